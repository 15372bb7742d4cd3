"""Compute R-Drop's loss from hidden states and the weight of a language-model head, without the full logits."""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..alpha import check_alpha
from ..functional import compute_dtype
from ..loss import RDropLossOutput, check_class_indices
from .blocks import logits_to_gradient

# A chunk of logits may take as much memory as the float32 gradient of the weight, which has to exist anyway: its
# matrix products then have as many rows as the head is wide, enough to be bound by arithmetic.
_MIN_CHUNK_BYTES, _MAX_CHUNK_BYTES = 2**24, 2**30


def linear_rdrop_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    alpha: float,
    label_smoothing: float = 0.0,
    passes: int = 2,
    chunk_bytes: int | None = None,
) -> RDropLossOutput:
    r"""Compute R-Drop's objective for ``logits = hidden @ weight.T + bias``, whose logits exist only chunk by chunk.

    ``loss = mean_j CE_j + alpha / 2 * mean_{i<j} sKL(P_i, P_j)``, averaged over the items whose label is not -100.
    Value and gradients are those of `RDropLoss` on the full logits. A chunk's logits become their own gradient in
    place and are multiplied into the gradients of `hidden`, `weight` and `bias` at once: nothing of the size ``N x V``
    is kept. With ``u_i = log p_i - mean_j log p_j``, ``v_i = p_i - mean_j p_j`` and the one-hot (smoothed) target
    ``y``, the closed form for the logits ``z_i`` of one item is

        d loss / d z_i = 1/m (p_i - y) + alpha / (2 (m - 1)) [p_i (u_i - p_i · u_i) + v_i]

    Cost: the three matrix products of the plain path, ``6 m N D V`` FLOPs, none of them twice.

    Args:
        hidden: `[m * B, ..., D]` (usually `[2N, D]` or `[2B, T, D]`), what the head is applied to, pass after pass.
        weight: `[V, D]` of the head.
        labels: `[B, ...]` class indices in [0, V), -100 where ignored; shifted already for causal language models.
        bias: `[V]`, or nothing.
        alpha: weight of the divergence, >= 0 and finite.
        label_smoothing: share of the target given to the uniform distribution, in [0, 1).
        passes: m >= 1; 1 is the plain cross-entropy.
        chunk_bytes: memory for one chunk of logits; by default as much as the float32 gradient of `weight`, but not
            under 16 MiB nor over 1 GiB.

    Returns:
        `RDropLossOutput(loss, ce, kl)`, scalars in float32 (float64 for float64), all 0 when every label is -100.
        Only `loss` carries a graph. Under autocast the matrix products are done in its dtype; softmax, divergence and
        the sum of the chunks in the gradient of `weight` are in float32.

    Raises:
        ValueError: if an argument is out of its range or shapes do not fit.

    Source: Liang et al. 2021, section 2, for the objective.

    Example:
        >>> hidden, weight = torch.randn(2 * 3, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
        >>> loss, ce, kl = linear_rdrop_loss(hidden, weight, torch.tensor([4, 99, -100]), alpha=5.0)
        >>> loss.backward()
    """
    check_alpha(alpha)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}.")
    if passes < 1 or labels.dim() < 1 or hidden.shape[:-1] != (passes * len(labels), *labels.shape[1:]):
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} for labels of shape {tuple(labels.shape)}: with passes={passes} "
            f"they must be [{passes} * B, ..., D] and [B, ...], one row per pass and label, pass after pass."
        )
    fits = weight.dim() == 2 and weight.numel() > 0 and weight.shape[1] == hidden.shape[-1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and bias "
            f"{None if bias is None else tuple(bias.shape)} do not fit: [..., D], [V, D] and [V] are needed."
        )
    check_class_indices(labels, len(weight))
    labels = labels.reshape(-1).long()
    hidden = hidden.reshape(passes, len(labels), hidden.shape[-1])
    mask = labels != -100
    valid: Tensor | None = mask
    if hidden.device.type == "cpu":  # elsewhere the number of valid rows is not known without waiting for the device
        if not mask.all():
            hidden, labels = hidden[:, mask], labels[mask]
        valid = None
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if chunk_bytes is None:
        chunk_bytes = default_chunk_bytes(weight.numel())
    rows = max(1, chunk_bytes // (passes * len(weight) * dtype.itemsize))
    with torch.autocast(device, enabled=False):
        loss, ce, kl = _LinearRDrop.apply(hidden, weight, bias, labels, valid, alpha, label_smoothing, rows, dtype)
    return RDropLossOutput(loss, ce, kl)


def default_chunk_bytes(weight_elements: int) -> int:
    """Choose the memory for one chunk of logits of a head with so many weights."""
    return min(max(4 * weight_elements, _MIN_CHUNK_BYTES), _MAX_CHUNK_BYTES)


class _LinearRDrop(torch.autograd.Function):
    """Compute loss and all gradients in one sweep over chunks of `rows` items; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, valid, alpha, smoothing, rows, dtype):  # type: ignore
        passes, items, width = hidden.shape
        vocabulary, precise = len(weight), compute_dtype(hidden)
        w = weight.to(dtype)
        # A class forbidden by a bias of -inf has probability 0 all the same; its log-ratio must not become nan.
        b = None if bias is None else bias.to(precise).clamp(min=torch.finfo(dtype).min / 16).to(dtype)
        # float16 ends at 65504 and loses what is under 1e-7, as most probabilities are: move the gradients up. With
        # |u| up to 32 and more nothing overflows; what would is cut off.
        scale = 2.0 ** math.floor(15 - math.log2(1 + 16 * alpha)) if dtype == torch.float16 else 1.0
        keep = precise if dtype == torch.float16 else dtype
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden, dtype=keep) if need_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias, dtype=precise) if bias is not None and need_bias else None
        sums = torch.zeros(2, dtype=precise, device=hidden.device)  # of CE (over the passes) and KL

        rows = min(rows, max(items, 1))
        one_chunk = items <= rows
        buffer = torch.empty(passes * rows * vocabulary, dtype=dtype, device=hidden.device)
        for start in range(0, items, rows):
            chunk = slice(start, start + rows)
            h = hidden[:, chunk].to(dtype).reshape(-1, width)
            logits = buffer[: len(h) * vocabulary].view(-1, vocabulary)
            if b is None:
                torch.mm(h, w.T, out=logits)
            else:
                torch.addmm(b, h, w.T, out=logits)
            counted = None if valid is None else valid[chunk]
            z = logits.view(passes, -1, vocabulary)
            sums += logits_to_gradient(z, labels[chunk], counted, alpha / 2, smoothing, scale)
            if grad_hidden is not None:
                grad_hidden[:, chunk] = torch.mm(logits, w).view(passes, -1, width)
            if need_weight and grad_weight is None:
                grad_weight = torch.mm(logits.T, h)
                if not one_chunk:  # more of them are summed in full precision
                    grad_weight = grad_weight.to(precise)
            elif grad_weight is not None and dtype == precise:
                grad_weight.addmm_(logits.T, h)
            elif grad_weight is not None:
                grad_weight += torch.mm(logits.T, h)
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=precise)

        if need_weight and grad_weight is None:  # no item at all
            grad_weight = torch.zeros_like(weight)
        count = torch.tensor(items, device=hidden.device) if valid is None else valid.sum()
        per_item = 1 / count.clamp(min=1).to(precise)
        ce, kl = (sums * per_item).unbind()
        ce = ce / passes
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, per_item / scale)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(ce, kl)
        return ce + alpha / 2 * kl, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        *grads, per_item = ctx.saved_tensors
        factor = grad_loss * per_item
        pairs = zip(grads, ctx.dtypes, strict=True)
        return *(None if grad is None else _scaled(grad, factor, dtype) for grad, dtype in pairs), *[None] * 6


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply in float32 and round once, so that float16 gradients get their factor before they are rounded."""
    # On a CPU a scalar keeps its float32 beside a tensor in half precision; elsewhere it would be rounded itself.
    if grad.dtype == factor.dtype or (grad.is_cpu and grad.dtype == dtype):
        return (grad * factor).to(dtype)
    return grad.to(factor.dtype).mul_(factor).to(dtype)
