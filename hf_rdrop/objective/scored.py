"""Measure which positions a language model's own loss scores, and against which labels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..batch import few_rows
from ..dropout import dropout_off
from ..generators import generators_restored
from .heads import shifted_labels

ROWS = 2  # enough to tell in most batches, few enough for the logits of a large vocabulary

# What a process finds, beside False and True; of several processes the least counts, so that all go on alike.
_NEITHER, _UNKNOWN, _NO_LABEL = -1, 2, 3


def measure_shift(model: nn.Module, wrapped: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> tuple[Any, bool]:
    """Find out whether a model's loss scores position t against label t + 1.

    The gradient of a cross-entropy by its logits is 0 where nothing is scored, and lowest at the label elsewhere: it
    shows the scored positions whatever else the loss holds (auxiliary losses, weights). One forward over at most two
    rows, a second over the batch where these do not tell (or the model fails on them), with dropout off and without
    gradients before the head; it draws no random number.

    Args:
        model: the model itself, with output embeddings.
        wrapped: the model as training calls it.
        inputs: a batch with `labels`, not repeated.
        labels: its labels, `[B, T]`.

    Returns:
        True when it shifts the labels, False when it does not, None where it cannot be told (both readings fit, the
        head is not called once for all positions); and whether another batch could tell, as this one has no label.

    Raises:
        ValueError: when the loss scores other positions, or other labels, than either reading says.
    """
    found = _UNKNOWN
    for count in (ROWS, len(labels)):
        if found >= _UNKNOWN:
            rows = few_rows(inputs, len(labels), min(len(labels), count))
            found = _least(_reading(_gradient_of_logits(model, wrapped, rows), rows["labels"]), labels.device)
    if found == _NEITHER:
        raise ValueError(
            f"The loss of {type(model).__name__} scores its predictions neither against the labels of their own "
            "positions nor against those of the next ones (an n-gram loss, several codebooks, or labels of its own), "
            "so R-Drop cannot tell which predictions count. Say what to compare with logits_for_agreement, or set "
            "rdrop_alpha to 0."
        )
    return (bool(found) if found < _UNKNOWN else None), found == _NO_LABEL


def _reading(gradient: Tensor | None, labels: Tensor) -> int:
    """Tell which labels a gradient by the logits was made of."""
    if not (labels != -100).any():
        return _NO_LABEL
    if gradient is None or gradient.shape[:-1] != labels.shape:  # an n-gram loss has logits for each n
        return _NEITHER if gradient is not None and gradient.dim() > labels.dim() + 1 else _UNKNOWN
    scored, lowest = gradient.abs().amax(-1) > 0, gradient.argmin(-1)
    readings = (labels, shifted_labels(labels))
    fits = [torch.equal(scored, r != -100) and bool((lowest == r)[scored].all()) for r in readings]
    if not any(fits):
        # A probability that rounds to 1 has no gradient: then the labels of the others decide.
        fits = [bool(((r != -100) & (lowest == r))[scored].all()) for r in readings]
    return fits.index(True) if sum(fits) == 1 else _UNKNOWN if any(fits) else _NEITHER


def _least(found: int, device: torch.device) -> int:
    """Take the least of what the processes have found."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    every = torch.tensor(found, device=device)
    torch.distributed.all_reduce(every, torch.distributed.ReduceOp.MIN)
    return int(every)


def _gradient_of_logits(model: Any, wrapped: nn.Module, rows: Mapping[str, Any]) -> Tensor | None:
    """Take the gradient of the model's loss by what its head puts out; None where that is not to be had."""
    head = model.get_output_embeddings()
    if isinstance(head, nn.Embedding):  # the logits are made of its weight, and what it puts out are inputs (FSMT)
        return None
    outputs: list[Tensor] = []
    found: list[Any] = []

    def leaf(head: nn.Module, args: Any, output: Tensor) -> Tensor:
        torch.set_grad_enabled(True)  # from here to the loss; before the head there is no graph
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    def end(module: nn.Module, args: Any, output: Any) -> None:
        torch.set_grad_enabled(False)  # before DDP looks whether a backward pass will come, and takes the graph away
        found.append(output)

    inner = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
    hooks = [head.register_forward_hook(leaf)]
    # Whichever ends first: adapters call no hook of the model. Before FSDP's own, which look for a backward pass too.
    hooks += [module.register_forward_hook(end, prepend=True) for module in (model, inner)]
    try:
        with dropout_off(model), torch.no_grad(), generators_restored(model):
            wrapped(**rows)
        loss = found[0]["loss"] if isinstance(found[0], Mapping) else found[0][0]
        if len(outputs) != 1 or not loss.requires_grad:
            return None
        return torch.autograd.grad(loss, outputs[0], allow_unused=True)[0]
    except Exception:  # whatever a model does with two rows of a batch, it may train on all of them
        return None
    finally:
        for hook in hooks:
            hook.remove()
