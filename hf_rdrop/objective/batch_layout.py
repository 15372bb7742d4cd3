"""Read the batches of one model: `heads` and `batch` bound to its label names and configuration."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batch import NON_BATCH_INPUTS, get_batch_size, repeat_batch, unlike_rows
from .heads import (
    find_labels,
    ignored_label,
    items_to_compare,
    predicts_next_token,
    segments_images,
    valid_items,
)


class BatchLayout(NamedTuple):
    """How the batches of one model are read.

    Args:
        label_names: the names that hold labels, beside `labels`; the first one in a batch counts.
        non_batch_inputs: names of inputs that are not per example, which are never repeated.
        shifts_labels: whether the head scores position t against label t + 1 (causal language models).
        config: the model's configuration, or None.
        ignored: the label that does not count.
    """

    label_names: Sequence[str] = ()
    non_batch_inputs: Collection[str] = NON_BATCH_INPUTS
    shifts_labels: bool = False
    config: Any = None
    ignored: int = -100

    @classmethod
    def of(cls, model: nn.Module, label_names: Sequence[str], non_batch_inputs: Collection[str]) -> "BatchLayout":
        """Read the layout off a model without wrappers and adapters."""
        config = getattr(model, "config", None)
        ignored = ignored_label(config) if segments_images(model) else -100
        return cls(tuple(label_names), non_batch_inputs, predicts_next_token(model), config, ignored)

    def size(self, inputs: Mapping[str, Any]) -> int:
        """Count the rows B of a batch."""
        return get_batch_size(inputs, (*self.label_names, "input_ids", "inputs_embeds"))

    def labels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Find the labels of a batch; None when it has none."""
        return find_labels(inputs, self.label_names)

    def repeat(self, inputs: Mapping[str, Any], passes: int) -> dict[str, Any]:
        """Repeat a batch for one forward of all passes: ``[x] -> [x; x]``."""
        size = self.size(inputs)
        return repeat_batch(inputs, passes, batch_size=size, non_batch_inputs=self.non_batch_inputs)

    def unlike_rows(self, inputs: Mapping[str, Any]) -> dict[str, str]:
        """Say of each input that has not one entry per row, by name, how it is repeated."""
        return unlike_rows(inputs, self.size(inputs), self.non_batch_inputs)

    def labelled_items(self, labels: Tensor) -> Tensor:
        """Mask the labels that the head's own loss averages over."""
        if self.ignored != -100 and getattr(self.config, "num_labels", None) == 1:
            return torch.ones_like(labels, dtype=torch.bool)  # pixels left out are 0 in this mean, and still count
        return valid_items(labels, self.shifts_labels, self.ignored)

    def items_to_compare(self, labels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Mask the items whose predictions are compared where rows without a label take part too."""
        return items_to_compare(labels, inputs, self.config, self.shifts_labels, self.ignored)
