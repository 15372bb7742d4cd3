"""Turn a block of logits into its own gradient, in place: the arithmetic of the fused loss."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional import compute_dtype

logger = logging.getLogger(__name__)

# On a CPU the elementwise work goes through a chunk in blocks that stay in a core's cache (float32 elements a core).
BLOCK_ELEMENTS_PER_CORE = 2**19

_can_compile = True


def logits_to_gradient(
    logits: Tensor, labels: Tensor, valid: Tensor | None, factor: float, smoothing: float, scale: float
) -> Tensor:
    """Turn a chunk of logits into their gradient in place.

    Args:
        logits: `[m, r, V]` of m passes.
        labels: `[r]`.
        valid: `[r]` boolean, the items that count; None for all of them (as on a CPU).
        factor: alpha / 2, the factor of the divergence.
        smoothing: share of the target given to the uniform distribution.
        scale: factor of all gradients.

    Returns:
        `[2]`, the chunk's sums of CE (over all passes) and divergence.
    """
    if logits.device.type != "cpu":
        return _on_accelerator(logits, labels, valid, factor, smoothing, scale)
    rows = max(1, BLOCK_ELEMENTS_PER_CORE * torch.get_num_threads() // (len(logits) * logits.shape[-1]))
    sums = [
        block_to_gradient(logits[:, i : i + rows], labels[i : i + rows], None, factor, smoothing, scale)
        for i in range(0, logits.shape[1], rows)
    ]
    return torch.stack(sums).sum(0)


def block_to_gradient(
    logits: Tensor, labels: Tensor, valid: Tensor | None, factor: float, smoothing: float, scale: float
) -> Tensor:
    """Apply the closed form to a block: one exponential per logit, as much as possible in place."""
    passes, items, _ = logits.shape
    z = logits.to(compute_dtype(logits))  # float32 and float64 stay where they are
    index = labels if valid is None else labels.clamp(min=0)  # -100 is no index
    index = index.expand(passes, items)[..., None]
    ce = -(1 - smoothing) * z.gather(-1, index)  # but for the logarithm of the softmax's denominator
    if smoothing:
        ce = ce - smoothing * z.mean(-1, keepdim=True)
    u = z - z.mean(0)
    p, log_total = _softmax_(z)
    ce = (ce + log_total).sum((0, 2))
    if passes > 1:
        weight = factor / (passes - 1)
        u -= log_total - log_total.mean(0)
        v = p - p.mean(0)
        kl = torch.linalg.vecdot(u, v).sum(0) / (passes - 1)
        inner = torch.linalg.vecdot(p, u)[..., None]
        p.mul_(u.mul_(weight).add_(1 / passes - weight * inner)).add_(v, alpha=weight)
    else:
        kl = torch.zeros_like(ce)
    gradient = p  # but for the target
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


def _softmax_(z: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the softmax in place, and the logarithm of its denominator, `[..., 1]`."""
    top = z.amax(-1, keepdim=True)
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    return z.div_(total), total.log() + top


@functools.cache
def compiled_block() -> Callable[..., Tensor]:
    """Compile `block_to_gradient` as a kernel of its own."""
    return torch.compile(block_to_gradient)


def _on_accelerator(*args: Any) -> Tensor:
    """Run one fused kernel a chunk where torch.compile works, else operation by operation."""
    global _can_compile
    if _can_compile:
        try:
            return compiled_block()(*args)
        except Exception as error:  # no compiler, no Triton, an unsupported device: many exception types
            _can_compile = False
            logger.warning(f"torch.compile failed for the fused R-Drop loss, which goes on uncompiled: {error}")
    return block_to_gradient(*args)
