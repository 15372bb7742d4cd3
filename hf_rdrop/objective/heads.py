"""Find a head's labels and logits, the items that count, and how its passes are compared."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)

from ..agreements import OUTPUT_AGREEMENTS
from ..batch import stack_passes

SUPPORTED_HEADS = (
    "classification of sequences, images and audio (single-label, multi-label, regression), token classification, "
    "multiple choice, question answering, semantic segmentation, language modelling (sequence-to-sequence, causal, "
    "masked); for any other, logits_for_agreement=... says what to compare"
)
# The labels of question answering, whose head has two distributions over the positions of a row.
ANSWER = ("start_positions", "end_positions")


class Head(NamedTuple):
    """How the passes of one head are compared: a key of `functional.AGREEMENTS`, and a mask of the items.

    With `by_pixel` the classes are the second dimension of the logits, before height and width.
    """

    problem_type: str
    mask: Tensor | None
    by_pixel: bool = False

    def divergence(self, logits: Tensor, passes: int, name: str = "symmetric_kl") -> Tensor:
        """Compute a divergence of `OUTPUT_AGREEMENTS` from the logits `[m * B, ...]` of a repeated batch."""
        return OUTPUT_AGREEMENTS[name](stack_passes(self.classes_last(logits), passes), self.mask, self.problem_type)

    def classes_last(self, logits: Tensor) -> Tensor:
        """View the logits with their classes in the last dimension."""
        return logits.movedim(1, -1) if self.by_pixel else logits

    def with_items(self, mask: Tensor, logits: Tensor) -> "Head":
        """Compare the items of a mask in the shape of the labels instead."""
        mask = self.labels_for(logits, mask)
        return self._replace(mask=mask if self.mask is None or mask.dim() == self.mask.dim() else mask[..., None])

    def labels_for(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Take the labels of the items: those of the pixels at the logits' resolution."""
        return nearest_pixels(labels, logits) if self.by_pixel else labels


def find_labels(inputs: Mapping[str, Any], names: Iterable[str] = ()) -> Tensor | None:
    """Find the labels of a batch: `labels`, or those of question answering as `[B, 2]`, or the first of `names`.

    An answer with a position outside its row, or with one of -100, becomes -100 twice.
    """
    for name in ("labels", "label"):
        if isinstance(inputs.get(name), Tensor):
            return inputs[name]
    if all(isinstance(inputs.get(name), Tensor) for name in ANSWER):
        return _answers(inputs)
    return next((inputs[name] for name in names if isinstance(inputs.get(name), Tensor)), None)


def _answers(inputs: Mapping[str, Any]) -> Tensor:
    positions = torch.stack([inputs[name].flatten() for name in ANSWER], -1)
    outside = (positions >= _length(inputs)) | (positions == -100)
    return positions.clamp(min=0).masked_fill(outside.any(-1, keepdim=True), -100)


