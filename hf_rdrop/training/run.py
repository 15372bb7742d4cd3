"""One training run with R-Drop: what its settings put on the model, and the loss of its batches."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ..fused.head import FusedHead, choose_fused_head, find_output_embeddings
from ..objective.batch_layout import BatchLayout
from ..objective.batch_loss import BatchLoss, Objective
from ..objective.heads import find_logits
from ..objective.parent_loss import ParentLoss
from ..objective.repeated_loss import check_repeated_loss
from ..objective.scored import measure_shift
from ..sub_models import SubModels
from ..training_args import REMOVED, check_removed
from ..trunk.check import check_shared_trunk
from ..trunk.shared import SharedTrunk
from .checks import (
    check_batch,
    check_batch_is_mapping,
    check_head,
    check_loss_of_labelled_rows,
    check_parallelism,
    check_passes_differ,
    check_per_sample_gradients,
    check_stochastic,
)
from .first_batch import check_labels_of_head, describe_cost, inputs_explained, no_evaluation, show, takes_items
from .item_counts import ItemCounts
from .settings import RunFacts, Settings, StepPlan


class TrainingRun:
    """The objective of one model by its settings, and what makes the second pass cheaper.

    Args:
        model: the model, without wrappers and adapters.
        args: arguments of the training.
        layout: how batches are read.
        parent_loss: the loss under R-Drop's.
        logits_for_agreement: as for `RDropMixin`; None for the model's own logits.
        needs_outputs: who needs the model's outputs, so that no fused head can take their place; None for nobody.
        label_smoothing: share of the target given to the uniform distribution; 0 where the Trainer leaves it out.
        shows: whether this process shows what a step costs.

    Attributes:
        settings: R-Drop's arguments, as they were when they were last read.
        items: counts what a mean is over.
        measured: whether it is known which positions a language model's loss scores.
        trunk: the shared lower layers, None when nothing is shared.
        fused_head: computes the loss itself from the first batch on; None when the full logits are used.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        layout: BatchLayout,
        parent_loss: ParentLoss,
        *,
        logits_for_agreement: Callable[[Any, Mapping[str, Any]], Any] | None = None,
        needs_outputs: str | None = None,
        label_smoothing: float = 0.0,
        shows: bool = False,
    ) -> None:
        self.model, self.layout, self.parent_loss, self.args = model, layout, parent_loss, args
        self.logits_for_agreement, self.needs_outputs, self.shows = logits_for_agreement, needs_outputs, shows
        self.label_smoothing = label_smoothing
        self.trunk: SharedTrunk | None = None
        self.fused_head: FusedHead | None = None
        self._sub_models: SubModels | None = None
        self._prepared = self._tried_out = self.measured = self._compared = False
        self.items = ItemCounts(layout, unlabeled=False)
        self.read(Settings.of(args))

    def measure(self, model: nn.Module, inputs: Any) -> None:
        """Measure on the first batch which positions a language model's loss scores; its class only suggests it.

        Args:
            model: the model as training calls it.
            inputs: the batch on the device, not repeated.

        Raises:
            ValueError: when alpha is above 0 and it cannot be known which predictions count.
        """
        if self.measured:
            return
        self.measured, labels = True, inputs.get("labels") if isinstance(inputs, Mapping) else None
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
            return
        if find_output_embeddings(self.model) is None or getattr(self.model, "is_quantized", False):
            return  # (An evaluation-mode forward repacks 4-bit weights for inference.)
        try:
            shifts, again = measure_shift(self.model, getattr(model, "_orig_mod", model), inputs, labels)
            if self.label_smoothing and shifts not in (None, self.layout.shifts_labels):
                raise ValueError(
                    f"Trainer's label smoothing goes by the class's name: it takes {type(self.model).__name__} for a "
                    f"model that {'does not shift' if shifts else 'shifts'} its labels, and would train on wrong "
                    "ones. Set label_smoothing_factor to 0."
                )
        except ValueError:
            if self.settings.alpha and self.logits_for_agreement is None and self.parent_loss.reader is None:
                raise
            return
        self.measured = not again
        if shifts is not None and shifts != self.layout.shifts_labels:
            self.layout = self.items.layout = self.layout._replace(shifts_labels=shifts)
            self.read(self.settings)

    def read(self, settings: Settings) -> None:
        """Take over settings that may have changed between steps; the trunk and the fused head stay as they are."""
        self.settings, self.items.unlabeled = settings, settings.unlabeled
        own = self.logits_for_agreement
        self.objective = Objective(settings.agreement, settings.unlabeled, self.layout, self.parent_loss, own)

    # ---- From the first step to the last ----

    def check_setup(self, accelerator: Any, optimizer: Any = None) -> None:
        """Check model, arguments, parallelism and optimizer (None before there is one).

        Raises:
            ValueError: when training with R-Drop would fail, be wrong or do nothing.
        """
        args, own = self.args, self.logits_for_agreement is not None
        check_removed(name for name in REMOVED if getattr(args, name, None))  # arguments that were unpickled
        check_parallelism(self.settings.alpha, args, accelerator)
        if self.settings.alpha:
            check_per_sample_gradients(self.model, optimizer)
        with self.sub_models() as sources:  # whether the model has a place for them
            differs = sources is not None and sources.differs
        if self.settings.alpha:
            if args.label_names is None and not own:  # else the first batch will show whether they are class labels
                check_head(self.model, self.layout.label_names)
            check_stochastic(self.model, differs, bool(args.neftune_noise_alpha))

    @contextmanager
    def sub_models(self) -> Iterator[SubModels | None]:
        """Put the sources of sub-models on the model for a moment; None when the settings ask for none."""
        found = self._new_sub_models()
        try:
            yield found
        finally:
            if found is not None:
                found.remove()

    def begin(self) -> None:
        """Put on the model what training needs."""
        self._sub_models = self._new_sub_models()
        self._prepare()

    def end(self) -> None:
        """Take the sources of sub-models off the model."""
        if self._sub_models is not None:
            self._sub_models.remove()
            self._sub_models = None

    def remove(self) -> None:
        """Leave the model as it was."""
        self.end()
        if self.trunk is not None:
            self.trunk.remove()

    def facts(self) -> RunFacts:
        """Tell what was in force."""
        trunk, own = self.trunk, self.logits_for_agreement is not None
        shared = (trunk.shared_layers, trunk.num_layers) if trunk is not None else (0, 0)
        return RunFacts(self.model, self.settings, own, *shared, self.fused_head is not None)

    # ---- A step ----

    def loss(self, model: nn.Module, inputs: dict[str, Any], plan: StepPlan, return_outputs: bool) -> BatchLoss:
        """Compute CE and divergence of a training batch.

        Args:
            model: the model as training calls it.
            inputs: the batch, not repeated; not changed.
            plan: of the optimizer step.
            return_outputs: whether the outputs are asked for, so that no fused head can take their place.
        """
        if not isinstance(inputs, Mapping):
            check_batch_is_mapping(self.settings.alpha, inputs)
            return self.objective.plain(model, inputs, None, return_outputs)
        self.measure(model, inputs)
        labels = self.layout.labels(inputs)
        if self.settings.unlabeled and labels is not None and labels.is_floating_point():
            check_loss_of_labelled_rows(self.parent_loss.reader)
        if not self.settings.alpha:
            return self.objective.plain(model, inputs, labels, return_outputs)
        own = self.logits_for_agreement is not None
        check_batch(self.layout, inputs, labels, own_logits=own, label_smoothing=self.label_smoothing)
        if not self._tried_out:
            self.try_out(model, inputs, labels)
        if self.trunk is not None:
            self.trunk.start(plan.passes)
        with inputs_explained(self.model, self.layout, inputs) if plan.passes > 1 else nullcontext():
            found = self._terms(model, inputs, labels, plan, return_outputs)
        if plan.compares and not self._compared:
            self._compared = True
            if self.objective.with_hidden or own or self._sub_models is not None:  # which may be equal by chance
                return found
            count = self.items.compared if self.settings.unlabeled else self.items.labelled
            check_passes_differ(self.model, found.divergence, count(inputs))
        return found

    def _terms(
        self, model: nn.Module, inputs: dict[str, Any], labels: Tensor | None, plan: StepPlan, return_outputs: bool
    ) -> BatchLoss:
        if self.fused_head is not None and not return_outputs:
            loss, ce, kl = self.fused_head.loss(
                model,
                inputs,
                self.layout.repeat,
                passes=plan.passes,
                shift_labels=self.layout.shifts_labels,
                alpha=plan.alpha,
                label_smoothing=self.label_smoothing,
            )
            return BatchLoss(ce, kl, None, loss)
        if not plan.compares:
            return self.objective.plain(model, inputs, labels, return_outputs)
        return self.objective.compared(model, inputs, labels, plan.passes)

    def stop(self) -> None:
        """Share no layers any more; after the backward pass, in which gradient checkpointing runs them once more."""
        if self.trunk is not None:
            self.trunk.stop()

    # ---- The first batch ----

    def _new_sub_models(self) -> SubModels | None:
        layer_drop, inserted = self.settings.layer_drop, self.settings.insert_dropout
        asked = layer_drop or inserted
        return SubModels(self.model, layer_drop=layer_drop, insert_dropout=inserted) if asked else None

    def _prepare(self) -> None:
        self._prepared = True
        if self.settings.alpha and self.settings.shared_layers:
            shared, stay = self.settings.shared_layers, self.layout.non_batch_inputs
            self.trunk = SharedTrunk(self.model, shared, non_batch_inputs=stay)

    def try_out(self, model: nn.Module, inputs: dict[str, Any], labels: Tensor | None) -> None:
        """Check on the first batch that labels are classes, and that shared layers and fused head do what they should.

        Raises:
            ValueError: when a label is no class, or the model does not work with what the settings ask for.
        """
        if not self._prepared:
            self._prepare()
        self._tried_out = True
        if labels is not None:
            check_labels_of_head(self.model, labels, ignored=self.layout.ignored)
        model = getattr(model, "_orig_mod", model)  # nothing is compiled for the sake of a check
        own_model = not type(self.model).__module__.startswith("transformers.")
        reads_otherwise = self.parent_loss.reader or own_model or takes_items(self.model)
        if reads_otherwise and not getattr(self.model, "is_quantized", False):
            low = self.args.bf16 or self.args.fp16 or any(p.element_size() < 4 for p in self.model.parameters())
            repeated, rtol = self.layout.repeat(inputs, self.settings.passes), 2e-2 if low else 1e-3
            check_repeated_loss(self.parent_loss, model, inputs, repeated, rtol, self.layout.unlike_rows(inputs))
        untried = no_evaluation(self.model)
        if self.trunk is not None:
            if untried is not None:
                raise ValueError(f"rdrop_shared_layers: {untried}. Set rdrop_shared_layers to 0.")
            passes, size = self.settings.passes, self.layout.size(inputs)
            repeated = self.layout.repeat(inputs, passes)
            check_shared_trunk(
                self.trunk,
                model,
                repeated,
                passes,
                batch_size=size,
                unrepeated=inputs,
                logits_of=self._compared_logits,
            )
        self.fused_head = choose_fused_head(
            self.settings.fused_head,
            self.model,
            model,
            inputs,
            labels,
            shift_labels=self.layout.shifts_labels,
            obstacle=self.needs_outputs or untried,
        )
        torch.clear_autocast_cache()  # torch before 2.8 would train on with the casts of the checks, without gradient
        if self.shows:
            show(describe_cost(self.facts(), inputs, self.args), self.args)

    def _compared_logits(self, outputs: Any, rows: int, inputs: Mapping[str, Any]) -> Tensor:
        if self.logits_for_agreement is None:
            return find_logits(outputs, rows, inputs)
        given = self.logits_for_agreement(outputs, inputs)
        return given[0] if isinstance(given, tuple) else given  # of (scores, mask, ...)
