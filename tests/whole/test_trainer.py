"""The objective inside real Trainer runs, what is logged, and that evaluation stays one plain pass."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_rdrop import RDropMixin, RDropSeq2SeqTrainer, RDropTrainer, RDropTrainingArguments, inspect_dropout
from support.reference import torch_reference
from support.settings import TINY, causal_rows, make_llama
from support.training import InOrder, make_collator, make_model, make_rows, step_logs, train

PROBLEM_TYPES = {"multi": "multi_label_classification", "regression": "regression"}


def make_trainer(head, alpha, tmp, dropout=0.3, trainer_class=RDropTrainer, **args):
    model = make_model(head, dropout)
    args = RDropTrainingArguments(tmp, rdrop_alpha=alpha, use_cpu=True, report_to=[], **args)
    return trainer_class(model=model, args=args, data_collator=make_collator(head, model))


def make_batch(head, model, rows=5):
    return make_collator(head, model)(make_rows(head, rows, seed=3))


def record_batch_sizes(model):
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return sizes


# ---- the objective ----


@pytest.mark.parametrize("passes", [2, 3])
@pytest.mark.parametrize("rows", [1, 5])
def test_loss_and_gradients_are_the_formulas_on_the_models_own_logits(head, rows, passes, tmp_path):
    trainer = make_trainer(head, 2.0, str(tmp_path), rdrop_passes=passes)
    model, batch = trainer.model.train(), make_batch(head, trainer.model, rows)
    torch.manual_seed(1)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    loss.backward()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = {name: p.grad.clone() for name, p in parameters.items()}
    model.zero_grad()

    torch.manual_seed(1)  # the same dropout masks
    logits = model(**{name: torch.cat([value] * passes) for name, value in batch.items()}).logits
    stacked = logits.double().unflatten(0, (passes, rows))
    labels = batch["labels"]
    if head in ("token", "seq2seq"):
        stacked, labels = stacked.flatten(1, 2), labels.flatten()
    if head == "regression":
        stacked = stacked.squeeze(-1)
    expected, _, kl = torch_reference(stacked, labels, 2.0, PROBLEM_TYPES.get(head, "single_label_classification"))
    expected.backward()
    assert kl.item() > 1e-4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(outputs["logits"]) == rows
    for name, p in parameters.items():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-5, msg=lambda t, name=name: f"{name}: {t}")


def test_every_parameter_moves(head):
    before = {name: value.clone() for name, value in make_model(head).named_parameters()}
    trainer = train(make_model(head), head, rdrop_alpha=1.0, learning_rate=1e-2)
    still = [
        name
        for name, value in trainer.model.named_parameters()
        if torch.equal(value, before[name]) and value.requires_grad
    ]
    assert still == []


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_the_callers_batch_is_not_changed(head, alpha, tmp_path):
    smoothing = 0.1 if head in ("single", "token", "seq2seq") else 0.0  # the Trainer then pops the labels
    trainer = make_trainer(head, alpha, str(tmp_path), label_smoothing_factor=smoothing)
    batch = make_batch(head, trainer.model)
    kept = {name: value.clone() for name, value in batch.items()}
    for model in (trainer.model.train(), trainer.model.eval()):
        trainer.compute_loss(model, batch)
        assert list(batch) == list(kept)
        assert all(torch.equal(batch[name], value) for name, value in kept.items())


def test_no_valid_item_gives_zero_and_finite_gradients(tmp_path):
    for alpha, smoothing in ((0.0, 0.0), (0.0, 0.1), (2.0, 0.0), (2.0, 0.1)):
        trainer = make_trainer("token", alpha, str(tmp_path), label_smoothing_factor=smoothing)
        batch = make_batch("token", trainer.model)
        batch["labels"].fill_(-100)
        loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=torch.tensor(0))
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is None or torch.all(p.grad == 0) for p in trainer.model.parameters())


def test_evaluation_of_rows_without_a_valid_item_gives_no_nan(tmp_path):
    rows = make_rows("token", 4)
    for row in rows:
        row["labels"] = [-100] * 8
    trainer = make_trainer("token", 2.0, str(tmp_path))
    assert trainer.evaluate(rows)["eval_loss"] == 0
    assert trainer.evaluate(rows + make_rows("token", 4, seed=1))["eval_loss"] > 0


def test_loss_is_the_batchs_share_of_the_step(tmp_path):
    """Called directly: a mean without a count, and its share of the count with one (a tensor or a plain number)."""
    trainer = make_trainer("token", 2.0, str(tmp_path), dropout=1e-9)
    model, batch = trainer.model.train(), make_batch("token", trainer.model)
    mean = trainer.compute_loss(model, batch)
    items = int((batch["labels"] != -100).sum())
    for count in (4 * items, torch.tensor(4 * items)):
        torch.testing.assert_close(trainer.compute_loss(model, batch, num_items_in_batch=count), mean / 4)


def test_a_micro_batch_without_valid_items_does_not_disturb_the_others():
    rows = make_rows("token", 8)
    for row in rows[4:]:
        row["labels"] = [-100] * 8
    args = {"rows": InOrder(rows), "max_steps": 1, "rdrop_alpha": 2.0}
    halves = train(
        make_model("token", 1e-9), "token", per_device_train_batch_size=4, gradient_accumulation_steps=2, **args
    )
    whole = train(make_model("token", 1e-9), "token", per_device_train_batch_size=8, **args)
    assert step_logs(halves)[0]["loss"] == pytest.approx(step_logs(whole)[0]["loss"], rel=1e-5)
    assert step_logs(halves)[0]["grad_norm"] == pytest.approx(step_logs(whole)[0]["grad_norm"], rel=1e-5)


def test_ragged_last_batch_trains():
    trainer = train(make_model("single"), rows=make_rows("single", 17), max_steps=-1, num_train_epochs=1)
    assert [math.isfinite(entry["kl_loss"]) for entry in step_logs(trainer)] == [True, True]


def test_an_input_that_is_not_per_example_is_not_repeated(tmp_path):
    class Weighted(nn.Module):
        """Class weights come with the batch; there are as many classes as rows."""

        def __init__(self):
            super().__init__()
            self.bert = make_model("single", 0.3)

        def forward(self, input_ids, class_weights, labels):
            logits = self.bert(input_ids).logits
            return {"loss": F.cross_entropy(logits, labels, class_weights), "logits": logits}

    class WeightedTrainer(RDropTrainer):
        non_batch_inputs = RDropTrainer.non_batch_inputs | {"class_weights"}

    args = RDropTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = WeightedTrainer(model=Weighted(), args=args)
    batch = make_batch("single", trainer.model, rows=3)
    batch = {"input_ids": batch["input_ids"], "labels": batch["labels"], "class_weights": torch.ones(3)}
    assert trainer.compute_loss(trainer.model.train(), batch).isfinite()


# ---- logs ----


def test_logged_terms_add_up(head):
    smoothing = 0.1 if head == "seq2seq" else 0.0
    alpha = 3.0
    trainer = train(
        make_model(head, 0.3),
        head,
        max_steps=6,
        logging_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        label_smoothing_factor=smoothing,
        rdrop_alpha=alpha,
    )
    assert len(step_logs(trainer)) == 3
    for entry in step_logs(trainer):
        assert entry["kl_loss"] > 1e-3  # the halves of the batch went through different sub-models
        assert entry["loss"] == pytest.approx(entry["ce_loss"] + alpha / 2 * entry["kl_loss"], rel=1e-5)
        assert entry["kl_share"] == pytest.approx(alpha / 2 * entry["kl_loss"] / entry["ce_loss"], rel=1e-5)


def test_alpha_zero_logs_no_agreement():
    for entry in step_logs(train(make_model("single"), rdrop_alpha=0.0)):
        assert entry["kl_loss"] == entry["kl_share"] == 0 and entry["ce_loss"] == pytest.approx(entry["loss"])


def test_a_nan_step_is_left_out_of_all_logged_terms_alike():
    class Exploding(RDropTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.state.global_step == 1:
                inputs = {**inputs, "labels": inputs["labels"] * float("nan")}
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = train(make_model("regression"), "regression", Exploding, max_steps=2, logging_steps=2, max_grad_norm=0)
    (entry,) = step_logs(trainer)
    assert entry["loss"] == pytest.approx(entry["ce_loss"] + 1.0 / 2 * entry["kl_loss"], rel=1e-5)


def test_logs_start_afresh_when_a_smaller_batch_is_tried():
    """`auto_find_batch_size` starts the loop again after an out-of-memory error in the middle of a logging window."""

    class Small(RDropTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self._train_batch_size > 8 and self.state.global_step == 1:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = train(
        make_model("single", 0.3),
        "single",
        Small,
        per_device_train_batch_size=9,
        max_steps=3,
        logging_steps=3,
        auto_find_batch_size=True,
    )
    entry = step_logs(trainer)[-1]
    assert trainer._train_batch_size <= 8
    assert entry["loss"] == pytest.approx(entry["ce_loss"] + 1.0 / 2 * entry["kl_loss"], rel=1e-5)


def test_an_inert_agreement_term_is_said_once(caplog):
    def warnings():
        return [r.getMessage() for r in caplog.records if "agreement term hardly changes" in r.getMessage()]

    hundred = {"max_steps": 130, "per_device_train_batch_size": 4, "logging_steps": 50}
    train(make_model("single", 0.01), rdrop_alpha=0.1, **hundred)
    (message,) = warnings()
    assert "rdrop_dropout; now [0.01]" in message and "rdrop_alpha (now 0.1)" in message
    train(make_model("single", 0.3), rdrop_alpha=5.0, **hundred)  # acts
    train(make_model("single", 0.01), rdrop_alpha=0.0, **hundred)  # is off
    train(make_model("single", 0.01), rdrop_alpha=0.1, **{**hundred, "max_steps": 20})  # too early to tell
    assert len(warnings()) == 1


def test_floating_point_operations_count_the_passes():
    plain, two, three = (
        train(make_model("single"), rdrop_alpha=alpha, rdrop_passes=passes).state.total_flos
        for alpha, passes in ((0.0, 2), (1.0, 2), (1.0, 3))
    )
    assert two == 2 * plain > 0 and three == 3 * plain


# ---- evaluation ----


def test_evaluation_and_prediction_are_one_plain_pass(head):
    model = make_model(head, 0.3)
    sizes = record_batch_sizes(model)
    trainer = train(model, head, rdrop_alpha=2.0, per_device_eval_batch_size=4)
    # Training: twice 16 rows. Before it two rows show which positions a language model's loss scores.
    assert sizes == [2] * (head == "seq2seq") + [32, 32]
    sizes.clear()
    rows = make_rows(head, 11, seed=1)
    metrics = trainer.evaluate()
    prediction = trainer.predict(rows)
    assert sizes == [4, 4, 3] * 2
    assert len(prediction.predictions if head != "seq2seq" else prediction.predictions[0]) == 11

    batches = [make_collator(head, model)(rows[i : i + 4]) for i in (0, 4, 8)]
    with torch.no_grad():
        losses = [model.eval()(**batch).loss.item() for batch in batches]
    expected = sum(loss * size for loss, size in zip(losses, (4, 4, 3), strict=True)) / 11
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_predict_with_generate():
    model = make_model("seq2seq", 0.3)
    trainer = train(
        model,
        "seq2seq",
        RDropSeq2SeqTrainer,
        rdrop_alpha=5.0,
        predict_with_generate=True,
        generation_max_length=9,
        eval_strategy="steps",
        eval_steps=1,
        trainer_kwargs={"compute_metrics": lambda p: {"rows": len(p.predictions)}},
    )
    evals = [entry for entry in trainer.state.log_history if "eval_rows" in entry]
    assert [entry["eval_rows"] for entry in evals] == [11, 11]
    assert all(math.isfinite(entry["eval_loss"]) for entry in evals)
    assert np.asarray(trainer.predict(make_rows("seq2seq", 11, seed=1)).predictions).shape[0] == 11


# ---- ways in ----


def test_plain_training_arguments_use_the_defaults():
    trainer = train(make_model("single", 0.3), args_class=TrainingArguments)
    assert not hasattr(trainer.args, "rdrop_alpha")  # a user's arguments are not changed
    (first, _) = step_logs(trainer)
    assert first["loss"] == pytest.approx(first["ce_loss"] + 1.0 / 2 * first["kl_loss"], rel=1e-5)
    assert first["kl_loss"] > 0


def test_the_mixin_keeps_another_trainers_loss(tmp_path):
    """Class weights by subclass, the documented way; R-Drop goes on top."""

    class ClassWeights(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
            loss = F.cross_entropy(outputs.logits, inputs["labels"], torch.tensor([1.0, 5.0, 0.1]))
            return (loss, outputs) if return_outputs else loss

    class Both(RDropMixin, ClassWeights):
        pass

    trainer = make_trainer("single", 2.0, str(tmp_path), dropout=1e-9, trainer_class=Both)
    batch = make_batch("single", trainer.model)
    model = trainer.model.train()
    expected = F.cross_entropy(
        model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"], torch.tensor([1.0, 5.0, 0.1])
    )
    assert trainer.compute_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def sum_over_count(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits.flatten(0, -2), labels.flatten(), reduction="sum") / num_items_in_batch


def plain_mean(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits.flatten(0, -2), labels.flatten())


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_a_users_loss_function_may_divide_by_the_count_or_not(alpha):
    reference = None
    for loss_func in (None, sum_over_count, plain_mean):
        for size, steps in ((16, 1), (4, 4)):
            trainer = train(
                make_model("token", 1e-9),
                "token",
                rows=InOrder(make_rows("token", 32)),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                rdrop_alpha=alpha,
                trainer_kwargs={"compute_loss_func": loss_func},
            )
            values = [entry[key] for entry in step_logs(trainer) for key in ("loss", "ce_loss", "grad_norm")]
            reference = reference or values
            assert values == pytest.approx(reference, rel=1e-4)
            assert trainer.evaluate()["eval_loss"] > 0


def test_rdrop_dropout_is_set_on_given_and_on_made_models(tmp_path):
    args = RDropTrainingArguments(str(tmp_path), rdrop_dropout=0.25, use_cpu=True, report_to=[], max_steps=1)
    given = RDropTrainer(model=make_model("single", 0.0), args=args)
    made = RDropTrainer(model_init=lambda: make_model("single", 0.0), args=args, train_dataset=make_rows("single"))
    made.train()
    for trainer in (given, made):
        assert {source.rate for source in inspect_dropout(trainer.model)} == {0.25}
        assert trainer.model.config.hidden_dropout_prob == 0.25


def test_every_trial_of_a_search_trains_at_its_own_dropout_and_alpha(tmp_path):
    pytest.importorskip("optuna", reason="the search needs optuna, of the scripts extra")
    rates, seen = [0.05, 0.2, 0.4], []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append((args.rdrop_alpha, *{source.rate for source in inspect_dropout(model)}))

    trainer = RDropTrainer(
        model_init=lambda: make_model("single", 0.1),
        args=RDropTrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], max_steps=1, disable_tqdm=True, save_strategy="no"
        ),
        train_dataset=make_rows("single"),
        eval_dataset=make_rows("single"),
        callbacks=[Watch()],
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"rdrop_dropout": rates[trial.number], "rdrop_alpha": trial.number + 1.0},
        backend="optuna",
        n_trials=3,
    )
    assert seen == [(1.0, 0.05), (2.0, 0.2), (3.0, 0.4)]


def test_a_plain_module_returning_a_tuple_trains(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(40, 8), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 3))

        def forward(self, input_ids, labels=None):
            logits = self.net(input_ids)
            return F.cross_entropy(logits, labels), logits

    trainer = train(Plain(), max_steps=3)
    assert all(entry["kl_loss"] > 0 for entry in step_logs(trainer))


def test_lora_adapters_train_with_the_base_frozen():
    peft = pytest.importorskip("peft")
    model = make_model("single", 0.3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], lora_dropout=0.2)
    adapted = peft.get_peft_model(model, config)
    before = {name: value.clone() for name, value in adapted.named_parameters()}
    trainer = train(adapted, max_steps=3, learning_rate=1e-2, rdrop_alpha=2.0)
    moved = {name for name, value in adapted.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert all(entry["kl_loss"] > 0 for entry in step_logs(trainer))


# ---- what other Trainers do in their steps ----


class Adversarial(Trainer):
    """FGM: a second loss and backward pass with the embeddings moved along their gradient."""

    second_counts = False

    def training_step(self, model, inputs, num_items_in_batch=None):
        first = super().training_step(model, dict(inputs), num_items_in_batch)
        weight = model.get_input_embeddings().weight
        kept = weight.data.clone()
        weight.data += weight.grad / (weight.grad.norm() + 1e-8)
        second = super().training_step(model, dict(inputs), num_items_in_batch)
        weight.data = kept
        return second if self.second_counts else first


class SecondCounts(Adversarial):
    second_counts = True


class DropoutInPrediction(Trainer):
    """Monte Carlo dropout: a loss in training mode, within an evaluation."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        model.train()
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, outputs["logits"], inputs["labels"]


