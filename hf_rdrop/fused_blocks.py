"""The arithmetic of the fused loss: a chunk of logits becomes its own gradient, in place."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .functional import compute_dtype

logger = logging.getLogger(__name__)

# On a CPU the elementwise work goes through a chunk in blocks that stay in a core's cache (float32 elements a core).
BLOCK_ELEMENTS_PER_CORE = 2**19

_can_compile = True


def logits_to_gradient(
    logits: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    agreement: float,
    smoothing: float,
    scale: float,
    fixed: bool = False,
) -> Tensor:
    """Turn a chunk of logits into their gradient in place. See `linear_rdrop_loss`.

    Args:
        logits: `[m, r, V]` of m passes.
        labels: `[r]`.
        valid: `[r]` boolean, the items that count; None for all of them (as on a CPU).
        agreement: alpha / 2, that the gradient of the agreement is multiplied by.
        smoothing: share of the target given to the uniform distribution.
        scale: that all gradients are multiplied by.
        fixed: whether the first of two passes is constant: the gradient is that of the second, and only there.

    Returns:
        `[2]`, the chunk's sums of CE (over all passes with a gradient) and agreement.
    """
    block = fixed_block if fixed else plain_block
    if logits.device.type != "cpu":
        return _on_accelerator(block, logits, labels, valid, agreement, smoothing, scale)
    rows = max(1, BLOCK_ELEMENTS_PER_CORE * torch.get_num_threads() // (len(logits) * logits.shape[-1]))
    sums = [
        block(logits[:, i : i + rows], labels[i : i + rows], None, agreement, smoothing, scale)
        for i in range(0, logits.shape[1], rows)
    ]
    return torch.stack(sums).sum(0)


def plain_block(
    logits: Tensor, labels: Tensor, valid: Tensor | None, agreement: float, smoothing: float, scale: float
) -> Tensor:
    """The closed form: one exponential per logit, as much as possible in place."""
    passes, items, _ = logits.shape
    z = logits.to(compute_dtype(logits))  # float32 and float64 stay where they are
    index = _index(labels, valid).expand(passes, items)[..., None]
    ce = _target_score(z, index, smoothing)
    u = z - z.mean(0)
    p, log_total = _softmax_(z)
    ce = (ce + log_total).sum((0, 2))
    if passes > 1:
        weight = agreement / (passes - 1)
        u -= log_total - log_total.mean(0)
        v = p - p.mean(0)
        kl = torch.linalg.vecdot(u, v).sum(0) / (passes - 1)
        inner = torch.linalg.vecdot(p, u)[..., None]
        p.mul_(u.mul_(weight).add_(1 / passes - weight * inner)).add_(v, alpha=weight)
    else:
        kl = torch.zeros_like(ce)
    return _finish(logits, p, index, ce, kl, valid, passes, smoothing, scale)


def fixed_block(
    logits: Tensor, labels: Tensor, valid: Tensor | None, agreement: float, smoothing: float, scale: float
) -> Tensor:
    """The same for the second of two passes alone, where the first is constant."""
    z0, z = logits.to(compute_dtype(logits))
    index = _index(labels, valid)[:, None]
    ce = _target_score(z, index, smoothing)
    u = z - z0
    (p0, log_total0), (p, log_total) = _softmax_(z0), _softmax_(z)
    ce = (ce + log_total).squeeze(-1)
    weight = agreement / 2
    u -= log_total - log_total0
    v = torch.sub(p, p0, out=p0)
    kl = torch.linalg.vecdot(u, v) / 2
    inner = torch.linalg.vecdot(p, u)[:, None]
    p.mul_(u.mul_(weight).add_(1 - weight * inner)).add_(v, alpha=weight)
    return _finish(logits[1], p, index, ce, kl, valid, 1, smoothing, scale)


def _index(labels: Tensor, valid: Tensor | None) -> Tensor:
    return labels if valid is None else labels.clamp(min=0)  # -100 is no index


def _target_score(z: Tensor, index: Tensor, smoothing: float) -> Tensor:
    """What CE adds to the logarithm of the softmax's denominator, `[..., 1]`."""
    score = -(1 - smoothing) * z.gather(-1, index)
    return score - smoothing * z.mean(-1, keepdim=True) if smoothing else score


def _softmax_(z: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax in place, and the logarithm of its denominator, `[..., 1]`."""
    top = z.amax(-1, keepdim=True)
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    return z.div_(total), total.log() + top


def _finish(
    logits: Tensor,
    gradient: Tensor,
    index: Tensor,
    ce: Tensor,
    kl: Tensor,
    valid: Tensor | None,
    passes: int,
    smoothing: float,
    scale: float,
) -> Tensor:
    """Take the target off the gradient, scale it, and leave it in the place of the logits; returns the sums."""
    if smoothing:
        gradient.sub_(smoothing / (passes * gradient.shape[-1]))
    gradient.scatter_add_(-1, index, gradient.new_full(index.shape, -(1 - smoothing) / passes))
    if scale != 1:
        gradient.mul_(scale).clamp_(torch.finfo(logits.dtype).min, torch.finfo(logits.dtype).max)
    if valid is not None:  # not a product: an ignored row may hold inf or nan
        ce, kl = torch.where(valid, ce, 0), torch.where(valid, kl, 0)
        gradient.masked_fill_(~valid[:, None], 0)
    if gradient.dtype != logits.dtype:
        logits.copy_(gradient)
    return torch.stack((ce.sum(), kl.sum()))


@functools.cache
def compiled(block: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One of the two blocks as a kernel of its own."""
    return torch.compile(block)


def _on_accelerator(block: Callable[..., Tensor], *args: Any) -> Tensor:
    """A block as one fused kernel a chunk where torch.compile works, else operation by operation."""
    global _can_compile
    if _can_compile:
        try:
            return compiled(block)(*args)
        except Exception as error:  # no compiler, no Triton, an unsupported device: many exception types
            _can_compile = False
            logger.warning(f"torch.compile failed for the fused R-Drop loss, which goes on uncompiled: {error}")
    return block(*args)
