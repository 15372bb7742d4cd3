"""Arguments beyond the paper: their ranges, what cannot be combined, and how alpha rises."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from transformers import HfArgumentParser

from finetuning.run import parse_arguments
from hf_rdrop import RDropArguments, RDropSeq2SeqTrainingArguments, RDropTrainingArguments
from hf_rdrop.training.settings import Settings
from hf_rdrop.training_args import REMOVED

SOURCES = ("layer_drop", "insert_dropout")


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
        ({"rdrop_layer_drop": True}, "rdrop_layer_drop"),
        ({"rdrop_insert_dropout": float("nan")}, "rdrop_insert_dropout"),
        ({"rdrop_layer_drop": None}, "rdrop_layer_drop"),
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
    assert [getattr(args, f"rdrop_{name}") for name in SOURCES] == [0.1, 0.2]
    (plain,) = HfArgumentParser(RDropTrainingArguments).parse_args_into_dataclasses(line[:2])
    assert [getattr(plain, f"rdrop_{name}") for name in SOURCES] == [0, 0]


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


GIVEN = {
    "rdrop_deterministic_target": True,
    "rdrop_second_dropout": 0.3,
    "rdrop_drop_connect": 0.1,
    "rdrop_embedding_noise": 1e-5,
}


@pytest.mark.parametrize("ours", [RDropTrainingArguments, RDropSeq2SeqTrainingArguments])
@pytest.mark.parametrize("name", REMOVED)
def test_an_argument_that_is_gone_says_why(name, ours, tmp_path):
    message = rf"^{name} was removed: .*\. (Use|Set|Leave) .*\.$"
    for value in (GIVEN[name], None):  # whatever it is
        with pytest.raises(ValueError, match=message):
            ours(str(tmp_path / "out"), **{name: value})
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ours(str(tmp_path / "out")), **{name: GIVEN[name]})
    assert not hasattr(ours, name) and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=f"not used by the HfArgumentParser: .*--{name}"):  # Transformers' own words
        HfArgumentParser(ours).parse_args_into_dataclasses(["--output_dir", str(tmp_path), f"--{name}", "0.1"])


@pytest.mark.parametrize("name", REMOVED)
def test_the_scripts_say_why_an_argument_is_gone(name, tmp_path):
    line = ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", "x"]
    value = [] if GIVEN[name] is True else [str(GIVEN[name])]
    (tmp_path / "args.json").write_text(json.dumps({"output_dir": "out", name: GIVEN[name]}))
    for argv in ([*line, f"--{name}", *value], [*line, f"--{name}={GIVEN[name]}"], [str(tmp_path / "args.json")]):
        with pytest.raises(ValueError, match=f"^{name} was removed: "):
            parse_arguments([RDropTrainingArguments], argv, None)


def test_arguments_saved_with_those_that_are_gone_load(tmp_path):
    """As `training_args.bin` of an older version has them."""
    args = RDropTrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[], rdrop_alpha=3.0)
    plain = args.to_dict()
    for name, value in GIVEN.items():
        setattr(args, name, value)
    torch.save(args, tmp_path / "training_args.bin")
    for loaded in (torch.load(tmp_path / "training_args.bin", weights_only=False), copy.deepcopy(args)):
        assert loaded.to_dict() == plain and loaded.rdrop_alpha == 3.0
        assert [getattr(loaded, name) for name in GIVEN] == list(GIVEN.values())
