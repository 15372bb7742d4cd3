"""Arguments beyond the paper: other sub-models, other agreements, a changing alpha, rows without labels."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .agreements import TERMS, parse_agreement

SCHEDULES = ("constant", "linear", "sigmoid")
#: Arguments (without their prefix) that `SubModels` takes.
SOURCES = ("layer_drop", "insert_dropout")
#: Arguments that are gone: why, and what to use instead.
REMOVED = {
    "rdrop_deterministic_target": "a pass without dropout and gradient as the target had 15.3 BLEU in translation, "
    "where plain training had 22.3. Leave it out, and both passes learn; for cheaper steps use rdrop_interval or "
    "rdrop_shared_layers",
    "rdrop_second_dropout": "another rate in the second pass was less accurate than equal rates on all four tasks, as "
    "in the paper. Set the rate of both passes with rdrop_dropout",
    "rdrop_drop_connect": "dropped weights were less accurate than R-Drop with dropout on all three text tasks, for "
    "2.4 times the time of plain training. Use rdrop_dropout, or rdrop_insert_dropout for a model without dropout",
    "rdrop_embedding_noise": "noise on the embeddings hardly made the passes differ. Use rdrop_dropout, or "
    "neftune_noise_alpha of TrainingArguments for such noise",
}


def check_removed(names: Iterable[str]) -> None:
    """Check that no argument is one that is gone.

    Args:
        names: the arguments that were given, with their prefix.

    Raises:
        ValueError: for the first of `REMOVED`, with the reason and what to use instead.
    """
    for name in names:
        if name in REMOVED:
            raise ValueError(f"{name} was removed: {REMOVED[name]}.")


@dataclass
class VariantArguments:
    """Which sub-models are drawn, what agreement means, how alpha rises, whether rows without labels take part.

    The defaults are R-Drop as published.

    Raises:
        ValueError: when an argument is out of its range, or one of `REMOVED`.
    """

    rdrop_agreement: str = field(
        default="symmetric_kl",
        metadata={
            "help": "What the passes are asked for: a sum of terms with factors > 0, such as symmetric_kl, or "
            f"'symmetric_kl + 0.1 * hidden_states'. Terms: {', '.join(TERMS)}. kl_loss in the logs is this sum."
        },
    )
    rdrop_alpha_schedule: str = field(
        default="constant",
        metadata={
            "help": "How alpha grows to rdrop_alpha in the first part of training (rdrop_alpha_warmup), with t from 0 "
            "to 1 in it: 'constant': it does not, 'linear': t, 'sigmoid': exp(-5 (1 - t)^2).",
            "choices": list(SCHEDULES),
        },
    )
    rdrop_alpha_warmup: float = field(
        default=0.1,
        metadata={
            "help": "Length of that part: a share of all optimizer steps in (0, 1] (1: a ramp over the whole "
            "training), or a number of steps > 1. Used by the schedules linear and sigmoid."
        },
    )
    rdrop_unlabeled: bool = field(
        default=False,
        metadata={
            "help": "Rows whose labels are all -100 take part in the agreement (semi-supervised R-Drop), which is "
            "then a mean over the items of all rows; CE remains a mean over the labelled ones."
        },
    )
    rdrop_layer_drop: float = field(
        default=0.0,
        metadata={
            "help": "Sub-models by whole hidden layers: each row skips each layer with this probability, 0 <= p < 1. "
            "Needs no dropout."
        },
    )
    rdrop_insert_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Dropout of this rate, 0 <= p < 1, on the outputs of the attention and MLP blocks, for models "
            "that come without any (Llama, Qwen, ModernBERT). Only while training: the saved model is a stock model."
        },
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        check_removed(kwargs)  # before the generated __init__, which would only say that they are unexpected
        return super().__new__(cls)

    def __post_init__(self) -> None:
        parse_agreement(self.rdrop_agreement)
        if self.rdrop_alpha_schedule not in SCHEDULES:
            raise ValueError(
                f"rdrop_alpha_schedule must be one of {', '.join(SCHEDULES)}, got {self.rdrop_alpha_schedule!r}."
            )
        if not _is_number(self.rdrop_alpha_warmup) or not 0 < self.rdrop_alpha_warmup < math.inf:
            raise ValueError(
                f"rdrop_alpha_warmup must be a share of the training in (0, 1] or a number of steps, got "
                f"{self.rdrop_alpha_warmup!r}. For an alpha that does not change leave rdrop_alpha_schedule out."
            )
        for name in SOURCES:
            p = getattr(self, f"rdrop_{name}")
            if not _is_number(p) or not 0 <= p < 1:
                raise ValueError(f"rdrop_{name} must be in [0, 1), got {p!r}: it is a probability of being dropped.")
        parent_post_init = getattr(super(), "__post_init__", None)
        if parent_post_init is not None:
            parent_post_init()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def alpha_at(args: Any, alpha: float, step: int, max_steps: int) -> float:
    """Alpha at an optimizer step.

    Args:
        args: with `rdrop_alpha_schedule` and `rdrop_alpha_warmup`; without them alpha is constant.
        alpha: its final value.
        step: optimizer steps done so far.
        max_steps: of the whole training; 0 when there is none, and alpha is the final one.

    Returns:
        ``alpha * t`` or ``alpha * exp(-5 (1 - t)^2)`` with ``t = min(1, (step + 1) / warmup)``, so above 0 from the
        first step on.

    Source: the sigmoid-shaped one is that of Laine & Aila 2017 (arXiv 1610.02242).
    """
    schedule = getattr(args, "rdrop_alpha_schedule", "constant")
    if schedule == "constant" or max_steps <= 0:
        return alpha
    warmup = args.rdrop_alpha_warmup
    steps = warmup * max_steps if warmup <= 1 else warmup
    t = min(1.0, (step + 1) / max(steps, 1.0))
    return alpha * (t if schedule == "linear" else math.exp(-5 * (1 - t) ** 2))
