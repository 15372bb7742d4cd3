"""Measure on the first batch how inputs that have not one row for each example are repeated."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import has_parts_in_order
from ..dropout import dropout_off
from ..generators import generators_restored
from .batch_layout import BatchLayout
from .heads import find_logits
from .scored import least_of_ranks


def measure_repetition(
    model: nn.Module, layout: BatchLayout, inputs: Mapping[str, Any], passes: int, rtol: float
) -> BatchLayout:
    """Find the layout under which the logits of ``[x; x]`` are those of x, pass by pass, with dropout off.

    Packed patches with their grid sizes, several images or chunks of audio in a row, and inputs that the whole batch
    shares have another first dimension than the batch. Those that hold parts of the rows in order are repeated as a
    whole; which they are is first told by their names, and then tried. Nothing is done for a batch without such
    inputs. Otherwise two forwards without gradient, up to four where the names mislead.

    Args:
        model: as training calls it.
        layout: as read off the model.
        inputs: the batch, not repeated.
        passes: m >= 2.
        rtol: by how much logits may differ, in units of the largest.

    Raises:
        ValueError: when the batch can be repeated in none of these ways.
    """
    names, device = layout.without_rows(inputs), next(model.parameters()).device
    if least_of_ranks(int(not names), device):
        return layout
    problems = []
    expected = _logits(model, layout, inputs)
    for readings in (has_parts_in_order, lambda name: has_parts_in_order(name) or name in names, lambda name: False):
        candidate = layout._replace(whole_inputs=readings)
        fits, problem = False, "the model gives other logits then"
        try:
            found = _logits(model, layout, candidate.repeat(inputs, passes))
            fits = expected is None or found is None or _alike(expected, found, passes, rtol)
        except Exception as error:  # whatever a model does with inputs that do not belong together
            problem = f"the model fails then ({type(error).__name__}: {str(error)[:200]})"
        if least_of_ranks(int(fits), device):
            return candidate
        problems.append(problem)
    shapes = ", ".join(f"{name} {tuple(inputs[name].shape)}" for name in names)
    raise ValueError(
        f"R-Drop repeats each batch as [x; x]. This one has {layout.size(inputs)} rows, and inputs that have not one "
        f"entry for each of them ({shapes}): they were repeated as a whole, and left as they are, but {problems[0]}. "
        "Have the data collator order them by rows, name what all rows share in non_batch_inputs of your trainer "
        "class, or set rdrop_alpha to 0."
    )


def _logits(model: nn.Module, layout: BatchLayout, inputs: Mapping[str, Any]) -> Tensor | None:
    """Compute the logits with dropout off; None for outputs in which they cannot be told."""
    with dropout_off(model), torch.no_grad(), generators_restored(model):
        outputs = model(**inputs)
    try:
        return find_logits(outputs, layout.size(inputs), inputs).float()
    except ValueError:
        return None


def _alike(expected: Tensor, found: Tensor, passes: int, rtol: float) -> bool:
    expected = torch.cat([expected] * passes)
    return expected.shape == found.shape and bool((found - expected).abs().max() <= rtol * expected.abs().max())
