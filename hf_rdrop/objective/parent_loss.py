"""Call the loss of the Trainer class under R-Drop's, and check that R-Drop can be built on it."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dropout import dropout_off
from ..generators import generators_restored, remember_generators
from .heads import Head


class ParentOutput(NamedTuple):
    """The result of a parent's `compute_loss`.

    Args:
        ce: its loss, a mean over the valid items of the batch.
        outputs: the outputs that it returned.
        recorded: what each of its calls of the model returned; empty for Trainer's own.
    """

    ce: Tensor
    outputs: Any
    recorded: list[Any]


class ParentLoss:
    """`super().compute_loss` of the mixin: the Trainer's own, or that of a class between them.

    Args:
        compute_loss: the bound method.
        name: its qualified name; None for Trainer's own.
        reader: name of the user code that reads the model's outputs in training; None when nobody does.
        count: counts the labelled items of a batch, for a loss that divides by the count itself.
    """

    def __init__(
        self,
        compute_loss: Callable[..., Any],
        name: str | None,
        reader: str | None,
        count: Callable[[Mapping[str, Any]], Tensor | None] | None = None,
    ) -> None:
        self.compute_loss, self.name, self.reader, self.count = compute_loss, name, reader, count
        self._tried = self._divides = False  # whether it needs the count

    def of(self, model: nn.Module, inputs: Any, return_outputs: bool = True) -> ParentOutput:
        """Compute the mean loss of a batch; without outputs (None) where nobody needs them.

        (`num_items_in_batch` is withheld: many heads ignore it and return their mean all the same, so the trainer asks
        everybody for the mean and scales it once. A loss that cannot do without it gets the count of this very batch,
        for which its sum becomes the mean.)
        """
        with _recorded_outputs(model if self.name and return_outputs else None) as recorded:
            found = self._call(model, inputs, return_outputs, recorded)
        ce, outputs = found if return_outputs else (found, None)
        return ParentOutput(ce, outputs, recorded)

    def _call(self, model: nn.Module, inputs: Any, return_outputs: bool, recorded: list[Any]) -> Any:
        def call(items: Tensor | None) -> Any:
            batch = dict(inputs) if isinstance(inputs, Mapping) else inputs  # a loss may take the labels out
            return self.compute_loss(model, batch, return_outputs=return_outputs, num_items_in_batch=items)

        if self.name is None or self.count is None or not isinstance(inputs, Mapping):
            return call(None)
        if not self._tried:
            self._tried = True
            restore = remember_generators(model)
            try:
                return call(None)
            except TypeError as error:
                if "NoneType" not in str(error) or self.count(inputs) is None:
                    raise
            self._divides = True
            recorded.clear()
            restore()  # as if it had been called once
        if not self._divides:
            return call(None)
        items = self.count(inputs)
        return call(None if items is None else items.clamp(min=1))

    def outputs_behind(self, found: ParentOutput) -> Any:
        """Find the outputs that the loss was computed from: those returned, else those of its only forward.

        Raises:
            ValueError: when it cannot be told.
        """
        if self.name is None or found.outputs:
            return found.outputs
        if len(found.recorded) != 1:
            raise ValueError(
                f"{self.name} returns no outputs and called the model {len(found.recorded)} times for one batch, so "
                "R-Drop cannot tell which logits to compare. It is for losses of one forward with a row of logits for "
                "each example, not for contrastive, margin or listwise ones. Use such a loss, or set rdrop_alpha to 0."
            )
        return found.recorded[0]


@contextmanager
def _recorded_outputs(model: nn.Module | None) -> Iterator[list[Any]]:
    """Collect what the model's calls return (nothing without a model), for a loss that keeps its outputs to itself."""
    outputs: list[Any] = []
    with ExitStack() as stack:
        if model is not None:
            hook = model.register_forward_hook(lambda module, args, output: outputs.append(output))
            stack.callback(hook.remove)
        yield outputs


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
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with dropout_off(model), torch.no_grad(), generators_restored(model):
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
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)  # running statistics
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


def check_gradient(loss: Tensor, logits: Tensor, name: str | None) -> None:
    """Raise a ValueError for a trained loss that is not trained through these logits."""
    if loss.requires_grad and not logits.requires_grad and name == "logits_for_agreement":
        raise ValueError(
            "The scores that logits_for_agreement returns carry no gradient (detached, copied, computed under "
            "torch.no_grad, or by an operation like argmax), so their agreement could not train anything. Return the "
            "model's own scores, or differentiable functions of them."
        )
    if loss.requires_grad and not logits.requires_grad:
        raise ValueError(
            f"The logits that {name or 'the model'} returns carry no gradient (the loss was computed elsewhere), so "
            "their agreement could not train anything. Where the loss is the language model's own cross-entropy, let "
            "R-Drop's fused head compute it: user_of_outputs = None in your trainer class, and rdrop_fused_head='on'. "
            "Otherwise set rdrop_alpha to 0."
        )


def check_comparison(config: Any, head: Head, logits: Tensor, labels: Tensor, passes: int, loss: Tensor) -> None:
    """Raise a ValueError for scores that the loss treats in another way than they are compared; waits for the device.

    Real numbers, or one score per row, are a regression to some models and binary classes to others. Where no
    `problem_type` says which, only the loss can tell.

    Args:
        config: the model's configuration, or None.
        head: how the passes would be compared.
        logits, labels: `[m * B, ...]` and `[B, ...]`, of m `passes`.
        loss: the parent's loss of these logits.
    """
    known = head.by_pixel or head.problem_type == "single_label_classification"
    if getattr(config, "problem_type", None) is not None or known:
        return
    scores, targets = logits.detach().float().flatten(), torch.cat([labels.flatten()] * passes).float()

    def is_loss(function: Any) -> Tensor:
        return torch.isclose(function(scores, targets), loss.detach().float(), rtol=1e-2)  # of bfloat16, too

    squared, binary = is_loss(F.mse_loss), is_loss(F.binary_cross_entropy_with_logits)
    reason = None
    if head.problem_type == "regression":
        if binary and not squared:
            reason = "its loss is the binary cross-entropy of its scores"
        elif not squared and ((targets == 0) | (targets == 1)).all():
            reason = "its labels are all 0 or 1 and its loss is not their mean squared error"
    elif squared and not binary:
        reason = "its loss is the mean squared error of its scores"
    elif ((targets < 0) | (targets > 1)).any():
        reason = "its labels are not between 0 and 1"
    elif not binary:
        reason = "its loss is not the binary cross-entropy of its scores (for soft labels of one choice: "
        reason += "problem_type 'single_label_classification')"
    if reason is not None:
        raise ValueError(
            f"R-Drop would compare the passes of this model as {head.problem_type}, by the shape of its scores and "
            f"labels, but {reason}. Say which it is: model.config.problem_type = 'regression' or "
            "'multi_label_classification' (a single score of a binary class too); for a module without a config, "
            "model.config = transformers.PretrainedConfig(problem_type=...). Or set rdrop_alpha to 0."
        )
