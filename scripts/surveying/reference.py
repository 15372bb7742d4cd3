"""What a step's loss should be, in float64 from the logits that the model gave: nothing of hf_rdrop's objective."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Terms(NamedTuple):
    """The sums of one forward over [x; x]: cross-entropy of both passes, divergence, and the number of items."""

    ce: float
    kl: float
    items: int


def scored_terms(logits: Tensor, labels: Tensor, shifts: bool) -> Terms:
    """Sum cross-entropy and divergence over the items with a label.

    Args:
        logits: `[2B, ..., C]` of two passes.
        labels: `[B, ...]`, -100 where nothing counts.
        shifts: whether position t is scored against label t + 1.
    """
    first, second = (half.double().log_softmax(-1) for half in logits.detach().chunk(2))
    if shifts:
        first, second, labels = first[:, :-1], second[:, :-1], labels[:, 1:]
    counts = labels != -100
    p, q, targets = first[counts], second[counts], labels[counts]
    entropy = -(p.gather(-1, targets[:, None]) + q.gather(-1, targets[:, None])).sum() / 2
    return Terms(float(entropy), float(_divergence(p, q).sum()), len(targets))


def span_terms(start: Tensor, end: Tensor, answers: Tensor) -> Terms:
    """Sum both terms for question answering; an item is one of the two positions of a row."""
    parts = [scored_terms(logits, answers[:, i], False) for i, logits in enumerate((start, end))]
    return Terms(sum(p.ce for p in parts), sum(p.kl for p in parts), sum(p.items for p in parts))


def multi_label_terms(logits: Tensor, labels: Tensor) -> Terms:
    """Sum both terms for yes-or-no labels; an item is a label."""
    a, b = (half.double() for half in logits.detach().chunk(2))
    entropy = sum(F.binary_cross_entropy_with_logits(x, labels.double(), reduction="sum") for x in (a, b)) / 2
    divergence = 0.5 * (a.sigmoid() - b.sigmoid()) * (a - b)
    return Terms(float(entropy), float(divergence.sum()), labels.numel())


def pixel_terms(logits: Tensor, labels: Tensor) -> Terms:
    """Sum both terms over pixels, of which all have a label.

    The cross-entropy is that of the logits `[2B, C, h, w]` stretched to the labels `[B, H, W]`, the divergence that of
    the logits as they are; its mean stands for that of the labelled pixels.
    """
    large = F.interpolate(logits.detach().double(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    found = scored_terms(large.movedim(1, -1), labels, False)
    first, second = (half.double().log_softmax(1).movedim(1, -1) for half in logits.detach().chunk(2))
    return found._replace(kl=float(_divergence(first, second).mean()) * found.items)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Half the sum of both KL divergences of log-probabilities; 0 where both passes exclude a class."""
    difference = torch.where(p == q, 0.0, p - q)
    terms = (p.exp() - q.exp()) * difference
    return 0.5 * terms.sum(-1)


def terms_of(outputs: Any, inputs: dict[str, Any], shifts: bool) -> Terms | None:
    """Find what a forward scored and sum it up; None for a head without such a reference."""
    rows = 2
    if "start_positions" in inputs and "start_logits" in outputs:
        half = len(inputs["start_positions"]) // rows
        answers = torch.stack((inputs["start_positions"][:half], inputs["end_positions"][:half]), -1)
        return span_terms(outputs["start_logits"], outputs["end_logits"], answers)
    logits, labels = outputs.get("logits"), inputs.get("labels")
    if logits is None or labels is None or not labels.numel():
        return None
    labels = labels[: len(labels) // rows]
    shape = (len(labels), *logits.shape[1:])
    if labels.is_floating_point() and labels.shape == shape:
        return multi_label_terms(logits, labels)
    if labels.dim() == 3 and logits.dim() == 4:
        return pixel_terms(logits, labels)
    if labels.shape == shape[:-1]:
        return scored_terms(logits, labels, shifts)
    return None
