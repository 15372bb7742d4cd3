"""Sharing the lower layers between the passes: they run once, only the layers above see different dropout masks."""

import inspect
import math
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..batch import NON_BATCH_INPUTS, map_tensors
from ..dropout import inspect_dropout

# Arguments of layers that are never per example, and the fewest dimensions of those that may be: rotary embeddings
# come as [B, T, D] or [T, D], position biases as [B, heads, T, T] or [heads, 1, T]. Without these rules they would be
# cut whenever T, say, happens to equal the number of rows.
_NON_BATCH_ARGUMENTS = frozenset({"rel_embeddings", "relative_position_embeddings", "relative_position_bias"})
_FEWEST_DIMS = {"position_embeddings": 3, "position_bias": 4}


def find_layer_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of transformer layers in `model` by qualified name, without those inside another one."""
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
    layers are cut to the B rows of the first pass, and the output of layer k is repeated to m * B rows. Everything
    else sees m * B rows. The L layers then cost ``m - (m - 1) * k / L`` times a plain forward instead of m times.

    The hooks that do this are put on the model once and do nothing outside `start` and `stop`, so that a compiled
    model is not compiled again in each step. Build the trunk before the model runs compiled for the first time.

    Args:
        model: the model itself, without wrappers for parallelism, compilation or adapters.
        shared_layers: k, the number of layers to share, >= 1, or a fraction of the layers in (0, 1): rounded, at
            least one layer. In an encoder-decoder it counts (or is a fraction of) the encoder's layers; a number
            above those goes on into the decoder's first layers.
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
        stacks = _stacks_to_share(model)
        sizes = [len(stack) for stack in stacks.values()]
        self.model, self.num_layers = model, sizes[0]
        self.shared_layers = _count_shared_layers(shared_layers, sizes)
        self.non_batch_inputs = frozenset(non_batch_inputs)
        layers = [_unwrapped(layer) for stack in stacks.values() for layer in stack]
        self.layers = layers[: self.shared_layers]
        _check_layerdrop(model, list(stacks)[: 1 + (self.shared_layers > self.num_layers)])
        self._passes = 1  # 1: the hooks do nothing
        self._handles = []
        for i, layer in enumerate(self.layers):
            names, is_first = tuple(inspect.signature(layer.forward).parameters), i in (0, self.num_layers)
            cut = partial(self._cut_arguments, names, is_first)
            self._handles.append(layer.register_forward_pre_hook(cut, with_kwargs=True))
            if i + 1 in (self.num_layers, self.shared_layers):
                self._handles.append(layer.register_forward_hook(self._repeat_output))

    def start(self, passes: int) -> None:
        """Share the layers from now on: every forward is over a batch repeated `passes` times."""
        self._passes = passes

    def stop(self) -> None:
        """Share no more. Call it after the backward pass, where gradient checkpointing runs the layers once more."""
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
    """The layer in torch's `CheckpointWrapper`, which FSDP's activation checkpointing puts around it."""
    return getattr(layer, "_checkpoint_wrapped_module", layer)


def _stacks_to_share(model: nn.Module) -> dict[str, nn.ModuleList]:
    stacks, name = find_layer_stacks(model), type(model).__name__
    if not stacks:
        raise ValueError(
            f"rdrop_shared_layers: no list of transformer layers found in {name} (an nn.ModuleList of Transformers' "
            "GradientCheckpointingLayer), so it is unknown which modules to share between the passes. Set "
            "rdrop_shared_layers to 0, or derive the model's layers from GradientCheckpointingLayer."
        )
    # At most: an encoder alone may have its encoder-decoder's config (T5ForTokenClassification).
    most = 2 if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else 1
    if len(stacks) > most:
        found = ", ".join(f"{path} ({len(stack)} layers)" for path, stack in stacks.items())
        raise ValueError(
            f"rdrop_shared_layers: {name} has {len(stacks)} lists of transformer layers ({found}), where an encoder "
            "or a decoder has one and an encoder-decoder two, so it is unclear which layers come first. Set "
            "rdrop_shared_layers to 0."
        )
    return stacks


def _count_shared_layers(shared_layers: float, sizes: list[int]) -> int:
    is_number = isinstance(shared_layers, (int, float)) and not isinstance(shared_layers, bool)
    if is_number and 0 < shared_layers < 1:
        return max(1, math.floor(shared_layers * sizes[0] + 0.5))
    if not is_number or not 1 <= shared_layers <= sum(sizes) or shared_layers != int(shared_layers):
        encoder = " encoder" if len(sizes) > 1 else ""
        raise ValueError(
            f"rdrop_shared_layers={shared_layers!r} does not fit this model of {' + '.join(map(str, sizes))} layers: "
            f"it is the number of layers that the passes share, a whole number from 1 to {sum(sizes)}, or a fraction "
            f"of the {sizes[0]}{encoder} layers between 0 and 1. Set it in that range, or to 0 to share none."
        )
    return int(shared_layers)


def _check_layerdrop(model: nn.Module, stacks: list[str]) -> None:
    for source in inspect_dropout(model):
        owner = source.name.rpartition(".")[0].removesuffix("config").removesuffix(".")
        skips = [stack for stack in stacks if not owner or stack.startswith(f"{owner}.")]
        if source.kind == "layerdrop" and source.rate > 0 and skips:
            raise ValueError(
                f"rdrop_shared_layers: {source.name} = {source.rate:g} skips whole layers of {skips[0]} at random, "
                "and the rows cannot be repeated after the last shared layer when that is skipped. Set the layerdrop "
                "to 0 (in the model's config), or rdrop_shared_layers to 0."
            )


def _first_tensor(values: Any) -> Tensor:
    return next(value for value in values if isinstance(value, Tensor))
