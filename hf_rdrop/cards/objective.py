"""Describe on a model card where the objective differs from R-Drop's as published: its terms, and other options."""

from typing import Any

from ..agreements import OUTPUT_AGREEMENTS, Term, parse_agreement
from ..training.settings import Settings

_TERMS = {
    "symmetric_kl": "1/2 KL(P||Q) + 1/2 KL(Q||P)",
    "one_sided_kl": "KL(P||Q), where P, of the earlier pass, is a fixed target without gradient",
    "jensen_shannon": "1/2 KL(P||M) + 1/2 KL(Q||M), where M = (P + Q) / 2",
    "squared_logits": "the squared difference of the scores before the softmax or sigmoid, averaged over them",
    "squared_probabilities": "the squared differences of the probabilities, summed over the classes",
    "hidden_states": "the squared difference of the hidden states, averaged over layers, tokens and width",
    "info_nce": "InfoNCE between the texts' mean last hidden states, with the rest of the micro-batch as negatives",
}
_SQUARED = frozenset({"symmetric_kl", "one_sided_kl", "squared_logits"})  # what they are for a regression
_SOURCES = {
    "layer_drop": "each row skipped each hidden layer with probability {:g}",
    "insert_dropout": "dropout of rate {:g} was put on the outputs of the attention and feed-forward blocks "
    "(the saved model has none there)",
}
_RISES = {"linear": "linearly", "sigmoid": "as exp(-5 (1 - t)^2) for t from 0 to 1"}


def objective_facts(settings: Settings, regression: bool, own_logits: bool = False) -> dict[str, Any]:
    """Put the settings into the words of the template; `own_logits`: whether `logits_for_agreement` was given.

    Returns:
        `agreement`, the sum of terms as text, and `terms`, their definitions, both empty for the symmetric KL alone;
        `within`, whether terms look at hidden states; `sources` of sub-models beside dropout; `schedule` of alpha, ""
        when constant; `unlabeled`; `own_logits`.
    """
    terms = parse_agreement(settings.agreement)
    variant = own_logits or terms != (Term("symmetric_kl", 1.0),)
    return {
        "agreement": settings.agreement if variant else "",
        "terms": [(term.name, _definition(term.name, regression, own_logits)) for term in terms] if variant else [],
        "within": any(term.name not in OUTPUT_AGREEMENTS for term in terms),
        "sources": [text.format(rate) for name, text in _SOURCES.items() if (rate := getattr(settings, name))],
        "schedule": _schedule(settings),
        "unlabeled": settings.unlabeled,
        "own_logits": own_logits,
    }


def _definition(name: str, regression: bool, own_logits: bool) -> str:
    if own_logits and name in ("symmetric_kl", "one_sided_kl"):
        return f"{_TERMS[name]} (of predictions that are numbers: the squared difference)"
    if not regression or name not in _SQUARED:
        return _TERMS[name]
    fixed = ", the earlier pass being a fixed target without gradient" if name == "one_sided_kl" else ""
    return f"the squared difference of the predictions{fixed}"


def _schedule(settings: Settings) -> str:
    schedule, length = settings.alpha_schedule, settings.alpha_warmup
    if schedule == "constant":
        return ""
    part = f"first {length:.4g} steps" if length > 1 else f"first {100 * length:.4g}% of the optimizer steps"
    return f"{_RISES[schedule]} over the {'whole training' if length == 1 else part}"
