"""The loss of one training batch: the parent's own, and how far its passes are from agreeing."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..agreements import OUTPUT_AGREEMENTS, Term, hidden_state_agreement, parse_agreement
from ..batch import first_rows, stack_passes
from ..contrastive import info_nce_agreement, pool
from ..functional import AGREEMENTS, compute_dtype
from ..training.checks import check_own_loss
from .heads import Head, find_logits, items_to_compare, resolve_head
from .parent_loss import check_comparison, check_gradient, outputs_behind, recorded_outputs

if TYPE_CHECKING:
    from ..trainer import RDropMixin


class BatchLoss(NamedTuple):
    """Of one batch: CE and agreement, each a mean over its own items, and the outputs of its first pass.

    `fused` is the whole loss where the fused head has computed it: then only this one carries a graph.
    """

    ce: Tensor
    agreement: Tensor
    outputs: Any = None
    fused: Tensor | None = None


class _Predictions(NamedTuple):
    """What passes are compared by: logits `[m * B, ...]`, and hidden states `[m * B, T, D]` with their masks."""

    logits: Tensor
    head: Head
    hidden: list[tuple[list[Tensor], Tensor | None]]


class Objective:
    """CE and agreement of the batches of one trainer, by its arguments.

    Args:
        trainer: whose arguments say what is compared, and how.
        parent_loss: the `compute_loss` under R-Drop's.
    """

    def __init__(self, trainer: "RDropMixin", parent_loss: Callable[..., Any]) -> None:
        self.trainer, self.parent_loss = trainer, parent_loss
        self.terms = parse_agreement(trainer.rdrop_argument("agreement"))
        self.with_hidden = any(term.name not in OUTPUT_AGREEMENTS for term in self.terms)
        self.config = getattr(trainer.base_model, "config", None)

    def plain(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None) -> BatchLoss:
        """One pass that is compared with nothing."""
        ce, outputs, _ = self._ce(model, dict(inputs), labels, 1)
        return BatchLoss(ce, torch.zeros_like(ce), outputs)

    def compared(self, model: nn.Module, inputs: dict[str, Any], labels: Tensor | None, passes: int) -> BatchLoss:
        """Run `passes` passes in one forward and compare them with each other.

        Raises:
            ValueError: when there is nothing to compare in what the model returns, or when the loss treats it in
                another way.
        """
        trainer, size = self.trainer, self.trainer._batch_size(inputs)
        extra = {"output_hidden_states": True} if self.with_hidden else {}
        repeated = {**trainer.repeat(inputs, passes), **extra}
        ce, returned, recorded = self._ce(model, repeated, labels, passes)
        name = trainer._parent_loss
        found = self._predictions(outputs_behind(returned, recorded, name), inputs, labels, passes)
        check_gradient(ce, found.logits, "logits_for_agreement" if trainer.logits_for_agreement is not None else name)
        economies = trainer._economies
        if economies is not None and not economies.compared:
            economies.compared = True
            if labels is not None and trainer.logits_for_agreement is None and not trainer.rdrop_argument("unlabeled"):
                check_comparison(self.config, found.head, found.logits, labels, passes, ce)
        values = [term.factor * self._distance(term, found, passes) for term in self.terms]
        return BatchLoss(ce, torch.stack(values).sum(), first_rows(returned, passes * size, size))

    def _ce(
        self, model: nn.Module, repeated: dict[str, Any], labels: Tensor | None, passes: int
    ) -> tuple[Tensor, Any, list[Any]]:
        """The parent's loss, its outputs, and those of every forward where the parent is not Trainer's own."""
        if labels is not None and self.trainer.rdrop_argument("unlabeled") and labels.is_floating_point():
            return (*self._ce_of_labelled_rows(model, repeated, labels, passes), [])
        with recorded_outputs(model if self.trainer._parent_loss else None) as recorded:
            ce, outputs = self.parent_loss(model, repeated, return_outputs=True, num_items_in_batch=None)
        return ce, outputs, recorded

    def _ce_of_labelled_rows(
        self, model: nn.Module, repeated: dict[str, Any], labels: Tensor, passes: int
    ) -> tuple[Tensor, Any]:
        """BCE or squared error over the labels that are not -100: heads for real-valued ones know none to ignore."""
        check_own_loss(self.trainer)
        outputs = model(**{name: value for name, value in repeated.items() if name not in ("labels", "label")})
        logits = find_logits(outputs, passes * len(labels))
        head = resolve_head(self.config, logits, labels, passes)
        keep = labels != -100
        scores = logits.to(compute_dtype(logits)).reshape(passes, *labels.shape)[:, keep]
        loss = F.mse_loss if head.problem_type == "regression" else F.binary_cross_entropy_with_logits
        ce = loss(scores, labels[keep].to(scores.dtype).expand_as(scores), reduction="sum")
        return ce / max(scores.numel(), 1), outputs

    def _predictions(
        self, outputs: Any, inputs: Mapping[str, Any], labels: Tensor | None, passes: int
    ) -> _Predictions:
        """What is to be compared among a model's outputs for `passes` passes."""
        trainer, rows = self.trainer, passes * self.trainer._batch_size(inputs)
        hidden = _hidden_states(outputs, inputs, rows) if self.with_hidden else []
        if trainer.logits_for_agreement is not None:
            logits, head = _own_comparison(trainer.logits_for_agreement(outputs, inputs), rows, passes)
            return _Predictions(logits, head, hidden)
        logits = find_logits(outputs, rows, inputs)
        assert labels is not None  # `check_batch`
        head = resolve_head(self.config, logits, labels, passes, trainer.shifts_labels)
        if trainer.rdrop_argument("unlabeled") and head.mask is not None:
            head = head._replace(mask=items_to_compare(labels, inputs, self.config, trainer.shifts_labels))
        return _Predictions(logits, head, hidden)

    def _distance(self, term: Term, found: _Predictions, passes: int) -> Tensor:
        """The value of one term."""
        if term.name in OUTPUT_AGREEMENTS:
            return found.head.agreement(found.logits, passes, term.name)
        if term.name == "hidden_states":
            values = [hidden_state_agreement(layers, passes, mask) for layers, mask in found.hidden]
            return torch.stack(values).mean()
        layers, mask = found.hidden[0]
        texts = stack_passes(layers[-1], passes)
        if texts.shape[1] < 2:  # no other rows to tell them from
            return texts.new_zeros(())
        return info_nce_agreement(torch.stack([pool(text, mask, "mean") for text in texts]))


def _own_comparison(given: Any, rows: int, passes: int) -> tuple[Tensor, Head]:
    """What a user's `logits_for_agreement` returned for `rows` rows of `passes` passes.

    Raises:
        ValueError: when it is not what it has to be.
    """
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
    """The outputs of all layers, `[rows, T, D]`, of each part of a model (encoder, decoder), with the mask `[B, T]` of
    what is no padding.

    Raises:
        ValueError: when the model returns none.
    """
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
