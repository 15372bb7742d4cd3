"""However the rows of an optimizer step are divided up, the loss and the gradients are the same; alpha 0 is the
plain Trainer where that one is right."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_rdrop.training.item_counts import ItemCounts
from support.training import HEADS, make_model, make_rows, step_logs, train

SMOOTHED = [
    (head, smoothing)
    for head in HEADS
    for smoothing in (0.0, 0.1)
    if smoothing == 0 or head in ("single", "token", "seq2seq")
]
TINY = 1e-9  # a dropout rate that makes a model stochastic on paper and never drops anything


def losses_and_norms(trainer):
    return [(entry["loss"], entry["grad_norm"]) for entry in step_logs(trainer)]


def assert_same_runs(first, second, rel=2e-5):
    assert [x for pair in losses_and_norms(first) for x in pair] == pytest.approx(
        [x for pair in losses_and_norms(second) for x in pair], rel=rel
    )
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("alpha", [0.0, 3.0])
@pytest.mark.parametrize(("head", "smoothing"), SMOOTHED)
def test_accumulation_changes_nothing(head, smoothing, alpha):
    """16 x 1, 4 x 4 and the ragged 6 + 6 + 4: heads that return their own mean would be off by the number of steps."""
    runs = [
        train(
            make_model(head, TINY),
            head,
            rows=make_rows(head, 16),
            num_train_epochs=2,
            max_steps=-1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            label_smoothing_factor=smoothing,
            rdrop_alpha=alpha,
            optim="sgd",
            learning_rate=1e-2,
        )
        for size, steps in ((16, 1), (4, 4), (6, 3))
    ]
    assert len(step_logs(runs[0])) == 2 and losses_and_norms(runs[0])[0][1] > 0.1
    assert_same_runs(runs[0], runs[1])
    assert_same_runs(runs[0], runs[2])


@pytest.mark.parametrize("head", HEADS)
def test_with_dropout_off_r_drop_is_plain_training(head):
    """Two identical passes: KL 0 and the CE of one pass, whatever alpha is."""
    plain = train(make_model(head, TINY), head, rdrop_alpha=0.0)
    rdrop = train(make_model(head, TINY), head, rdrop_alpha=4.0)
    assert_same_runs(plain, rdrop)
    assert all(abs(entry["kl_loss"]) < 1e-6 for entry in step_logs(rdrop))


@pytest.mark.parametrize(("head", "smoothing"), SMOOTHED)
def test_alpha_zero_is_the_plain_trainer_bit_for_bit(head, smoothing):
    """One process, no accumulation: same losses, same weights, same random numbers, with dropout on."""
    states = []
    for trainer_class, args in (
        (Trainer, {"args_class": TrainingArguments}),
        (None, {"rdrop_alpha": 0.0}),
    ):
        trainer = train(
            make_model(head, 0.3), head, trainer_class, max_steps=4, label_smoothing_factor=smoothing, **args
        )
        states.append((losses_and_norms(trainer), trainer.model.state_dict(), torch.get_rng_state()))
    (plain_logs, plain_weights, plain_rng), (our_logs, our_weights, our_rng) = states
    assert plain_logs == our_logs
    assert torch.equal(plain_rng, our_rng)
    assert all(torch.equal(value, our_weights[name]) for name, value in plain_weights.items())


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_next_token_heads_count_shifted_labels(alpha):
    """A causal language model scores one token less per row; rows of unequal length show a wrong count."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_dropout=TINY,
        pad_token_id=0,
    )
    rows = [{**row, "labels": [i if i else -100 for i in row["input_ids"]]} for row in make_rows("token", 16)]
    runs = []
    for size, steps in ((16, 1), (4, 4)):
        torch.manual_seed(0)
        runs.append(
            train(
                LlamaForCausalLM(config),
                "token",
                rows=rows,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                rdrop_alpha=alpha,
                optim="sgd",
                learning_rate=1e-2,
            )
        )
    assert_same_runs(*runs)


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
