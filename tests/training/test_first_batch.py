"""What the first batch of a run shows: the predicted cost, to a program with and without logging set up."""

import logging

import pytest
import torch

from hf_rdrop import RDropTrainer, RDropTrainingArguments
from hf_rdrop.objective.batch_layout import BatchLayout
from hf_rdrop.training.first_batch import labels_explained, show
from support.training import make_model, make_rows, train


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


# ---- labels that are no class of the head, at any step ----


@pytest.mark.parametrize("alpha", [0.0, 2.0])
@pytest.mark.parametrize(("head", "bad", "kind"), [("single", 3, "3 classes"), ("token", 9, "5 classes")])
@pytest.mark.parametrize("row", [0, 20])  # of the first batch, and of the second
def test_labels_out_of_range_are_named_at_any_step(head, bad, kind, row, alpha):
    rows = make_rows(head, 32)
    rows[row]["labels"] = bad if head == "single" else [bad] * len(rows[row]["labels"])
    args = {"rows": rows, "rdrop_alpha": alpha, "train_sampling_strategy": "sequential"}
    with pytest.raises(ValueError, match=rf"^The labels of .* to {bad}, but .* has {kind}"):
        train(make_model(head), head, **args)


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_labels_out_of_range_are_named_in_evaluation(alpha):
    trainer = train(make_model("single"), rdrop_alpha=alpha)
    rows = make_rows("single", 4)
    rows[2]["labels"] = -2
    with pytest.raises(ValueError, match=r"^The labels of a batch are from -2 to "):
        trainer.evaluate(rows)


def test_an_error_of_another_kind_is_left_as_it_is():
    class Fails(RDropTrainer):
        def prediction_step(self, *args, **kwargs):
            with labels_explained(self.model, BatchLayout(), {"labels": torch.tensor([0, 2])}):
                raise RuntimeError("out of memory")

    trainer = train(make_model("single"), trainer_class=Fails)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        trainer.evaluate()
