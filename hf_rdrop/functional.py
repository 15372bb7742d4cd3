"""R-Drop's divergences between passes, as pure functions of tensors.

Each function takes the logits of ``m`` stochastic passes stacked along a new first dimension and returns the mean
divergence over all pairs of passes and all valid items, as a scalar. For a divergence of the form
``1/2 (p - q)·(a - b)`` the mean over the ``m (m - 1) / 2`` pairs is

    1 / (m - 1) * sum_i (p_i - mean_j p_j) · (a_i - mean_j a_j)

which costs O(m), and for ``m = 2`` is the pair's own value.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of one [m, rows, C] block of elementwise work in float32. On a CPU its temporaries stay in a core's cache;
# elsewhere (8 MiB each) they never matter beside the logits, and launching the operations on a block costs nothing.
BLOCK_ELEMENTS_PER_CORE = 2**18
BLOCK_ELEMENTS = 2**21


def symmetric_kl(logits_a: Tensor, logits_b: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Compute the symmetric Kullback-Leibler divergence between two passes, averaged over the valid items.

    ``sKL(P, Q) = 1/2 KL(P||Q) + 1/2 KL(Q||P) = 1/2 sum_c (p_c - q_c)(log p_c - log q_c)``, summed over the classes.
    Gradients flow into both arguments. The softmax is taken in float32 (float64 for float64).

    Args:
        logits_a: `[..., C]` unnormalised scores of the first pass.
        logits_b: `[..., C]` scores of the second pass.
        mask: `[...]` boolean or 0/1, the items to average over; all of them by default.

    Returns:
        Scalar >= 0, in nats; 0 when no item is valid; finite where a class has -inf in both passes.

    Raises:
        ValueError: if the shapes do not fit.

    Source: Liang et al. 2021, section 2.

    Example:
        >>> symmetric_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])).item()
        0.0
    """
    if logits_a.shape != logits_b.shape:
        raise ValueError(
            f"The two passes must give logits of the same shape, got {tuple(logits_a.shape)} and "
            f"{tuple(logits_b.shape)}: they are compared class by class. Pass the logits of the same batch twice."
        )
    return softmax_agreement(torch.stack((logits_a, logits_b)), mask)


