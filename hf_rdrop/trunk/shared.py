"""Share the lower layers between the passes: they run once, and only the layers above draw different dropout masks."""

import inspect
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..batch import NON_BATCH_INPUTS, map_tensors
from .check import check_layerdrop, check_stacks, count_shared_layers

# Arguments of layers that are never per example, and the fewest dimensions of those that may be: rotary embeddings
# come as [B, T, D] or [T, D], position biases as [B, heads, T, T] or [heads, 1, T]. Without these rules they would be
# cut whenever T happens to equal the number of rows.
_NON_BATCH_ARGUMENTS = frozenset({"rel_embeddings", "relative_position_embeddings", "relative_position_bias"})
_FEWEST_DIMS = {"position_embeddings": 3, "position_bias": 4}


def find_layer_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Find the lists of transformer layers in `model` by qualified name, without those inside another one."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        is_stack = isinstance(module, nn.ModuleList) and all(
            isinstance(_unwrapped(layer), GradientCheckpointingLayer) for layer in module
        )
        if is_stack and len(module) and not any(name.startswith(f"{outer}.") for outer in stacks):
            stacks[name] = module
    return stacks


class SharedTrunk:
    """The first k layers of a model, run once for all passes of a repeated batch.

    In a forward over `[x; x]` (m * B rows for m passes) between `start` and `stop`, the arguments of the first k
    layers are cut to the B rows of the first pass, and the output of layer k is repeated to m * B rows. The L layers
    then cost ``m - (m - 1) * k / L`` times a plain forward instead of m times.

    The hooks stay on the model and do nothing outside `start` and `stop`, so that a compiled model is not compiled
    again in each step. Build the trunk before the model runs compiled for the first time.

    Args:
        model: the model itself, without wrappers for parallelism, compilation or adapters.
        shared_layers: k, the number of layers to share, >= 1, or a fraction of the layers in (0, 1): rounded, at
            least one layer. In an encoder-decoder it refers to the encoder's layers; a number above those goes on
            into the decoder's first layers.
        non_batch_inputs: names of arguments that are not per example, which are never cut.

    Attributes:
        num_layers: number of layers L, in an encoder-decoder those of the encoder.
        shared_layers: number of layers k that are shared.

    Raises:
        ValueError: if `shared_layers` does not fit the model, or its layers cannot be found or are skipped at random.

    Example:
        >>> trunk = SharedTrunk(model, 0.75)
        >>> trunk.start(passes=2)
        >>> model(**repeat_batch(inputs, 2)).loss.backward()
        >>> trunk.stop()
    """

    def __init__(
        self, model: nn.Module, shared_layers: float, *, non_batch_inputs: Collection[str] = NON_BATCH_INPUTS
    ) -> None:
        stacks = find_layer_stacks(model)
        check_stacks(model, stacks)
        sizes = [len(stack) for stack in stacks.values()]
        self.model, self.num_layers = model, sizes[0]
        self.shared_layers = count_shared_layers(shared_layers, sizes)
        self.non_batch_inputs = frozenset(non_batch_inputs)
        layers = [_unwrapped(layer) for stack in stacks.values() for layer in stack]
        self.layers = layers[: self.shared_layers]
        check_layerdrop(model, list(stacks)[: 1 + (self.shared_layers > self.num_layers)])
        self._passes = 1  # 1: the hooks do nothing
        self._handles = []
        for i, layer in enumerate(self.layers):
            names, is_first = tuple(inspect.signature(layer.forward).parameters), i in (0, self.num_layers)
            cut = partial(self._cut_arguments, names, is_first)
            self._handles.append(layer.register_forward_pre_hook(cut, with_kwargs=True))
            if i + 1 in (self.num_layers, self.shared_layers):
                self._handles.append(layer.register_forward_hook(self._repeat_output))

    def start(self, passes: int) -> None:
        """Share the layers from now on: the batch of every forward is repeated `passes` times."""
        self._passes = passes

    def stop(self) -> None:
        """Share no more; to be called after the backward pass, in which checkpointed layers run once more."""
        self._passes = 1

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    # The number of rows is read off the hidden states: m * B come into the first layer of a stack, B into the next.
    # It need not be the batch's: a multiple-choice model has a row for each choice.

    def _cut_arguments(
        self, names: tuple[str, ...], is_first: bool, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        passes = self._passes
        if passes == 1:
            return None
        names += ("",) * len(args)
        rows = len(_first_tensor((kwargs.get("hidden_states"), *args, *kwargs.values())))
        rows = rows if is_first else rows * passes

        def cut(name: str, value: Any) -> Any:
            if name in self.non_batch_inputs or name in _NON_BATCH_ARGUMENTS:
                return value
            fewest = _FEWEST_DIMS.get(name, 2)
            return map_tensors(lambda t: t[: rows // passes] if t.dim() >= fewest and len(t) == rows else t, value)

        # (torch 2.7 compiles no zip with strict=False.)
        args = tuple(cut(names[i], value) for i, value in enumerate(args))
        return args, {name: cut(name, value) for name, value in kwargs.items()}

    def _repeat_output(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        passes = self._passes
        if passes == 1:
            return None
        size = len(_first_tensor((output,) if isinstance(output, Tensor) else output))
        return map_tensors(lambda t: torch.cat([t] * passes) if t.dim() >= 2 and len(t) == size else t, output)


def _unwrapped(layer: nn.Module) -> nn.Module:
    """Take the layer out of torch's `CheckpointWrapper`, which FSDP's activation checkpointing puts around it."""
    return getattr(layer, "_checkpoint_wrapped_module", layer)


def _first_tensor(values: Any) -> Tensor:
    return next(value for value in values if isinstance(value, Tensor))
