"""Loss and gradients are the same however the rows of a step are divided; with alpha 0 they are the Trainer's own."""

import pytest
import torch
from transformers import Trainer

from hf_rdrop.training.item_counts import ItemCounts
from support.settings import DRAWING, HEADS, OPTIONS, TINY, fits, run
from support.training import HEADS as BASIC
from support.training import make_model, make_rows, step_logs, train

# The heads whose loss by the plain Trainer is right without accumulation: for a causal language model it is a sum over
# tokens divided by another count.
RIGHT = [head for head in HEADS if head not in ("causal", "gpt2", "images")]
SMOOTHED = ("single", "token", "seq2seq")
QUICK = [
    *((head, option) for head in BASIC for option in ("plain", "default")),
    *((head, option) for head in SMOOTHED for option in ("plain + label smoothing", "label smoothing")),
    *((head, "default") for head in HEADS if head not in BASIC),
    *((head, option) for head in SMOOTHED for option in ("own logits", "two divergences", "schedule")),
    *(("causal", option) for option in ("plain", "fused head")),
    *(("token", option) for option in ("three passes", "shared layer", "interval", "unlabeled")),
    ("seq2seq", "fused head + shared layer"),
]
TRIED = [option for option in OPTIONS if option not in DRAWING]
TRIED += ["plain + label smoothing", "fused head + shared layer", "fused head + interval"]


def losses_and_norms(trainer):
    return [(entry["loss"], entry["grad_norm"]) for entry in step_logs(trainer)]


def assert_same_runs(first, second, rel=2e-5):
    logs = list(zip(step_logs(first), step_logs(second), strict=True))
    assert [x for pair in losses_and_norms(first) for x in pair] == pytest.approx(
        [x for pair in losses_and_norms(second) for x in pair], rel=rel
    )
    assert all("kl_loss" not in a or a["kl_loss"] == pytest.approx(b["kl_loss"], rel=rel, abs=1e-6) for a, b in logs)
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def assert_divided_alike(head, option):
    """16 x 1, 4 x 4 and the ragged 6 + 6 + 4: heads that return their own mean would be off by the number of steps."""
    args = {"max_steps": -1, "num_train_epochs": 4 if "interval" in option else 2}
    whole, *divided = [run(head, option, size, steps, **args) for size, steps in ((16, 1), (4, 4), (6, 3))]
    logs = step_logs(whole)
    assert len(logs) == args["num_train_epochs"] and logs[0]["grad_norm"] > 0.1
    if "plain" not in option and "interval" not in option:
        assert all(line["kl_loss"] > 1e-4 for line in logs)
    for other in divided:
        assert_same_runs(whole, other)


@pytest.mark.parametrize(("head", "option"), QUICK)
def test_accumulation_changes_nothing(head, option):
    assert fits(head, option)
    assert_divided_alike(head, option)


@pytest.mark.slow
@pytest.mark.parametrize("option", TRIED)
def test_accumulation_changes_nothing_for_any_head(option):
    """The rest of the table."""
    heads = [head for head in HEADS if fits(head, option) and (head, option) not in QUICK]
    for head in heads:
        print(head)
        assert_divided_alike(head, option)


@pytest.mark.parametrize("head", BASIC)
def test_with_dropout_off_r_drop_is_plain_training(head):
    """Two identical passes: KL 0 and the CE of one pass, whatever alpha is."""
    plain = train(make_model(head, TINY), head, rdrop_alpha=0.0)
    rdrop = train(make_model(head, TINY), head, rdrop_alpha=4.0)
    assert_same_runs(plain, rdrop)
    assert all(abs(entry["kl_loss"]) < 1e-6 for entry in step_logs(rdrop))


@pytest.mark.parametrize(
    ("head", "option"),
    [*((head, "plain") for head in RIGHT), *((head, "plain + label smoothing") for head in SMOOTHED)],
)
def test_alpha_zero_is_the_plain_trainer_bit_for_bit(head, option):
    """One process, no accumulation: same losses, same weights, same random numbers, with dropout on."""
    args = {"dropout": 0.3, "rows": HEADS[head].rows(32), "max_steps": 4}
    ours = run(head, option, **args)
    our_rng = torch.get_rng_state()
    plain = run(head, option, **args, trainer_class=Trainer)
    assert torch.equal(our_rng, torch.get_rng_state())
    assert losses_and_norms(plain) == losses_and_norms(ours)
    assert all(line["kl_loss"] == 0 for line in step_logs(ours))
    weights = ours.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.model.state_dict().items())


def test_order_of_rows_within_a_batch_and_padding_do_not_matter():
    rows = make_rows("token", 16)
    longer = [
        {name: value + [-100 if name == "labels" else 0] * 5 for name, value in row.items()} for row in reversed(rows)
    ]
    args = {"max_steps": 1, "optim": "sgd", "learning_rate": 1e-2, "rdrop_alpha": 2.0}
    assert_same_runs(
        train(make_model("token", TINY), "token", rows=rows, **args),
        train(make_model("token", TINY), "token", rows=longer, **args),
    )


def test_these_tests_can_fail(monkeypatch):
    """Weigh every batch as the whole step: a head that ignores `num_items_in_batch` does so to Trainer."""
    monkeypatch.setattr(ItemCounts, "shares", lambda *args, **kwargs: (1.0, 1.0))
    runs = [
        train(
            make_model("token", TINY),
            "token",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        for size, steps in ((16, 1), (4, 4))
    ]
    assert losses_and_norms(runs[1])[0][0] / losses_and_norms(runs[0])[0][0] == pytest.approx(4, rel=0.2)
    with pytest.raises(AssertionError):
        assert_same_runs(*runs)