def softmax_agreement(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average the symmetric KL over all pairs of softmax distributions (single-label classes, tags, tokens).

    Args:
        logits: `[m, ..., C]` scores of m >= 2 passes.
        mask: `[...]` boolean or 0/1, the items to average over; all of them by default.

    Returns:
        Scalar >= 0, in nats; 0 when no item is valid.

    Raises:
        ValueError: if the shapes do not fit or m < 2.
    """
    check_passes(logits)
    items = logits.shape[1:-1]
    if mask is not None and mask.shape != items:
        raise ValueError(
            f"The mask has shape {tuple(mask.shape)}, the logits have items of shape {tuple(items)}: one mask value "
            "per item is needed. For causal language models shift the mask with the labels."
        )
    dtype = compute_dtype(logits)
    if not logits.shape[-1]:  # no class, so nothing to disagree about
        return logits.sum(dtype=dtype)
    weight = torch.ones(items, device=logits.device) if mask is None else mask.to(logits.device)
    weight = weight.to(dtype).flatten()
    weight = weight / weight.sum().clamp(min=1)
    return _SoftmaxAgreement.apply(logits.reshape(len(logits), len(weight), logits.shape[-1]), weight)


class _SoftmaxAgreement(torch.autograd.Function):
    """Compute value and gradient in one sweep over blocks of rows.

    The probabilities live only for one block: autograd over `log_softmax` would keep several float32 copies of all
    logits until the backward pass. On a CPU, rows without weight are left out; elsewhere their number is not known
    without waiting for the device.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        passes, rows, classes = logits.shape
        counted = weight > 0
        chosen = counted.nonzero()[:, 0] if logits.is_cpu and not counted.all() else None
        grad = None
        if ctx.needs_input_grad[0]:
            # Gradients of a mean over many tokens fall below float16's range before the loss scaler sees them.
            keep = torch.float32 if logits.dtype == torch.float16 else logits.dtype
            grad = (torch.empty_like if chosen is None else torch.zeros_like)(logits, dtype=keep)
        value = weight.new_zeros(())
        step = max(1, block_elements(logits.device) // (passes * classes))
        for start in range(0, rows if chosen is None else len(chosen), step):
            block = slice(start, start + step) if chosen is None else chosen[start : start + step]
            z, w = logits[:, block].to(weight.dtype), weight[block]
            p, log_total = softmax_and_log_total(z)
            kl = divergence_to_gradient_(p, z, log_total, 0.0, w[:, None])
            # `where` and not a product: an ignored row may hold inf or nan
            value += torch.where(w > 0, kl, 0).mul_(w).sum()
            if grad is not None:
                p = p if logits.is_cpu else p.masked_fill_(~counted[block, None], 0)
                grad[:, block] = p.to(grad.dtype)
        if grad is not None:
            ctx.save_for_backward(grad)
        ctx.logits_dtype = logits.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_value: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        return (grad * grad_value).to(ctx.logits_dtype), None


def softmax_and_log_total(z: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the softmax over the last dimension, and the logarithm of its denominator, `[..., 1]`."""
    p = z.softmax(-1)
    return p, z.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()


def divergence_to_gradient_(p: Tensor, z: Tensor, log_total: Tensor, share: float, weight: float | Tensor) -> Tensor:
    """Turn probabilities into ``share * p_i + weight * d value / d z_i`` in place, and return the value of each item.

    With ``u_i = log p_i - mean_j log p_j`` and ``v_i = p_i - mean_j p_j`` (for m = 2 half of log p - log q and p - q)

        value = 1 / (m - 1) sum_i u_i · v_i,    d value / d z_i = 1 / (m - 1) [p_i (u_i - p_i · u_i) + v_i]

    The gradient costs two multiplications more than the value. For m = 2 one u and one v serve both passes, which see
    them with opposite signs.

    Args:
        p: `[m, r, C]` softmax of z.
        z: `[m, r, C]` logits of m >= 2 passes.
        log_total: `[m, r, 1]` logarithms of the softmax's denominators.
        share: factor of the probabilities themselves, which are the gradient of the logarithm of the denominator.
        weight: factor of the divergence's gradient, a number or `[r, 1]`.

    Returns:
        `[r]`, the mean symmetric KL over all pairs of passes.
    """
    if len(p) > 2:
        u, v = z - z.mean(0), p - p.mean(0)
        u.sub_(log_total - log_total.mean(0))
        weight = weight / (len(p) - 1)
    else:
        u, v = (z[0] - z[1])[None], (p[0] - p[1])[None]
        u.sub_(log_total[0] - log_total[1]).mul_(0.5)
        v.mul_(0.5)
    # A class with p = 0 in every pass agrees: -inf, or finfo.min, by which some models mask, overflows.
    if not (u.is_cpu and u.abs().amax() < 1e30):
        u.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf).masked_fill_(p.sum(0) == 0, 0)
    value = torch.linalg.vecdot(u, v).sum(0)
    if len(p) > 2:
        inner = torch.linalg.vecdot(p, u)[..., None]
        p.mul_(u.sub_(inner).mul_(weight).add_(share)).add_(v.mul_(weight))
        return value / (len(p) - 1)
    u, v = u[0].mul_(weight), v[0]
    inner = torch.linalg.vecdot(p[0], u)[..., None]  # under p_1; under p_2 it is less by twice the weighted value
    v.mul_(weight)
    p[0].mul_(u + (share - inner)).add_(v)
    p[1].mul_(u.neg_().add_(share + inner - 2 * weight * value[:, None])).sub_(v)
    return 2 * value


def bernoulli_agreement(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average the symmetric KL over all pairs of independent Bernoulli distributions (multi-label classification).

    Per label ``sKL = 1/2 (sigmoid(a) - sigmoid(b)) (a - b)``, averaged over items and labels, as BCE is.

    Args:
        logits: `[m, ..., C]` scores of m >= 2 passes, one per label.
        mask: `[..., C]` boolean or 0/1, the labels to average over; all of them by default.

    Returns:
        Scalar >= 0, in nats; 0 when no label is valid.

    Raises:
        ValueError: if the shapes do not fit or m < 2.
    """
    check_passes(logits)
    logits = counted_scores(logits, mask)
    p = logits.sigmoid()
    same = (logits == logits[0]).all(0)  # also where all passes hold the same infinity, whose difference is nan
    difference = torch.where(same, 0, logits - logits.mean(0))
    return masked_mean(((p - p.mean(0)) * difference).sum(0) / (len(logits) - 1), mask)


def squared_agreement(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average the squared difference over all pairs of predictions (regression), as MSE does.

    Args:
        logits: `[m, ...]` predictions of m >= 2 passes, in the units of the target.
        mask: `[...]` boolean or 0/1, the predictions to average over; all of them by default.

    Returns:
        Scalar >= 0, in squared units of the target; 0 when no prediction is valid.

    Raises:
        ValueError: if the shapes do not fit or m < 2.
    """
    check_passes(logits)
    logits = counted_scores(logits, mask)
    return masked_mean(2 * (logits - logits.mean(0)).square().sum(0) / (len(logits) - 1), mask)


#: Divergence by Transformers' `problem_type`; tags and tokens are single-label classes with a mask.
AGREEMENTS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "single_label_classification": softmax_agreement,
    "multi_label_classification": bernoulli_agreement,
    "regression": squared_agreement,
}


def check_passes(logits: Tensor) -> None:
    if logits.dim() < 2 or len(logits) < 2:
        raise ValueError(
            f"Agreement needs the logits of at least two passes stacked along the first dimension, got shape "
            f"{tuple(logits.shape)}. Use torch.stack([logits_a, logits_b])."
        )


def block_elements(device: torch.device) -> int:
    """Choose how many elements one block of elementwise work has."""
    return BLOCK_ELEMENTS_PER_CORE * torch.get_num_threads() if device.type == "cpu" else BLOCK_ELEMENTS


def compute_dtype(logits: Tensor) -> torch.dtype:
    """Choose the precision of softmax and divergences: float32, or float64 for float64."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def counted_scores(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Convert the scores to `compute_dtype`, with 0 for those that do not count.

    These may hold inf or nan, which a product with 0 would not keep out of the gradient.
    """
    logits = logits.to(compute_dtype(logits))
    if mask is None:
        return logits
    if mask.shape != logits.shape[1:]:
        raise ValueError(
            f"The mask has shape {tuple(mask.shape)}, one pass has scores of shape {tuple(logits.shape[1:])}: one "
            "mask value per score is needed."
        )
    return logits.masked_fill(~mask.to(device=logits.device, dtype=torch.bool), 0)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    count = values.numel() if mask is None else mask.to(device=values.device, dtype=torch.bool).sum().clamp(min=1)
    return values.sum() / (count or 1)
