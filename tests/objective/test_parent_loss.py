"""The losses of other Trainers and modules under R-Drop: trained as they are, or refused with what to change."""

import contextlib
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, Trainer

from hf_rdrop import RDropMixin, RDropTrainer
from support.short_runs import ALPHA, TINY, refuse, run, values
from support.training import make_model, make_rows, step_logs, train

# ---- the objective of others ----


def test_label_smoothing_does_nothing_to_multi_label_heads():
    with pytest.warns(UserWarning, match="not compatible with multi-label"):
        smoothed = run(make_model("multi", 0.3), "multi", label_smoothing_factor=0.1)
    assert values(smoothed) == values(run(make_model("multi", 0.3), "multi"))


class ClassWeights(Trainer):
    """The documented way to weigh classes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, torch.tensor([1.0, 5.0, 0.1]))
        return (loss, outputs) if return_outputs else loss


class RDropClassWeights(RDropMixin, ClassWeights):
    pass


def test_class_weights_of_a_parent_are_trained():
    trainer = run(make_model("single", 0.3), trainer_class=RDropClassWeights)
    plain = run(make_model("single", 0.3))
    assert step_logs(trainer)[0]["kl_loss"] == pytest.approx(step_logs(plain)[0]["kl_loss"])
    assert step_logs(trainer)[0]["ce_loss"] != pytest.approx(step_logs(plain)[0]["ce_loss"], rel=1e-2)
    still = train(make_model("single", TINY), trainer_class=RDropClassWeights)
    weighted = train(make_model("single", TINY), trainer_class=ClassWeights)
    assert step_logs(still)[0]["loss"] == pytest.approx(step_logs(weighted)[0]["loss"], rel=1e-5)
    assert step_logs(still)[0]["grad_norm"] == pytest.approx(step_logs(weighted)[0]["grad_norm"], rel=1e-4)


def test_the_mixin_must_come_first():
    with pytest.raises(TypeError, match=r"class Wrong\(RDropMixin, ...\)"):

        class Wrong(ClassWeights, RDropMixin):
            pass


def test_a_mixin_of_ones_own_between_r_drop_and_the_trainer():
    class Mixin(RDropMixin):
        pass

    class Mixed(Mixin, Trainer):
        pass

    assert run(make_model("single", 0.3), trainer_class=Mixed, max_steps=1).state.global_step == 1


def test_the_mixin_needs_a_trainer():
    class Other:
        def train(self): ...

    with pytest.raises(TypeError, match=r"Wrong is no transformers\.Trainer"):

        class Wrong(RDropMixin, Other):
            pass


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_a_loss_that_hides_r_drop_is_refused(alpha):
    class Hides(RDropTrainer):
        compute_loss = ClassWeights.compute_loss

    refuse(make_model("single"), "Hides trains without R-Drop", trainer_class=Hides, rdrop_alpha=alpha)


def test_a_loss_on_top_of_r_drops_is_trained():
    class Larger(RDropTrainer):
        def compute_loss(self, *args, **kwargs):
            return 3 * super().compute_loss(*args, **kwargs)

    larger, plain = (train(make_model("single", 0.3), trainer_class=c, max_steps=1) for c in (Larger, RDropTrainer))
    assert step_logs(larger)[0]["grad_norm"] == pytest.approx(3 * step_logs(plain)[0]["grad_norm"], rel=1e-5)


# ---- modules that are no Transformers models ----


class Scores(nn.Module):
    """A module of one's own: `kind` is its loss, `form` what it returns."""

    def __init__(self, kind, form="dict", outputs=3, problem_type=None):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(40, 8), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, outputs))
        self.kind, self.form = kind, form
        if problem_type:
            self.config = PretrainedConfig(problem_type=problem_type)

    def forward(self, input_ids, labels=None):
        logits = self.net(input_ids)
        if self.kind != "ce":
            logits = logits.squeeze(-1)
        loss = {
            "ce": lambda: F.cross_entropy(logits, labels),
            "bce": lambda: F.binary_cross_entropy_with_logits(logits, labels.float()),
            "weighted": lambda: F.binary_cross_entropy_with_logits(logits, labels, pos_weight=torch.tensor(3.0)),
            "mse": lambda: F.mse_loss(logits, labels),
            "huber": lambda: F.smooth_l1_loss(logits, labels),
            "sigmoid": lambda: F.mse_loss(logits.sigmoid(), labels),
            "tanh": lambda: F.l1_loss(logits.tanh(), labels),
        }[self.kind]()
        return {"loss": loss, "logits": logits} if self.form == "dict" else (loss, logits)


