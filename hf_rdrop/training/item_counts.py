"""Count the items of a batch, and weigh its means in those of the whole optimizer step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..objective.batch_layout import BatchLayout


class ItemCounts:
    """Counts of valid items, so that loss and gradients do not depend on how rows are divided up.

    CE is a mean over the labelled items of the step. So is the divergence, unless rows without labels take part
    (`rdrop_unlabeled`): then it is a mean over the items of all rows.

    Args:
        layout: how batches are read.
        unlabeled: whether rows without labels take part in the divergence.
    """

    def __init__(self, layout: BatchLayout, unlabeled: bool) -> None:
        self.layout, self.unlabeled = layout, unlabeled
        self._compared_in_step: Tensor | None = None

    def labelled(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Count the items of a batch that have a label; None when it has no labels."""
        labels = self.layout.labels(inputs) if isinstance(inputs, Mapping) else None
        if labels is None:
            return None
        if labels.is_floating_point() and self.unlabeled:
            return (labels != -100).sum()
        return self.layout.labelled_items(labels).sum()

    def compared(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Count the items of a batch that are compared, rows without labels included; None when it has no labels."""
        labels = self.layout.labels(inputs)
        return None if labels is None else self.layout.items_to_compare(labels, inputs).sum()

    def of_step(
        self, batches: Sequence[Mapping[str, Any]], device: torch.device, gather: Callable[[Tensor], Tensor] | None
    ) -> Tensor | None:
        """Count the labelled items of one optimizer step.

        Args:
            batches: those of this process.
            device: where the count is wanted.
            gather: stacks a tensor `[1, ...]` of every process; None to count this process alone.

        Returns:
            Scalar; None when a batch has no labels, or is not prepared yet.
        """
        if not all(isinstance(batch, Mapping) for batch in batches):  # lists of rows until `_prepare_inputs`
            return None
        counters = [self.labelled, self.compared] if self.unlabeled else [self.labelled]
        counts = [[count(batch) for batch in batches] for count in counters]
        if not batches or any(count is None for kind in counts for count in kind):
            return None
        totals = torch.stack([torch.stack(kind).sum() for kind in counts]).to(device)  # type: ignore[arg-type]
        if gather is not None:
            totals = gather(totals[None]).sum(0)
        self._compared_in_step = totals[-1]
        return totals[0]

    def shares(
        self, inputs: Mapping[str, Any], labelled: Tensor | None, in_step: Any, ranks: int, accumulation: int
    ) -> tuple[Any, Any]:
        """Weigh a batch's mean CE and mean divergence in those of the optimizer step.

        Args:
            inputs: the batch, not repeated.
            labelled: its count of labelled items.
            in_step: what `of_step` returned; None without a count.
            ranks: processes whose gradients are averaged and whose items `in_step` counts together, else 1.
            accumulation: batches in this optimizer step, the weight where there is no count.

        Returns:
            Weight of CE and weight of the divergence; exactly 1.0 for a batch that is the whole step.
        """
        share = _share(labelled, in_step, ranks, accumulation)
        if not self.unlabeled or in_step is None:
            return share, share
        return share, _share(self.compared(inputs), self._compared_in_step, ranks, accumulation)


def _share(count: Tensor | None, in_step: Any, ranks: int, accumulation: int) -> Any:
    if in_step is None or count is None:
        return 1 / accumulation
    return count / torch.as_tensor(in_step, device=count.device).clamp(min=1) * ranks
