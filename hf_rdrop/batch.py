"""Repeat a batch for several passes in one forward, and take its outputs apart again."""

import copy
import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

#: Inputs of Transformers models that have one value for the whole batch, whatever their first dimension is.
NON_BATCH_INPUTS = frozenset(
    {"head_mask", "decoder_head_mask", "cross_attn_head_mask", "cache_position", "num_items_in_batch"}
)

# Inputs of Transformers' models that hold the parts of all rows one after another (patches, tiles, images, chunks of
# audio), whatever their first dimension is, and the sizes of these parts.
_PARTS_IN_ORDER = re.compile(
    r"(pixel|image|video|audio|input_features|input_audio|feature|spatial_shape|patch|crop|second_per_grid)"
)


def has_parts_in_order(name: str) -> bool:
    """Tell by an input's name whether it holds the images or sounds of all rows one after another."""
    return _PARTS_IN_ORDER.match(name) is not None


def get_batch_size(inputs: Mapping[str, Any], names: Collection[str] = ("labels", "input_ids")) -> int:
    """Read the number of examples off a batch: the first dimension of the first of `names`, else of any tensor.

    Raises:
        ValueError: if the batch holds no tensor with a batch dimension.
    """
    for value in [*(inputs[name] for name in names if name in inputs), *inputs.values()]:
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
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
    whole_inputs: Callable[[str], bool] = has_parts_in_order,
) -> dict[str, Any]:
    """Repeat every per-example tensor, so that one forward runs all passes: ``[x] -> [x; x]``.

    Dropout draws one mask per element, so the halves of the repeated batch go through different sub-models.

    Args:
        inputs: what the model is called with; not changed. Tensors may be nested in dicts, lists and tuples.
        passes: how often to repeat, m >= 1.
        batch_size: number of examples B; read off the labels or input ids by default.
        non_batch_inputs: names of inputs that are never repeated, even if their first dimension happens to be B.
        whole_inputs: tells for a name whether the input holds parts of all rows one after another (packed patches
            and their grid sizes, several images a row), and so is repeated whatever its first dimension is.

    Returns:
        A new dict: tensors with first dimension B, and lists of B entries, have m * B rows, pass after pass; so have
        `position_ids` of `[axes, B, T]` in their second dimension, and `whole_inputs`. Everything else is passed
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

    def repeat(value: Any, whole: bool) -> Any:
        if isinstance(value, Tensor):
            return torch.cat([value] * passes) if value.dim() > 0 and (whole or len(value) == size) else value
        if isinstance(value, Mapping):
            return {key: repeat(item, whole) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            # A list of B entries has one for each row, unless each of them has B rows itself (one for each layer).
            if whole or (len(value) == size and not any(has_rows(item, size) for item in value)):
                return value * passes if type(value) in (list, tuple) else _like(value, list(value) * passes)
            return _like(value, [repeat(item, whole) for item in value])
        return value

    def of(name: str, value: Any) -> Any:
        if name in non_batch_inputs:
            return value
        if name == "position_ids" and isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == size:
            return torch.cat([value] * passes, dim=1)  # [axes, B, T] of rotary embeddings in space and time
        return repeat(value, whole_inputs(name))

    return {name: of(name, value) for name, value in inputs.items()}


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


def few_rows(inputs: Mapping[str, Any], rows: int, count: int) -> dict[str, Any]:
    """Cut a batch of so many rows to the first `count`; not where images or sounds of some rows lie among the text."""
    parts = "input_ids" in inputs and any(map(has_parts_in_order, inputs))
    return dict(inputs) if parts or rows <= count else first_rows(dict(inputs), rows, count)


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


def has_rows(value: Any, size: int) -> bool:
    """Tell whether a tensor, or one in nested dicts, lists and tuples, has `size` rows."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and len(value) == size
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(has_rows(item, size) for item in items)


def _like(template: list[Any] | tuple[Any, ...], items: list[Any]) -> Any:
    return type(template)(*items) if hasattr(template, "_fields") else type(template)(items)
