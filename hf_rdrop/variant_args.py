"""Arguments beyond the paper: other sub-models, other agreements, a changing alpha, rows without labels."""

import math
from dataclasses import dataclass, field
from typing import Any

from .agreements import TERMS, parse_agreement

SCHEDULES = ("constant", "linear", "sigmoid")
#: Arguments (without their prefix) that `SubModels` takes.
SOURCES = ("layer_drop", "insert_dropout", "drop_connect", "embedding_noise", "second_dropout")


@dataclass
class VariantArguments:
    """Which sub-models are drawn, what agreement means, how alpha rises, whether rows without labels take part.

    The defaults are R-Drop as published.

    Raises:
        ValueError: when an argument is out of its range, or two cannot be used together.
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
    rdrop_drop_connect: float = field(
        default=0.0,
        metadata={
            "help": "Sub-models by dropped weights (DropConnect): each pass has its own mask on the weights of the "
            "layers' linear maps, 0 <= p < 1."
        },
    )
    rdrop_embedding_noise: float = field(
        default=0.0,
        metadata={
            "help": "Sub-models by Gaussian noise of this standard deviation, >= 0, on the input embeddings (R3F: "
            "1e-5)."
        },
    )
    rdrop_second_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Dropout rate of the second and further passes, 0 <= q < 1, where the model has dropout; the "
            "first pass keeps its rates. The paper found equal rates best. Default: equal rates."
        },
    )
    rdrop_deterministic_target: bool = field(
        default=False,
        metadata={
            "help": "One pass with dropout that learns, on the plain batch, and agrees with one with dropout off that "
            "does not (expectation-linear dropout): a forward more than plain training, not a second batch."
        },
    )

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
        for name in ("layer_drop", "insert_dropout", "drop_connect", "second_dropout"):
            p = getattr(self, f"rdrop_{name}")
            if p is not None and (not _is_number(p) or not 0 <= p < 1):
                raise ValueError(f"rdrop_{name} must be in [0, 1), got {p!r}: it is a probability of being dropped.")
        noise = self.rdrop_embedding_noise
        if not _is_number(noise) or not 0 <= noise < math.inf:
            raise ValueError(
                f"rdrop_embedding_noise must be a finite number >= 0, got {noise!r}: a standard deviation."
            )
        self._check_one_learning_pass()
        parent_post_init = getattr(super(), "__post_init__", None)
        if parent_post_init is not None:
            parent_post_init()

    def _check_one_learning_pass(self) -> None:
        if not self.rdrop_deterministic_target:
            return
        for name, plain in {"passes": 2, "shared_layers": 0, "second_dropout": None}.items():
            if (value := getattr(self, f"rdrop_{name}", plain)) != plain:
                raise ValueError(
                    "rdrop_deterministic_target has one pass that learns and one without gradient, on a batch that is "
                    f"not repeated, so rdrop_{name}={value!r} has no meaning there: leave it out."
                )


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
