"""Share the lower layers between the passes: they run once, and only the layers above draw different dropout masks."""

import inspect
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..batch import NON_BATCH_INPUTS, map_tensors
from .check import check_layerdrop, check_stacks, count_shared_layers

# Arguments of layers that are never per example, and the fewest dimensions of those that may be: rotary embeddings
# come as [B, T, D] or [T, D], position biases as [B, heads, T, T] or [heads, 1, T]. Without these rules they would be
# cut whenever T happens to equal the number of rows.
_NON_BATCH_ARGUMENTS = frozenset({"rel_embeddings", "relative_position_embeddings", "relative_position_bias"})
_FEWEST_DIMS = {"position_embeddings": 3, "position_bias": 4}

LayerCall = tuple[tuple[Any, ...], dict[str, Any], Any]  # arguments and output


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


def _find_plain_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Find lists of two or more layers of one class of their own, where a model derives none from the usual class."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        kinds = {type(layer) for layer in module} if isinstance(module, nn.ModuleList) else set()
        is_stack = len(kinds) == 1 and nn.ModuleList not in kinds and any(True for _ in module.parameters())
        if is_stack and len(module) > 1 and not any(name.startswith(f"{outer}.") for outer in stacks):
            stacks[name] = module
    return stacks


def _without_convolutions(stacks: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """Leave out stacks without a linear layer: the convolutions below or above an encoder of audio."""
    return {
        name: stack
        for name, stack in stacks.items()
        if any(isinstance(m, (nn.Linear, Conv1D)) for m in stack.modules())
    }


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
        stacks = find_layer_stacks(model) or _find_plain_stacks(model)
        if len(stacks) > 1:
            stacks = _without_convolutions(stacks) or stacks
        check_stacks(model, stacks)
        sizes = [len(stack) for stack in stacks.values()]
        self.model, self.num_layers = model, sizes[0]
        self.shared_layers = count_shared_layers(shared_layers, sizes)
        self.non_batch_inputs = frozenset(non_batch_inputs)
        layers = [_unwrapped(layer) for stack in stacks.values() for layer in stack]
        self.layers = layers[: self.shared_layers]
        check_layerdrop(model, list(stacks)[: 1 + (self.shared_layers > self.num_layers)])
        self._passes = 1  # 1: the hooks do nothing
        self._axes: dict[tuple[str, int], tuple[int, list[int]]] = {}  # the axis, and numbers of entries a row
        self._hidden_axis = 0
        self._names = tuple(inspect.signature(self.layers[0].forward).parameters)
        self._handles = []
        for i, layer in enumerate(self.layers):
            names, is_first = tuple(inspect.signature(layer.forward).parameters), i in (0, self.num_layers)
            cut = partial(self._cut_arguments, names, is_first)
            self._handles.append(layer.register_forward_pre_hook(cut, with_kwargs=True))
            if i + 1 in (self.num_layers, self.shared_layers):
                self._handles.append(layer.register_forward_hook(self._repeat_output))

    def set_axes(self, few: list[LayerCall], many: list[LayerCall], passes: int) -> None:
        """Read off two forwards, the second over `passes` times the rows, which axis of what holds the rows.

        A tensor is known by its argument (an output by "") and its number of dimensions. It may have several entries a
        row (ALiBi: `[B * heads, 1, T]`). What is the same in both is left to the rules for names, as a mask may be
        there for some batches only.
        """
        seen: dict[tuple[str, int], set[tuple[int, int]]] = {}
        for one, all_rows in zip(few, many, strict=False):
            a, b = _hidden_states(*one[:2]).shape, _hidden_states(*all_rows[:2]).shape
            if (axis := _grown_axis(a, b, passes)) is None:
                continue
            self._hidden_axis, size = axis, a[axis]
            for (name, t), (_, u) in zip(
                _named_tensors(self._names, one), _named_tensors(self._names, all_rows), strict=False
            ):
                grown = _grown_axis(t.shape, u.shape, passes)
                if grown is not None and t.shape[grown] % size == 0:
                    seen.setdefault((name, t.dim()), set()).add((grown, t.shape[grown] // size))
        self._axes = {
            key: (min(found)[0], sorted(times for _, times in found))
            for key, found in seen.items()
            if len({axis for axis, _ in found}) == 1
        }

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
        rows = _hidden_states(args, kwargs).shape[self._hidden_axis]
        rows = rows if is_first else rows * passes

        def cut(name: str, value: Any) -> Any:
            if name in self.non_batch_inputs or name in _NON_BATCH_ARGUMENTS:
                return value
            fewest = _FEWEST_DIMS.get(name, 2)

            def first(t: Tensor) -> Tensor:
                known = self._axes.get((name, t.dim()))
                if known is None and t.dim() < fewest:
                    return t
                axis, times = known or (0, [1])
                holds_rows = t.shape[axis] in [rows * n for n in times]
                return t.narrow(axis, 0, t.shape[axis] // passes) if holds_rows else t

            return map_tensors(first, value)

        # (torch 2.7 compiles no zip with strict=False.)
        args = tuple(cut(names[i], value) for i, value in enumerate(args))
        return args, {name: cut(name, value) for name, value in kwargs.items()}

    def _repeat_output(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        passes = self._passes
        if passes == 1:
            return None
        first = _first_tensor((output,) if isinstance(output, Tensor) else output)
        size = first.shape[self._hidden_axis]

        def repeat(t: Tensor) -> Tensor:
            axis, times = self._axes.get(("", t.dim()), (0, [1]))
            return torch.cat([t] * passes, axis) if t.dim() >= 2 and t.shape[axis] in [size * n for n in times] else t

        return map_tensors(repeat, output)


def _grown_axis(few: torch.Size, many: torch.Size, passes: int) -> int | None:
    """Find the one axis in which a tensor of `passes` times the rows is longer."""
    longer = [i for i, (a, b) in enumerate(zip(few, many, strict=False)) if a != b]
    same_dims = len(few) == len(many)
    return longer[0] if same_dims and len(longer) == 1 and many[longer[0]] == few[longer[0]] * passes else None


def _named_tensors(names: tuple[str, ...], call: LayerCall) -> list[tuple[str, Tensor]]:
    args, kwargs, output = call
    found: list[tuple[str, Tensor]] = []
    for name, value in [*zip(names, args, strict=False), *kwargs.items(), ("", output)]:

        def note(t: Tensor, name: str = name) -> Tensor:
            found.append((name, t))
            return t

        map_tensors(note, value)
    return found


def _unwrapped(layer: nn.Module) -> nn.Module:
    """Take the layer out of torch's `CheckpointWrapper`, which FSDP's activation checkpointing puts around it."""
    return getattr(layer, "_checkpoint_wrapped_module", layer)


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _first_tensor((kwargs.get("hidden_states"), *args, *kwargs.values()))


def _first_tensor(values: Any) -> Tensor:
    return next(value for value in values if isinstance(value, Tensor))
