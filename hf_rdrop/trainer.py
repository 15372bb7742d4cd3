"""R-Drop for any Hugging Face `Trainer`, through `compute_loss`."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from .batch import NON_BATCH_INPUTS, get_batch_size, repeat_batch
from .cards.card import write_card
from .checkpoints.resuming import ResumeMixin, set_epoch
from .dropout import draw_own_masks
from .hub.push import CleanPushMixin
from .objective.batch_loss import BatchLoss, Objective
from .objective.heads import without_answers
from .objective.parent_loss import check_was_called
from .training.checks import check_bases, check_batch, check_training_setup
from .training.loss_log import LossLog
from .training.run import Economies
from .training.step_logs import StepLogMixin

if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object  # the mixin calls what every Trainer has, but derives from none


class RDropMixin(CleanPushMixin, ResumeMixin, StepLogMixin, _AnyTrainer):
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
    `kl_share`, the agreement's part of the loss, (alpha / 2 * KL) / CE. `kl_loss` is 0 when alpha is, and at the plain
    steps of an interval.

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

    Further arguments (of the `args` given to the Trainer; their defaults hold for a plain `TrainingArguments`):
        rdrop_alpha: weight of the agreement, >= 0.
        rdrop_passes: number of passes m, >= 2.
        rdrop_dropout: when given, `set_dropout(model, rdrop_dropout)` is applied to the model.
        rdrop_fused_head: `"auto"`, `"on"` or `"off"`: the loss of a language model in place of its head.
        rdrop_shared_layers: number, or fraction, of the lower layers that the passes share; 0 for none.
        rdrop_interval: R-Drop at every n-th optimizer step, n >= 1.

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
    compute_loss_func: Callable[..., Tensor] | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_bases(cls, RDropMixin)

    def __init__(
        self,
        *args: Any,
        logits_for_agreement: Callable[[Any, Mapping[str, Any]], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.logits_for_agreement = logits_for_agreement
        # Have the Trainer count the valid items of each optimizer step whatever the model accepts, and take our loss
        # as scaled whenever it has counted: `compute_loss` does the division.
        self.model_accepts_loss_kwargs, self.loss_is_scaled_for_ga = True, None
        self._log = LossLog()
        self._economies: Economies | None = None
        self._installed = ExitStack()  # of `sub_models` while training
        self._apply_dropout(self.model)
        if self.compute_loss_func is not None:
            self.compute_loss_func = self._as_mean(self.compute_loss_func)
        self.add_callback(_RDropCallback(self))

    # ---- Set-up ----

    def _as_mean(self, loss_func: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Give a user's loss function the count of the labels it sees: a mean, whether it divides by it or not."""

        def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            return loss_func(outputs, labels, num_items_in_batch=self._count_items({"labels": labels}))

        return mean_loss

    @property
    def needs_outputs(self) -> str | None:
        """What of R-Drop's own needs the model's outputs, so that no fused head can take their place."""
        if self.logits_for_agreement is not None:
            return "logits_for_agreement gets the model's outputs"
        if (agreement := self.rdrop_argument("agreement")) != "symmetric_kl":
            return f"rdrop_agreement={agreement} needs the logits"
        if self.rdrop_argument("unlabeled"):
            return "rdrop_unlabeled needs the logits"
        return self.user_of_outputs

    @property
    def user_of_outputs(self) -> str | None:
        """Whose code is handed the model's outputs in training, logits included, if anybody's beside Trainer's."""
        if self.compute_loss_func is not None:
            return "compute_loss_func gets the model's outputs"
        return f"{self._parent_loss} gets the model's outputs" if self._parent_loss else None

    @property
    def _parent_loss(self) -> str | None:
        """The parent's `compute_loss` by name, if it is not Trainer's."""
        parent: Any = super().compute_loss
        return None if parent.__func__ is Trainer.compute_loss else parent.__func__.__qualname__

    def _begin_training(self) -> None:
        """Refuse what cannot work, with a reason, before the first step; forget an interrupted run."""
        self._apply_dropout(self.model)  # a new one when there is a `model_init`
        self._log = self._restore_log()
        if self._economies is not None:
            self._economies.remove()
        self._end_training()
        check_training_setup(self)
        self._installed.enter_context(self.sub_models())
        self._economies = Economies(self)
        # (Processes that share a batch, in tensor parallelism, must draw the same.)
        tensor_parallel = getattr(getattr(self.accelerator, "parallelism_config", None), "tp_size", 1)
        draw_own_masks(self.accelerator.process_index // tensor_parallel, self.args.device)

    def _end_training(self) -> None:
        """Take off the model what `sub_models` put on it."""
        self._installed.close()

    # ---- The objective ----

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            loss = super().training_step(*args, **kwargs)
        finally:
            if self._economies is not None:
                self._economies.stop()
        check_was_called(type(self), self._log)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """R-Drop's loss in training, the plain mean loss of one pass in evaluation. See `RDropMixin`."""
        inputs = without_answers(inputs, self.base_model)
        if not model.training:
            # A copy, because the Trainer pops the labels off the dict when it smooths them.
            found: Any = super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch=None)
            loss, outputs = found if return_outputs else (found, None)
            if (count := self._count_items(inputs)) is not None:
                loss = torch.where(count > 0, loss, 0)  # as in training: not nan for rows without a valid item
            return (loss, outputs) if return_outputs else loss

        found = self._batch_loss(super().compute_loss, model, inputs, return_outputs)
        ce, kl, alpha = found.ce, found.agreement, self._alpha
        count = self._count_items(inputs)
        if count is not None and found.fused is None:
            ce = torch.where(count > 0, ce, 0)  # the mean over no item is 0 and not nan
        share = kl_share = self._step_share(count, num_items_in_batch)
        if self.rdrop_argument("unlabeled") and num_items_in_batch is not None:
            kl_share = self._step_share(self._count_compared(inputs), self._compared_in_step)
        # Without a count, `training_step` divides by the accumulation steps.
        is_scaled = num_items_in_batch is not None or self.compute_loss_func is not None
        weights = (share, kl_share) if is_scaled else (1, 1)
        loss = ce * weights[0] + alpha / 2 * kl * weights[1] if found.fused is None else found.fused * weights[0]

        ce, kl = ce.detach() * share, kl.detach() * kl_share
        parts = torch.stack((ce + alpha / 2 * kl, ce, kl))
        self._log.add(self.state.global_step, parts, self._compares, self.args.logging_nan_inf_filter)
        return (loss, found.outputs) if return_outputs else loss

    def _batch_loss(
        self, parent_loss: Callable[..., Any], model: nn.Module, inputs: dict[str, Any], return_outputs: bool
    ) -> BatchLoss:
        """CE and agreement of a training batch."""
        passes, objective = self._passes, Objective(self, parent_loss)
        if not self.rdrop_argument("alpha"):
            return objective.plain(model, inputs, self.find_labels(inputs))
        labels = check_batch(self, inputs)
        economies = self._economies = self._economies or Economies(self)
        if not economies.tried_out:
            economies.try_out(model, inputs, labels)
        economies.start(passes)
        if economies.fused_head is not None and not return_outputs:
            loss, ce, kl = economies.fused_head.loss(
                model,
                inputs,
                self.repeat,
                passes=passes,
                shift_labels=self.shifts_labels,
                alpha=self._alpha,
                label_smoothing=self.args.label_smoothing_factor,
            )
            return BatchLoss(ce, kl, None, loss)
        if not self._compares:
            return objective.plain(model, inputs, labels)
        return objective.compared(model, inputs, labels, passes)

    def _batch_size(self, inputs: Mapping[str, Any]) -> int:
        return get_batch_size(inputs, (*self.label_names, "input_ids"))

    def repeat(self, inputs: Mapping[str, Any], passes: int) -> dict[str, Any]:
        """The batch for a forward of all passes; extend `non_batch_inputs` for what must not be repeated."""
        size = self._batch_size(inputs)
        return repeat_batch(inputs, passes, batch_size=size, non_batch_inputs=self.non_batch_inputs)

    # ---- Model card ----

    def create_model_card(self, *args: Any, comparison: Any = None, consistency: Any = None, **kwargs: Any) -> None:
        """As the base class's, with R-Drop's evidence on the card; see `hf_rdrop.model_card.write_card`."""
        if self.is_world_process_zero():
            write_card(self, super().create_model_card, args, kwargs, comparison=comparison, consistency=consistency)


class _RDropCallback(TrainerCallback):
    """The moments of training for which Trainer has no method to override."""

    def __init__(self, trainer: RDropMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._begin_training()  # also when `auto_find_batch_size` starts again

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_epoch(kwargs["train_dataloader"], int(state.epoch or 0))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._warn_if_inert()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._end_training()


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
