"""R-Drop's arguments as typed values, and what they ask of one optimizer step."""

import dataclasses
import math
from typing import Any, NamedTuple

from ..training_args import RDropArguments


class StepPlan(NamedTuple):
    """What one optimizer step does.

    Args:
        alpha: weight of the divergence, >= 0.
        compares: whether the step has a divergence term.
        passes: how often its batches are repeated, >= 1.
    """

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
        """Plan an optimizer step.

        Args:
            step: optimizer steps done so far.
            max_steps: of the whole training; 0 when there is none.
        """
        compares = bool(self.alpha) and step % self.interval == 0
        return StepPlan(self.alpha_at(step, max_steps), compares, self.passes if compares else 1)

    def alpha_at(self, step: int, max_steps: int) -> float:
        """Give alpha at an optimizer step.

        Args:
            step: optimizer steps done so far.
            max_steps: of the whole training; 0 when there is none, and alpha is the final one.

        Returns:
            ``alpha * t`` or ``alpha * exp(-5 (1 - t)^2)`` with ``t = min(1, (step + 1) / warmup)``, so above 0 from
            the first step on.

        Source: the sigmoid-shaped one is that of Laine & Aila 2017 (arXiv 1610.02242).
        """
        if self.alpha_schedule == "constant" or max_steps <= 0:
            return self.alpha
        steps = self.alpha_warmup * max_steps if self.alpha_warmup <= 1 else self.alpha_warmup
        t = min(1.0, (step + 1) / max(steps, 1.0))
        return self.alpha * (t if self.alpha_schedule == "linear" else math.exp(-5 * (1 - t) ** 2))

    @property
    def asks_for_sub_models(self) -> bool:
        """Whether the model is to have sources of sub-models beside its dropout."""
        return bool(self.layer_drop or self.insert_dropout)


# Looked up once, because the settings are read anew for every batch.
_DEFAULTS = [
    (f"rdrop_{field.name}", getattr(RDropArguments, f"rdrop_{field.name}")) for field in dataclasses.fields(Settings)
]
