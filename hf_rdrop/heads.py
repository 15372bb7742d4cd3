"""What a head's outputs mean: where its logits are, which items count, and how its passes are compared."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .batch import stack_passes
from .functional import AGREEMENTS

SUPPORTED_HEADS = (
    "sequence classification (single-label, multi-label, regression), token classification and language modelling "
    "(sequence-to-sequence, causal, masked)"
)


class Head(NamedTuple):
    """How the passes of one head are compared: a key of `AGREEMENTS` and the mask of the items that count."""

    problem_type: str
    mask: Tensor | None

    def agreement(self, logits: Tensor, passes: int) -> Tensor:
        """Mean disagreement of the passes for the logits `[m * B, ...]` of a repeated batch."""
        return AGREEMENTS[self.problem_type](stack_passes(logits, passes), self.mask)


def predicts_next_token(model: nn.Module) -> bool:
    """Whether the head scores position t against label t + 1 (causal language models)."""
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    names = {base.__name__ for base in type(model).__mro__}  # FSDP makes a class of its own of the model's
    return not names.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) and not is_pair


def valid_items(labels: Tensor, shift_labels: bool = False) -> Tensor:
    """Mask of the labels that the head's own loss averages over.

    Integer labels count where they are not -100, without the first position when the head predicts the next token;
    real-valued labels (regression, multi-label) all count, whatever their value.
    """
    if labels.is_floating_point():
        return torch.ones_like(labels, dtype=torch.bool)
    return (shifted_labels(labels) if shift_labels else labels) != -100


def shifted_labels(labels: Tensor) -> Tensor:
    """The labels of a head that predicts the next token, as long as its logits: position t gets label t + 1."""
    return F.pad(labels[..., 1:], (0, 1), value=-100)


def find_logits(outputs: Any, rows: int) -> Tensor:
    """The logits among a model's outputs (ModelOutput, dict or tuple), which must have one row per row of the batch.

    Raises:
        ValueError: when there are none.
    """
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits", outputs.get("scores"))  # the latter in sentence-transformers' CrossEncoder
        found = ", ".join(outputs)
    else:  # (loss, logits, ...), or (logits, ...) when the labels were withheld for label smoothing
        items = outputs if isinstance(outputs, (list, tuple)) else ()
        tensors = [item for item in items if isinstance(item, Tensor) and item.dim() > 0]
        logits, found = next(iter(tensors), None), f"{type(outputs).__name__} of {len(items)}"
    if not isinstance(logits, Tensor) or logits.dim() == 0 or len(logits) != rows:
        shape = f", logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
        raise ValueError(
            f"R-Drop compares the logits of the passes, but the model returned no logits for its {rows} rows (got: "
            f"{found}{shape}). Use a model whose output has `logits`, without a fused loss that drops them "
            "(`use_liger_kernel`, unless liger_kernel_config={'fused_linear_cross_entropy': False}); supported heads: "
            f"{SUPPORTED_HEADS}. Or set rdrop_alpha to 0."
        )
    return logits


def resolve_head(config: Any, logits: Tensor, labels: Tensor, passes: int, shift_labels: bool = False) -> Head:
    """Decide how the passes are compared, by Transformers' own rules for `problem_type` (read, never set).

    Args:
        config: the model's configuration, or None.
        logits: `[m * B, ...]`.
        labels: `[B, ...]`.
        passes: m.
        shift_labels: whether the head predicts the next token.

    Raises:
        ValueError: when logits and labels do not fit a supported head.
    """
    shape = (len(logits) // passes, *logits.shape[1:])
    problem_type = getattr(config, "problem_type", None)
    per_class = labels.dim() > 0 and labels.shape == shape[:-1]
    one_score = labels.dim() == 1 and shape in ((len(labels),), (len(labels), 1))
    if labels.shape == shape or one_score:
        if problem_type == "regression" or (problem_type is None and (one_score or shape[-1] == 1)):
            return Head("regression", None)
        if labels.shape == shape or problem_type == "multi_label_classification":
            return Head("multi_label_classification", None)
    if per_class and not labels.is_floating_point():
        return Head("single_label_classification", valid_items(labels, shift_labels))
    raise ValueError(
        f"R-Drop cannot compare logits of shape {shape} for labels of shape {tuple(labels.shape)} and type "
        f"{labels.dtype}: neither one class index per row of scores nor one target per score. Supported heads: "
        f"{SUPPORTED_HEADS}. Check the labels, or set rdrop_alpha to 0."
    )
