"""The parts of the loss: summed on the device, read once per log line."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# The agreement is called inert when alpha/2 * KL is below this share of CE over this many first steps.
INERT_SHARE, INERT_STEPS = 0.01, 100


class LossLog:
    """Running sums of loss, CE and KL; only `take` and `inert_share` wait for the device.

    Args:
        step: optimizer steps done so far (more than 0 when training resumes).
        saved: the `state` of the log that it continues.
        device: where the sums are kept.
    """

    def __init__(self, step: int = 0, saved: Mapping[str, Any] | None = None, device: Any = None) -> None:
        saved = saved or {}
        self._sums: Tensor | None = _to_tensor(saved.get("sums"), device)
        self._since = saved.get("since", step)
        self._early: Tensor | None = _to_tensor(saved.get("early"), device)
        self._watching = step < INERT_STEPS

    def state(self, gather: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The sums, as means over all processes, in a form for JSON."""
        sums, early = (None if x is None else gather(x[None]).mean(0).tolist() for x in (self._sums, self._early))
        return {"sums": sums, "since": self._since, "early": early}

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added since the last log line."""
        return self._sums is None

    def add(self, step: int, parts: Tensor, has_agreement: bool, skip_nan: bool) -> None:
        """Add one batch.

        Args:
            step: optimizer steps done so far.
            parts: `[loss, ce, kl]` of the batch, each times its weight in the mean over the optimizer step.
            has_agreement: whether the batch made more than one pass.
            skip_nan: count the average so far instead of a nan or inf, as the Trainer does for `loss`.
        """
        if self._sums is None:
            self._sums, self._since = torch.zeros_like(parts, dtype=torch.float32), step
        if skip_nan:
            parts = torch.where(parts[0].isfinite(), parts, self._sums / (1 + step - self._since))
        self._sums += parts
        if self._watching and has_agreement:
            self._early = parts.float() if self._early is None else self._early + parts

    def take(self, step: int, gather: Callable[[Tensor], Tensor]) -> tuple[float, float, float] | None:
        """Mean loss, CE and KL of an optimizer step over all processes since the last call; None without a step."""
        if self._sums is None:
            return None
        loss, ce, kl = (gather(self._sums[None]).mean(0) / max(1, step - self._since)).tolist()
        self._sums = None
        return loss, ce, kl

    def inert_share(self, step: int, alpha: float) -> float | None:
        """Once, after the first hundred steps: alpha/2 * KL over CE, if that is so little that it hardly counts."""
        if not self._watching or step < INERT_STEPS:
            return None
        early, self._early, self._watching = self._early, None, False
        if early is None or not alpha:
            return None
        _, ce, kl = early.tolist()
        share = alpha / 2 * kl / ce if ce else math.inf
        return share if share < INERT_SHARE else None


def _to_tensor(sums: list[float] | None, device: Any) -> Tensor | None:
    return None if sums is None else torch.tensor(sums, device=device)
