"""R-Drop's arguments as typed values, what they ask of one optimizer step, and what was in force in a run."""

import dataclasses
import math
from typing import Any, NamedTuple

from torch import nn

from ..training_args import RDropArguments


class StepPlan(NamedTuple):
    """One optimizer step: alpha, whether there is a divergence term, and how often its batches are repeated."""

    alpha: float
    compares: bool
    passes: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """The `rdrop_*` arguments without their prefix; `RDropArguments` says what each means."""

    alpha: float
    passes: int
    dropout: float | None
    fused_head: str
    shared_layers: float
    interval: int
    agreement: str
    alpha_schedule: str
    alpha_warmup: float
    unlabeled: bool
    layer_drop: float
    insert_dropout: float

    @classmethod
    def of(cls, args: Any) -> "Settings":
        """Read the settings off training arguments; a plain `TrainingArguments` has the defaults."""
        return cls(*(getattr(args, name, default) for name, default in _DEFAULTS))

    def plan(self, step: int, max_steps: int) -> StepPlan:
        """Plan the optimizer step after `step` steps of `max_steps` (0 outside a training)."""
        compares = bool(self.alpha) and step % self.interval == 0
        return StepPlan(self.alpha_at(step, max_steps), compares, self.passes if compares else 1)

    def alpha_at(self, step: int, max_steps: int) -> float:
        """Give alpha at an optimizer step: ``alpha * t`` (linear) or ``alpha * exp(-5 (1 - t)^2)`` (sigmoid).

        ``t = min(1, (step + 1) / warmup)`` is above 0 from the first step on. Without `max_steps` alpha is the last.

        Source: the sigmoid-shaped one is that of Laine & Aila 2017 (arXiv 1610.02242).
        """
        if self.alpha_schedule == "constant" or max_steps <= 0:
            return self.alpha
        steps = self.alpha_warmup * max_steps if self.alpha_warmup <= 1 else self.alpha_warmup
        t = min(1.0, (step + 1) / max(steps, 1.0))
        return self.alpha * (t if self.alpha_schedule == "linear" else math.exp(-5 * (1 - t) ** 2))


class RunFacts(NamedTuple):
    """What was in force in a training run, for its model card and the prediction of its cost.

    Args:
        model: the model, without wrappers and adapters.
        settings: R-Drop's arguments.
        own_logits: whether `logits_for_agreement` said what the passes are compared by.
        shared_layers: number of layers that the passes shared; 0 for none.
        num_layers: number of layers of the stack that they belong to; 0 where nothing was shared.
        fused_head: whether the loss was computed in place of the head.
    """

    model: nn.Module
    settings: Settings
    own_logits: bool
    shared_layers: int
    num_layers: int
    fused_head: bool


# Looked up once, because the settings are read anew for every batch.
_DEFAULTS = [
    (f"rdrop_{field.name}", getattr(RDropArguments, f"rdrop_{field.name}")) for field in dataclasses.fields(Settings)
]