def rows_of(labels):
    return [{**row, "labels": label} for row, label in zip(make_rows("single", 16), labels, strict=True)]


def draw(*shape, real=True):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=generator) if real else torch.rand(shape, generator=generator)).tolist()


CLASSES = [i % 3 for i in range(16)]
FLAGS = [[float(i % 2), 1.0, float(i % 3 == 0)] for i in range(16)]
BINARY = [float(i % 2) for i in range(16)]
MODULES = {
    "classes": ({"kind": "ce"}, CLASSES),
    "flags": ({"kind": "bce"}, FLAGS),
    "one real number": ({"kind": "mse", "outputs": 1}, draw(16)),
    "binary": ({"kind": "bce", "outputs": 1, "problem_type": "multi_label_classification"}, BINARY),
    "numbers 0 and 1": ({"kind": "mse", "outputs": 1}, BINARY),
    "real numbers": ({"kind": "mse", "problem_type": "regression"}, draw(16, 3)),
}


@pytest.mark.parametrize("form", ["dict", "tuple"])
@pytest.mark.parametrize("case", MODULES)
def test_plain_modules(case, form):
    kwargs, labels = MODULES[case]
    torch.manual_seed(0)
    model = Scores(form=form, **kwargs)
    first = step_logs(run(model, rows=rows_of(labels), learning_rate=0.0, max_steps=1))[0]
    # The same rows and masks, the divergence written out again.
    torch.manual_seed(0)
    again = Scores(form=form, **kwargs)
    seen = []
    again.net.register_forward_hook(lambda module, args, output: seen.append(output) if module.training else None)
    assert step_logs(run(again, rows=rows_of(labels), learning_rate=0.0, max_steps=1))[0] == pytest.approx(first)
    p, q = seen[0].double().chunk(2)
    if case == "classes":
        p, q = p.softmax(-1), q.softmax(-1)
        expected = 0.5 * ((p - q) * (p.log() - q.log())).sum(-1).mean()
    elif case in ("flags", "binary"):
        expected = 0.5 * ((p.sigmoid() - q.sigmoid()) * (p - q)).mean()
    else:
        expected = ((p - q) ** 2).mean()
    assert first["kl_loss"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "labels", "message"),
    [
        ({"kind": "bce", "outputs": 1}, BINARY, "as regression.*binary cross-entropy.*'multi_label_classification'"),
        ({"kind": "weighted", "outputs": 1}, BINARY, "all 0 or 1 and its loss is not their mean squared error"),
        ({"kind": "bce", "outputs": 1}, draw(16, real=False), "its loss is the binary cross-entropy"),
        ({"kind": "mse"}, draw(16, 3, real=False), "its loss is the mean squared error.*'regression'"),
        ({"kind": "huber"}, draw(16, 3), "not between 0 and 1.*PretrainedConfig"),
        ({"kind": "sigmoid", "outputs": 1}, draw(16, real=False), r"the sigmoid of its scores.*\.sigmoid\(\)"),
        ({"kind": "tanh", "outputs": 1, "problem_type": "regression"}, draw(16), "the tanh of its scores"),
    ],
)
@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_plain_modules_whose_scores_could_be_either(kwargs, labels, message, form):
    refuse(Scores(form=form, **kwargs), message, rows=rows_of(labels))


