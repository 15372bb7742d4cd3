"""Refuse a trunk that cannot be shared: by the model's structure, and by a trial on real rows."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..batch import get_batch_size, map_tensors, unlike_rows
from ..dropout import dropout_off, inspect_dropout, is_stochastic
from ..generators import generators_restored
from ..objective.heads import find_logits

_CHECKED_EXAMPLES = 2  # enough to notice rows in a wrong order, few enough for the logits of a large vocabulary


class Trunk(Protocol):
    """What the trial needs of a `SharedTrunk`."""

    model: nn.Module
    layers: list[nn.Module]
    shared_layers: int
    non_batch_inputs: frozenset[str]

    def start(self, passes: int) -> None: ...
    def stop(self) -> None: ...
    def set_axes(self, few: list[Any], many: list[Any], passes: int) -> None: ...


def check_stacks(model: nn.Module, stacks: Mapping[str, nn.ModuleList]) -> None:
    """Check that it is clear which of a model's lists of layers comes first."""
    name = type(model).__name__
    if not stacks:
        raise ValueError(
            f"rdrop_shared_layers: no list of transformer layers found in {name} (an nn.ModuleList of two or more "
            "layers of one class, or of Transformers' GradientCheckpointingLayer), so it is unknown which modules to "
            "share between the passes. One layer that is called many times, as in ALBERT, cannot be shared. Set "
            "rdrop_shared_layers to 0."
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


def count_shared_layers(shared_layers: float, sizes: list[int]) -> int:
    """Turn `rdrop_shared_layers`, a number or a fraction, into a number of layers, given the sizes of the stacks."""
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


def check_layerdrop(model: nn.Module, stacks: list[str]) -> None:
    """Check that no layer of these stacks is skipped at random."""
    for source in inspect_dropout(model):
        owner = source.name.rpartition(".")[0].removesuffix("config").removesuffix(".")
        skips = [stack for stack in stacks if not owner or stack.startswith(f"{owner}.")]
        if source.kind == "layerdrop" and source.rate > 0 and skips:
            raise ValueError(
                f"rdrop_shared_layers: {source.name} = {source.rate:g} skips whole layers of {skips[0]} at random, "
                "and the rows cannot be repeated after the last shared layer when that is skipped. Set the layerdrop "
                "to 0 (in the model's config), or rdrop_shared_layers to 0."
            )


@torch.no_grad()
def check_shared_trunk(
    trunk: Trunk,
    model: nn.Module,
    inputs: Mapping[str, Any],
    passes: int,
    *,
    batch_size: int | None = None,
    unrepeated: Mapping[str, Any] | None = None,
    logits_of: Callable[[Any, int, Mapping[str, Any]], Tensor] = find_logits,
) -> None:
    """Check that sharing changes no logits in evaluation, and that something above the shared layers is random.

    Three forwards over at most two examples. Random number generators, training flags and `inputs` stay as they are;
    the trunk is stopped.

    Args:
        trunk, model: the trunk, and its model as training calls it, perhaps in a wrapper.
        inputs, passes: a repeated batch of m * B rows, and m >= 2.
        batch_size: number of examples B; read off the labels or input ids by default.
        unrepeated: the batch before it was repeated, which is tried as a whole where inputs are not one per row.
        logits_of: takes the scores from outputs, given their number of rows and the batch before it was repeated.

    Raises:
        ValueError: the model does not work with its first layers shared, or the passes would be identical.
    """
    model = getattr(model, "_orig_mod", model)  # a graph compiled for these few rows would never be used again
    name, k = type(trunk.model).__name__, trunk.shared_layers
    size = batch_size or get_batch_size(inputs) // passes
    whole = unrepeated is not None and bool(unlike_rows(unrepeated, size, trunk.non_batch_inputs))
    few = size if whole else min(size, _CHECKED_EXAMPLES)
    rows = [i * size + j for i in range(passes) for j in range(few)]
    calls: list[nn.Module] = []
    dtypes: set[torch.dtype] = set()

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append(module)
        dtypes.update(x.dtype for x in args if isinstance(x, Tensor))

    layer_calls: list[Any] = []

    def record_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        layer_calls.append((args, kwargs, output))

    def select(index: list[int]) -> dict[str, Any]:
        if whole and unrepeated is not None:
            return dict(inputs if len(index) == len(rows) else unrepeated)
        return {k: v if k in trunk.non_batch_inputs else _select(v, passes * size, index) for k, v in inputs.items()}

    def run(index: list[int]) -> Tensor:
        logits = logits_of(model(**select(index)), len(index), select(rows[:few])).float()
        return logits.nan_to_num(0.0, 0.0, 0.0)  # a masked logit is -inf with and without sharing

    trunk.stop()
    with dropout_off(model), generators_restored(trunk.model):
        hooks = [module.register_forward_pre_hook(record) for module in trunk.model.modules()]
        hooks += [layer.register_forward_hook(record_layer, with_kwargs=True) for layer in trunk.layers]
        try:
            plain = run(rows)
            many = layer_calls.copy()
            layer_calls.clear()
            _check_calls(trunk, calls)
            alone = run(rows[:few])
        finally:
            for hook in hooks:
                hook.remove()
        trunk.set_axes(layer_calls, many, passes)
        trunk.start(passes)
        try:
            shared = run(rows)
        except Exception as error:
            raise ValueError(
                f"rdrop_shared_layers: {name} does not run with its first {k} layers shared between the passes "
                f"({type(error).__name__}: {error}): something outside these layers uses what is between them, or "
                "they need an input that cannot be cut. Set rdrop_shared_layers to a smaller number, or to 0."
            ) from error
        finally:
            trunk.stop()
    # What rounding does to these very logits when the number of rows changes, and a floor under it.
    floor = (2e-2 if dtypes & {torch.bfloat16, torch.float16} else 1e-3) * plain.abs().max()
    limit = float(8 * (plain[:few] - alone).abs().max() + floor)
    if (change := float((plain - shared).abs().max())) > limit:
        raise ValueError(
            f"rdrop_shared_layers: with its first {k} layers shared between the passes, the logits of {name} in "
            f"evaluation change by up to {change:.2g}, where rounding explains {limit:.2g}: its layers mix rows, or "
            "their batch dimension is not the first. Set rdrop_shared_layers to 0."
        )


def _check_calls(trunk: Trunk, calls: list[nn.Module]) -> None:
    """Check that the shared layers are called once each, in order, and that something called after them is random."""
    k, name = trunk.shared_layers, type(trunk.model).__name__
    numbers = {layer: i for i, layer in enumerate(trunk.layers, 1)}
    order = [numbers[module] for module in calls if module in numbers]
    if not order:
        raise ValueError(
            f"rdrop_shared_layers: {name} does not call its layers as modules (it calls their forward, or leaves them "
            "out), so that their inputs cannot be cut. Set rdrop_shared_layers to 0."
        )
    if order != list(range(1, k + 1)):
        raise ValueError(
            f"rdrop_shared_layers: one forward of {name} calls its first {k} layers in the order {order}, but only "
            "layers that are called once each, one after the other, can be shared between the passes. Set "
            "rdrop_shared_layers to 0."
        )
    inside = set(trunk.layers[-1].modules())
    after = set(calls[calls.index(trunk.layers[-1]) :]) - inside
    paths = {path for path, module in trunk.model.named_modules() if module in after}

    def is_after(source: str) -> bool:  # a dropout, or an attribute, of a module that is called after the trunk
        parts = source.split(".")
        return any(".".join(parts[:i]) in paths for i in range(1, len(parts) + 1))

    if not is_stochastic(source for source in inspect_dropout(trunk.model) if is_after(source.name)):
        raise ValueError(
            f"rdrop_shared_layers: nothing that {name} runs after its {k} shared layers is random, so the passes "
            "would be identical and the KL term always 0. Share fewer layers, or give the layers or the head above "
            "them dropout (rdrop_dropout=0.1, or hf_rdrop.set_dropout(model, 0.1))."
        )


def _select(value: Any, rows: int, index: list[int]) -> Any:
    """Take the rows `index` of whatever has `rows` rows in a batch."""
    if isinstance(value, list) and len(value) == rows and not any(isinstance(v, (Tensor, dict)) for v in value):
        return [value[i] for i in index]
    return map_tensors(lambda t: t[index] if t.dim() > 0 and len(t) == rows else t, value)
