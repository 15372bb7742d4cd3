"""Question answering, multiple choice, language models, images, sound, plain modules, and `logits_for_agreement`."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_rdrop import RDropMixin, RDropTrainer, RDropTrainingArguments, measure_consistency
from hf_rdrop.batch import repeat_batch
from hf_rdrop.objective.heads import find_labels, find_logits
from support.head_models import ANSWERS, SIZES, TOKENS, build, rates, rows_of
from support.reference import torch_reference
from support.training import InOrder, make_model, make_rows, step_logs

TINY = 1e-9  # a dropout rate that makes a model stochastic on paper and never drops anything


def items_of(head, outputs, batch, passes=1):
    """All predictions of a batch that is not repeated as `[m, N, C]`, and their labels `[N]`; -100 does not count."""
    if head in ANSWERS:
        logits = torch.cat((outputs["start_logits"], outputs["end_logits"]), 0)
        halves = [part.unflatten(0, (passes, -1)) for part in logits.chunk(2)]
        positions = torch.cat((batch["start_positions"].flatten(), batch["end_positions"].flatten()))
        return torch.cat(halves, 1).double(), positions.masked_fill(positions >= halves[0].shape[-1], -100)
    logits = outputs[1] if isinstance(outputs, tuple) else outputs["logits"]
    logits, labels = logits.double().unflatten(0, (passes, -1)), batch["labels"]
    if head == "causal":
        logits, labels = logits[:, :, :-1], labels[:, 1:]
    return (logits, labels) if labels.dim() == 1 else (logits.flatten(1, 2), labels.flatten())


HEADS = (*ANSWERS, "choice", "masked", "causal", "image", "audio", "tuple", "dict")
# Of the three for question answering, and of the two plain modules, one each.
kinds = pytest.mark.parametrize("head", [head for head in HEADS if "-" not in head and head != "dict"])


def make_trainer(model, folder, rows=(), trainer_class=RDropTrainer, collator=default_data_collator, **args):
    kwargs = {"logits_for_agreement": args.pop("hook")} if "hook" in args else {}
    args_class = TrainingArguments if trainer_class is Trainer else RDropTrainingArguments
    defaults = {
        **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1},
        **{"max_steps": 2, "per_device_train_batch_size": 16, "lr_scheduler_type": "constant", "learning_rate": 1e-2},
    }
    return trainer_class(
        model=model,
        args=args_class(str(folder), **{**defaults, **args}),
        train_dataset=InOrder(rows),
        data_collator=collator,
        **kwargs,
    )


def fit(model, folder, rows, **args):
    trainer = make_trainer(model, folder, rows, **args)
    trainer.train()
    return trainer


def figures(trainer):
    return [entry[name] for entry in step_logs(trainer) for name in ("loss", "ce_loss", "kl_loss", "grad_norm")]


# ---- Every head ----


@pytest.mark.parametrize(("head", "passes"), [*((head, 2) for head in HEADS), ("question", 3), ("choice", 3)])
def test_loss_and_gradients_are_the_formula_on_the_models_own_logits(head, passes, tmp_path):
    model = build(head).train()
    trainer = make_trainer(model, tmp_path, rdrop_alpha=2.0, rdrop_passes=passes)
    batch = default_data_collator(rows_of(head, 6))
    torch.manual_seed(1)
    trainer.compute_loss(model, batch).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    torch.manual_seed(1)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    model.zero_grad()

    torch.manual_seed(1)  # the same dropout masks
    naive = model(**{name: torch.cat([value] * passes) for name, value in batch.items()})
    expected, _, kl = torch_reference(*items_of(head, naive, batch, passes), 2.0)
    expected.backward()
    assert kl.item() > 1e-4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    name = "end_logits" if head in ANSWERS else "logits"
    assert len(outputs[1] if isinstance(outputs, tuple) else outputs[name]) == 6
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-5, msg=lambda t, name=name: name + t)


@kinds
def test_logs_add_up_and_evaluation_is_one_plain_pass(head, tmp_path):
    model, sizes = build(head), []
    trainer = fit(
        model,
        tmp_path,
        rows_of(head, 32),
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        rdrop_alpha=3.0,
        per_device_eval_batch_size=4,
    )
    assert len(step_logs(trainer)) == 2
    for entry in step_logs(trainer):
        assert entry["kl_loss"] > 1e-4
        assert entry["loss"] == pytest.approx(entry["ce_loss"] + 1.5 * entry["kl_loss"], rel=1e-5)
    main = "pixel_values" if head == "image" else "input_values" if head == "audio" else "input_ids"
    model.register_forward_pre_hook(lambda m, args, kwargs: sizes.append(len(kwargs[main])), with_kwargs=True)
    rows = rows_of(head, 11, seed=1)
    metrics, prediction = trainer.evaluate(rows), trainer.predict(rows)
    assert sizes == [4, 4, 3] * 2
    arrays = prediction.predictions if isinstance(prediction.predictions, tuple) else (prediction.predictions,)
    assert len(arrays) == (2 if head in ANSWERS else 3 if head in ("tuple", "dict") else 1)
    assert all(len(array) == 11 for array in arrays)
    assert [len(part) for part in prediction.label_ids] == [11, 11] if head in ANSWERS else len(prediction.label_ids)
    with torch.no_grad():
        batches = [default_data_collator(rows[i : i + 4]) for i in (0, 4, 8)]
        outputs = [model.eval()(**batch) for batch in batches]
    losses = [(out[0] if isinstance(out, tuple) else out["loss"]).item() for out in outputs]
    expected = sum(loss * size for loss, size in zip(losses, (4, 4, 3), strict=True)) / 11
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("head", ["question", "choice", "dict"])
def test_label_names_given_or_not(head, tmp_path):
    names = ["start_positions", "end_positions"] if head == "question" else ["labels"]
    runs = []
    for given in (None, names):
        trainer = fit(build(head), tmp_path, rows_of(head, 32), label_names=given, rdrop_alpha=2.0)
        runs.append([*figures(trainer), trainer.evaluate(rows_of(head, 5))["eval_loss"]])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("head", ["question", "choice", "masked", "causal", "image", "audio"])
def test_the_passes_share_a_trunk(head, tmp_path):
    model, rows = build(head), {}
    layers = model.get_submodule("transformer.h") if head == "causal" else None
    if layers is None:
        layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    trainer = make_trainer(model, tmp_path, rows_of(head, 32), rdrop_shared_layers=1, max_steps=1)
    for i, layer in enumerate(layers):
        inside = next(m for m in layer.modules() if isinstance(m, (nn.Linear, nn.LayerNorm)))
        inside.register_forward_pre_hook(lambda m, args, i=i: rows.__setitem__(i, (m.training, len(args[0]))))
    trainer.train()
    per_row = 3 if head == "choice" else 1
    assert rows == {0: (True, 16 * per_row), 1: (True, 32 * per_row)}
    assert step_logs(trainer)[0]["kl_loss"] > 1e-4


def test_the_fused_head_of_a_masked_language_model(tmp_path):
    runs = [
        fit(build("masked"), tmp_path, rows_of("masked", 32), rdrop_alpha=3.0, rdrop_fused_head=fused)
        for fused in ("on", "off")
    ]
    assert runs[0].rdrop_run.fused_head is not None and runs[1].rdrop_run.fused_head is None
    assert figures(runs[0]) == pytest.approx(figures(runs[1]), rel=1e-4)


@pytest.mark.parametrize(
    ("head", "variant"),
    [
        ("question", {"rdrop_agreement": "jensen_shannon + 0.1 * hidden_states"}),
        ("question", {"rdrop_unlabeled": True}),
        ("choice", {"rdrop_agreement": "symmetric_kl + 0.1 * hidden_states"}),
        ("choice", {"rdrop_layer_drop": 0.2}),
        ("masked", {"rdrop_agreement": "one_sided_kl"}),
        ("image", {"rdrop_agreement": "squared_probabilities + 0.1 * hidden_states"}),
        ("image", {"rdrop_layer_drop": 0.2}),
    ],
)
def test_variants_train(head, variant, tmp_path):
    trainer = fit(build(head), tmp_path, rows_of(head, 32), rdrop_alpha=2.0, **variant)
    for entry in step_logs(trainer):
        assert entry["kl_loss"] > 1e-4
        assert entry["loss"] == pytest.approx(entry["ce_loss"] + entry["kl_loss"], rel=1e-5)


def test_labels_of_sound_and_images_that_are_no_class_are_refused(tmp_path):
    for head in ("image", "audio"):
        rows = [{**row, "labels": 3} for row in rows_of(head)]
        with pytest.raises(ValueError, match="has 3 classes"):
            fit(build(head), tmp_path, rows)


# ---- Question answering ----


def unpadded(head, rows, seed=0):
    """Rows as long as their texts, answers anywhere, also behind their end: what truncation leaves."""
    found = []
    for row in rows_of(head, rows, seed):
        length = sum(row["attention_mask"])
        found.append({name: x[:length] if isinstance(x, list) else x for name, x in row.items()})
    return found


def pad(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    padded = [{k: v + [0] * (longest - len(v)) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    return default_data_collator(padded)


def naive_step(model, batches):
    """Sums over the micro-batches of a step, divided by all of its answers that are whole inside their rows."""
    ce, count = 0.0, 0
    for batch in batches:
        logits, labels = items_of("question", model(**batch), batch)
        cut = (labels == -100).view(2, -1).any(0)
        labels = labels.masked_fill(torch.cat((cut, cut)), -100)
        logs = logits[0].log_softmax(-1)
        ce -= sum(logs[i, label].item() for i, label in enumerate(labels.tolist()) if label != -100)
        count += int((labels != -100).sum())
    return ce / count


def test_an_answer_counts_where_it_is_inside_its_padded_row(tmp_path):
    """Micro-batches padded to different lengths: which answers are cut off depends on them."""
    rows = unpadded("question", 16)
    model = build("question", TINY)
    with torch.no_grad():
        batches = [pad(rows[i : i + 4]) for i in range(0, 16, 4)]
        expected = naive_step(model, batches)
    assert len({batch["input_ids"].shape[1] for batch in batches}) > 1
    counts = [int((find_labels(batch) != -100).sum()) for batch in batches]
    assert len(set(counts)) > 1 and sum(counts) < 32
    args = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = fit(model, tmp_path, rows, collator=pad, rdrop_alpha=2.0, **args)
    assert step_logs(trainer)[0]["ce_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [16, 4, 1])
def test_half_an_answer_is_none(size, tmp_path):
    """Rows with a start but no end, of which the heads' own loss makes nan where no other row has one."""
    rows = rows_of("question")
    for i, row in enumerate(rows):
        row |= {"start_positions": 2, "end_positions": 8 if i % 2 else 3}
    whole = [row for row in rows if row["end_positions"] == 3]
    args = {"rdrop_alpha": 2.0, "max_steps": 1, "optim": "sgd", "per_device_train_batch_size": size}
    trainer = fit(build("question", TINY), tmp_path, rows, gradient_accumulation_steps=16 // size, **args)
    args["per_device_train_batch_size"] = 8
    assert figures(trainer) == pytest.approx(figures(fit(build("question", TINY), tmp_path, whole, **args)), rel=1e-4)
    assert trainer.evaluate(rows[1::2])["eval_loss"] == 0


@pytest.mark.parametrize("alpha", [0.0, 2.0])
@pytest.mark.parametrize("head", ANSWERS)
def test_answers_of_minus_100_are_ignored_as_labels_are(head, alpha, tmp_path):
    """Transformers' heads take -100 for the first position."""
    rows = [{**row, "start_positions": i, "end_positions": i + 1} for i, row in enumerate(rows_of(head, 6))]
    bare = [{**row, "start_positions": -100, "end_positions": -100} for row in rows_of(head, 2, seed=1)]
    model = build(head, TINY).train()
    trainer = make_trainer(model, tmp_path, rdrop_alpha=alpha)
    results = []
    for given in (rows, rows + bare):
        model.zero_grad()
        loss = trainer.compute_loss(model.train(), default_data_collator(given))
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
        results.append([loss.item(), norm, trainer.compute_loss(model.eval(), default_data_collator(given)).item()])
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert trainer.predict(rows + bare).label_ids[0].tolist()[-2:] == [-100, -100]  # metrics see them as they came
    batch = default_data_collator(bare)
    loss = trainer.compute_loss(model.train(), batch, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss.item() == 0 and trainer.evaluate(bare)["eval_loss"] == 0
    assert batch["start_positions"].tolist() == [-100, -100]


def test_the_other_rows_of_an_agreement_do_not_see_ignored_answers(tmp_path):
    """With real dropout: the agreement is that of the answers inside alone."""
    model = build("question").train()
    trainer = make_trainer(model, tmp_path, rdrop_alpha=4.0)
    batch = default_data_collator(rows_of("question", 8))
    batch["start_positions"][:2], batch["end_positions"][:2] = -100, -100
    torch.manual_seed(1)
    loss = trainer.compute_loss(model, batch)
    torch.manual_seed(1)
    outputs = model(**repeat_batch(batch, 2))
    logits, labels = items_of("question", outputs, batch, 2)
    expected, _, _ = torch_reference(logits, labels, 4.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_positions_may_have_a_second_dimension_of_one(tmp_path):
    model = build("question").train()
    trainer = make_trainer(model, tmp_path, rdrop_alpha=2.0)
    batch = default_data_collator(rows_of("question", 6))
    columns = {k: v[:, None] if k.endswith("positions") else v for k, v in batch.items()}
    losses = []
    for given in (batch, columns):
        torch.manual_seed(1)
        losses.append(trainer.compute_loss(model, given).item())
    assert losses[0] == losses[1]
    assert torch.equal(find_labels(batch), find_labels(columns)) and find_labels(batch).shape == (6, 2)


def test_a_tuple_of_question_answering_has_two_kinds_of_logits(tmp_path):
    losses = []
    for return_dict in (True, False):
        model = build("question", return_dict=return_dict).train()
        trainer = make_trainer(model, tmp_path, rdrop_alpha=2.0)
        batch = default_data_collator(rows_of("question", 6))
        torch.manual_seed(1)
        losses.append(trainer.compute_loss(model, batch).item())
        logits = find_logits(model(**batch), 6, batch)
        assert logits.shape == (6, 2, 8)
    assert losses[0] == losses[1]


def test_a_tuple_with_one_of_the_two_is_refused(tmp_path):
    class Start(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = build("question")

        def forward(self, **inputs):
            outputs = self.net(**inputs)
            return outputs.loss, outputs.start_logits

    model = Start().train()
    trainer = make_trainer(model, tmp_path)
    with pytest.raises(ValueError, match=r"cannot compare logits of shape \(6, 8\) for labels of shape \(6, 2\)"):
        trainer.compute_loss(model, default_data_collator(rows_of("question", 6)))


@pytest.mark.parametrize("return_dict", [True, False])
def test_consistency_of_question_answering(return_dict):
    model = build("question", 0.2, return_dict=return_dict)
    rows = rows_of("question", 12)
    batches = [default_data_collator(rows[i : i + 4]) for i in (0, 4, 8)]
    seen = {}

    def spans(predictions, labels):
        seen["shapes"] = predictions.shape, labels.shape
        return {"exact": float((predictions == labels).all(1).mean())}

    found = measure_consistency(model, batches, 3, compute_metrics=spans)
    with torch.no_grad():
        items = []
        for batch in batches:
            outputs = model.eval()(**batch, return_dict=True)
            items.append([part if part.dim() == 1 else part[0] for part in items_of("question", outputs, batch)])
    kept = [(scores, label) for both in items for scores, label in zip(*both, strict=True) if label >= 0]
    assert found.items == len(kept) < 24
    loss = sum(F.cross_entropy(scores, label).item() for scores, label in kept) / len(kept)
    assert found.scores["loss"].dropout_off == pytest.approx(loss, rel=1e-5)
    right = sum(int(scores.argmax() == label) for scores, label in kept) / len(kept)
    assert found.scores["accuracy"].dropout_off == pytest.approx(right)
    assert seen["shapes"] == ((12, 2), (12, 2)) and found.between_sub_models > 0


# ---- logits_for_agreement ----


class Two(nn.Module):
    """Two outputs and label names of its own: topics of rows, and scores of tokens."""

    def __init__(self, p=0.3):
        super().__init__()
        set_seed(0)
        self.bert = BertModel(BertConfig(**TOKENS, **SIZES, **rates(p)))
        self.topic, self.tag = nn.Linear(16, 3), nn.Linear(16, 5)

    def forward(self, input_ids, attention_mask=None, topic=None, tags=None, output_hidden_states=None):
        hidden = self.bert(input_ids, attention_mask).last_hidden_state
        topics, tag_scores = self.topic(hidden[:, 0]), self.tag(hidden)
        loss = F.cross_entropy(topics, topic) + F.cross_entropy(tag_scores.flatten(0, 1), tags.flatten())
        return {"loss": loss, "topics": topics, "tag_scores": tag_scores}


def two_rows(rows=32):
    return [{"tags": row.pop("labels"), "topic": row["input_ids"][0] % 3, **row} for row in make_rows("token", rows)]


class Hook(NamedTuple):
    function: Callable
    problem_type: str  # of the reference
    items: Callable  # outputs, batch -> the scores, and who counts, of the reference

    def __repr__(self):
        return self.function.__name__


def topics(outputs, inputs):
    return outputs["topics"]


def real_tags(outputs, inputs):
    return outputs["tag_scores"], inputs["tags"] != -100


def labels_alone(outputs, inputs):
    return outputs["topics"], None, "multi_label_classification"


def distances(outputs, inputs):
    mask = (inputs["tags"] != -100)[..., None].expand(-1, -1, 5)
    return outputs["tag_scores"], mask, "regression"


HOOKS = [
    Hook(topics, "single_label_classification", lambda out, batch: (out["topics"], torch.ones(6))),
    Hook(real_tags, "single_label_classification", lambda out, batch: (out["tag_scores"], batch["tags"] != -100)),
    Hook(labels_alone, "multi_label_classification", lambda out, batch: (out["topics"], torch.ones(6))),
    Hook(distances, "regression", lambda out, batch: (out["tag_scores"], batch["tags"] != -100)),
]


def naive_hook(hook, outputs, batch):
    """CE of the model's own and the agreement that the hook means, by the loops of `reference.py`."""
    scores, counts = hook.items(outputs, batch)
    passes = scores.double().unflatten(0, (2, -1))
    if counts.dim() == 2:
        passes = passes.flatten(1, 2)
    passes = passes[:, counts.flatten().bool()]
    n, classes = passes.shape[1:]
    labels = torch.zeros(n, dtype=torch.long)
    if hook.problem_type != "single_label_classification":
        labels = torch.zeros(n, classes)
    return torch_reference(passes, labels, 1.0, hook.problem_type)[2]


@pytest.mark.parametrize("hook", HOOKS, ids=repr)
@pytest.mark.parametrize("names", [["topic", "tags"], ["tags"], None])
def test_the_agreement_is_that_of_what_the_function_returns(hook, names, tmp_path):
    model = Two().train()
    args = {} if names is None else {"label_names": names}
    trainer = make_trainer(model, tmp_path, hook=hook.function, rdrop_alpha=2.0, **args)
    batch = default_data_collator(two_rows(6))
    torch.manual_seed(1)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert len(outputs["topics"]) == len(outputs["tag_scores"]) == 6
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.manual_seed(1)
    naive = model(**repeat_batch(batch, 2))
    kl = naive_hook(hook, naive, batch)
    assert kl > 1e-4
    expected = naive["loss"] + kl
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for given, p in zip(grads, [p for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(given, p.grad, rtol=1e-3, atol=1e-5)


def test_not_called_in_evaluation_and_predictions_have_their_rows(tmp_path):
    calls = []

    def hook(outputs, inputs):
        calls.append(len(outputs["topics"]))
        return outputs["topics"]

    trainer = fit(Two(), tmp_path, two_rows(), hook=hook, label_names=["topic", "tags"], max_steps=1)
    assert calls == [32] and step_logs(trainer)[0]["kl_loss"] > 1e-4
    prediction = trainer.predict(two_rows(5))
    assert calls == [32]
    assert [len(array) for array in prediction.predictions] == [5, 5] and len(prediction.label_ids) == 2
    plain = fit(Two(), tmp_path, two_rows(), hook=hook, label_names=["topic", "tags"], max_steps=1, rdrop_alpha=0.0)
    assert calls == [32] and step_logs(plain)[0]["kl_loss"] == 0


def test_accumulated_batches_count_by_the_labels(tmp_path):
    """By the first of `label_names`: rows where it is `topic`; by `labels` where the batch has them."""
    runs = [
        fit(
            Two(TINY),
            tmp_path,
            [{**row, "tags": [1] * 8} for row in two_rows()],
            hook=topics,
            label_names=["topic", "tags"],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
        )
        for size, steps in ((16, 1), (4, 4), (6, 3))
    ]
    assert figures(runs[0])[:4] == pytest.approx(figures(runs[1])[:4], rel=5e-5, abs=1e-6)
    assert figures(runs[0]) == pytest.approx(figures(runs[1]), rel=5e-5, abs=1e-6)


class Distances(nn.Module):
    """Without any labels: a loss of its own, and something to compare."""

    def __init__(self, p):
        super().__init__()
        set_seed(0)
        self.embed, self.dropout, self.out = nn.Embedding(40, 16), nn.Dropout(p), nn.Linear(16, 4)

    def forward(self, input_ids):
        codes = self.out(self.dropout(self.embed(input_ids).mean(1)))
        return {"loss": codes.square().mean(), "codes": codes}


def test_without_labels_accumulated_batches_count_alike(tmp_path):
    rows = [{"input_ids": row["input_ids"]} for row in make_rows("token", 32)]

    def hook(outputs, inputs):
        return outputs["codes"], None, "regression"

    runs = [
        fit(
            Distances(TINY),
            tmp_path,
            rows,
            hook=hook,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
        )
        for size, steps in ((16, 1), (4, 4))
    ]
    assert figures(runs[0]) == pytest.approx(figures(runs[1]), rel=5e-5, abs=1e-6)
    entry = step_logs(fit(Distances(0.3), tmp_path, rows, hook=hook, rdrop_alpha=2.0))[0]
    assert entry["kl_loss"] > 1e-4 and entry["loss"] == pytest.approx(entry["ce_loss"] + entry["kl_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda out, x: None, "Got NoneType"),
        (lambda out, x: out, "Got dict"),
        (lambda out, x: out["topics"][:6], r"all 12 rows.*Got float32 \[6, 3\]"),
        (lambda out, x: out["topics"].argmax(-1), r"real numbers.*Got int64 \[12\]"),
        (lambda out, x: out["topics"][:, 0], r"\[12, ..., C\].*Got float32 \[12\]"),
        (lambda out, x: out["topics"].sum(), r"Got float32 \[\]"),
        (lambda out, x: (out["topics"], None, "regression", 1), r"Got \(float32 \[12, 3\], NoneType, str, int\)"),
        (lambda out, x: (), r"Got \(\)"),
        (lambda out, x: (out["tag_scores"], x["tags"][:, :4] != -100), r"mask of the shape \(6, 8\).*bool \[6, 4\]"),
        (lambda out, x: (out["tag_scores"], torch.ones(12, 8)), r"shape \(6, 8\).*not repeated.*float32 \[12, 8\]"),
        (lambda out, x: (out["tag_scores"], x["tags"] != -100, "regression"), r"\(6, 8, 5\): one value for each s"),
        (lambda out, x: (out["topics"], [1] * 6), "Got list"),
        (lambda out, x: (out["topics"], None, "softmax"), "problem_type 'softmax'.*multi_label_classification"),
        (lambda out, x: (out["topics"], None, 0), "problem_type 0"),
        (lambda out, x: out["topics"].detach(), "carry no gradient"),
        (lambda out, x: F.one_hot(out["topics"].argmax(-1), 3).float(), "carry no gradient"),
    ],
)
def test_what_the_function_may_not_return(returned, message, tmp_path):
    model = Two().train()
    trainer = make_trainer(model, tmp_path, hook=returned, label_names=["topic", "tags"])
    with pytest.raises(ValueError, match=rf"logits_for_agreement.*{message}"):
        trainer.compute_loss(model, default_data_collator(two_rows(6)))


class TwoInTransformers(PreTrainedModel):
    """The same as a model of Transformers, for the shared trunk."""

    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.net = Two()
        self.post_init()

    def forward(self, input_ids, attention_mask=None, topic=None, tags=None):
        return self.net(input_ids, attention_mask, topic, tags)


@pytest.mark.parametrize("hook", [topics, real_tags, distances])
def test_a_shared_trunk_under_a_function_of_ones_own(hook, tmp_path):
    model = TwoInTransformers(BertConfig(**TOKENS, **SIZES))
    args = {"label_names": ["topic", "tags"], "rdrop_shared_layers": 1, "max_steps": 1}
    trainer = fit(model, tmp_path, two_rows(), hook=hook, **args)
    assert step_logs(trainer)[0]["kl_loss"] > 1e-4


def test_it_takes_the_place_of_a_head_that_is_known(tmp_path):
    """Only the answers' starts are to agree, and the wrapper around the model (as DDP's) is not the model's class."""

    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    def starts(outputs, inputs):
        return outputs.start_logits, inputs["start_positions"] < 8

    model = build("question").train()
    batch = default_data_collator(rows_of("question", 6))
    trainer = make_trainer(model, tmp_path, hook=starts, rdrop_alpha=2.0)
    torch.manual_seed(1)
    loss = trainer.compute_loss(Wrapped(model).train(), batch)
    torch.manual_seed(1)
    outputs = model(**repeat_batch(batch, 2))
    labels = batch["start_positions"].masked_fill(batch["start_positions"] >= 8, -100)
    _, _, kl = torch_reference(outputs.start_logits.double().unflatten(0, (2, -1)), labels, 2.0)
    assert loss.item() == pytest.approx((outputs.loss + kl).item(), rel=1e-5)


def test_a_model_with_a_known_head_and_the_function_uses_no_fused_head(tmp_path):
    def logits(outputs, inputs):
        return outputs.logits, inputs["labels"] != -100

    args = {"rdrop_alpha": 2.0, "rdrop_fused_head": "on"}
    with pytest.raises(ValueError, match="logits_for_agreement gets the model's outputs"):
        fit(build("masked"), tmp_path, rows_of("masked", 32), hook=logits, **args)
    trainer = fit(build("masked"), tmp_path, rows_of("masked", 32), hook=logits, rdrop_alpha=2.0)
    plain = fit(build("masked"), tmp_path, rows_of("masked", 32), rdrop_alpha=2.0, rdrop_fused_head="off")
    assert figures(trainer) == pytest.approx(figures(plain), rel=1e-5)


def test_a_subclass_and_plain_training_arguments_take_it(tmp_path):
    class Own(RDropTrainer):
        pass

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], label_names=["topic", "tags"])
    model = Two().train()
    trainer = Own(model, args, default_data_collator, logits_for_agreement=topics)  # beside positional arguments
    assert trainer.compute_loss(model, default_data_collator(two_rows(6))).requires_grad
    assert make_model("single").config.problem_type is None


# ---- soft labels ----


class SoftLabels(Trainer):
    """A cross-entropy against a distribution for each row."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class RDropSoftLabels(RDropMixin, SoftLabels):
    pass


def test_one_hot_rows_are_the_classes(tmp_path):
    rows, found = make_rows("single", 16), []
    soft = [{**row, "labels": [float(row["labels"] == c) for c in range(3)]} for row in rows]
    for data, trainer_class in ((rows, RDropTrainer), (soft, RDropSoftLabels)):
        model = make_model("single", 0.3)
        model.config.problem_type = "single_label_classification"
        trainer = make_trainer(model, tmp_path, data, trainer_class)
        trainer.train()
        found.append(step_logs(trainer))
    for first, second in zip(*found, strict=True):
        assert first["kl_loss"] > 1e-3
        for key in ("loss", "ce_loss", "kl_loss", "grad_norm"):
            assert second[key] == pytest.approx(first[key], rel=1e-4)


def test_distributions_of_a_teacher_are_compared_by_the_softmax(tmp_path):
    model, batch = make_model("single", 0.3), default_data_collator(make_rows("single", 6))
    model.config.problem_type = "single_label_classification"
    batch["labels"] = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    trainer, seen = make_trainer(model, tmp_path, trainer_class=RDropSoftLabels, rdrop_alpha=2.0), []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    loss = trainer.compute_loss(model.train(), batch)
    p, q = seen[-1].double().log_softmax(-1).chunk(2)
    ce = -(batch["labels"] * (p + q)).sum(-1).mean() / 2
    kl = 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
    assert loss.item() == pytest.approx((ce + kl).item(), rel=1e-5) and kl > 1e-3


@pytest.mark.parametrize("kind", [1.0, 0.5])
def test_soft_labels_without_a_problem_type_are_refused(kind, tmp_path):
    rows = [{**row, "labels": [kind, 1 - kind, 0.0]} for row in make_rows("single", 16)]
    with pytest.raises(ValueError, match=r"not the binary cross-entropy.*'single_label_classification'"):
        make_trainer(make_model("single", 0.3), tmp_path, rows, RDropSoftLabels).train()
