"""R-Drop's objective for plain PyTorch and Accelerate loops."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .agreements import OUTPUT_AGREEMENTS, parse_agreement
from .alpha import check_alpha
from .functional import AGREEMENTS


class RDropLossOutput(NamedTuple):
    """`loss = ce + alpha / 2 * kl`, each a scalar with its graph."""

    loss: Tensor
    ce: Tensor
    kl: Tensor


def check_class_indices(labels: Tensor, classes: int) -> None:
    """Raise `ValueError` unless labels are integers and, which is checked on a CPU only, -100 or in [0, classes)."""
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"Labels must be class indices, got {labels.dtype}: convert them with labels.long().")
    if labels.device.type == "cpu" and len(wrong := labels[(labels != -100) & ((labels < 0) | (labels >= classes))]):
        raise ValueError(
            f"Labels must be class indices in [0, {classes}) or -100, got {wrong.min()} to {wrong.max()}: check that "
            "the labels (or the tokenizer) fit the outputs of the model."
        )


class RDropLoss(nn.Module):
    r"""Compute R-Drop's objective from the logits of two (or more) stochastic passes and the labels.

    ``loss = mean_j CE_j + alpha / 2 * mean_{i<j} sKL(P_i, P_j)``, which for two passes is
    ``(CE_1 + CE_2 + alpha * sKL) / 2`` with ``sKL(P, Q) = 1/2 KL(P||Q) + 1/2 KL(Q||P)``: the paper's alpha, on the
    scale of plain fine-tuning's loss. Both terms are averaged over the items whose label is not -100.

    Args:
        alpha: weight of the divergence, >= 0 and finite. The paper uses 1.0 for language modelling, 0.1 to 1.0 for
            GLUE and 5 for translation.
        problem_type: as in Transformers' configurations: `"single_label_classification"` (also tags and tokens),
            `"multi_label_classification"` (BCE and Bernoulli KL per label) or `"regression"` (MSE and squared
            difference of the predictions).
        label_smoothing: share of the target given to the uniform distribution, in [0, 1); single-label only.
        agreement: the divergence, sKL by default: a sum such as `"symmetric_kl + 0.1 * squared_logits"` of names in
            `hf_rdrop.agreements.OUTPUT_AGREEMENTS`.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Liang et al. 2021, section 2 (divided by two).

    Example:
        >>> logits = model(**repeat_batch(batch)).logits          # one forward, [x; x]
        >>> loss, ce, kl = RDropLoss(alpha=1.0)(*split_passes(logits), batch["labels"])
        >>> loss.backward()
    """

    def __init__(
        self,
        alpha: float = 1.0,
        problem_type: str = "single_label_classification",
        label_smoothing: float = 0.0,
        agreement: str = "symmetric_kl",
    ) -> None:
        super().__init__()
        check_alpha(alpha)
        if problem_type not in AGREEMENTS:
            raise ValueError(f"Unknown problem_type {problem_type!r}: choose one of {', '.join(AGREEMENTS)}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}.")
        if label_smoothing and problem_type != "single_label_classification":
            raise ValueError(
                f"label_smoothing has no meaning for {problem_type}: it mixes one-hot targets with the uniform "
                "distribution. Set it to 0."
            )
        self.terms = parse_agreement(agreement)
        if unknown := [term.name for term in self.terms if term.name not in OUTPUT_AGREEMENTS]:
            raise ValueError(
                f"RDropLoss gets logits alone, and {unknown[0]} compares hidden states: choose of "
                f"{', '.join(OUTPUT_AGREEMENTS)}, or use RDropTrainer (rdrop_agreement)."
            )
        self.alpha, self.problem_type, self.label_smoothing = alpha, problem_type, label_smoothing

    def forward(self, logits_a: Tensor, logits_b: Tensor, labels: Tensor, *more_logits: Tensor) -> RDropLossOutput:
        """Compute loss, CE and KL.

        Args:
            logits_a: `[..., C]` scores of the first pass; `[...]` or `[..., K]` predictions for regression.
            logits_b: the same of the second pass.
            labels: `[...]` class indices, -100 where ignored; `[..., C]` 0/1 for multi-label; targets of the shape of
                the predictions (or without a last dimension of 1) for regression.
            more_logits: the same of further passes (m > 2).

        Returns:
            `RDropLossOutput(loss, ce, kl)`, scalars; all 0 when every label is -100.

        Raises:
            ValueError: if shapes do not fit.
        """
        passes = (logits_a, logits_b, *more_logits)
        if any(logits.shape != logits_a.shape for logits in passes):
            raise ValueError(f"All passes must have one shape, got {[tuple(logits.shape) for logits in passes]}.")
        logits = torch.stack(passes)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.problem_type == "single_label_classification":
            if logits_a.dim() < 1 or labels.shape != logits_a.shape[:-1]:
                raise ValueError(_shape_message(labels, "one class index per item", logits_a.shape[:-1]))
            check_class_indices(labels, logits.shape[-1])
            mask = labels != -100
            logits.masked_fill_(~mask[..., None], 0)  # an ignored item may hold inf or nan; `stack` has made a copy
            scores, targets = logits.flatten(0, -2), labels.long().expand(len(passes), *labels.shape).flatten()
            ce_sum = F.cross_entropy(scores, targets, reduction="sum", label_smoothing=self.label_smoothing)
            ce = ce_sum / (mask.sum() * len(passes)).clamp(min=1)
            kl = self._divergence(logits, mask)
        else:
            if self.problem_type == "regression" and logits_a.shape == (*labels.shape, 1):
                logits = logits.squeeze(-1)
            if labels.shape != logits.shape[1:]:
                raise ValueError(_shape_message(labels, "one target per score", logits.shape[1:]))
            criterion = F.mse_loss if self.problem_type == "regression" else F.binary_cross_entropy_with_logits
            ce_sum = criterion(logits, labels.to(logits.dtype).expand_as(logits), reduction="sum")
            ce = ce_sum / max(logits.numel(), 1)
            kl = self._divergence(logits, None)
        return RDropLossOutput(ce + self.alpha / 2 * kl, ce, kl)

    def _divergence(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        values = [term.factor * OUTPUT_AGREEMENTS[term.name](logits, mask, self.problem_type) for term in self.terms]
        return torch.stack(values).sum()

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, problem_type={self.problem_type!r}, label_smoothing={self.label_smoothing}"


def _shape_message(labels: Tensor, wanted: str, shape: torch.Size) -> str:
    return f"The labels have shape {tuple(labels.shape)}, but {wanted} is needed: {tuple(shape)}."
