"""Which items of a batch count, and what its mean weighs in the mean over the whole optimizer step."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..objective.heads import find_labels, items_to_compare, predicts_next_token, valid_items

if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object  # a mixin, like RDropMixin


class ItemCountMixin(_AnyTrainer):
    """Counts valid items for a Trainer, so that loss and gradients do not depend on how rows are divided up.

    CE is a mean over the labelled items of the step. So is the agreement, unless rows without labels take part
    (`rdrop_unlabeled`): then it is a mean over the items of all rows (`items_to_compare`).
    """

    _unwrapped: tuple[Any, nn.Module] | None = None
    _compared_in_step: Tensor | None = None  # items that the agreement of this optimizer step is a mean of

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

    def find_labels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        return find_labels(inputs, self.label_names)

    def _count_items(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """How many items of a batch have a label; None when it has no labels."""
        labels = self.find_labels(inputs)
        if labels is None:
            return None
        if labels.is_floating_point() and getattr(self.args, "rdrop_unlabeled", False):
            return (labels != -100).sum()
        return valid_items(labels, self.shifts_labels).sum()

    def _count_compared(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """How many items of a batch are to agree, rows without labels included; None when it has no labels."""
        labels = self.find_labels(inputs)
        config = getattr(self.base_model, "config", None)
        return None if labels is None else items_to_compare(labels, inputs, config, self.shifts_labels).sum()

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Valid items of one optimizer step, on all ranks when `average_tokens_across_devices`; for every head."""
        counters = [self._count_items]
        if getattr(self.args, "rdrop_unlabeled", False):
            counters.append(self._count_compared)
        counts = [[count(batch) for batch in batch_samples] for count in counters]
        if not batch_samples or any(count is None for kind in counts for count in kind):
            return None
        totals = torch.stack([torch.stack(kind).sum() for kind in counts]).to(device)  # type: ignore[arg-type]
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            totals = self.accelerator.gather(totals[None]).sum(0)
        self._compared_in_step = totals[-1]
        return totals[0]

    def _step_share(self, count: Tensor | None, num_items_in_batch: Any) -> Any:
        """What a mean over this batch weighs in the mean over the optimizer step (1.0 exactly if it is all of it)."""
        if num_items_in_batch is None or count is None:
            return 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        across = self.args.average_tokens_across_devices
        ranks = self.accelerator.num_processes if across else 1  # undoes the averaging of gradients over the ranks
        return count / torch.as_tensor(num_items_in_batch, device=count.device).clamp(min=1) * ranks
