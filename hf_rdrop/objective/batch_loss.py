"""The loss of one training batch: the parent's own, and the divergence between its passes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..agreements import OUTPUT_AGREEMENTS, Term, hidden_state_agreement, parse_agreement
from ..batch import first_rows, stack_passes
from ..contrastive import info_nce_agreement, pool
from ..functional import AGREEMENTS, compute_dtype
from .batch_layout import BatchLayout
from .comparison_checks import check_comparison, check_gradient
from .heads import Head, find_logits, resolve_head
from .parent_loss import ParentLoss, ParentOutput


class BatchLoss(NamedTuple):
    """The terms of one batch's loss.

    Args:
        ce: mean over the labelled items, averaged over the passes.
        divergence: mean over the items that are compared, and over the pairs of passes; 0 in a plain step.
        outputs: the model's outputs for the first pass.
        fused: the whole loss where the fused head has computed it: then only this one carries a graph.
    """

    ce: Tensor
    divergence: Tensor
    outputs: Any = None
    fused: Tensor | None = None


class _Predictions(NamedTuple):
    """What passes are compared by: logits `[m * B, ...]`, and hidden states `[m * B, T, D]` with their masks."""

    logits: Tensor
    head: Head
    hidden: list[tuple[list[Tensor], Tensor | None]]


class Objective:
    """CE and divergence of the batches of one training run, on full logits.

    Args:
        agreement: weighted sum of terms, as `rdrop_agreement`.
        unlabeled: whether rows without labels are compared too.
        layout: how batches are read.
        parent_loss: the loss under R-Drop's.
        logits_for_agreement: as for `RDropMixin`; None for the model's own logits.
    """

    def __init__(
        self,
        agreement: str,
        unlabeled: bool,
        layout: BatchLayout,
        parent_loss: ParentLoss,
        logits_for_agreement: Callable[[Any, Mapping[str, Any]], Any] | None,
    ) -> None:
        self.terms = parse_agreement(agreement)
        self.unlabeled, self.layout, self.parent_loss = unlabeled, layout, parent_loss
        self.logits_for_agreement = logits_for_agreement
        self.with_hidden = any(term.name not in OUTPUT_AGREEMENTS for term in self.terms)
        self._checked = False  # whether the loss of the first compared batch was looked at

    def plain(self, model: nn.Module, inputs: Any, labels: Tensor | None, return_outputs: bool = True) -> BatchLoss:
        """Compute the loss of one pass, compared with nothing.

        (A parent may run a second forward for outputs that are asked for.)
        """
        found = self._ce(model, inputs, labels, 1, return_outputs)
        return BatchLoss(found.ce, torch.zeros_like(found.ce), found.outputs)

    def compared(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None, passes: int) -> BatchLoss:
        """Compute CE and divergence of `passes` passes, in one forward over the repeated batch.

        Raises:
            ValueError: when there is nothing to compare in what the model returns, or the loss treats it otherwise.
        """
        repeated = self.layout.repeat(inputs, passes)
        if self.with_hidden:
            repeated["output_hidden_states"] = True
        parent, size = self.parent_loss, self.layout.size(inputs)
        own = self.logits_for_agreement is not None
        ran = self._ce(model, repeated, labels, passes)
        found = self._predictions(parent.outputs_behind(ran), inputs, labels, passes)
        check_gradient(ran.ce, found.logits, "logits_for_agreement" if own else parent.name)
        if not self._checked:
            self._checked = True
            if labels is not None and not own and not self.unlabeled:
                check_comparison(self.layout.config, found.head, found.logits, labels, passes, ran.ce)
        values = [term.factor * self._divergence(term, found, passes) for term in self.terms]
        return BatchLoss(ran.ce, torch.stack(values).sum(), first_rows(ran.outputs, passes * size, size))

    def _ce(
        self, model: nn.Module, repeated: Any, labels: Tensor | None, passes: int, return_outputs: bool = True
    ) -> ParentOutput:
        if self.unlabeled and labels is not None and labels.is_floating_point():
            return self._ce_of_labelled_rows(model, repeated, labels, passes)
        return self.parent_loss.of(model, repeated, return_outputs)

    def _ce_of_labelled_rows(
        self, model: nn.Module, repeated: dict[str, Any], labels: Tensor, passes: int
    ) -> ParentOutput:
        """BCE or squared error over the labels that are not -100: heads for real-valued ones know none to ignore."""
        outputs = model(**{name: value for name, value in repeated.items() if name not in ("labels", "label")})
        logits = find_logits(outputs, passes * len(labels))
        head = resolve_head(self.layout.config, logits, labels, passes)
        keep = labels != -100
        scores = logits.to(compute_dtype(logits)).reshape(passes, *labels.shape)[:, keep]
        loss = F.mse_loss if head.problem_type == "regression" else F.binary_cross_entropy_with_logits
        ce = loss(scores, labels[keep].to(scores.dtype).expand_as(scores), reduction="sum")
        return ParentOutput(ce / max(scores.numel(), 1), outputs, [outputs])

    def _predictions(
        self, outputs: Any, inputs: Mapping[str, Any], labels: Tensor | None, passes: int
    ) -> _Predictions:
        """Find what is to be compared among a model's outputs for `passes` passes."""
        layout, rows = self.layout, passes * self.layout.size(inputs)
        hidden = _hidden_states(outputs, inputs, rows) if self.with_hidden else []
        if self.logits_for_agreement is not None:
            logits, head = _own_comparison(self.logits_for_agreement(outputs, inputs), rows, passes)
            return _Predictions(logits, head, hidden)
        logits = find_logits(outputs, rows, inputs)
        assert labels is not None  # `check_batch`
        head = resolve_head(layout.config, logits, labels, passes, layout.shifts_labels)
        if self.unlabeled and head.mask is not None:
            head = head.with_items(layout.items_to_compare(labels, inputs), logits)
        return _Predictions(logits, head, hidden)

    def _divergence(self, term: Term, found: _Predictions, passes: int) -> Tensor:
        """Compute the value of one term."""
        if term.name in OUTPUT_AGREEMENTS:
            return found.head.divergence(found.logits, passes, term.name)
        if term.name == "hidden_states":
            values = [hidden_state_agreement(layers, passes, mask) for layers, mask in found.hidden]
            return torch.stack(values).mean()
        layers, mask = found.hidden[0]
        texts = stack_passes(layers[-1], passes)
        if texts.shape[1] < 2:  # no other rows to tell them from
            return texts.new_zeros(())
        return info_nce_agreement(torch.stack([pool(text, mask, "mean") for text in texts]))