def test_labels_under_another_name():
    class Targets(Scores):
        def forward(self, input_ids, targets=None):
            return super().forward(input_ids, targets)

    rows = [{"input_ids": row["input_ids"], "targets": i % 3} for i, row in enumerate(make_rows("single", 16))]
    run(Targets("ce"), rows=rows, label_names=["targets"])
    with_config = Targets("ce", problem_type="single_label_classification")
    run(with_config, rows=rows, label_names=["targets"])


def test_a_hook_of_the_callers_survives():
    """What R-Drop hangs on a model for one forward is taken off again, and nothing else."""
    model, seen = make_model("single", 0.3), []
    model.register_forward_hook(lambda module, *args: seen.append(1) if module.training else None)
    run(model, trainer_class=RDropClassWeights)
    assert len(model._forward_hooks) == 1 and len(seen) == 2
    with contextlib.suppress(ValueError):
        train(model, rows=[{**row, "labels": 9} for row in make_rows("single", 16)], trainer_class=RDropClassWeights)
    assert len(model._forward_hooks) == 1


# ---- labels ----


@pytest.mark.parametrize(
    ("head", "label", "message"),
    [
        ("single", 3, r"from 0 to 3, but BertForSequenceClassification has 3 classes"),
        ("single", -1, r"from -1 to 2"),
        ("token", 5, r"has 5 classes: a label is from 0 to 4, or -100"),
        ("seq2seq", 40, r"has 40 tokens.*tokenizer"),
    ],
)
@pytest.mark.parametrize("fused", ["off", "auto"])
def test_labels_that_are_no_class_of_the_head(head, label, message, fused):
    rows = make_rows(head, 16)
    rows[7]["labels"] = label if head == "single" else [label, *rows[7]["labels"][1:]]
    refuse(make_model(head), message, head, rows=rows, rdrop_fused_head=fused)


# ---- the loss of [x; x] is that of x ----


def cross_entropy(logits, inputs, model):
    return F.cross_entropy(logits, inputs["labels"], reduction="none")


def noisy(logits, inputs, model):
    """R3F: divergence to a pass with noise on the embeddings."""
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["attention_mask"]
    other = model(inputs_embeds=embedded + 0.1 * torch.randn_like(embedded), attention_mask=mask).logits
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    return cross_entropy(logits, inputs, model).mean() + ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()


def adversarial(logits, inputs, model):
    """SMART and its like take a gradient inside the loss."""
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    kept = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).logits
    slope = torch.autograd.grad(cross_entropy(kept, inputs, model).mean(), embedded)[0]
    moved = model(inputs_embeds=embedded + 0.1 * slope.sign(), attention_mask=inputs["attention_mask"]).logits
    return (cross_entropy(logits, inputs, model) + cross_entropy(moved, inputs, model)).mean()


def mixed(logits, inputs, model):
    """Draws from numpy and from Python."""
    share = np.random.beta(1.0, 1.0) * random.random()
    return share * cross_entropy(logits, inputs, model).mean()


def focal(logits, inputs, model):
    ce = cross_entropy(logits, inputs, model)
    return ((1 - torch.exp(-ce)) ** 2 * ce).mean()


def weighted_rows(logits, inputs, model):
    weights = inputs["attention_mask"].sum(-1).float()
    return (cross_entropy(logits, inputs, model) * weights).sum() / weights.sum()


def smoothed(logits, inputs, model):
    return F.cross_entropy(logits, inputs["labels"], torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)


def margins(logits, inputs, model):
    return F.multi_margin_loss(logits, inputs["labels"])


MEANS = (noisy, adversarial, mixed, focal, weighted_rows, smoothed, margins)


def total(logits, inputs, model):
    return cross_entropy(logits, inputs, model).sum()


def total_of_weighted(logits, inputs, model):
    return (cross_entropy(logits, inputs, model) * inputs["attention_mask"].sum(-1)).sum()


def pairs_of_rows(logits, inputs, model):
    """A reward model's: the first half was chosen, the second rejected."""
    chosen, rejected = logits[:, 0].chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def close_pairs(logits, inputs, model):
    """As before its first steps, when the scores hardly differ."""
    return pairs_of_rows(0.1 * logits, inputs, model)


