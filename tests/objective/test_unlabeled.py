"""Rows without labels: they are to agree and nothing else, however the rows of a step are divided up."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)

from hf_rdrop import RDropMixin, RDropTrainer, RDropTrainingArguments
from hf_rdrop.objective.heads import ANSWER, items_to_compare
from support import settings
from support.distributed_worker import run
from support.processes import assert_same
from support.reference import torch_reference
from support.settings import TINY, hide_labels, make_passes_differ
from support.short_runs import ALPHA, refuse
from support.training import InOrder, make_model, make_rows, step_logs, train

SEMI = {"rdrop_alpha": ALPHA, "rdrop_unlabeled": True}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
KINDS = {"multi": "multi_label_classification", "regression": "regression"}
TOKENS = ("token", "causal", "masked", "seq2seq", "seq2seq-ids")
HEADS = ("single", "multi", "regression", "answers", "image", *TOKENS)
INTEGERS = tuple(head for head in HEADS if head not in KINDS)
QUICK = ("regression", "seq2seq-ids")  # of the tests with whole runs; the others are slow
SMOOTHED = ("single", "token", "causal", "seq2seq-ids")
CASES = [*((head, 0.0) for head in HEADS), *((head, 0.1) for head in SMOOTHED)]


def quick(cases, *chosen):
    """All cases, of which those that are not chosen are slow."""
    chosen = chosen or QUICK
    return [
        pytest.param(*x, marks=[] if x[0] in chosen else pytest.mark.slow)
        for x in (case if isinstance(case, tuple) else (case,) for case in cases)
    ]


def make(head, dropout=0.3):
    if head not in ("answers", "image", "masked"):
        larger = {"initializer_range": 0.3} if head == "causal" else {}
        return settings.HEADS[head.removesuffix("-ids")].model(dropout, **larger)
    set_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "initializer_range": 0.3}
    if head == "image":
        return ViTForImageClassification(ViTConfig(**SIZES, **rates, image_size=4, patch_size=2, num_labels=3))
    bert = BertConfig(**SIZES, **rates, vocab_size=40, max_position_embeddings=32)
    return BertForQuestionAnswering(bert) if head == "answers" else BertForMaskedLM(bert)


def rows_of(head, count=16):
    """Labelled rows; those of `seq2seq-ids` bring a target text whether they have labels or not."""
    if head == "image":
        draw = torch.Generator().manual_seed(0)
        return [{"pixel_values": torch.randn(3, 4, 4, generator=draw), "labels": i % 3} for i in range(count)]
    if head == "answers":
        rows = make_rows("single", count)
        return [
            {**{k: v for k, v in row.items() if k != "labels"}, "start_positions": i % 3, "end_positions": 1 + i % 3}
            for i, row in enumerate(rows)
        ]
    if head == "masked":  # as from its collator: a part of the tokens
        rows = settings.causal_rows(count)
        return [
            {**row, "labels": [x if (t + i) % 3 == 0 else -100 for t, x in enumerate(row["labels"])]}
            for i, row in enumerate(rows)
        ]
    rows = settings.causal_rows(count) if head == "causal" else make_rows(head.removesuffix("-ids"), count)
    if head == "seq2seq-ids":
        rows = [{**r, "decoder_input_ids": [0, *(0 if x == -100 else x for x in r["labels"][:-1])]} for r in rows]
    return rows


def mixed_rows(head, pattern="LLLLUUUULUULULUL"):
    """Rows with (L) and without (U) labels: in fours, all labelled, none, and both."""
    return [row if kind == "L" else hide_labels(row) for row, kind in zip(rows_of(head), pattern, strict=True)]


def labels_of(batch):
    if "labels" in batch:
        return batch["labels"]
    return torch.stack([batch[name] for name in ANSWER], 1)


def compared(head, batch):
    """By loops: which items are to agree, `[B]` or `[B, T]`."""
    labels, found = labels_of(batch).tolist(), []
    for i, row in enumerate(labels):
        if head in TOKENS:
            shown = batch["attention_mask"][i].tolist()
            if head.startswith("seq2seq"):  # the first token, and those that the decoder is given
                ids = batch["decoder_input_ids"][i].tolist() if head == "seq2seq-ids" else [0] * len(row)
                shown = [t == 0 or ids[t] != 0 for t in range(len(row))]
            target = (lambda x, past: [*x[1:], past]) if head == "causal" else (lambda x, past: x)
            kept = [x != -100 for x in target(row, -100)]
            found.append(kept if any(x != -100 for x in row) else [bool(x) for x in target(shown, 0)])
        else:
            found.append([True] * len(row) if head == "answers" else True)
    return torch.tensor(found)


def naive(head, logits, batch, smoothing=0.0):
    """CE over the labelled items and KL over all that are to agree, by loops over `[m, N, C]`."""
    labels, kind = labels_of(batch), KINDS.get(head, "single_label_classification")
    if head == "causal":
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    if head in KINDS:
        logits = logits.squeeze(-1) if head == "regression" else logits
        known = (labels.reshape(len(labels), -1) != -100).all(1)
        ce = torch_reference(logits[:, known], labels[known], 0, kind)[1]
        return ce, torch_reference(logits, labels, 0, kind)[2]
    counted = compared(head, batch).flatten()
    logits, labels = logits.reshape(len(logits), counted.numel(), -1), labels.flatten()
    ce = torch_reference(logits, labels, 0, kind, smoothing)[1]
    return ce, torch_reference(logits, torch.where(counted, 0, -100), 0, kind)[2]


def make_trainer(head, folder, trainer_class=RDropTrainer, **args):
    args = RDropTrainingArguments(str(folder), use_cpu=True, report_to=[], **{**SEMI, **args})
    return trainer_class(model=make(head), args=args, data_collator=default_data_collator)


@pytest.mark.parametrize("passes", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("head", "smoothing"), CASES)
def test_loss_and_gradients_are_the_formulas_on_the_models_own_logits(head, smoothing, passes, tmp_path):
    trainer = make_trainer(head, tmp_path, rdrop_passes=passes, label_smoothing_factor=smoothing)
    model, batch = trainer.model.train(), default_data_collator(mixed_rows(head)[2:9])
    torch.manual_seed(1)
    trainer.compute_loss(model, batch).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    (logged,) = [trainer._log.means(1, lambda x: x)]
    model.zero_grad()

    torch.manual_seed(1)  # the same dropout masks
    outputs = model(**{name: torch.cat([value] * passes) for name, value in batch.items()})
    pair = [outputs[f"{name}_logits"] for name in ("start", "end")] if head == "answers" else []
    logits = torch.stack(pair, 1) if pair else outputs.logits
    ce, kl = naive(head, logits.double().unflatten(0, (passes, -1)), batch, smoothing)
    loss = ce + ALPHA / 2 * kl
    loss.backward()
    assert ce.item() > 0.1 and kl.item() > 1e-3
    assert logged == pytest.approx([loss.item(), ce.item(), kl.item()], rel=1e-5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")


def one_step(head, size, steps, rows, dropout=TINY, **args):
    model = make(head, dropout)
    has_dropout = args.pop("same_passes", False) or dropout != TINY
    return run(head, size, steps, model, rows, has_dropout=has_dropout, max_steps=1, **{**SEMI, **args})


@pytest.mark.parametrize(("head", "smoothing"), quick(CASES, "multi", "token"))
def test_accumulation_changes_nothing(head, smoothing):
    """Also in micro-batches without a labelled row (the second four) and without an unlabelled one (the first)."""
    rows = mixed_rows(head)
    whole = one_step(head, 16, 1, InOrder(rows), label_smoothing_factor=smoothing)
    assert whole["logs"][0][1] > 0.1 and whole["logs"][0][2] > 1e-3
    for order, size, steps in ((rows, 4, 4), (rows[::-1], 6, 3)):
        assert_same(one_step(head, size, steps, InOrder(order), label_smoothing_factor=smoothing), whole)
    with pytest.raises(AssertionError):
        assert_same(one_step(head, 16, 1, InOrder(rows_of(head)), label_smoothing_factor=smoothing), whole)


@pytest.mark.parametrize("head", quick(HEADS, "multi", "answers"))
def test_without_agreement_it_is_plain_training_on_the_labelled_rows(head):
    rows = mixed_rows(head)
    labelled = [row for row, full in zip(rows, rows_of(head), strict=True) if str(row) == str(full)]
    assert len(labelled) == 8
    plain = one_step(head, 8, 1, labelled, rdrop_alpha=0.0, rdrop_unlabeled=False)
    for alpha in (0.0, 1e-9):
        found = one_step(head, 4, 4, InOrder(rows), rdrop_alpha=alpha, same_passes=True)
        assert_same({**found, "logs": [[*x[:2], 0, x[3]] for x in found["logs"]]}, plain)


@pytest.mark.parametrize("head", quick(INTEGERS, "answers", "token"))
def test_without_the_argument_such_rows_add_nothing(head):
    rows = mixed_rows(head)
    labelled = [row for row, full in zip(rows, rows_of(head), strict=True) if str(row) == str(full)]
    args = {"rdrop_unlabeled": False}
    assert_same(one_step(head, 16, 1, InOrder(rows), **args), one_step(head, 8, 1, labelled, **args))


@pytest.mark.parametrize("head", quick(HEADS, "single", "regression"))
def test_unlabelled_rows_are_trained_through_the_agreement_alone(head):
    """A step's gradient is that of the labelled rows' CE, and that of all rows' agreement."""
    rows = mixed_rows(head)
    bare = [hide_labels(row) for row in rows]
    ce = one_step(head, 16, 1, InOrder(rows), rdrop_alpha=1e-9)
    none = one_step(head, 16, 1, InOrder(bare))
    assert none["logs"][0][1] == 0 and none["logs"][0][0] == pytest.approx(ALPHA / 2 * none["logs"][0][2], rel=1e-5)
    if head in TOKENS:  # their labelled rows agree on other items than they would without labels
        return
    both = one_step(head, 16, 1, InOrder(rows))
    sums = {name: gradient + none["gradients"][0][name] for name, gradient in ce["gradients"][0].items()}
    assert_same({"logs": both["logs"], "gradients": [sums]}, both)


