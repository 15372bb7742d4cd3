"""Measure which positions a language model's own loss scores, and against which labels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import first_rows
from ..dropout import dropout_off
from .heads import shifted_labels

ROWS = 2  # enough to tell, few enough for the logits of a large vocabulary


def measure_shift(model: nn.Module, wrapped: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> bool | None:
    """Find out whether a model's loss scores position t against label t + 1.

    The gradient of a cross-entropy by its logits is 0 where nothing is scored, and lowest at the label elsewhere: it
    shows the scored positions whatever else the loss holds (auxiliary losses, weights). One forward over at most two
    rows, with dropout off and without gradients before the head; it draws no random number.

    Args:
        model: the model itself, with output embeddings.
        wrapped: the model as training calls it.
        inputs: a batch with `labels`, not repeated.
        labels: its labels, `[B, T]`.

    Returns:
        True when it shifts the labels, False when it does not, None where it cannot be told (both readings fit, the
        head is not called once for all positions, the forward fails on so few rows).

    Raises:
        ValueError: when the loss scores other positions, or other labels, than either reading says.
    """
    rows = first_rows(dict(inputs), len(labels), min(len(labels), ROWS))
    gradient = _gradient_of_logits(model, wrapped, rows)
    target = rows["labels"]
    if gradient is None or gradient.shape[:-1] != target.shape:
        return None
    scored, lowest = gradient.abs().amax(-1) > 0, gradient.argmin(-1)
    if not scored.any():
        return None
    fits = []
    for shifts, reading in ((False, target), (True, shifted_labels(target))):
        if torch.equal(scored, reading != -100) and bool((lowest == reading)[scored].all()):
            fits.append(shifts)
    if not fits:
        # A probability that rounds to 1 has no gradient: then the labels of the others decide.
        for shifts, reading in ((False, target), (True, shifted_labels(target))):
            if bool(((reading != -100) & (lowest == reading))[scored].all()):
                fits.append(shifts)
    if not fits:
        raise ValueError(
            f"The loss of {type(model).__name__} scores its predictions neither against the labels of their own "
            "positions nor against those of the next ones (an n-gram loss, several codebooks, or labels of its own), "
            "so R-Drop cannot tell which predictions count. Say what to compare with logits_for_agreement, or set "
            "rdrop_alpha to 0."
        )
    return fits[0] if len(fits) == 1 else None


def _gradient_of_logits(model: Any, wrapped: nn.Module, rows: Mapping[str, Any]) -> Tensor | None:
    """Take the gradient of the model's loss by what its head puts out; None where that is not to be had."""
    outputs: list[Tensor] = []

    def leaf(head: nn.Module, args: Any, output: Tensor) -> Tensor:
        torch.set_grad_enabled(True)  # from here to the loss; before the head there is no graph
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    def end(module: nn.Module, args: Any, output: Any) -> None:
        torch.set_grad_enabled(False)  # before DDP looks whether a backward pass will come

    hooks = [model.get_output_embeddings().register_forward_hook(leaf), model.register_forward_hook(end)]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        with dropout_off(model), torch.no_grad(), torch.random.fork_rng(devices):
            found = wrapped(**rows)
        loss = found["loss"] if isinstance(found, Mapping) else found[0]
        if len(outputs) != 1 or not loss.requires_grad:
            return None
        return torch.autograd.grad(loss, outputs[0], allow_unused=True)[0]
    except Exception:  # whatever a model does with two rows of a batch, it may train on all of them
        return None
    finally:
        for hook in hooks:
            hook.remove()
