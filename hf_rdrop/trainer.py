"""R-Drop for any Hugging Face `Trainer`, through `compute_loss`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from .batch import NON_BATCH_INPUTS
from .cards.card import write_card
from .checkpoints.resuming import ResumeMixin, set_epoch
from .generators import draw_own_masks
from .hub.push import CleanPushMixin
from .objective.batch_layout import BatchLayout
from .objective.heads import without_answers
from .objective.parent_loss import ParentLoss
from .sub_models import SubModels
from .training.checks import check_bases, check_scale, check_was_called
from .training.first_batch import labels_explained
from .training.knobs import set_rate
from .training.loss_function import LossFunctionMixin
from .training.loss_log import LossLog, log_fields, warn_of_inert
from .training.run import TrainingRun
from .training.settings import Settings

if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object  # the mixin calls what every Trainer has, but derives from none


class RDropMixin(CleanPushMixin, ResumeMixin, LossFunctionMixin, _AnyTrainer):
    """Makes the objective of the `Trainer` class it is mixed in before R-Drop's: ``class T(RDropMixin, MyTrainer)``.

    In training, each batch is repeated (`[x; x]`, one forward, two dropout masks) and

        loss = mean_j CE_j + rdrop_alpha / 2 * mean_{i<j} sKL(P_i, P_j)

    where CE is whatever the parent's `compute_loss` returns for the repeated batch (label smoothing,
    `compute_loss_func`, class weights and so on stay the parent's own). Evaluation and prediction are one plain pass.
    With `rdrop_alpha=0` nothing is repeated: the parent's loss. Language models with a large vocabulary compute the
    same loss without their full logits (`FusedHead`), unless the outputs are asked for.

    The loss is a mean over the valid items (labels that are not -100) of the whole optimizer step: however the rows
    are divided over gradient accumulation and processes, loss and gradients are the same, also with `rdrop_alpha=0`
    and also for the many heads that ignore `num_items_in_batch`.

    Every training log line gains `ce_loss` and `kl_loss` with ``loss = ce_loss + rdrop_alpha / 2 * kl_loss``, and
    `kl_share`, the divergence's part of the loss, (alpha / 2 * KL) / CE. `kl_loss` is averaged over all steps; plain
    steps count as 0.

    Args:
        logits_for_agreement: what the passes are compared by, for a model whose outputs are not those of a supported
            head. A function of the model's outputs for the repeated batch (m * B rows, pass after pass) and of the
            batch before it was repeated (B rows). It is called in training only, while the loss stays the model's or
            the parent's own, and returns one of

            - the scores of classes `[m * B, ..., C]`;
            - (scores, mask), with the items to compare in a boolean or 0/1 `[B, ...]`;
            - (scores, mask or None, problem type): `"single_label_classification"`, `"multi_label_classification"` for
              scores that are labels by themselves or `"regression"` for predictions, both `[m * B, ...]` with a mask
              `[B, ...]` of the same shape.

            Accumulated batches count by their labels: by `labels`, else the first of `label_names` that is in the
            batch, and with none of them all alike.

    The `rdrop_*` arguments are those of `RDropArguments`; a plain `TrainingArguments` means their defaults.

    Raises:
        ValueError: before the first step, when the set-up cannot work (nothing stochastic in the model, unsupported
            head, packed batches, sequence parallelism, several GPUs in one process, layers that cannot be shared); in
            it, when `logits_for_agreement` returns something else, or scores without a gradient.

    Attributes:
        non_batch_inputs: names of model inputs that are not per example, which are never repeated; extend it in a
            subclass when your model takes such inputs.

    Source: Liang et al. 2021 (arXiv 2106.14448).

    Example:
        >>> def spans(outputs, inputs):  # of a model that returns {"loss": ..., "span_scores": [rows, T, C], ...}
        ...     return outputs["span_scores"], inputs["attention_mask"]
        >>> trainer = RDropTrainer(model=model, args=args, train_dataset=train, logits_for_agreement=spans)
    """

    non_batch_inputs: frozenset[str] = NON_BATCH_INPUTS
    _run: TrainingRun | None = None  # read it through `rdrop_run`, which keeps it up to date
    _unwrapped: tuple[Any, nn.Module] | None = None
    _calls: list[Tensor] | None = None  # loss, CE and KL of each `compute_loss` of a `training_step`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_bases(cls, RDropMixin)

    def __init__(
        self, *args: Any, logits_for_agreement: Callable[[Any, Mapping[str, Any]], Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.logits_for_agreement = logits_for_agreement
        # Have the Trainer count the valid items of each optimizer step whatever the model accepts, and take our loss
        # as scaled whenever it has counted: `compute_loss` does the division.
        self.model_accepts_loss_kwargs, self.loss_is_scaled_for_ga = True, None
        self._log = LossLog()
        set_rate(self.model, Settings.of(self.args).dropout)
        self.add_callback(_RDropCallback(self))

    # ---- The objective ----

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute R-Drop's loss in training, the plain mean loss of one pass in evaluation. See `RDropMixin`."""
        run, state = self.rdrop_run, self.state
        if isinstance(inputs, Mapping):
            inputs = without_answers(inputs, run.model)
        if not model.training:
            with labels_explained(run.model, run.layout, inputs):
                loss, outputs, _ = run.parent_loss.of(model, inputs, return_outputs)
            if (count := run.items.labelled(inputs)) is not None:
                loss = torch.where(count > 0, loss, 0)  # as in training: not nan for rows without a valid item
            return (loss, outputs) if return_outputs else loss

        plan, count = run.settings.plan(state.global_step, state.max_steps), run.items.labelled(inputs)
        # Accumulation. Both terms are means over this batch, and the optimizer step's are means over all its items, so
        # each batch counts by its items, here and nowhere else: the parent was not told of the step's count. With
        # `average_tokens_across_devices` that count is of all ranks, whose gradients are then averaged: times ranks.
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        accumulated = getattr(self, "current_gradient_accumulation_steps", 1)
        weights = run.items.shares(inputs, count, num_items_in_batch, ranks, accumulated)
        with labels_explained(run.model, run.layout, inputs):
            terms = run.loss(model, inputs, plan, return_outputs)
        ce, kl = terms.ce, terms.divergence
        if count is not None and terms.fused is None:
            ce = torch.where(count > 0, ce, 0)  # the mean over no item is 0 and not nan
        # Without a count, the Trainer's `training_step` divides by the accumulation steps itself.
        divided = num_items_in_batch is not None or self.compute_loss_func is not None
        w = weights if divided else (1, 1)
        loss = ce * w[0] + plan.alpha / 2 * kl * w[1] if terms.fused is None else terms.fused * w[0]

        ce, kl = ce.detach() * weights[0], kl.detach() * weights[1]
        parts = torch.stack((ce + plan.alpha / 2 * kl, ce, kl))
        if self._calls is not None:
            self._calls.append(parts)
        elif not self.is_in_train:  # else it is an evaluation in training mode, as Monte Carlo dropout
            self._log.add(state.global_step, parts, plan.compares, self.args.logging_nan_inf_filter)
        return (loss, terms.outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        run, outer, self._calls = self.rdrop_run, self._calls, []
        try:
            loss = super().training_step(*args, **kwargs)
        finally:
            calls, self._calls = self._calls, outer
            run.stop()
        check_was_called(type(self), calls)
        # A parent may compute several losses (adversarial training): the one that it returns is the one that counts.
        parts = calls[0] if len(calls) == 1 else torch.stack(calls)[_nearest(calls, loss)]
        if self._log.is_fresh:
            check_scale(type(self), parts[0], loss, getattr(self, "current_gradient_accumulation_steps", 1))
        compares = run.settings.plan(self.state.global_step, self.state.max_steps).compares
        self._log.add(self.state.global_step, parts, compares, self.args.logging_nan_inf_filter)
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Count the valid items of one optimizer step, on all ranks when `average_tokens_across_devices`.

        (In place of the base class's count, which does not know what each head's own loss averages over.)
        """
        run = self.rdrop_run
        for batch in batch_samples:
            if self.is_in_train and not run.measured:
                # (Not by the parent's _prepare_inputs, which may generate or count.)
                run.measure(self.model_wrapped, self._prepare_input(batch))
        across = self.args.average_tokens_across_devices and self.args.world_size > 1
        return run.items.of_step(batch_samples, device, self.accelerator.gather if across else None)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        plan = self.rdrop_run.settings.plan(self.state.global_step, self.state.max_steps)
        return super().floating_point_ops(inputs) * plan.passes

    # ---- The run ----

    @property
    def rdrop_run(self) -> TrainingRun:
        """R-Drop's part of this training: its settings, and what is on the model.

        Made when training begins, or for a `compute_loss` outside it. An argument that a callback changes counts from
        the next batch on.
        """
        if self._run is None or self._run.model is not self.base_model:
            self._run = self._new_run()
        if self._run.settings != (settings := Settings.of(self.args)):
            self._run.read(settings)
        return self._run

    def _new_run(self) -> TrainingRun:
        return TrainingRun(
            self.base_model,
            self.args,
            BatchLayout.of(self.base_model, self.label_names, self.non_batch_inputs),
            ParentLoss(
                super().compute_loss,
                self._parent_name,
                self.user_of_outputs,
                lambda batch: self.rdrop_run.items.labelled(batch),
            ),
            logits_for_agreement=self.logits_for_agreement,
            needs_outputs=self.needs_outputs,
            label_smoothing=0.0 if self.label_smoother is None else self.args.label_smoothing_factor,
            shows=self.is_world_process_zero(),
        )

    @property
    def base_model(self) -> nn.Module:
        """The model without wrappers and adapters; looked for once, because unwrapping walks through all modules."""
        if self._unwrapped is None or self._unwrapped[0] is not self.model:
            model = self.accelerator.unwrap_model(self.model)
            self._unwrapped = self.model, model.get_base_model() if hasattr(model, "get_base_model") else model
        return self._unwrapped[1]

    @property
    def needs_outputs(self) -> str | None:
        """Who of R-Drop's own needs the model's outputs, so that no fused head can take their place."""
        settings = Settings.of(self.args)
        if self.logits_for_agreement is not None:
            return "logits_for_agreement gets the model's outputs"
        if settings.agreement != "symmetric_kl":
            return f"rdrop_agreement={settings.agreement} needs the logits"
        if settings.unlabeled:
            return "rdrop_unlabeled needs the logits"
        if self.compute_loss_func is not None:  # also where a subclass says that nobody needs them
            return "compute_loss_func gets the model's outputs"
        return self.user_of_outputs

    @property
    def user_of_outputs(self) -> str | None:
        """Name of the user code that reads the model's outputs in training, or None."""
        if self.compute_loss_func is not None:
            return "compute_loss_func gets the model's outputs"
        return f"{self._parent_name} gets the model's outputs" if self._parent_name else None

    @property
    def _parent_name(self) -> str | None:
        """The parent's `compute_loss` by name, if it is not Trainer's."""
        parent: Any = super().compute_loss
        return None if parent.__func__ is Trainer.compute_loss else parent.__func__.__qualname__

    @contextmanager
    def sub_models(self) -> Iterator[SubModels | None]:
        """Put the sources of sub-models that the arguments ask for on the model for a moment; None without any."""
        with self.rdrop_run.sub_models() as sources:
            yield sources

    # ---- From the first step to the last ----

    def check_setup(self) -> None:
        """Raise a ValueError where training with R-Drop would fail, be wrong or do nothing, as `train` does."""
        self._new_run().check_setup(self.accelerator)

    def _begin_training(self) -> None:
        """Check the set-up, forget an interrupted run, and put on the model what training needs."""
        set_rate(self.model, Settings.of(self.args).dropout)  # a new one when there is a `model_init`
        self._log = LossLog(self.state.global_step, self.restore_sums(), self.args.device)
        self.keep(self._log)
        if self._run is not None:
            self._run.remove()
        self._run = self._new_run()
        self._run.check_setup(self.accelerator, self.optimizer)
        self._run.begin()
        # (Processes that share a batch, in tensor parallelism, must draw the same.)
        tensor_parallel = getattr(getattr(self.accelerator, "parallelism_config", None), "tp_size", 1)
        draw_own_masks(self.accelerator.process_index // tensor_parallel, self.args.device)

    def _end_step(self) -> None:
        """Say once, after the first hundred steps, when the divergence does nothing."""
        settings = self.rdrop_run.settings
        alpha = settings.alpha if settings.alpha_schedule == "constant" else 0
        share = self._log.inert_share(self.state.global_step, alpha)
        if share is not None and self.is_world_process_zero():
            warn_of_inert(share, alpha, self.base_model)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the base class's; a training line gains `ce_loss`, `kl_loss`, `kl_share` (see `log_fields`)."""
        state = self.state
        if "loss" in logs and (means := self._log.means(state.global_step, self.accelerator.gather)) is not None:
            settings = self.rdrop_run.settings
            logs.update(log_fields(means, settings, settings.alpha_at(state.global_step, state.max_steps)))
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, comparison: Any = None, consistency: Any = None, **kwargs: Any) -> None:
        """As the base class's, with R-Drop's evidence on the card; see `hf_rdrop.cards.card.write_card`."""
        if self.is_world_process_zero():
            base_card, facts = super().create_model_card, self.rdrop_run.facts()
            write_card(self, base_card, args, kwargs, facts, comparison=comparison, consistency=consistency)


def _nearest(calls: list[Tensor], loss: Tensor) -> Tensor:
    return (torch.stack([parts[0] for parts in calls]) - loss).abs().argmin()  # on the device: no waiting for it


class _RDropCallback(TrainerCallback):
    """The moments of training for which Trainer has no method to override."""

    def __init__(self, trainer: RDropMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._begin_training()  # also when `auto_find_batch_size` starts again

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_epoch(kwargs["train_dataloader"], int(state.epoch or 0))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._end_step()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.rdrop_run.end()


class RDropTrainer(RDropMixin, Trainer):
    """`Trainer` with R-Drop's objective, for all heads but those that generate in evaluation. See `RDropMixin`.

    Example:
        >>> trainer = RDropTrainer(
        ...     model=model, args=RDropTrainingArguments("out", rdrop_alpha=1.0), train_dataset=train, ...
        ... )
        >>> trainer.train()
    """


class RDropSeq2SeqTrainer(RDropMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with R-Drop's objective: translation, summarisation (`predict_with_generate` included)."""
