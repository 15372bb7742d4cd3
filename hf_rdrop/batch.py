"""Repeat a batch for several passes in one forward, and take its outputs apart again."""

import copy
import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

#: Inputs of Transformers models that have one value for the whole batch, whatever their first dimension is.
NON_BATCH_INPUTS = frozenset(
    {"head_mask", "decoder_head_mask", "cross_attn_head_mask", "cache_position", "num_items_in_batch"}
    | {"logits_to_keep"}
)

# Inputs by the words in their names that hold what belongs to the rows one after the other, any number to a row:
# images, their patches packed into one dimension, grid sizes, chunks of audio, lists with an entry for each.
_IN_ORDER = re.compile(
    r"(^|_)(pixel|pixels|image|images|video|videos|frames|patch|patches|patchified|grid|grids|thw|tgt|target_sizes|"
    r"spatial_shapes|crop|crops|tile|tiles|aspect|audio|audios|speech|feature|features|chunk|waveform|deepstack|"
    r"visual)(_|$)|^(mask_labels|class_labels|second_per_grids?)$"
)
_MOST_AXES = 4  # of position ids that have one for text, time, height, width each: [axes, B, T]


def get_batch_size(
    inputs: Mapping[str, Any], names: Collection[str] = ("labels", "input_ids", "inputs_embeds")
) -> int:
    """Read the number of examples off a batch: the first dimension of the first of `names`, else of any tensor.

    Raises:
        ValueError: if the batch holds no tensor with a batch dimension.
    """
    by_row = [name for name in inputs if not _IN_ORDER.search(name)]
    for name in (*names, *by_row, *inputs):
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[1] if _axes_first(name, value, inputs) else len(value)
    raise ValueError(
        f"The batch has no tensor with a batch dimension (its keys: {', '.join(inputs) or 'none'}), so it cannot be "
        "repeated for a second pass. Check that the data collator returns tensors."
    )


