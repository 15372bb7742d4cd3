"""Settings read off training arguments, and what they ask of each optimizer step."""

import math

import pytest

from hf_rdrop import RDropArguments
from hf_rdrop.training.settings import Settings


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
