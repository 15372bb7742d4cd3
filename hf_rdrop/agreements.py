"""Divergences between the passes beside R-Drop's symmetric KL, and weighted sums of them (`parse_agreement`).

With ``x = (log p - log q) / 2`` and the mean ``M`` of two distributions, ``p - q = 2 M tanh(x)``. The divergences are
written in terms of x: differences of nearly equal logarithms of probabilities would lose all digits in float32.
"""

import math
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import stack_passes
from .functional import AGREEMENTS, check_passes, counted_scores, masked_mean, squared_agreement

# log p - log q is never this large where neither probability is 0; tanh and exp are at their limits long before.
_LARGE = 1e3


def one_sided_kl(logits: Tensor, mask: Tensor | None, problem_type: str) -> Tensor:
    """Compute ``KL(stopgrad(P_i) || P_j)`` for passes i < j: the earlier pass is a fixed target for the later ones.

    Multi-label: per label between Bernoulli distributions. Regression: ``(stopgrad(a) - b)^2``. The divergence is inf
    where only the later pass excludes a class (-inf), and finite where only the earlier one does.

    Source: the consistency term of UDA (Xie et al. 2020, arXiv 1904.12848), there between a clean and a noised input.
    """
    if _known(problem_type) == "regression":
        scores, mask = _scores(logits, mask, problem_type)
        return masked_mean(_mean_over_pairs(scores, lambda a, b: (a.detach() - b).square()), mask)
    return masked_mean(_mean_over_pairs(_log_probabilities(logits, mask, problem_type), _one_sided_kl), mask)


def jensen_shannon(logits: Tensor, mask: Tensor | None, problem_type: str) -> Tensor:
    """Compute ``JS(P_i, P_j) = 1/2 KL(P_i||M) + 1/2 KL(P_j||M)`` with ``M = (P_i + P_j) / 2``; at most log 2.

    Multi-label: per label between Bernoulli distributions. Finite where only one pass excludes a class (-inf).

    Source: Lin 1991, "Divergence measures based on the Shannon entropy".

    Raises:
        ValueError: for regression, whose predictions are no distribution.
    """
    _refuse_regression("jensen_shannon", problem_type)
    return masked_mean(_mean_over_pairs(_log_probabilities(logits, mask, problem_type), _jensen_shannon), mask)


def squared_logits(logits: Tensor, mask: Tensor | None, problem_type: str) -> Tensor:
    """Compute ``mean_c (z_ic - z_jc)^2``, averaged over the classes (labels, predictions) and the items.

    Unlike the other divergences it changes when all scores of one pass are shifted by a constant. A class with -inf in
    both passes counts as 0; in one of them only, the divergence is inf.

    Source: fraternal dropout (Zolna et al. 2018, arXiv 1711.00066), with kappa = alpha / 2.
    """
    scores, mask = _scores(logits, mask, _known(problem_type))
    return masked_mean(_mean_over_pairs(scores, lambda a, b: (a - b).masked_fill(a == b, 0).square()), mask)


def squared_probabilities(logits: Tensor, mask: Tensor | None, problem_type: str) -> Tensor:
    """Compute ``sum_c (p_ic - p_jc)^2``, or per label ``(p - q)^2`` averaged over the labels (multi-label).

    Always finite: at most 2 (1 per label).

    Source: the Pi-model (Laine and Aila 2017, arXiv 1610.02242), with w = alpha * C / 2 (it averages over C classes).

    Raises:
        ValueError: for regression, whose predictions are no distribution.
    """
    _refuse_regression("squared_probabilities", problem_type)
    if problem_type == "multi_label_classification":
        scores, mask = _scores(logits, mask, problem_type)
        return masked_mean(_mean_over_pairs(scores.sigmoid(), lambda p, q: (p - q).square()), mask)
    probabilities = _log_probabilities(logits, mask, problem_type).exp()
    return masked_mean(_mean_over_pairs(probabilities, lambda p, q: (p - q).square().sum(-1)), mask)


#: Divergences of the outputs by name, as functions of `(logits, mask, problem_type)`: logits `[m, ..., C]` of m >= 2
#: passes (`[m, ...]` for regression), mask and problem type as in `functional.AGREEMENTS`. Each returns a scalar >= 0,
#: the mean over valid items and over all pairs i < j of passes; 0 when no item is valid.
OUTPUT_AGREEMENTS: dict[str, Callable[[Tensor, Tensor | None, str], Tensor]] = {
    "symmetric_kl": lambda logits, mask, problem_type: AGREEMENTS[_known(problem_type)](logits, mask),
    "one_sided_kl": one_sided_kl,
    "jensen_shannon": jensen_shannon,
    "squared_logits": squared_logits,
    "squared_probabilities": squared_probabilities,
}


