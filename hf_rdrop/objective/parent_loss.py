"""Call the loss of the Trainer class under R-Drop's."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..generators import remember_generators


class ParentOutput(NamedTuple):
    """The result of a parent's `compute_loss`.

    Args:
        ce: its loss, a mean over the valid items of the batch.
        outputs: the outputs that it returned.
        recorded: what each of its calls of the model returned; empty for Trainer's own.
    """

    ce: Tensor
    outputs: Any
    recorded: list[Any]


class ParentLoss:
    """`super().compute_loss` of the mixin: the Trainer's own, or that of a class between them.

    Args:
        compute_loss: the bound method.
        name: its qualified name; None for Trainer's own.
        reader: name of the user code that reads the model's outputs in training; None when nobody does.
        count: counts the labelled items of a batch, for a loss that divides by the count itself.
    """

    def __init__(
        self,
        compute_loss: Callable[..., Any],
        name: str | None,
        reader: str | None,
        count: Callable[[Mapping[str, Any]], Tensor | None] | None = None,
    ) -> None:
        self.compute_loss, self.name, self.reader, self.count = compute_loss, name, reader, count
        self._tried = self._divides = False  # whether it needs the count

    def of(self, model: nn.Module, inputs: Any, return_outputs: bool = True) -> ParentOutput:
        """Compute the mean loss of a batch; without outputs (None) where nobody needs them.

        (`num_items_in_batch` is withheld: many heads ignore it and return their mean all the same, so the trainer asks
        everybody for the mean and scales it once. A loss that cannot do without it gets the count of this very batch,
        for which its sum becomes the mean.)
        """
        with _recorded_outputs(model if self.name and return_outputs else None) as recorded:
            found = self._call(model, inputs, return_outputs, recorded)
        ce, outputs = found if return_outputs else (found, None)
        return ParentOutput(ce, outputs, recorded)

    def _call(self, model: nn.Module, inputs: Any, return_outputs: bool, recorded: list[Any]) -> Any:
        def call(items: Tensor | None) -> Any:
            batch = dict(inputs) if isinstance(inputs, Mapping) else inputs  # a loss may take the labels out
            return self.compute_loss(model, batch, return_outputs=return_outputs, num_items_in_batch=items)

        if self.name is None or self.count is None or not isinstance(inputs, Mapping):
            return call(None)
        if not self._tried:
            self._tried = True
            restore = remember_generators(model)
            try:
                return call(None)
            except TypeError as error:
                if "NoneType" not in str(error) or self.count(inputs) is None:
                    raise
            self._divides = True
            recorded.clear()
            restore()  # as if it had been called once
        if not self._divides:
            return call(None)
        items = self.count(inputs)
        return call(None if items is None else items.clamp(min=1))

    def outputs_behind(self, found: ParentOutput) -> Any:
        """Find the outputs that the loss was computed from: those returned, else those of its only forward.

        Raises:
            ValueError: when it cannot be told.
        """
        if self.name is None or found.outputs:
            return found.outputs
        if len(found.recorded) != 1:
            raise ValueError(
                f"{self.name} returns no outputs and called the model {len(found.recorded)} times for one batch, so "
                "R-Drop cannot tell which logits to compare. It is for losses of one forward with a row of logits for "
                "each example, not for contrastive, margin or listwise ones. Use such a loss, or set rdrop_alpha to 0."
            )
        return found.recorded[0]


@contextmanager
def _recorded_outputs(model: nn.Module | None) -> Iterator[list[Any]]:
    """Collect what the model's calls return (nothing without a model), for a loss that keeps its outputs to itself."""
    outputs: list[Any] = []
    with ExitStack() as stack:
        if model is not None:
            hook = model.register_forward_hook(lambda module, args, output: outputs.append(output))
            stack.callback(hook.remove)
        yield outputs
