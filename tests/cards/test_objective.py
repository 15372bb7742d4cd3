"""What a card says of the objective: agreements, schedules, sub-models, shared layers."""

import pytest

from support.cards import card, run, section


def test_economies_and_an_inert_term_are_told(tmp_path):
    trainer = run(
        tmp_path, rdrop_shared_layers=1, rdrop_interval=2, rdrop_passes=3, rdrop_alpha=1e-6, label_smoothing_factor=0.2
    )
    text = section(card(trainer), "R-Drop")
    assert "first 1 of 2 layers" in " ".join(text.split()) and "one of every 2 optimizer steps" in text
    assert "mean_j CE_j + 5e-07 * mean_(i<j) sKL(P_i, P_j)" in text and "label smoothing 0.2" in text
    assert "hardly changed the training" in text


VARIANTS = {
    "agreement": (
        {"rdrop_agreement": "jensen_shannon + 0.1 * hidden_states"},
        [
            *("(CE_1 + CE_2) / 2 + 1 * A(P_1, P_2)", "A = jensen_shannon + 0.1 * hidden_states", "1/2 KL(P||M)"),
            *("averaged over layers,", "CE and what compares predictions are means", "within each micro-batch"),
        ],
    ),
    "factor": ({"rdrop_agreement": "2 * symmetric_kl"}, ["1 * A(P_1, P_2)", "A = 2 * symmetric_kl"]),
    "schedule": (
        {"rdrop_alpha_schedule": "linear", "rdrop_alpha_warmup": 0.5},
        ["`rdrop_alpha` 2 in the end", "rose to this value linearly over the first 50% of the optimizer steps"],
    ),
    "ramp": (
        {"rdrop_alpha_schedule": "sigmoid", "rdrop_alpha_warmup": 1.0},
        ["rose to this value as exp(-5 (1 - t)^2) for t from 0 to 1 over the whole training", "alpha / 2 * sKL was"],
    ),
    "steps": (
        {"rdrop_alpha_schedule": "linear", "rdrop_alpha_warmup": 3},
        ["linearly over the first 3 steps"],
    ),
    "sources": (
        {"rdrop_layer_drop": 0.1},
        ["each row skipped each hidden layer with probability 0.1", "(CE_1 + CE_2) / 2 + 1 * sKL"],
    ),
    "inserted": (
        {"head": "causal", "rdrop_insert_dropout": 0.2},
        ["dropout of rate 0.2 was put on the outputs of the attention and feed-forward blocks (the saved model has"],
    ),
    "unlabeled": (
        {"rdrop_unlabeled": True},
        ["CE is a mean over the labelled rows", "one over those of all its rows"],
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_told(variant, tmp_path):
    args, told = VARIANTS[variant]
    text = card(run(tmp_path, rdrop_alpha=2.0, **args))
    part = " ".join(section(text, "R-Drop").split())
    for words in told:
        assert words in part
    assert ("sKL" in part) == ("A =" not in part)
    assert ("rose to" in part) == ("rdrop_alpha_schedule" in args)
    assert ("Sources of sub-models" in part) == (variant in ("sources", "inserted"))
    assert ("labelled" in part) == (variant == "unlabeled")
    column = "disagreement" if "A =" in part else "KL"
    assert f"| CE | {column} | alpha/2 x {column} over CE |" in text
    opening = text.partition("## ")[0]
    assert ("dropout masks" in opening) == (variant not in ("sources", "inserted"))
    assert "2 passes" in opening


def test_the_default_is_told_without_variants(trained):
    part = section(card(trained), "R-Drop")
    variants = ("A =", "rose to", "Sources", "labelled", "in the end", "logits_for_agreement")
    for words in (*variants, "no gradient"):
        assert words not in part


@pytest.mark.parametrize("head", ["multi", "regression"])
def test_another_agreement_of_other_heads(head, tmp_path):
    text = card(run(tmp_path, head, rdrop_agreement="squared_logits"))
    part = " ".join(section(text, "R-Drop").split())
    if head == "multi":
        assert "(BCE_1 + BCE_2) / 2 + 0.5 * A(P_1, P_2)" in part and "each by itself (Bernoulli)" in part
        assert "the squared difference of the scores before" in part
    else:
        assert "`squared_logits`: the squared difference of the predictions." in part and "probabilit" not in part
        assert "| MSE | disagreement |" in text


def test_the_share_follows_the_schedule(tmp_path):
    """By the alpha of each log line, not by the last one."""
    trainer = run(tmp_path, rdrop_alpha=2.0, rdrop_alpha_schedule="linear", rdrop_alpha_warmup=1.0, logging_steps=4)
    (logged,) = [entry for entry in trainer.state.log_history if "kl_share" in entry]
    assert logged["rdrop_alpha"] < 1.9
    assert f"| {logged['kl_share']:.1%} |" in section(card(trainer), "Training by epoch")


def test_a_function_for_the_agreement_is_told(tmp_path):
    def logits(outputs, inputs):
        return outputs.logits

    trainer = run(tmp_path, trainer_kwargs={"logits_for_agreement": logits}, rdrop_alpha=2.0)
    text = card(trainer)
    part = " ".join(section(text, "R-Drop").split())
    assert "(CE_1 + CE_2) / 2 + 1 * A(P_1, P_2)" in part and "`logits_for_agreement`" in part
    assert "| CE | disagreement |" in text
