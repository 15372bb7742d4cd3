"""What another trainer's `compute_loss` does with a model: whether R-Drop can be built on it, seen on real batches."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fused.head import find_head
from ..training.loss_log import LossLog
from .heads import Head

# The heads of Transformers whose labels are classes below `config.num_labels`.
_CLASSIFIER = re.compile(r"For(Sequence|Token|Image|Video|Audio)Classification$")


def check_labels_of_head(model: nn.Module, labels: Tensor) -> None:
    """Check that class labels are classes of the model's head; it waits for the device, so it is for a first batch.

    (Out of range, the loss fails with an index error from its depths, or on a GPU with an assertion that ends the
    process's use of it. Heads whose number of classes is not known are left alone.)

    Args:
        model: the model itself.
        labels: the labels of a batch.

    Raises:
        ValueError: when a label is neither a class nor -100.
    """
    config, head = getattr(model, "config", None), find_head(model)
    if isinstance(head, nn.Linear):
        classes, kind, remedy = head.out_features, "tokens", "encode the data with the model's own tokenizer"
    elif _CLASSIFIER.search(type(model).__name__) and getattr(config, "problem_type", None) in (
        None,
        "single_label_classification",
    ):
        classes, kind, remedy = config.num_labels, "classes", "load the model with num_labels=..."  # type: ignore
    else:
        return
    valid = labels[labels != -100]
    if labels.is_floating_point() or classes < 2 or not valid.numel():
        return
    low, high = valid.min().item(), valid.max().item()
    if low < 0 or high >= classes:
        raise ValueError(
            f"The labels of the first batch are from {low} to {high}, but {type(model).__name__} has {classes} "
            f"{kind}: a label is from 0 to {classes - 1}, or -100 where nothing is to be learned. Check the labels, "
            f"or {remedy}."
        )


def check_comparison(config: Any, head: Head, logits: Tensor, labels: Tensor, passes: int, loss: Tensor) -> None:
    """Check that scores are compared in the way that the loss treats them; it waits for the device.

    Real numbers, or one score per row, are a regression to some models and binary classes to others. Where no
    `problem_type` says which, only the loss can tell.

    Args:
        config: the model's configuration, or None.
        head: how the passes would be compared.
        logits: `[m * B, ...]`.
        labels: `[B, ...]`.
        passes: m.
        loss: the parent's loss of these logits.

    Raises:
        ValueError: when the loss, or a label, is that of the other kind.
    """
    if getattr(config, "problem_type", None) is not None or head.problem_type == "single_label_classification":
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
    if reason is not None:
        raise ValueError(
            f"R-Drop would compare the passes of this model as {head.problem_type}, by the shape of its scores and "
            f"labels, but {reason}. Say which it is: model.config.problem_type = 'regression' or "
            "'multi_label_classification' (a single score of a binary class too); for a module without a config, "
            "model.config = transformers.PretrainedConfig(problem_type=...). Or set rdrop_alpha to 0."
        )


@contextmanager
def recorded_outputs(model: nn.Module | None) -> Iterator[list[Any]]:
    """Collect what the model's calls return, for a `compute_loss` that keeps its outputs to itself.

    Args:
        model: the model as training calls it, None to collect nothing.
    """
    outputs: list[Any] = []
    with ExitStack() as stack:
        if model is not None:
            hook = model.register_forward_hook(lambda module, args, output: outputs.append(output))
            stack.callback(hook.remove)
        yield outputs


def outputs_behind(returned: Any, recorded: list[Any], name: str | None) -> Any:
    """The outputs that a parent's loss was computed from: those it returned, else those of its only forward.

    Args:
        returned: the outputs that the parent's `compute_loss` returned.
        recorded: what each call of the model in it returned.
        name: what to call it, None for Trainer's own.

    Raises:
        ValueError: when it cannot be told.
    """
    if name is None or returned:
        return returned
    if len(recorded) != 1:
        raise ValueError(
            f"{name} returns no outputs and called the model {len(recorded)} times for one batch, so R-Drop "
            "cannot tell which logits to compare. It is for losses of one forward with a row of logits for each "
            "example, not for contrastive, margin or listwise ones. Use such a loss, or set rdrop_alpha to 0."
        )
    return recorded[0]


def check_gradient(loss: Tensor, logits: Tensor, name: str | None) -> None:
    """Check that a loss that is trained is trained through these logits.

    Raises:
        ValueError: when it is not.
    """
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


def check_was_called(trainer_class: type, log: LossLog) -> None:
    """Check after a forward and backward pass, and before the optimizer's step, that R-Drop's loss took part.

    Raises:
        ValueError: when a subclass's `compute_loss` has replaced it.
    """
    if log.is_empty:
        raise ValueError(
            f"{trainer_class.__name__} trains without R-Drop: a `compute_loss` of its own does not call "
            "super().compute_loss. Put your loss into a Trainer class below the mixin: class WithLoss(Trainer) with "
            "compute_loss, then class MyTrainer(RDropMixin, WithLoss)."
        )
