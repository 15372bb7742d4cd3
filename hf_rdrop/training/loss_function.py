"""Give a user's loss function the count of the labels that it sees, whenever it is set."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class LossFunctionMixin:
    """Keep `compute_loss_func` a mean over the labels of its batch."""

    rdrop_run: Any
    _loss_func: Callable[..., Tensor] | None = None

    @property
    def compute_loss_func(self) -> Callable[..., Tensor] | None:
        """The user's loss function, given the count of the labels that it sees; it can be set at any time."""
        return self._loss_func

    @compute_loss_func.setter
    def compute_loss_func(self, loss_func: Callable[..., Tensor] | None) -> None:
        self._loss_func = None if loss_func is None else self._as_mean(loss_func)

    def _as_mean(self, loss_func: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Give a user's loss function the count of the labels it sees: a mean, whether it divides by it or not."""

        def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            return loss_func(outputs, labels, num_items_in_batch=self.rdrop_run.items.labelled({"labels": labels}))

        return mean_loss
