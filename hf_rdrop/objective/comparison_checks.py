"""Check that the scores that are compared are those that the loss trains, and as it reads them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .heads import Head


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
    if head.by_pixel or head.problem_type == "single_label_classification":
        return
    scores, targets = logits.detach().float().flatten(), torch.cat([labels.flatten()] * passes).float()

    def is_loss(function: Any, transform: Any = torch.clone) -> Tensor:
        found = function(transform(scores), targets)
        return torch.isclose(found, loss.detach().float(), rtol=1e-2)  # of bfloat16, too

    squared, binary = is_loss(F.mse_loss), is_loss(F.binary_cross_entropy_with_logits)
    if head.problem_type == "regression" and not squared and not binary:
        for name, transform in (("sigmoid", torch.sigmoid), ("tanh", torch.tanh)):
            if is_loss(F.mse_loss, transform) or is_loss(F.l1_loss, transform):
                raise ValueError(
                    f"The loss of this model is that of the {name} of its scores, and R-Drop would compare the scores "
                    "themselves. Say what the loss sees with logits_for_agreement=lambda outputs, inputs: "
                    f"(outputs['logits'].{name}()), with the name under which your model returns its scores. Or set "
                    "rdrop_alpha to 0."
                )
    if getattr(config, "problem_type", None) is not None:
        return
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