def _own_comparison(given: Any, rows: int, passes: int) -> tuple[Tensor, Head]:
    """Read what a user's `logits_for_agreement` returned for `rows` rows of `passes` passes, or raise a ValueError."""
    parts = given if isinstance(given, tuple) else (given,)
    logits, mask, problem_type = (*parts, None, None, None)[:3]
    problem_type = "single_label_classification" if problem_type is None else problem_type
    if problem_type not in AGREEMENTS:
        raise ValueError(
            f"logits_for_agreement returned the problem_type {problem_type!r}. Return (logits, mask, problem_type) "
            f"with one of {', '.join(AGREEMENTS)}, or leave it out for the first of these."
        )
    by_class = problem_type == "single_label_classification"
    fits = isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim() > by_class
    if len(parts) > 3 or not fits or len(logits) != rows:
        raise ValueError(
            f"logits_for_agreement must return the scores of all {rows} rows of the repeated batch, alone or as "
            f"(logits, mask) or (logits, mask, problem_type): real numbers [{rows}, ..., C] for C classes, or with "
            f"the problem type multi_label_classification or regression [{rows}, ...]. Got {_shown(given)}."
        )
    items = (rows // passes, *(logits.shape[1:-1] if by_class else logits.shape[1:]))
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != items):
        raise ValueError(
            f"logits_for_agreement must return a mask of the shape {items}: one value for each "
            f"{'item' if by_class else 'score'} of one pass (the batch that it is given is not repeated). Got "
            f"{_shown(mask)}."
        )
    return logits, Head(problem_type, None if mask is None else mask.to(logits.device, torch.bool))


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"({', '.join(map(_shown, value))})" if isinstance(value, tuple) else type(value).__name__


def _hidden_states(outputs: Any, inputs: Mapping[str, Any], rows: int) -> list[tuple[list[Tensor], Tensor | None]]:
    """Find the outputs `[rows, T, D]` of all layers of each part of a model (encoder, decoder), and the part's mask
    `[B, T]` of what is no padding; raise a ValueError when the model returns none."""
    parts = {
        "hidden_states": "attention_mask",
        "encoder_hidden_states": "attention_mask",
        "decoder_hidden_states": "decoder_attention_mask",
    }
    found = []
    for name, mask_name in parts.items():
        layers = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if not layers:
            continue
        # (Multiple choice has a row for each choice.)
        states = [layer for layer in layers[1:] if layer.dim() == 3 and len(layer) % rows == 0]
        mask = inputs.get(mask_name)
        mask = mask.flatten(0, -2) if isinstance(mask, Tensor) else None
        if name == "decoder_hidden_states" and mask is None and isinstance(inputs.get("labels"), Tensor):
            mask = inputs["labels"] != -100
        if mask is not None and (not states or mask.shape[1:] != states[0].shape[1:2]):
            mask = None  # patches of an image, or audio after its convolutions
        found.append((states, mask))
    if not found or any(len(states) == 0 for states, _ in found):
        raise ValueError(
            "The model returns no hidden states `[rows, T, D]`, which the agreement terms hidden_states and info_nce "
            "compare. Leave these terms out of rdrop_agreement, or use a model that takes output_hidden_states=True."
        )
    return found
