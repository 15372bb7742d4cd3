"""The argument classes: defaults, parsing, help, errors before anything is created."""

import dataclasses

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_rdrop import RDropSeq2SeqTrainingArguments, RDropTrainingArguments

BOTH = [(RDropTrainingArguments, TrainingArguments), (RDropSeq2SeqTrainingArguments, Seq2SeqTrainingArguments)]


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
