"""Modules that `SubModels` puts on a model: without parameters, active in training mode only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class StochasticDepth(nn.Module):
    """Skip a layer for each row of the batch with probability p in [0, 1): ``y_i = x_i``, else ``layer(x)_i``."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, hidden: Tensor, output: Tensor) -> Tensor:
        if hidden.shape != output.shape:
            raise ValueError(
                f"layer_drop: a layer turns hidden states of shape {tuple(hidden.shape)} into {tuple(output.shape)}, "
                "so its input cannot stand in for its output. Set layer_drop to 0."
            )
        skip = torch.rand(len(hidden), device=hidden.device) < self.p
        return torch.where(skip.view(-1, *[1] * (hidden.dim() - 1)), hidden, output)

    def after_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Act as the forward hook of the layer."""
        if not self.training:
            return None
        inputs = (kwargs.get("hidden_states"), *args, *kwargs.values())
        hidden = next(value for value in inputs if isinstance(value, Tensor))
        return map_first(lambda y: self(hidden, y), output)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def map_first(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Apply a function to the hidden states in a layer's or block's output: the tensor, or a tuple's first."""
    if isinstance(output, Tensor):
        return function(output)
    return type(output)((function(output[0]), *output[1:]))


def drop_output(block: Any, args: Any, output: Any) -> Any:
    """Act as the forward hook of a block whose child `rdrop_dropout` drops from its output."""
    return map_first(block.rdrop_dropout, output)