def hidden_state_agreement(hidden_states: Sequence[Tensor], passes: int, mask: Tensor | None = None) -> Tensor:
    """Average ``(h_i - h_j)^2`` over layers, valid tokens, width and the pairs of passes.

    Args:
        hidden_states: the outputs of the layers for a repeated batch, `[m * B, ..., D]` each. Leave out the embedding
            output, the first of a model's `hidden_states`: its divergence is the dropout noise itself.
        passes: m >= 2.
        mask: `[B, ...]` boolean or 0/1, the tokens to average over (the attention mask); all of them by default.

    Returns:
        Scalar >= 0, in squared units of the hidden states; 0 when no token is valid.

    Raises:
        ValueError: if there is no layer, m < 2, or the shapes do not fit.

    Source: the hidden-state term of LR-Drop (Ni et al. 2024, arXiv 2402.16361).
    """
    if not hidden_states:
        raise ValueError(
            "Agreement of hidden states needs those of at least one layer, got none. Call the model with "
            "output_hidden_states=True and pass all its `hidden_states` but the first, the embedding output."
        )
    values = []
    for layer in hidden_states:
        if len(layer) != len(hidden_states[-1]):
            raise ValueError(
                f"The layers' hidden states have {len(layer)} and {len(hidden_states[-1])} rows: some have not seen "
                f"all {passes} passes, so there is nothing to compare. Leave out the layers that the passes share."
            )
        states = stack_passes(layer, passes)
        if mask is not None and mask.shape != states.shape[1:-1]:
            raise ValueError(
                f"The mask has shape {tuple(mask.shape)}, the hidden states of one pass {tuple(states.shape[1:])}: "
                "one mask value per token is needed. Pass the attention mask of the batch before it was repeated."
            )
        values.append(squared_agreement(states, None if mask is None else mask[..., None].expand(states.shape[1:])))
    return torch.stack(values).mean()


class Term(NamedTuple):
    """One summand of a weighted sum of divergences: a name of `TERMS` and its factor."""

    name: str
    factor: float


#: The names that `parse_agreement` reads.
TERMS: tuple[str, ...] = (*OUTPUT_AGREEMENTS, "hidden_states", "info_nce")


def parse_agreement(text: str) -> tuple[Term, ...]:
    """Read a weighted sum of divergences: names of `TERMS`, each with an optional factor, joined by plus signs.

    Raises:
        ValueError: if a name is unknown or comes twice, or a factor is no finite number > 0.

    Example:
        >>> parse_agreement("symmetric_kl + 0.1 * hidden_states")
        (Term(name='symmetric_kl', factor=1.0), Term(name='hidden_states', factor=0.1))
    """
    terms: list[Term] = []
    for part in re.split(r"(?<![\d.][eE])\+", text):  # not the plus of 1e+3
        number, star, name = part.rpartition("*")
        number, name = number.strip(), name.strip()
        problem = ""
        try:
            factor = float(number) if star else 1.0
        except ValueError:
            factor = math.nan
        if name not in TERMS:
            close = get_close_matches(name, TERMS, n=1)
            problem = f"{name!r} is no agreement" + (f" (did you mean {close[0]!r}?)" if close else "")
        elif not (math.isfinite(factor) and factor > 0):
            problem = f"the factor {number!r} of {name!r} is no finite number above 0"
        elif any(name == term.name for term in terms):
            problem = f"{name!r} comes twice, so it is unclear how much it counts"
        if problem:
            raise ValueError(
                f"The agreement {text!r} cannot be read: {problem}. Write names with an optional factor, joined by "
                f"plus signs, such as 'symmetric_kl + 0.1 * hidden_states'; the names are {', '.join(TERMS)}."
            )
        terms.append(Term(name, factor))
    return tuple(terms)


def _known(problem_type: str) -> str:
    if problem_type not in AGREEMENTS:
        raise ValueError(f"Unknown problem type {problem_type!r}. Use one of {', '.join(AGREEMENTS)}.")
    return problem_type


def _refuse_regression(name: str, problem_type: str) -> None:
    if _known(problem_type) == "regression":
        raise ValueError(
            f"The agreement {name!r} compares probabilities, and a regression head has none. Use 'symmetric_kl' or "
            "'squared_logits' (both the squared difference of the predictions), or 'one_sided_kl' (the same with the "
            "first pass as a fixed target)."
        )


def _scores(logits: Tensor, mask: Tensor | None, problem_type: str) -> tuple[Tensor, Tensor | None]:
    """Return the scores, 0 where they do not count, and a mask of their shape."""
    check_passes(logits)
    if mask is not None and problem_type == "single_label_classification":
        if mask.shape != logits.shape[1:-1]:
            raise ValueError(
                f"The mask has shape {tuple(mask.shape)}, the logits have items of shape {tuple(logits.shape[1:-1])}: "
                "one mask value per item is needed. For causal language models shift the mask with the labels."
            )
        mask = mask[..., None].expand(logits.shape[1:])
    return counted_scores(logits, mask), mask


def _log_probabilities(logits: Tensor, mask: Tensor | None, problem_type: str) -> Tensor:
    """Return `[m, ..., C]` over the classes, or `[m, ..., C, 2]` over yes and no of every label."""
    scores, _ = _scores(logits, mask, problem_type)
    if problem_type == "multi_label_classification":
        return torch.stack((F.logsigmoid(scores), F.logsigmoid(-scores)), dim=-1)
    return scores.log_softmax(-1)


def _mean_over_pairs(passes: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return torch.stack([compare(a, b) for a, b in combinations(passes.unbind(), 2)]).mean(0)


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    # The difference of two -inf is nan; a class that neither pass allows agrees.
    return (log_p - log_q).masked_fill(log_p == log_q, 0)


def _one_sided_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute ``sum p log(p/q) - (p - q)``: p - q sums to 0 and cancels the first order class by class."""
    log_p = log_p.detach()
    p, q = log_p.exp(), log_q.exp()
    ratio = _log_ratio(log_p, log_q).clamp(min=-_LARGE)  # p = 0 below: 0 * -inf is nan
    return (p * ratio - (p + q) * (ratio / 2).tanh()).sum(-1)


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute ``sum M (x tanh(x) - log cosh(x))``, the latter as ``|x| + log((1 + exp(-2|x|)) / 2)``."""
    x = (_log_ratio(log_p, log_q) / 2).abs().clamp(max=_LARGE)
    return ((log_p.exp() + log_q.exp()) / 2 * (x * (x.tanh() - 1) - (x * -2).expm1().div(2).log1p())).sum(-1)