def without_answers(inputs: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Move the answers that do not count behind the row, where Transformers' question-answering heads ignore them.

    These heads do not ignore -100: they clamp it to position 0. Of an answer that is cut in two they would count one
    half: the loss would then be no mean over items, and nan for a batch without any end.
    """
    if not all(isinstance(inputs.get(name), Tensor) for name in ANSWER):
        return inputs
    if _class_names(model).isdisjoint(MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values()):
        return inputs
    lost = (_answers(inputs) == -100)[:, 0]
    return {**inputs, **{n: inputs[n].masked_fill(lost.view_as(inputs[n]), _length(inputs)) for n in ANSWER}}


def _length(inputs: Mapping[str, Any]) -> int:
    names = ("input_ids", "inputs_embeds", "attention_mask")
    return next((inputs[n].shape[1] for n in names if isinstance(inputs.get(n), Tensor)), torch.iinfo(torch.long).max)


def predicts_next_token(model: nn.Module) -> bool:
    """Tell whether the head scores position t against label t + 1 (causal language models)."""
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return not _class_names(model).isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) and not is_pair


def segments_images(model: nn.Module) -> bool:
    """Tell whether the head gives classes to pixels (semantic segmentation)."""
    return not _class_names(model).isdisjoint(MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.values())


def ignored_label(config: Any) -> int:
    """Find the label of the pixels that a model for semantic segmentation leaves out."""
    for name in ("semantic_loss_ignore_index", "loss_ignore_index"):
        if isinstance(index := getattr(config, name, None), int):
            return index
    return -100


def nearest_pixels(labels: Tensor, logits: Tensor) -> Tensor:
    """Take of the labels `[B, H, W]` one for each pixel of logits `[..., h, w]`: `interpolate`'s `nearest`."""
    rows, columns = (
        torch.arange(n, device=labels.device) * of // n
        for n, of in zip(logits.shape[-2:], labels.shape[-2:], strict=True)
    )
    return labels[:, rows[:, None], columns]


def _class_names(model: nn.Module) -> set[str]:
    """Collect the names of the class and its bases: FSDP derives a class of its own from the model's."""
    return {base.__name__ for base in type(model).__mro__}


def valid_items(labels: Tensor, shift_labels: bool = False, ignored: int = -100) -> Tensor:
    """Mask the labels that the head's own loss averages over.

    Integer labels count where they are not `ignored`, without the first position when the head predicts the next
    token. Real-valued labels (regression, multi-label) all count.
    """
    if labels.is_floating_point():
        return torch.ones_like(labels, dtype=torch.bool)
    return (shifted_labels(labels) if shift_labels else labels) != ignored


def items_to_compare(
    labels: Tensor, inputs: Mapping[str, Any], config: Any = None, shift_labels: bool = False, ignored: int = -100
) -> Tensor:
    """Mask the items to compare when rows without a label count too, in the shape of the labels `[B]`, `[B, T]`, ...

    A row with labels has the items that the loss counts. A row whose labels are all -100 has itself; with tags and
    tokens, every position that is no padding (by `attention_mask`); in an encoder-decoder, the decoder's positions (by
    `decoder_attention_mask` or the padding in `decoder_input_ids`), and always the first.
    """
    if labels.dim() < 2 or labels.is_floating_point():
        return torch.ones_like(labels, dtype=torch.bool)
    counted = valid_items(labels, shift_labels, ignored)
    if labels.dim() > 2 or ANSWER[0] in inputs:
        return counted | _bare(labels, ignored)
    is_pair = getattr(config, "is_encoder_decoder", False)
    mask, ids = inputs.get("decoder_attention_mask" if is_pair else "attention_mask"), inputs.get("decoder_input_ids")
    if mask is None and is_pair:
        mask = torch.zeros_like(labels) if ids is None else ids != config.pad_token_id
    if mask is None or mask.shape != labels.shape:
        mask = torch.ones_like(labels)
    mask = mask.to(device=labels.device, dtype=torch.bool, copy=True)
    if is_pair:
        mask[:, 0] = True  # the start, which may be the padding token
    return counted | (_bare(labels) & (F.pad(mask[:, 1:], (0, 1), value=False) if shift_labels else mask))


def _bare(labels: Tensor, ignored: int = -100) -> Tensor:
    """Mask as `[B, 1, ...]` the rows of `[B, T, ...]` that have no label at all."""
    return (labels == ignored).flatten(1).all(1).view(-1, *[1] * (labels.dim() - 1))


def shifted_labels(labels: Tensor) -> Tensor:
    """Shift the labels for a head that predicts the next token: position t gets label t + 1, the last one -100."""
    return F.pad(labels[..., 1:], (0, 1), value=-100)


def find_logits(outputs: Any, rows: int, inputs: Mapping[str, Any] | None = None) -> Tensor:
    """Find the logits `[rows, ...]` (question answering: `[rows, 2, T]`) among a model's outputs.

    Args:
        outputs: ModelOutput, dict or tuple; with `start_logits` and `end_logits` `[rows, T]` for question answering.
        rows: number of rows of the batch as the model got it.
        inputs: the batch, which shows a tuple to be one of question answering: (loss, start, end, ...).

    Raises:
        ValueError: there are no logits with one row per row of the batch.
    """
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits", outputs.get("scores"))  # the latter in sentence-transformers' CrossEncoder
        if logits is None and {"start_logits", "end_logits"} <= outputs.keys():  # question answering: [rows, 2, T]
            logits = torch.stack((outputs["start_logits"], outputs["end_logits"]), 1)
        found = ", ".join(outputs)
    else:  # (loss, logits, ...), or (logits, ...) when the labels were withheld for label smoothing
        items = outputs if isinstance(outputs, (list, tuple)) else ()
        tensors = [item for item in items if isinstance(item, Tensor) and item.dim() > 0]
        logits, found = next(iter(tensors), None), f"{type(outputs).__name__} of {len(items)}"
        if ANSWER[0] in (inputs or ()) and len(tensors) > 1 and tensors[0].shape == tensors[1].shape:
            logits = torch.stack(tensors[:2], 1)
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

    The logits are `[m * B, ...]` of m passes, the labels `[B, ...]`; `config` may be None.

    Raises:
        ValueError: logits and labels do not fit a supported head.
    """
    shape = (len(logits) // passes, *logits.shape[1:])
    problem_type = getattr(config, "problem_type", None)
    per_class = labels.dim() > 0 and labels.shape == shape[:-1]
    one_score = labels.dim() == 1 and shape in ((len(labels),), (len(labels), 1))
    if labels.shape == shape and problem_type == "single_label_classification":  # a distribution for each row
        return Head(problem_type, None)
    if labels.shape == shape or one_score:
        if problem_type == "regression" or (problem_type is None and (one_score or shape[-1] == 1)):
            return Head("regression", None)
        if labels.shape == shape or problem_type == "multi_label_classification":
            return Head("multi_label_classification", None)
    by_pixel = labels.dim() == 3 and len(shape) == 4 and shape[0] == len(labels) and not labels.is_floating_point()
    if by_pixel and not per_class:
        mask = nearest_pixels(labels, logits) != ignored_label(config)
        if shape[1] == 1:  # object or background
            return Head("multi_label_classification", mask[..., None], True)
        return Head("single_label_classification", mask, True)
    if per_class and not labels.is_floating_point():
        return Head("single_label_classification", valid_items(labels, shift_labels))
    raise ValueError(
        f"R-Drop cannot compare logits of shape {shape} for labels of shape {tuple(labels.shape)} and type "
        f"{labels.dtype}: neither one class index per row of scores nor one target per score. Supported heads: "
        f"{SUPPORTED_HEADS}. Check the labels, or set rdrop_alpha to 0."
    )
