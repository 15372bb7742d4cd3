"""InfoNCE between the passes' embeddings of a text, with the rest of the batch as negatives."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import compute_dtype

POOLINGS = ("cls", "mean", "last")


def info_nce(embeddings_a: Tensor, embeddings_b: Tensor, temperature: float = 0.05) -> Tensor:
    r"""Compute SimCSE's loss: each row of one pass is to find its own row of the other pass among the batch's rows.

    ``loss = -1/B sum_i log( exp(cos(a_i, b_i) / t) / sum_j exp(cos(a_i, b_j) / t) )``

    One direction, rows of `a` among rows of `b`, as in the source: the mean of both would have the same expected
    gradient. The computation is in float32 (float64 for float64), also under autocast. Gradients flow into both
    arguments. A row of zeros has similarity 0 to every row.

    Args:
        embeddings_a: `[B, D]` embeddings of the batch's B >= 2 rows in the first pass, of any length.
        embeddings_b: `[B, D]` embeddings of the same rows in the second pass.
        temperature: t > 0 and finite; the smaller, the more the nearest negatives count. 0.05 is SimCSE's.

    Returns:
        Scalar in nats, >= 0: log(B) where the embeddings tell nothing about the rows. In data-parallel training the
        negatives are those of the process's own batch.

    Raises:
        ValueError: if the shapes do not fit, there is no negative (B < 2), or the temperature is out of its range.

    Source: Gao, Yao and Chen 2021 (arXiv 2104.08821), equation 4, whose z and z' are two dropout masks.

    Example:
        >>> info_nce(torch.eye(2), torch.eye(2), temperature=1.0)  # log(1 + exp(-1))
        tensor(0.3133)
    """
    if embeddings_a.dim() != 2 or embeddings_a.shape != embeddings_b.shape:
        raise ValueError(
            f"Embeddings of two passes over one batch are needed, both [B, D]; got {tuple(embeddings_a.shape)} and "
            f"{tuple(embeddings_b.shape)}. `pool` makes them from hidden states."
        )
    return info_nce_agreement(torch.stack((embeddings_a, embeddings_b)), temperature)


def info_nce_agreement(embeddings: Tensor, temperature: float = 0.05) -> Tensor:
    """Average `info_nce` over all pairs of passes i < j.

    Args:
        embeddings: `[m, B, D]` embeddings of B >= 2 rows in m >= 2 passes.
        temperature: as for `info_nce`.

    Raises:
        ValueError: as `info_nce`, and if m < 2.
    """
    check_temperature(temperature)
    if embeddings.dim() != 3 or len(embeddings) < 2:
        raise ValueError(
            "InfoNCE needs the embeddings of at least two passes stacked along the first dimension, [m, B, D]; got "
            f"shape {tuple(embeddings.shape)}. `pool` makes embeddings from hidden states, stack_passes stacks them."
        )
    passes, rows = embeddings.shape[:2]
    if rows < 2:
        raise ValueError(
            f"InfoNCE takes the other rows of the batch as negatives, but the batch has {rows} row(s): the loss would "
            "be 0 whatever the embeddings are. Use batches of at least 2 rows (better 32 or more), and drop a last "
            "batch of 1 row (dataloader_drop_last=True)."
        )
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings = embeddings.to(compute_dtype(embeddings))
        norms = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
        unit = embeddings / norms.masked_fill(norms == 0, 1)
        own = torch.arange(rows, device=embeddings.device)
        pairs = itertools.combinations(range(passes), 2)
        return torch.stack([F.cross_entropy(unit[i] @ unit[j].T / temperature, own) for i, j in pairs]).mean()


def check_temperature(temperature: float) -> None:
    """Raise `ValueError` unless the temperature is a finite number above 0."""
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(
            f"The temperature must be a finite number > 0, got {temperature!r}: cosine similarities are divided by "
            "it. Use 0.05 (SimCSE's), or up to 1 to make less of near negatives."
        )


def pool(hidden_states: Tensor, attention_mask: Tensor | None = None, how: str = "cls") -> Tensor:
    """Pool the hidden states of a row's tokens to one embedding, on whichever side the padding is.

    Args:
        hidden_states: `[B, T, D]`, of the last layer as a rule.
        attention_mask: `[B, T]` boolean or 0/1, 0 at padding; None: no padding.
        how: `"cls"`, the first token that is no padding; `"mean"` of all tokens that are none, summed up in float32;
            `"last"`, the last one (for causal models, where no other token has seen the whole text).

    Returns:
        `[B, D]` in the type of the hidden states; zeros for a row of padding. The hidden states at padding, nan
        included, change neither the result nor any gradient.

    Raises:
        ValueError: if the shapes do not fit or `how` is none of these.
    """
    if how not in POOLINGS:
        raise ValueError(f"Unknown pooling {how!r}: choose one of {', '.join(POOLINGS)}.")
    if hidden_states.dim() != 3:
        raise ValueError(
            f"Hidden states must be [B, T, D], got {tuple(hidden_states.shape)}: one vector per row and token is "
            "pooled to one per row."
        )
    if attention_mask is None:
        attention_mask = hidden_states.new_ones(hidden_states.shape[:2])
    if attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"The attention mask has shape {tuple(attention_mask.shape)}, the hidden states have "
            f"{tuple(hidden_states.shape[:2])} tokens: one mask value per token is needed."
        )
    mask = attention_mask.to(device=hidden_states.device, dtype=torch.bool)
    if how == "mean":
        total = hidden_states.masked_fill(~mask[..., None], 0).sum(1, dtype=compute_dtype(hidden_states))
        return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    chosen = places.masked_fill(~mask, mask.shape[1]).argmin(1) if how == "cls" else (places * mask).argmax(1)
    pooled = hidden_states[torch.arange(len(mask), device=mask.device), chosen]
    return pooled.masked_fill(~mask.any(1, keepdim=True), 0)
