"""A training run as its arguments ask for it: rates and sources of sub-models, and what each step is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..dropout import set_dropout
from ..sub_models.sources import SubModels
from ..training_args import RDropArguments
from ..variant_args import SOURCES, alpha_at
from .item_counts import ItemCountMixin


class RunMixin(ItemCountMixin):
    """What R-Drop's arguments mean for a Trainer's model and for the optimizer step it is at."""

    def rdrop_argument(self, name: str) -> Any:
        """An R-Drop argument, or its default where `args` is a plain `TrainingArguments`."""
        return getattr(self.args, f"rdrop_{name}", getattr(RDropArguments, f"rdrop_{name}"))

    def _apply_dropout(self, model: Any) -> None:
        if (p := self.rdrop_argument("dropout")) is not None:
            set_dropout(model, p)

    @contextmanager
    def sub_models(self) -> Iterator[SubModels | None]:
        """The sources of sub-models that the arguments ask for, on the model for a moment; None when there are none.

        Raises:
            ValueError: when the model has no place for one.
        """
        wanted = {name: self.rdrop_argument(name) for name in SOURCES}
        found = SubModels(self.base_model, **wanted) if any(wanted.values()) else None
        try:
            yield found
        finally:
            if found is not None:
                found.remove()

    @property
    def _alpha(self) -> float:
        """Alpha at this optimizer step."""
        return alpha_at(self.args, self.rdrop_argument("alpha"), self.state.global_step, self.state.max_steps)

    @property
    def _compares(self) -> bool:
        """Whether this optimizer step has an agreement term."""
        return bool(self.rdrop_argument("alpha")) and self.state.global_step % self.rdrop_argument("interval") == 0

    @property
    def _passes(self) -> int:
        """How often this optimizer step's batches are repeated while training."""
        return self.rdrop_argument("passes") if self._compares else 1

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return super().floating_point_ops(inputs) * self._passes
