"""What a card says of the training: curves by epoch, the scores of the weights as they are, the picture."""

import sys

from hf_rdrop.cards.card import PLOT
from hf_rdrop.cards.facts import describe_head
from hf_rdrop.cards.history import MAX_ROWS, curves_part, last_evaluation
from support.cards import card, run
from support.training import make_model


def line(step, epoch, ce, kl, alpha=2.0, **more):
    parts = {"loss": ce + alpha / 2 * kl, "ce_loss": ce, "kl_loss": kl, "kl_share": alpha / 2 * kl / ce}
    return {"step": step, "epoch": epoch, **parts, **more}


def test_curves_by_epoch():
    head = describe_head(make_model("single"))
    history = [
        line(10, 0.5, 4.0, 0.4),
        line(40, 1.0, 2.0, 0.8),  # 30 steps: three times the weight
        {"step": 40, "epoch": 1.0, "eval_loss": 1.5, "eval_runtime": 3.0},
        line(60, 1.5, 1.0, 0.5),
    ]
    lines = curves_part(history, head, 2.0)["table"].splitlines()
    assert lines[0] == "| epoch | step | loss | CE | KL | alpha/2 x KL over CE | evaluation loss |"
    assert lines[2] == "| 1 | 40 | 3.2 | 2.5 | 0.7 | 28.0% | 1.5 |"
    assert lines[3] == "| 1.5 | 60 | 1.5 | 1 | 0.5 | 50.0% | – |"
    long = [line(i, i, 1.0, 0.1) for i in range(1, 101)]
    part = curves_part(long, head, 2.0)
    shown = [row.split(" | ")[0] for row in part["table"].splitlines()[2:]]
    assert part["thinned"] and len(shown) == MAX_ROWS and shown[0] == "| 1" and shown[-1] == "| 100"
    assert curves_part([], head, 2.0) is None
    plain = curves_part([line(10, 1.0, 2.0, 0.0)], head, 0.0)["table"]
    assert "KL" not in plain and "| 1 | 10 | 2 |" in plain


def test_the_scores_of_the_weights_as_they_are(tmp_path):
    trainer = run(tmp_path)
    state = trainer.state
    within = [{"step": s, "epoch": s, "eval_accuracy": s / 10, "eval_loss": 1.0} for s in (1, 2, 3)]
    state.log_history = [*within, {"train_runtime": 1.0, "step": 4}]
    assert last_evaluation(trainer.state, trainer.args) == {
        "metrics": {"accuracy": 0.3, "loss": 1.0},
        "step": 3,
        "best": False,
    }
    assert "at step 3 of 4" in card(trainer)
    trainer.args.load_best_model_at_end, state.best_global_step = True, 2
    assert last_evaluation(trainer.state, trainer.args)["metrics"]["accuracy"] == 0.2
    assert "the best checkpoint" in card(trainer)
    # several evaluation sets give several lines; what was measured after training counts most
    state.log_history += [{"step": 4, "eval_a_accuracy": 0.7}, {"step": 4, "eval_b_accuracy": 0.8}]
    assert last_evaluation(trainer.state, trainer.args)["metrics"] == {"a_accuracy": 0.7, "b_accuracy": 0.8}


def test_without_matplotlib(tmp_path, monkeypatch, pictures):
    trainer = run(tmp_path)
    assert f"({PLOT})" in card(trainer)
    (tmp_path / "model" / PLOT).unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = card(trainer)
    assert PLOT not in text and "| epoch | step |" in text and not (tmp_path / "model" / PLOT).exists()
