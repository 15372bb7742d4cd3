"""Arguments beyond the paper: their ranges, what cannot be combined, and how alpha rises."""

import math

import pytest
from transformers import HfArgumentParser

from hf_rdrop import RDropArguments, RDropTrainingArguments
from hf_rdrop.variant_args import SOURCES, alpha_at


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rdrop_agreement": "kl"}, "symmetric_kl"),
        ({"rdrop_agreement": "symmetric_kl + -1 * hidden_states"}, "rdrop_agreement|factor"),
        ({"rdrop_alpha_schedule": "cosine"}, "rdrop_alpha_schedule must be one of constant, linear, sigmoid"),
        ({"rdrop_alpha_warmup": 0}, "rdrop_alpha_warmup must be a share"),
        ({"rdrop_alpha_warmup": float("inf")}, "rdrop_alpha_warmup"),
        ({"rdrop_layer_drop": 1}, r"rdrop_layer_drop must be in \[0, 1\)"),
        ({"rdrop_insert_dropout": -0.1}, "rdrop_insert_dropout"),
        ({"rdrop_drop_connect": True}, "rdrop_drop_connect"),
        ({"rdrop_second_dropout": float("nan")}, "rdrop_second_dropout"),
        ({"rdrop_embedding_noise": -1}, "rdrop_embedding_noise"),
        ({"rdrop_embedding_noise": float("nan")}, "rdrop_embedding_noise"),
        ({"rdrop_deterministic_target": True, "rdrop_passes": 3}, "rdrop_passes=3 has no meaning"),
        ({"rdrop_deterministic_target": True, "rdrop_shared_layers": 1}, "rdrop_shared_layers=1 has no meaning"),
        ({"rdrop_deterministic_target": True, "rdrop_second_dropout": 0}, "rdrop_second_dropout=0 has no meaning"),
    ],
)
def test_bad_values_are_refused_and_nothing_is_created(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RDropTrainingArguments(str(tmp_path / "out"), **kwargs)
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path):
    line = ["--output_dir", str(tmp_path), "--rdrop_agreement", "symmetric_kl + 0.1 * hidden_states"]
    line += ["--rdrop_alpha_schedule", "sigmoid", "--rdrop_alpha_warmup", "0.3", "--rdrop_unlabeled"]
    line += [word for i, name in enumerate(SOURCES) for word in (f"--rdrop_{name}", f"0.{i + 1}")]
    (args,) = HfArgumentParser(RDropTrainingArguments).parse_args_into_dataclasses(line)
    assert args.rdrop_agreement == "symmetric_kl + 0.1 * hidden_states" and args.rdrop_unlabeled
    assert (args.rdrop_alpha_schedule, args.rdrop_alpha_warmup) == ("sigmoid", 0.3)
    assert [getattr(args, f"rdrop_{name}") for name in SOURCES] == [0.1, 0.2, 0.3, 0.4, 0.5]
    (plain,) = HfArgumentParser(RDropTrainingArguments).parse_args_into_dataclasses(line[:2])
    assert [getattr(plain, f"rdrop_{name}") for name in SOURCES] == [0, 0, 0, 0, None]


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
    args = RDropArguments(rdrop_alpha_schedule=schedule, rdrop_alpha_warmup=warmup)
    assert [alpha_at(args, 4.0, step, 10) for step in (0, 1, 5, 9)] == pytest.approx(expected)
    assert alpha_at(args, 4.0, 0, 0) == 4.0 and alpha_at(object(), 4.0, 0, 10) == 4.0
