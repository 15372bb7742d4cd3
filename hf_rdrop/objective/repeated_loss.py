"""Check on the first batch that the loss of ``[x; x]`` is that of x: its value and its gradient."""

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..dropout import dropout_off
from ..generators import undisturbed
from .parent_loss import ParentLoss


class UnrepeatableInputs(ValueError):
    """A batch has inputs that are not one per row, and the model does not read their repetition as two passes."""


def unrepeatable(unlike_rows: Mapping[str, str], problem: str) -> UnrepeatableInputs:
    """Make the refusal of inputs that are not one per row, each with how it was repeated."""
    return UnrepeatableInputs(
        "R-Drop repeats each batch, and the model does not take the repeated one as the same rows twice "
        f"({problem}). Not one per row, so that R-Drop had to go by names, are: {'; '.join(unlike_rows.values())}. "
        "Name those that are the same for all rows in non_batch_inputs of a subclass of the trainer (RDropTrainer."
        "non_batch_inputs | {...}), give the others one entry per row, or set rdrop_alpha to 0."
    )


def check_repeated_loss(
    parent: ParentLoss,
    model: nn.Module,
    inputs: Mapping[str, Any],
    repeated: Any,
    rtol: float,
    unlike_rows: Mapping[str, str] | None = None,
) -> None:
    """Raise a ValueError for a loss of ``[x; x]`` that is not that of x with dropout off: sums, pairs of rows.

    So do inputs that are not one per row (`unlike_rows`, each with how it was repeated), where a model reads them
    otherwise. Compares the gradients with respect to the model's outputs too. The model itself runs without gradient:
    two forwards (a third where the losses differ), which draw no random number that counts and leave its buffers as
    they were. A loss that draws some itself, or needs gradients inside, is let be.
    """
    try:
        with dropout_off(model), torch.no_grad(), undisturbed(model):
            once, gradient = _loss_and_gradient(parent, model, inputs)
            try:
                found, of_repeated = _loss_and_gradient(parent, model, repeated)
            except Exception as error:
                if unlike_rows:
                    raise unrepeatable(unlike_rows, f"{type(error).__name__}: {error}") from error
                raise
            again = once if _are_close(found, once, rtol) else _loss_and_gradient(parent, model, inputs)[0]
    except UnrepeatableInputs:
        raise
    except Exception:  # whatever a loss does here, training says it itself
        return
    if not torch.isclose(once, again, rtol=rtol / 10):
        return
    if _are_close(found, once, rtol):
        if _are_repeated(gradient, of_repeated, 10 * rtol):
            return
        raise ValueError(
            f"R-Drop repeats each batch, and the loss of {parent.name or type(model).__name__} has another gradient "
            "for a repeated batch with dropout off, though its value is the same (it may sum over the rows or pair "
            "them in a part that cancels out), so R-Drop would train something else. Use a loss that is a mean over "
            "the rows, or set rdrop_alpha to 0."
        )
    if unlike_rows:
        raise unrepeatable(unlike_rows, f"with dropout off its loss is {found:.4g} instead of {once:.4g}")
    kind = (
        "a sum over the rows" if torch.isclose(found / once, (found / once).round(), rtol=1e-3) else "no mean of them"
    )
    raise ValueError(
        f"R-Drop repeats each batch, and the loss of {parent.name or type(model).__name__} is not the same for a "
        f"repeated batch with dropout off ({found:.4g} instead of {once:.4g}): it is {kind} (it may pair the rows of "
        "a batch, or tell them from each other), so R-Drop would train something else. Use a loss that is a mean over "
        "the rows, or set rdrop_alpha to 0."
    )


def _are_close(found: Tensor, once: Tensor, rtol: float) -> bool:
    return bool(torch.isclose(found, once, rtol=rtol, atol=1e-5))


def _loss_and_gradient(
    parent: ParentLoss, model: nn.Module, inputs: Mapping[str, Any]
) -> tuple[Tensor, list[Tensor | None]]:
    """Compute a loss and its gradients with respect to the outputs of the model, through which none goes on.

    (So nothing is left in `.grad`, and no wrapper of the model waits for a backward pass.)
    """
    leaves: list[Tensor] = []

    def as_leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
            return value
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    def before(module: nn.Module, args: Any) -> None:
        torch.set_grad_enabled(False)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        torch.set_grad_enabled(True)
        if isinstance(output, Mapping):
            new: Any = copy.copy(output)
            for name, value in output.items():
                new[name] = as_leaf(value)
            return new
        return tuple(map(as_leaf, output)) if type(output) is tuple else as_leaf(output)

    with torch.no_grad(), ExitStack() as stack:  # which puts the mode back
        stack.callback(model.register_forward_pre_hook(before).remove)
        stack.callback(model.register_forward_hook(after).remove)
        loss = parent.of(model, dict(inputs)).ce
        if not loss.requires_grad:
            return loss.float(), []
        return loss.detach().float(), list(torch.autograd.grad(loss, leaves, allow_unused=True))


def _are_repeated(once: list[Tensor | None], repeated: list[Tensor | None], rtol: float) -> bool:
    """Tell whether the gradients of a repeated batch are those of the batch, divided among the passes."""
    for one, many in zip(once, repeated, strict=False):
        if one is None or many is None or len(many) % len(one):
            continue
        passes = len(many) // len(one)
        difference = many.float() * passes - torch.cat([one.float()] * passes)
        if difference.abs().max() > rtol * one.float().abs().max() + 1e-7:
            return False
    return True
