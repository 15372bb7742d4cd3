"""Turn a block of logits into its own gradient, in place: the arithmetic of the fused loss."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional import block_elements, compute_dtype, divergence_to_gradient_, softmax_and_log_total

logger = logging.getLogger(__name__)

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
    # On a CPU the elementwise work goes through a chunk in blocks that stay in a core's cache.
    rows = max(1, block_elements(logits.device) // (len(logits) * logits.shape[-1]))
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
    z = logits.to(compute_dtype(logits))
    index = labels if valid is None else labels.clamp(min=0)  # -100 is no index
    index = index.expand(passes, items)[..., None]
    p, log_total = softmax_and_log_total(z)
    ce = log_total - (1 - smoothing) * z.gather(-1, index)
    if smoothing:
        ce = ce - smoothing * z.mean(-1, keepdim=True)
    ce = ce.sum((0, 2))
    gradient = p  # but for the target
    kl = divergence_to_gradient_(p, z, log_total, 1 / passes, factor) if passes > 1 else torch.zeros_like(ce)
    if smoothing:
        gradient.sub_(smoothing / (passes * gradient.shape[-1]))
    gradient.scatter_add_(-1, index, gradient.new_full(index.shape, -(1 - smoothing) / passes))
    if scale != 1:
        gradient.mul_(scale).clamp_(torch.finfo(logits.dtype).min, torch.finfo(logits.dtype).max)
    if valid is not None:  # not a product: an ignored row may hold inf or nan
        ce, kl = torch.where(valid, ce, 0), torch.where(valid, kl, 0)
        gradient.masked_fill_(~valid[:, None], 0)
    logits.copy_(gradient)
    return torch.stack((ce.sum(), kl.sum()))


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
