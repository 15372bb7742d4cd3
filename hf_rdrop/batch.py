"""Repeat a batch for several passes in one forward, and take its outputs apart again."""

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

#: Inputs of Transformers models that have one value for the whole batch, whatever their first dimension is.
NON_BATCH_INPUTS = frozenset(
    {"head_mask", "decoder_head_mask", "cross_attn_head_mask", "cache_position", "num_items_in_batch"}
)


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
) -> dict[str, Any]:
    """Repeat every per-example tensor, so that one forward runs all passes: ``[x] -> [x; x]``.

    Dropout draws one mask per element, so the halves of the repeated batch go through different sub-models.

    Args:
        inputs: what the model is called with; not changed. Tensors may be nested in dicts, lists and tuples.
        passes: how often to repeat, m >= 1.
        batch_size: number of examples B; read off the labels or input ids by default.
        non_batch_inputs: names of inputs that are never repeated, even if their first dimension happens to be B.

    Returns:
        A new dict: tensors (and lists of B non-tensors) with first dimension B have m * B rows, pass after pass;
        everything else is passed through.

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

    return {name: value if name in non_batch_inputs else repeat(value) for name, value in inputs.items()}


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