def repeat_batch(
    inputs: Mapping[str, Any],
    passes: int = 2,
    *,
    batch_size: int | None = None,
    non_batch_inputs: Collection[str] = NON_BATCH_INPUTS,
) -> dict[str, Any]:
    """Repeat every per-example tensor, so that one forward runs all passes: ``[x] -> [x; x]``.

    Dropout draws one mask per element, so the halves of the repeated batch go through different sub-models.

    Images and audio need not be one per row: what a model takes in the order of the rows (`pixel_values`,
    `image_grid_thw`, `input_features`, ..., by the words in their names) is repeated as a whole. `position_ids` of
    several axes, `[3, B, T]`, are repeated in their second dimension.

    Args:
        inputs: what the model is called with; not changed. Tensors may be nested in dicts, lists and tuples.
        passes: how often to repeat, m >= 1.
        batch_size: number of examples B; read off the labels or input ids by default.
        non_batch_inputs: names of inputs that are never repeated, even if their first dimension happens to be B.

    Returns:
        A new dict: tensors (and lists of B non-tensors) with first dimension B have m * B rows, pass after pass; so
        have those that are in the order of the rows, whatever their first dimension is. Everything else is passed
        through.

    Raises:
        ValueError: if no batch size can be read off the inputs, or `passes` is less than 1.

    Example:
        >>> repeat_batch({"input_ids": torch.tensor([[1], [2]]), "labels": torch.tensor([0, 1])})["labels"].tolist()
        [0, 1, 0, 1]
    """
    if passes < 1:
        raise ValueError(f"passes must be at least 1, got {passes!r}: it says how often the batch is repeated.")
    size = get_batch_size(inputs) if batch_size is None else batch_size

    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.cat([value] * passes) if value.dim() > 0 and len(value) == size else value
        if isinstance(value, Mapping):
            return {key: repeat(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            if len(value) == size and not any(map(_holds_tensor, value)):
                return value * passes
            return _like(value, [repeat(item) for item in value])
        return value

    def repeat_input(name: str, value: Any) -> Any:
        if name in non_batch_inputs:
            return value
        if _axes_first(name, value, inputs, size):
            return torch.cat([value] * passes, 1)
        return _repeat_whole(name, value, passes) if _IN_ORDER.search(name) else repeat(value)

    return {name: repeat_input(name, value) for name, value in inputs.items()}


def unlike_rows(
    inputs: Mapping[str, Any], size: int, non_batch_inputs: Collection[str] = NON_BATCH_INPUTS
) -> dict[str, str]:
    """Find the inputs of a batch of `size` rows whose first dimension is not that of the rows.

    Returns:
        How `repeat_batch` reads each of them, in words with its shape.
    """
    found = {}
    for name, value in inputs.items():
        count = len(value) if isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim()) else size
        if name in non_batch_inputs or (count == size and not _axes_first(name, value, inputs, size)):
            continue
        shape = list(value.shape) if isinstance(value, Tensor) else f"{type(value).__name__} of {count}"
        if _axes_first(name, value, inputs, size):
            found[name] = f"{name} {shape}: repeated in its second dimension"
        elif _IN_ORDER.search(name):
            found[name] = f"{name} {shape}: repeated as a whole, as what belongs to the rows one after the other"
        else:
            found[name] = f"{name} {shape}: not repeated, as what is the same for all rows"
    return found


def few_rows(inputs: Mapping[str, Any], size: int, count: int) -> dict[str, Any]:
    """Cut a batch of `size` rows to its first `count`.

    Where the images of a row cannot be told from those of the next, the rows are left without them: their places in
    the text stay, and models read them as tokens.
    """
    if count >= size:
        return dict(inputs)
    loose = {name for name in unlike_rows(inputs, size) if _IN_ORDER.search(name)}
    kept = {k: v for k, v in inputs.items() if not (loose and _IN_ORDER.search(k))}
    axes = {k: v[:, :count] for k, v in kept.items() if _axes_first(k, v, inputs, size)}
    return {**first_rows(kept, size, count), **axes}


def has_items_in_order(names: Iterable[str]) -> bool:
    """Tell by their names whether inputs are images, audio and the like, of which a row may have any number."""
    return any(_IN_ORDER.search(name) for name in names)


def _repeat_whole(name: str, value: Any, passes: int) -> Any:
    if isinstance(value, Tensor):
        return torch.cat([value] * passes) if value.dim() else value
    if isinstance(value, Mapping):
        return {key: _repeat_whole(name, item, passes) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if name.startswith("deepstack"):  # a tensor for each layer
            return _like(value, [_repeat_whole(name, item, passes) for item in value])
        return value * passes
    return value


def _axes_first(name: str, value: Any, inputs: Mapping[str, Any], size: int | None = None) -> bool:
    """Tell whether an input is position ids `[axes, B, T]` of several axes."""
    if name != "position_ids" or not isinstance(value, Tensor) or value.dim() != 3 or len(value) > _MOST_AXES:
        return False
    ids = next(
        (inputs[n] for n in ("input_ids", "inputs_embeds", "labels") if isinstance(inputs.get(n), Tensor)), None
    )
    if ids is not None and ids.dim() > 1 and value.shape[2] != ids.shape[1]:
        return False  # [B, T, axes], or [B, axes, ...]
    return size is None or value.shape[1] == size


def split_passes(logits: Tensor, passes: int = 2) -> tuple[Tensor, ...]:
    """Take the rows of a repeated batch apart: `[m * B, ...]` to m views of `[B, ...]`, one per pass."""
    return stack_passes(logits, passes).unbind(0)


def stack_passes(logits: Tensor, passes: int = 2) -> Tensor:
    """View the rows of a repeated batch pass by pass: `[m * B, ...]` to `[m, B, ...]`, without a copy.

    Raises:
        ValueError: if the rows cannot be divided into `passes` equal parts.
    """
    rows = len(logits) if logits.dim() else 1
    if passes < 1 or logits.dim() < 1 or rows % passes:
        raise ValueError(
            f"The model returned {rows} rows for a batch repeated {passes} times, so they cannot be told apart "
            "by pass. R-Drop needs one row of logits per row of the batch."
        )
    return logits.unflatten(0, (passes, -1))


def first_rows(values: Any, total: int, rows: int) -> Any:
    """Cut every tensor of `total` rows (in dicts, model outputs, lists and tuples) to the first `rows`."""
    return map_tensors(lambda t: t[:rows] if t.dim() > 0 and len(t) == total else t, values)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to all tensors in nested dicts, lists and tuples.

    A container in which nothing changes is returned itself, as some models hand all layers one dict to write to.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        mapped = {key: map_tensors(function, item) for key, item in value.items()}
        if all(mapped[key] is item for key, item in value.items()):
            return value
        if dataclasses.is_dataclass(value):
            return type(value)(**mapped)  # a ModelOutput is made from keywords
        if type(value) is dict or not isinstance(value, MutableMapping):
            return mapped
        changed = copy.copy(value)
        for key, item in mapped.items():
            changed[key] = item
        return changed
    if isinstance(value, (list, tuple)):
        items = [map_tensors(function, item) for item in value]
        return _like(value, items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, (Mapping, Tensor)) or (
        isinstance(value, (list, tuple)) and any(map(_holds_tensor, value))
    )


def _like(template: list[Any] | tuple[Any, ...], items: list[Any]) -> Any:
    return type(template)(*items) if hasattr(template, "_fields") else type(template)(items)
