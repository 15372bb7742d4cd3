"""The argument classes: defaults, parsing, help, errors before anything is created, and arguments that are gone."""

import copy
import dataclasses
import json

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from finetuning.run import parse_arguments
from hf_rdrop import RDropSeq2SeqTrainingArguments, RDropTrainingArguments
from hf_rdrop.training_args import REMOVED

BOTH = [(RDropTrainingArguments, TrainingArguments), (RDropSeq2SeqTrainingArguments, Seq2SeqTrainingArguments)]
SOURCES = ("layer_drop", "insert_dropout")


@pytest.mark.parametrize(("ours", "theirs"), BOTH)
def test_they_are_training_arguments_with_the_papers_defaults(ours, theirs, tmp_path):
    args = ours(str(tmp_path / "out"), num_train_epochs=2)  # positional use as before
    assert isinstance(args, theirs) and args.num_train_epochs == 2
    assert (args.rdrop_alpha, args.rdrop_passes, args.rdrop_dropout) == (1.0, 2, None)
    assert (args.rdrop_fused_head, args.rdrop_shared_layers, args.rdrop_interval) == ("auto", 0, 1)
    assert args.to_dict()["rdrop_alpha"] == 1.0


@pytest.mark.parametrize(("ours", "theirs"), BOTH)
def test_command_line_and_help(ours, theirs, capsys, tmp_path):
    parser = HfArgumentParser(ours)
    line = ["--output_dir", str(tmp_path), "--rdrop_alpha", "5", "--rdrop_passes", "3", "--rdrop_dropout", "0.2"]
    line += ["--rdrop_fused_head", "on", "--rdrop_shared_layers", "0.75", "--rdrop_interval", "2"]
    (args,) = parser.parse_args_into_dataclasses(line)
    assert (args.rdrop_alpha, args.rdrop_passes, args.rdrop_dropout) == (5.0, 3, 0.2)
    assert (args.rdrop_fused_head, args.rdrop_shared_layers, args.rdrop_interval) == ("on", 0.75, 2)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "loss = CE + alpha/2 * KL" in " ".join(text.split())
    for field in dataclasses.fields(ours):
        if field.name.startswith("rdrop_"):
            assert f"--{field.name}" in text and "%" not in field.metadata["help"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rdrop_fused_head": "yes"}, "rdrop_fused_head must be 'auto', 'on' or 'off', got 'yes'"),
        ({"rdrop_shared_layers": -1}, "rdrop_shared_layers must be a number of layers"),
        ({"rdrop_shared_layers": 1.5}, "got 1.5"),
        ({"rdrop_shared_layers": float("nan")}, "got nan"),
        ({"rdrop_interval": 0}, "rdrop_interval must be an integer >= 1, got 0"),
        ({"rdrop_interval": 1.5}, "got 1.5"),
        ({"rdrop_alpha": -0.1}, "rdrop_alpha must be a finite number >= 0, got -0.1"),
        ({"rdrop_alpha": float("nan")}, "rdrop_alpha"),
        ({"rdrop_alpha": float("inf")}, "rdrop_alpha"),
        ({"rdrop_alpha": True}, "rdrop_alpha"),
        ({"rdrop_alpha": None}, "rdrop_alpha"),
        ({"rdrop_passes": 1}, "rdrop_passes must be an integer >= 2"),
        ({"rdrop_passes": 2.0}, "rdrop_passes"),
        ({"rdrop_dropout": 1.0}, r"rdrop_dropout must be in \[0, 1\)"),
        ({"rdrop_dropout": float("nan")}, "rdrop_dropout"),
        ({"rdrop_dropout": -0.5}, "rdrop_dropout"),
    ],
)
@pytest.mark.parametrize("ours", [RDropTrainingArguments, RDropSeq2SeqTrainingArguments])
def test_bad_values_are_refused_and_nothing_is_created(ours, kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ours(str(tmp_path / "out"), **kwargs)
    assert not (tmp_path / "out").exists()


# ---- Arguments beyond the paper ----


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
def test_bad_values_of_the_variants_are_refused_and_nothing_is_created(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RDropTrainingArguments(str(tmp_path / "out"), **kwargs)
    assert not (tmp_path / "out").exists()


def test_command_line_of_the_variants(tmp_path):
    line = ["--output_dir", str(tmp_path), "--rdrop_agreement", "symmetric_kl + 0.1 * hidden_states"]
    line += ["--rdrop_alpha_schedule", "sigmoid", "--rdrop_alpha_warmup", "0.3", "--rdrop_unlabeled"]
    line += [word for i, name in enumerate(SOURCES) for word in (f"--rdrop_{name}", f"0.{i + 1}")]
    (args,) = HfArgumentParser(RDropTrainingArguments).parse_args_into_dataclasses(line)
    assert args.rdrop_agreement == "symmetric_kl + 0.1 * hidden_states" and args.rdrop_unlabeled
    assert (args.rdrop_alpha_schedule, args.rdrop_alpha_warmup) == ("sigmoid", 0.3)
    assert [getattr(args, f"rdrop_{name}") for name in SOURCES] == [0.1, 0.2]
    (plain,) = HfArgumentParser(RDropTrainingArguments).parse_args_into_dataclasses(line[:2])
    assert [getattr(plain, f"rdrop_{name}") for name in SOURCES] == [0, 0]


# ---- Arguments that are gone ----

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
