"""Call the loss of the Trainer class under R-Drop's, and check that R-Drop can be built on it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dropout import dropout_off
from ..generators import generators_restored
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
    """

    def __init__(self, compute_loss: Callable[..., Any], name: str | None, reader: str | None) -> None:
        self.compute_loss, self.name, self.reader = compute_loss, name, reader

    def of(self, model: nn.Module, inputs: Mapping[str, Any]) -> ParentOutput:
        """Compute the mean loss of a batch.

        (`num_items_in_batch` is withheld: many heads ignore it and return their mean all the same, so the trainer asks
        everybody for the mean and scales it once.)
        """
        with _recorded_outputs(model if self.name else None) as recorded:
            ce, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=None)
        return ParentOutput(ce, outputs, recorded)

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
    otherwise.

    Three forwards without gradient, which draw no random number that counts. A loss that draws some itself, or needs
    gradients inside, is let be.
    """
    try:
        with dropout_off(model), torch.no_grad(), generators_restored(model):
            once, again = (parent.of(model, dict(inputs)).ce.float() for _ in range(2))
            try:
                found = parent.of(model, dict(repeated)).ce.float()
            except Exception as error:
                if unlike_rows:
                    raise unrepeatable(unlike_rows, f"{type(error).__name__}: {error}") from error
                raise
    except UnrepeatableInputs:
        raise
    except Exception:  # whatever a loss does here, training says it itself
        return
    if not torch.isclose(once, again, rtol=rtol / 10) or torch.isclose(found, once, rtol=rtol, atol=1e-5):
        return
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