@pytest.mark.parametrize("head", quick(HEADS))
def test_an_epoch_of_rows_without_labels(head):
    rows = [hide_labels(row) for row in rows_of(head)]
    model = make(head)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = train(
        model,
        head,
        RDropTrainer,
        rows=rows,
        max_steps=-1,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **SEMI,
    )
    lines = step_logs(trainer)
    assert len(lines) == 2
    for line in lines:
        assert line["ce_loss"] == 0 and line["kl_loss"] > 0
        assert line["loss"] == pytest.approx(ALPHA / 2 * line["kl_loss"], rel=1e-5)
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert len(moved) > len(before) / 2
    assert all(value.isfinite().all() for value in model.parameters())


VARIANTS = [
    {"rdrop_interval": 2},
    {"rdrop_agreement": "squared_logits"},
]


@pytest.mark.parametrize("args", VARIANTS)
@pytest.mark.parametrize("head", quick(HEADS, "token"))
def test_logged_parts_add_up(head, args):
    """With dropout, accumulation, and micro-batches of each kind."""
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4}
    rows = InOrder(mixed_rows(head) * 2)
    lines = step_logs(train(make(head), head, RDropTrainer, rows=rows, **sizes, **{**SEMI, **args}))
    assert len(lines) == 4
    for step, line in enumerate(lines):
        assert line["loss"] == pytest.approx(line["ce_loss"] + ALPHA / 2 * line["kl_loss"], rel=1e-5)
        assert line["ce_loss"] > 0
        assert (line["kl_loss"] > 0) == (step % args.get("rdrop_interval", 1) == 0)


