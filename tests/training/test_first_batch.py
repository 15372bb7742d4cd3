"""What the first batch of a run shows: the predicted cost, to a program with and without logging set up."""

import logging

import pytest

from hf_rdrop import RDropTrainingArguments
from hf_rdrop.training.first_batch import show
from support.training import make_model, train


def arguments(folder, **args):
    return RDropTrainingArguments(str(folder), use_cpu=True, report_to=[], **args)


def test_the_cost_is_shown_on_stderr_where_logging_is_not_set_up(capsys):
    train(make_model("single"), max_steps=3)
    shown = capsys.readouterr()
    assert shown.err.count("R-Drop: about ") == 1 and "x the time" in shown.err and "x the time" not in shown.out


@pytest.mark.parametrize(
    ("args", "expected"), [({}, "told\n"), ({"log_level": "warning"}, "told\n"), ({"log_level": "error"}, "")]
)
def test_log_level_error_silences_it(args, expected, tmp_path, capsys):
    show("told", arguments(tmp_path, **args))
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("level", ["passive", "error"])
def test_it_is_logged_where_info_is_on(level, tmp_path, capsys, caplog):
    with caplog.at_level(logging.INFO, "hf_rdrop"):
        show("told", arguments(tmp_path, log_level=level))
    (record,) = caplog.records
    assert (record.getMessage(), record.levelno) == ("told", logging.INFO)
    assert record.name == "hf_rdrop.training.first_batch" and capsys.readouterr().err == ""


def test_plain_training_shows_nothing(capsys):
    train(make_model("single"), rdrop_alpha=0.0)
    assert "x the time" not in capsys.readouterr().err