@pytest.mark.parametrize("parent", [Adversarial, SecondCounts, DropoutInPrediction])
def test_the_log_holds_the_loss_that_is_returned(parent):
    class Ours(RDropMixin, parent):
        returned = ()

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.returned = (*self.returned, loss.item())
            return loss

    args = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    trainer = train(make_model("single", 0.3), trainer_class=Ours, rdrop_alpha=2.0, **args)
    assert len(step_logs(trainer)) == 3
    for entry, returned in zip(step_logs(trainer), trainer.returned, strict=True):
        assert entry["kl_loss"] > 0
        assert entry["loss"] == pytest.approx(returned, rel=1e-5)
        assert entry["loss"] == pytest.approx(entry["ce_loss"] + entry["kl_loss"], rel=1e-5)


class ChangesLabels(Trainer):
    """Ignores the first labels of a batch, in place."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        labels.masked_fill_(labels == 0, -100)
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_items_are_counted_before_a_parent_changes_labels_in_place(alpha):
    """Whatever it ignores, its loss is a mean, and the batch counts by the labels that the step was counted with."""
    trainer_class = type("Ours", (RDropMixin, ChangesLabels), {})
    found = train(make_model("single", TINY), trainer_class=trainer_class, rdrop_alpha=alpha, max_steps=1)
    rows = [{**row, "labels": row["labels"] or -100} for row in make_rows("single", 32)]
    plain = train(make_model("single", TINY), rows=rows, rdrop_alpha=alpha, max_steps=1)
    assert step_logs(found)[0]["loss"] == pytest.approx(step_logs(plain)[0]["loss"], rel=1e-5)


class OtherOrder(Trainer):
    def compute_loss(self, model, inputs, num_items_in_batch=None, return_outputs=False):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class KeywordsOnly(Trainer):
    def compute_loss(self, model, inputs, *, return_outputs=False, **kwargs):
        return OtherOrder.compute_loss(self, model, inputs, return_outputs=return_outputs)


@pytest.mark.parametrize("alpha", [0.0, 2.0])
@pytest.mark.parametrize("parent", [OtherOrder, KeywordsOnly])
def test_a_parents_loss_is_called_by_keyword(parent, alpha):
    trainer = train(make_model("single", 0.3), trainer_class=type("Ours", (RDropMixin, parent), {}), rdrop_alpha=alpha)
    plain = train(make_model("single", 0.3), rdrop_alpha=alpha)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


class Prepares(Trainer):
    """As trainers of reinforcement learning, which make their batches in `_prepare_inputs`, once for each."""

    prepared = 0

    def _prepare_inputs(self, inputs):
        self.prepared += 1
        if isinstance(inputs, list):
            inputs = make_collator("single", self.model)(inputs)
        return super()._prepare_inputs(inputs)


class FromLists(Prepares):
    def get_train_dataloader(self):
        self.data_collator = list
        return super().get_train_dataloader()


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_batches_may_be_lists_until_they_are_prepared(alpha):
    args = {"rdrop_alpha": alpha, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    lists = train(make_model("single", 0.3), trainer_class=type("Ours", (RDropMixin, FromLists), {}), **args)
    plain = train(make_model("single", 0.3), **args)
    assert lists.prepared == 8
    assert [entry["loss"] for entry in step_logs(lists)] == pytest.approx([e["loss"] for e in step_logs(plain)])


def test_a_parents_preparation_runs_once_for_each_batch():
    trainer_class = type("Ours", (RDropMixin, Prepares), {})
    assert train(make_llama(0.3), "token", rows=causal_rows(), trainer_class=trainer_class).prepared == 2
