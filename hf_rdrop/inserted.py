"""What `SubModels` puts on a model: modules without parameters, which act in training mode only."""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pass_dropout import PassRows


class StochasticDepth(nn.Module):
    """Leaves a whole layer out, for each row of the batch with probability p: ``y_i = x_i``, else ``layer(x)_i``.

    Args:
        p: probability that a row skips the layer, in [0, 1).
    """

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
        """The forward hook of the layer."""
        if not self.training:
            return None
        inputs = (kwargs.get("hidden_states"), *args, *kwargs.values())
        hidden = next(value for value in inputs if isinstance(value, Tensor))
        return map_first(lambda y: self(hidden, y), output)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class EmbeddingNoise(nn.Module):
    """Adds noise of a normal distribution to embeddings: ``y = x + std * N(0, 1)``, drawn for each element.

    Args:
        std: standard deviation of the noise, >= 0.
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, embedded: Tensor) -> Tensor:
        return embedded + self.std * torch.randn_like(embedded) if self.training else embedded

    def extra_repr(self) -> str:
        return f"std={self.std}"


class DropConnect(nn.Module):
    """Linear map with a part of its weights dropped: ``y = x (W * mask / (1 - p))^T + b``, one mask for each pass.

    Args:
        p: probability that a weight is dropped, in [0, 1).
        pass_rows: tells the rows of the passes apart.
    """

    def __init__(self, p: float, pass_rows: PassRows) -> None:
        super().__init__()
        self.p, self.pass_rows = p, pass_rows

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        parts = x.chunk(self.pass_rows.parts(len(x), "drop_connect"))
        # torch.dropout, because PassDropout changes torch.nn.functional.dropout.
        return torch.cat([F.linear(part, torch.dropout(weight, self.p, True), bias) for part in parts])

    def extra_repr(self) -> str:
        return f"p={self.p}"


def map_first(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """The output of a layer or block with a function applied to its hidden states: the tensor, or a tuple's first."""
    if isinstance(output, Tensor):
        return function(output)
    return type(output)((function(output[0]), *output[1:]))


def drop_output(block: Any, args: Any, output: Any) -> Any:
    """Forward hook of a block whose child `rdrop_dropout` drops from its output."""
    return map_first(block.rdrop_dropout, output)


def add_noise(embeddings: Any, args: Any, output: Any) -> Any:
    """Forward hook of embeddings whose child `rdrop_embedding_noise` adds noise to their output."""
    return embeddings.rdrop_embedding_noise(output)


def drop_weights(linear: Any) -> None:
    """Have a linear map whose child `rdrop_drop_connect` drops its weights use it: its `forward` is replaced."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.rdrop_drop_connect.training:
            return type(self).forward(self, x)
        weight = self.weight if isinstance(self, nn.Linear) else self.weight.t()  # a Conv1D of Transformers
        return self.rdrop_drop_connect(x, weight, self.bias)

    linear.forward = types.MethodType(forward, linear)  # a method, so that a copy of the module has its own
