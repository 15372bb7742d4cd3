"""Settings read off training arguments, and what they ask of each optimizer step."""

import dataclasses
import math

import pytest
from transformers import TrainingArguments

from hf_rdrop import RDropArguments, RDropTrainingArguments
from hf_rdrop.training.settings import Settings, StepPlan


def test_plain_arguments_have_the_defaults(tmp_path):
    plain = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    ours = RDropTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    settings = Settings.of(plain)
    assert settings == Settings.of(ours) == Settings.of(RDropArguments()) == Settings.of(object())
    assert not hasattr(plain, "rdrop_alpha")
    for name, value in dataclasses.asdict(settings).items():
        assert value == getattr(ours, f"rdrop_{name}")


def test_settings_are_the_arguments_at_that_time():
    args = RDropArguments(rdrop_alpha=3.0, rdrop_passes=4, rdrop_layer_drop=0.1)
    settings = Settings.of(args)
    args.rdrop_alpha = 5.0
    assert (settings.alpha, settings.passes, Settings.of(args).alpha) == (3.0, 4, 5.0)
    assert settings.layer_drop == 0.1 and not Settings.of(object()).layer_drop
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.alpha = 1.0


@pytest.mark.parametrize("interval", [1, 3])
def test_every_nth_step_compares_and_the_others_have_one_pass(interval):
    settings = Settings.of(RDropArguments(rdrop_alpha=2.0, rdrop_passes=3, rdrop_interval=interval))
    for step in range(7):
        compares = step % interval == 0
        assert settings.plan(step, 10) == StepPlan(2.0, compares, 3 if compares else 1)


def test_alpha_zero_compares_at_no_step():
    settings = Settings.of(RDropArguments(rdrop_alpha=0.0))
    assert {settings.plan(step, 10) for step in range(3)} == {StepPlan(0.0, False, 1)}


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.1, [4, 4, 4, 4]),
        ("linear", 0.4, [1, 2, 4, 4]),  # of 10 steps: over the first 4, after steps 0, 1, 5 and 9
        ("linear", 1.0, [0.4, 0.8, 2.4, 4]),
        ("linear", 2, [2, 4, 4, 4]),  # a number of steps
        ("sigmoid", 0.4, [4 * math.exp(-5 * 0.75**2), 4 * math.exp(-5 * 0.25), 4, 4]),
        ("linear", 0.01, [4, 4, 4, 4]),  # less than a step
    ],
)
def test_schedules_of_alpha(schedule, warmup, expected):
    settings = Settings.of(RDropArguments(rdrop_alpha=4.0, rdrop_alpha_schedule=schedule, rdrop_alpha_warmup=warmup))
    assert [settings.plan(step, 10).alpha for step in (0, 1, 5, 9)] == pytest.approx(expected)
    assert settings.plan(0, 0).alpha == 4.0 and Settings.of(object()).plan(0, 10).alpha == 1.0
