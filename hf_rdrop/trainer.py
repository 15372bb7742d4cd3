"""R-Drop for any Hugging Face `Trainer`, through `compute_loss`."""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from .batch import NON_BATCH_INPUTS, first_rows, get_batch_size, repeat_batch
from .checks import check_bases, check_batch, check_training_setup
from .dropout import draw_own_masks, inspect_dropout, set_dropout
from .economies import Economies
from .heads import predicts_next_token, resolve_head, valid_items
from .hub import CleanPushMixin
from .loss_log import INERT_SHARE, INERT_STEPS, LossLog
from .model_card import write_card
from .parent_loss import check_comparison, check_was_called, logits_to_compare, recorded_outputs
from .resuming import ResumeMixin, set_epoch
from .training_args import RDropArguments

if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object  # the mixin calls what every Trainer has, but derives from none

logger = logging.getLogger(__name__)


class RDropMixin(CleanPushMixin, ResumeMixin, _AnyTrainer):
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

    Args (of the `args` given to the Trainer; their defaults hold for a plain `TrainingArguments`):
        rdrop_alpha: weight of the agreement, >= 0.
        rdrop_passes: number of passes m, >= 2.
        rdrop_dropout: when given, `set_dropout(model, rdrop_dropout)` is applied to the model.
        rdrop_fused_head: `"auto"`, `"on"` or `"off"`: the loss of a language model in place of its head.
        rdrop_shared_layers: number, or fraction, of the lower layers that the passes share; 0 for none.
        rdrop_interval: R-Drop at every n-th optimizer step, n >= 1.

    Raises:
        ValueError: before the first step, when the set-up cannot work (nothing stochastic in the model, unsupported
            head, packed batches, sequence parallelism, several GPUs in one process, layers that cannot be shared).

    Attributes:
        non_batch_inputs: names of model inputs that are not per example, which are never repeated; extend it in a
            subclass when your model takes such inputs.

    Source: Liang et al. 2021 (arXiv 2106.14448).
    """

    non_batch_inputs: frozenset[str] = NON_BATCH_INPUTS
    compute_loss_func: Callable[..., Tensor] | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_bases(cls, RDropMixin)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Have the Trainer count the valid items of each optimizer step whatever the model accepts, and take our loss
        # as scaled whenever it has counted: `compute_loss` does the division.
        self.model_accepts_loss_kwargs, self.loss_is_scaled_for_ga = True, None
        self._log = LossLog()
        self._economies: Economies | None = None
        self._unwrapped: tuple[Any, nn.Module] | None = None
        self._apply_dropout(self.model)
        if self.compute_loss_func is not None:
            self.compute_loss_func = self._as_mean(self.compute_loss_func)
        self.add_callback(_RDropCallback(self))

    # ---- Set-up ----

    def _apply_dropout(self, model: Any) -> None:
        if (p := self.rdrop_argument("dropout")) is not None:
            set_dropout(model, p)

    def rdrop_argument(self, name: str) -> Any:
        """An R-Drop argument, or its default where `args` is a plain `TrainingArguments`."""
        return getattr(self.args, f"rdrop_{name}", getattr(RDropArguments, f"rdrop_{name}"))

    def _as_mean(self, loss_func: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Give a user's loss function the count of the labels it sees: a mean, whether it divides by it or not."""

        def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            return loss_func(outputs, labels, num_items_in_batch=self._count_items({"labels": labels}))

        return mean_loss

    @property
    def base_model(self) -> nn.Module:
        """The model without wrappers and adapters; looked for once, because unwrapping walks through all modules."""
        if self._unwrapped is None or self._unwrapped[0] is not self.model:
            model = self.accelerator.unwrap_model(self.model)
            self._unwrapped = self.model, model.get_base_model() if hasattr(model, "get_base_model") else model
        return self._unwrapped[1]

    @property
    def shifts_labels(self) -> bool:
        """Whether the head scores position t against label t + 1 (causal language models)."""
        return predicts_next_token(self.base_model)

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
        check_training_setup(self)
        self._economies = Economies(self)
        # (Processes that share a batch, in tensor parallelism, must draw the same.)
        tensor_parallel = getattr(getattr(self.accelerator, "parallelism_config", None), "tp_size", 1)
        draw_own_masks(self.accelerator.process_index // tensor_parallel, self.args.device)

    @property
    def _passes(self) -> int:
        """How often this optimizer step's batches are repeated while training."""
        if not self.rdrop_argument("alpha") or self.state.global_step % self.rdrop_argument("interval"):
            return 1
        return self.rdrop_argument("passes")

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
        if not model.training:
            # A copy, because the Trainer pops the labels off the dict when it smooths them.
            found: Any = super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch=None)
            loss, outputs = found if return_outputs else (found, None)
            if (count := self._count_items(inputs)) is not None:
                loss = torch.where(count > 0, loss, 0)  # as in training: not nan for rows without a valid item
            return (loss, outputs) if return_outputs else loss

        alpha, passes, outputs, fused_head = self.rdrop_argument("alpha"), self._passes, None, None
        if alpha:
            labels = check_batch(self, inputs)
            economies = self._economies = self._economies or Economies(self)
            if not economies.tried_out:
                economies.try_out(model, inputs, labels)
            economies.start(passes)
            fused_head = None if return_outputs else economies.fused_head

        count = self._count_items(inputs)
        if fused_head is not None:
            loss, ce, kl = fused_head.loss(
                model,
                inputs,
                self.repeat,
                passes=passes,
                shift_labels=self.shifts_labels,
                alpha=alpha,
                label_smoothing=self.args.label_smoothing_factor,
            )
        else:
            repeated = self.repeat(inputs, passes) if passes > 1 else dict(inputs)
            with recorded_outputs(model if self._parent_loss else None) as recorded:
                ce, outputs = super().compute_loss(model, repeated, return_outputs=True, num_items_in_batch=None)
            if count is not None:
                ce = torch.where(count > 0, ce, 0)  # the mean over no item is 0 and not nan
            loss, kl = ce, torch.zeros_like(ce)
            if passes > 1:
                size = self._batch_size(inputs)
                logits = logits_to_compare(outputs, recorded, ce, rows=passes * size, name=self._parent_loss)
                config = getattr(self.base_model, "config", None)
                head = resolve_head(config, logits, labels, passes, self.shifts_labels)
                if not economies.compared:
                    economies.compared = True
                    check_comparison(config, head, logits, labels, passes, ce)
                kl = head.agreement(logits, passes)
                loss = ce + alpha / 2 * kl
                outputs = first_rows(outputs, passes * size, size) if return_outputs else None

        scale = self._step_share(count, num_items_in_batch)
        parts = torch.stack((loss.detach(), ce.detach(), kl.detach())) * scale
        self._log.add(self.state.global_step, parts, passes > 1, self.args.logging_nan_inf_filter)
        if num_items_in_batch is not None or self.compute_loss_func is not None:
            loss = loss * scale  # otherwise `training_step` divides by the accumulation steps
        return (loss, outputs) if return_outputs else loss

    def _batch_size(self, inputs: Mapping[str, Any]) -> int:
        return get_batch_size(inputs, (*self.label_names, "input_ids"))

    def repeat(self, inputs: Mapping[str, Any], passes: int) -> dict[str, Any]:
        """The batch for a forward of all passes; extend `non_batch_inputs` for what must not be repeated."""
        size = self._batch_size(inputs)
        return repeat_batch(inputs, passes, batch_size=size, non_batch_inputs=self.non_batch_inputs)

    # ---- Normalisation over the optimizer step ----

    def find_labels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        names = ("labels", "label", *self.label_names)
        found = (inputs[name] for name in names if isinstance(inputs.get(name), Tensor))
        return next(found, None)

    def _count_items(self, inputs: Mapping[str, Any]) -> Tensor | None:
        labels = self.find_labels(inputs)
        return None if labels is None else valid_items(labels, self.shifts_labels).sum()

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Valid items of one optimizer step, on all ranks when `average_tokens_across_devices`; for every head."""
        counts = [count for batch in batch_samples if (count := self._count_items(batch)) is not None]
        if not counts or len(counts) < len(batch_samples):
            return None
        total = torch.stack(counts).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total

    def _step_share(self, count: Tensor | None, num_items_in_batch: Any) -> Any:
        """What a mean over this batch weighs in the mean over the optimizer step (1.0 exactly if it is all of it)."""
        if num_items_in_batch is None or count is None:
            return 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        across = self.args.average_tokens_across_devices
        ranks = self.accelerator.num_processes if across else 1  # undoes the averaging of gradients over the ranks
        return count / torch.as_tensor(num_items_in_batch, device=count.device).clamp(min=1) * ranks

    # ---- Logs and model card ----

    def create_model_card(self, *args: Any, comparison: Any = None, consistency: Any = None, **kwargs: Any) -> None:
        """As the base class's, with R-Drop's evidence on the card; see `hf_rdrop.model_card.write_card`."""
        if self.is_world_process_zero():
            write_card(self, super().create_model_card, args, kwargs, comparison=comparison, consistency=consistency)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and (means := self._log.take(self.state.global_step, self.accelerator.gather)) is not None:
            logs["ce_loss"], logs["kl_loss"] = ce, kl = means
            logs["kl_share"] = self.rdrop_argument("alpha") / 2 * kl / ce if ce else 0.0
        super().log(logs, *args, **kwargs)

    def _warn_if_inert(self) -> None:
        """Say once, after the first hundred steps, when the agreement term does nothing."""
        alpha = self.rdrop_argument("alpha")
        parts = self._log.inert_parts(self.state.global_step, alpha)
        if parts is not None and self.is_world_process_zero():
            rates = sorted({s.rate for s in inspect_dropout(self.base_model) if s.rate > 0})
            logger.warning(
                f"R-Drop: over the first {INERT_STEPS} steps alpha/2 * KL was {parts[0]:.2g}, under "
                f"{INERT_SHARE:.0%} of the cross-entropy ({parts[1]:.2g}): the agreement term hardly changes the "
                f"training. The sub-models already agree: raise the dropout rate (rdrop_dropout; now {rates}) or "
                f"rdrop_alpha (now {alpha:g}), or save the second pass with rdrop_alpha=0."
            )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return super().floating_point_ops(inputs) * self._passes


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


class RDropTrainer(RDropMixin, Trainer):
    """`Trainer` with R-Drop's objective: sequence and token classification. See `RDropMixin`.

    Example:
        >>> trainer = RDropTrainer(
        ...     model=model, args=RDropTrainingArguments("out", rdrop_alpha=1.0), train_dataset=train, ...
        ... )
        >>> trainer.train()
    """


class RDropSeq2SeqTrainer(RDropMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with R-Drop's objective: translation, summarisation (`predict_with_generate` included)."""