def in_batch_contrast(logits, inputs, model):
    z = F.normalize(logits, dim=-1)
    return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(z)))


def ranked(logits, inputs, model):
    """CoSENT's kind: every pair of rows in one logarithm."""
    differences = logits[:, 0][:, None] - logits[:, 0]
    return torch.log1p(differences.exp().sum())


CONTRASTS = (total, total_of_weighted, pairs_of_rows, close_pairs, in_batch_contrast, ranked)


def parent_of(function):
    class Parent(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            loss = function(outputs.logits, inputs, model)
            return (loss, outputs) if return_outputs else loss

    return type("Ours", (RDropMixin, Parent), {})


@pytest.mark.parametrize("function", CONTRASTS)
def test_a_parents_loss_over_the_rows_together_is_refused(function):
    args = {"trainer_class": parent_of(function), "max_steps": 1}
    refuse(make_model("single", 0.3), "not the same for a repeated batch with dropout off.*rdrop_alpha to 0", **args)
    train(make_model("single", 0.3), rdrop_alpha=0.0, **args)


def test_a_sum_is_called_a_sum():
    refuse(make_model("single", 0.3), "it is a sum over the rows", trainer_class=parent_of(total))


@pytest.mark.parametrize("function", MEANS)
def test_a_parents_loss_that_is_a_mean_is_trained_and_the_check_draws_nothing(function, monkeypatch):
    runs = []
    for checked in (True, False):
        with monkeypatch.context() as patch:
            if not checked:
                patch.setattr("hf_rdrop.training.run.check_repeated_loss", lambda *args: None)
            np.random.seed(0)
            random.seed(0)
            runs.append(values(run(make_model("single", 0.3), trainer_class=parent_of(function))))
    assert runs[0] == runs[1]


def test_low_precision_is_no_contrast():
    train(make_model("single", 0.3).bfloat16(), trainer_class=parent_of(focal), rdrop_alpha=2.0)
    train(make_model("single", 0.3), trainer_class=parent_of(smoothed), rdrop_alpha=2.0, bf16=True)


def test_a_loss_function_that_is_a_sum_is_refused():
    def sums(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, reduction="sum")

    with pytest.raises(ValueError, match="a sum over the rows"):
        train(make_model("single", 0.3), trainer_kwargs={"compute_loss_func": sums})


class Clusters(nn.Module):
    """A module of one's own whose loss tells the rows from each other, or is a sum."""

    def __init__(self, reduction):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(40, 8), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 3))
        self.reduction = reduction

    def forward(self, input_ids, labels=None):
        logits = self.net(input_ids)
        if self.reduction == "contrast":
            return {"loss": in_batch_contrast(logits, None, None), "logits": logits}
        return {"loss": F.cross_entropy(logits, labels, reduction=self.reduction), "logits": logits}


@pytest.mark.parametrize("reduction", ["sum", "contrast"])
def test_a_module_of_ones_own_whose_loss_is_no_mean(reduction):
    rows = rows_of(CLASSES)
    refuse(Clusters(reduction), "the loss of Clusters is not the same for a repeated batch", rows=rows)
    train(Clusters(reduction), rows=rows, rdrop_alpha=0.0)
    run(Clusters("mean"), rows=rows)


# ---- what the repeated batch, the item count and the outputs mean to a parent ----


def parent(loss, calls=None):
    """Make a Trainer, and the same with R-Drop, of a loss of logits, labels and the step's count."""

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            if calls is not None:
                calls.append(return_outputs)
            value = loss(outputs.logits, labels, num_items_in_batch)
            return (value, outputs) if return_outputs else value

    class RDropOwn(RDropMixin, Own):
        pass

    return Own, RDropOwn


def mean_with_gradient_of_a_sum(logits, labels, count):
    total = F.cross_entropy(logits, labels, reduction="sum")
    return F.cross_entropy(logits, labels) + total - total.detach()