@pytest.mark.parametrize("head", quick(TOKENS))
def test_padding_does_not_count(head):
    rows = mixed_rows(head)
    longer = [
        {name: [*value, *[-100 if name == "labels" else 0] * 5] for name, value in row.items()} for row in rows[::-1]
    ]
    assert_same(one_step(head, 16, 1, longer), one_step(head, 16, 1, rows))


def test_shared_layers_and_rows_without_labels_in_the_first_batch():
    """The trial of the trunk, and of the labels, meets a batch without a label."""
    rows = InOrder([hide_labels(row) for row in make_rows("token", 4)] + make_rows("token", 12))
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = train(make_model("token", 0.3), "token", rows=rows, rdrop_shared_layers=1, **sizes, **SEMI)
    assert all(line["ce_loss"] > 0 and line["kl_loss"] > 0 for line in step_logs(trainer))


# ---- Losses of others ----


def sum_over_count(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"]
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("head", quick(["single", "token"], "token"))
def test_own_loss_functions_see_micro_batches_without_a_label(head):
    rows, runs = InOrder(mixed_rows(head)), []
    for size, steps, loss in ((16, 1, None), (16, 1, sum_over_count), (4, 4, sum_over_count)):
        model = make(head, TINY)
        make_passes_differ(model)
        trainer = train(
            model,
            head,
            rows=rows,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=1e-2,
            trainer_kwargs={"compute_loss_func": loss},
            **SEMI,
        )
        runs.append(
            [line[name] for line in step_logs(trainer) for name in ("loss", "ce_loss", "kl_loss", "grad_norm")]
        )
    assert runs[1] == pytest.approx(runs[0], rel=2e-5) and runs[2] == pytest.approx(runs[0], rel=2e-5)


class WithLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class WithOwnLoss(RDropMixin, WithLoss):
    pass


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
@pytest.mark.parametrize("head", KINDS)
def test_real_valued_labels_leave_no_room_for_anothers_loss(head, alpha):
    args = {**SEMI, "rdrop_alpha": alpha, "rows": mixed_rows(head)}
    own = {"compute_loss_func": lambda outputs, labels, **kwargs: outputs["logits"].mean()}
    refuse(make(head), "compute_loss_func gets the model's outputs", head, trainer_kwargs=own, **args)
    refuse(make(head), "WithLoss.compute_loss gets the model's outputs", head, trainer_class=WithOwnLoss, **args)


def test_multi_label_rows_may_have_some_of_their_labels(tmp_path):
    """Labels of -100 among others count for the agreement alone."""
    trainer = make_trainer("multi", tmp_path)
    batch = default_data_collator(rows_of("multi", 4))
    batch["labels"][0, 1:3] = -100
    batch["labels"][2] = -100
    torch.manual_seed(1)
    trainer.compute_loss(trainer.model.train(), batch)
    _, ce, kl = trainer._log.means(1, lambda x: x)
    torch.manual_seed(1)
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"].repeat(2, 1), batch["attention_mask"].repeat(2, 1)).logits
    known = batch["labels"] != -100
    each = [nn.functional.binary_cross_entropy_with_logits(x[known], batch["labels"][known]) for x in logits.chunk(2)]
    assert known.sum() == 10 and ce == pytest.approx(sum(each).item() / 2, rel=1e-5)
    expected = torch_reference(logits.double().unflatten(0, (2, 4)), batch["labels"], 0, KINDS["multi"])[2]
    assert kl == pytest.approx(expected.item(), rel=1e-5)


# ---- Which items are compared ----

BARE = [[-100, -100, -100], [5, -100, 6]]


class Pair:
    is_encoder_decoder, pad_token_id = True, 0


@pytest.mark.parametrize(
    ("inputs", "config", "shift", "expected"),
    [
        ({}, None, False, [[1, 1, 1], [1, 0, 1]]),
        ({}, None, True, [[1, 1, 0], [0, 1, 0]]),
        ({"attention_mask": [[1, 1, 0], [1, 1, 1]]}, None, False, [[1, 1, 0], [1, 0, 1]]),
        ({"attention_mask": [[1, 1, 0], [1, 1, 1]]}, None, True, [[1, 0, 0], [0, 1, 0]]),
        ({"attention_mask": [[0, 1, 1], [1, 1, 1]]}, None, True, [[1, 1, 0], [0, 1, 0]]),  # padding to the left
        ({"attention_mask": [[1, 1], [1, 1]]}, Pair, False, [[1, 0, 0], [1, 0, 1]]),  # the encoder's
        ({"decoder_input_ids": [[0, 7, 0], [0, 5, 0]]}, Pair, False, [[1, 1, 0], [1, 0, 1]]),
        ({"decoder_attention_mask": [[0, 1, 1], [1, 1, 1]]}, Pair, False, [[1, 1, 1], [1, 0, 1]]),
    ],
)
def test_items_of_rows_of_tokens(inputs, config, shift, expected):
    inputs = {name: torch.tensor(value) for name, value in inputs.items()}
    kept = {name: value.clone() for name, value in inputs.items()}
    assert items_to_compare(torch.tensor(BARE), inputs, config, shift).int().tolist() == expected
    assert all(torch.equal(value, kept[name]) for name, value in inputs.items())


def test_items_of_other_rows():
    assert items_to_compare(torch.tensor([-100, 3]), {}).tolist() == [True, True]
    assert items_to_compare(torch.tensor([[-100.0, 1.0]]), {}).tolist() == [[True, True]]
    answers = {"start_positions": torch.tensor([-100, 1, 1])}
    labels = torch.tensor([[-100, -100], [1, -100], [1, 2]])
    assert items_to_compare(labels, answers).int().tolist() == [[1, 1], [1, 0], [1, 1]]
    pixels = torch.full((2, 2, 3), -100)
    pixels[1, 0, 0] = 4
    assert items_to_compare(pixels, {}).sum((1, 2)).tolist() == [6, 1]