def mean_with_gradient_of_pairs(logits, labels, count):
    chosen, rejected = logits[:, 0].chunk(2)
    pairs = -F.logsigmoid(chosen - rejected).mean()
    return F.cross_entropy(logits, labels) + pairs - pairs.detach()


@pytest.mark.parametrize("loss", [mean_with_gradient_of_a_sum, mean_with_gradient_of_pairs])
def test_a_loss_whose_gradient_alone_is_another_for_a_repeated_batch_is_refused(loss):
    model = make_model("single", 0.3)
    refuse(model, "has another gradient", trainer_class=parent(loss)[1])
    assert all(parameter.grad is None for parameter in model.parameters())


def divided_by_the_count(logits, labels, count):
    return F.cross_entropy(logits, labels, reduction="sum") / count


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_divides_by_the_items_of_the_step_is_as_with_trainer(accumulation):
    mixed = parent(divided_by_the_count)[1]
    args = {"max_steps": 2, "gradient_accumulation_steps": accumulation}
    plain = train(make_model("single", 0.3), trainer_class=RDropTrainer, rdrop_alpha=0.0, **args)
    found = train(make_model("single", 0.3), trainer_class=mixed, rdrop_alpha=0.0, **args)
    for one, other in zip(step_logs(found), step_logs(plain), strict=True):
        assert (one["loss"], one["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-5)
    repeated = step_logs(train(make_model("single", 0.3), trainer_class=mixed, rdrop_alpha=1.0))[0]
    usual = step_logs(train(make_model("single", 0.3), rdrop_alpha=1.0))[0]
    assert repeated["ce_loss"] == pytest.approx(usual["ce_loss"], rel=1e-5)
    assert repeated["kl_loss"] == pytest.approx(usual["kl_loss"], rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_loss_function_can_be_set_after_construction(alpha):
    class Later(RDropTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.compute_loss_func = lambda outputs, labels, num_items_in_batch: divided_by_the_count(
                outputs.logits, labels, num_items_in_batch
            )

    found = step_logs(train(make_model("single", 0.3), trainer_class=Later, rdrop_alpha=alpha))[0]
    usual = step_logs(train(make_model("single", 0.3), rdrop_alpha=alpha))[0]
    assert found["loss"] == pytest.approx(usual["loss"], rel=1e-5)


def test_a_loss_function_counts_as_user_of_outputs_where_a_subclass_names_none():
    class Recipe(RDropTrainer):
        user_of_outputs = None

    trainer = train(make_model("single"), trainer_class=Recipe, rdrop_alpha=0.0)
    assert trainer.needs_outputs is None
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.sum()
    assert trainer.needs_outputs == "compute_loss_func gets the model's outputs"


def test_outputs_are_asked_for_only_where_they_are_needed():
    calls = []
    mixed = parent(lambda logits, labels, count: F.cross_entropy(logits, labels), calls)[1]
    train(make_model("single"), trainer_class=mixed, rdrop_alpha=0.0, max_steps=2)
    assert calls == [False, False]


class FromPairs(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**dict(inputs))
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class RDropFromPairs(RDropMixin, FromPairs):
    pass


@pytest.mark.parametrize("form", [list, tuple])
def test_batches_without_names_train_with_alpha_0_and_are_refused_above(form):
    def collate(rows):
        names = ("input_ids", "attention_mask", "labels")
        return form((name, torch.tensor([row[name] for row in rows])) for name in names if name in rows[0])

    class Collates(RDropFromPairs):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "data_collator": collate})

    args = {"trainer_class": Collates}
    found = step_logs(train(make_model("single", 0.3), rdrop_alpha=0.0, **args))[0]
    usual = step_logs(train(make_model("single", 0.3), rdrop_alpha=0.0))[0]
    assert (found["loss"], found["grad_norm"]) == pytest.approx((usual["loss"], usual["grad_norm"]), rel=1e-5)
    with pytest.raises(ValueError, match=f"this one is a {form.__name__}"):
        train(make_model("single", 0.3), rdrop_alpha=1.0, **args)
