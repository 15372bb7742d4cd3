"""The parts of the loss, summed on the device and read once per log line; a warning where KL is next to nothing."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..dropout import inspect_dropout
from .settings import Settings

logger = logging.getLogger(__name__)

# The divergence is called inert when alpha/2 * KL is below this share of CE over this many first steps.
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
        self._watching, self._added = step < INERT_STEPS, False

    def state(self, gather: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Give the sums, as means over all processes, in a form for JSON."""
        sums, early = (None if x is None else gather(x[None]).mean(0).tolist() for x in (self._sums, self._early))
        return {"sums": sums, "since": self._since, "early": early}

    @property
    def is_fresh(self) -> bool:
        """Whether nothing was ever added."""
        return not self._added

    def add(self, step: int, parts: Tensor, compares: bool, skip_nan: bool) -> None:
        """Add one batch of the optimizer step after `step` steps.

        Args:
            step: optimizer steps done so far.
            parts: `[loss, ce, kl]`, each times its weight in the mean over the optimizer step.
            compares: whether the batch had a divergence term.
            skip_nan: count the average so far instead of a nan or inf, as the Trainer does for `loss`.
        """
        self._added = True
        if self._sums is None:
            self._sums, self._since = torch.zeros_like(parts, dtype=torch.float32), step
        if skip_nan:
            parts = torch.where(parts[0].isfinite(), parts, self._sums / (1 + step - self._since))
        self._sums += parts
        if self._watching and compares:
            self._early = parts.float() if self._early is None else self._early + parts

    def means(self, step: int, gather: Callable[[Tensor], Tensor]) -> tuple[float, float, float] | None:
        """Take the mean loss, CE and KL of an optimizer step since the last call; None without a step."""
        if self._sums is None:
            return None
        loss, ce, kl = (gather(self._sums[None]).mean(0) / max(1, step - self._since)).tolist()
        self._sums = None
        return loss, ce, kl

    def inert_share(self, step: int, alpha: float) -> float | None:
        """Give alpha/2 * KL over CE once, after the first hundred steps, if it is so little that it hardly counts."""
        if not self._watching or step < INERT_STEPS:
            return None
        early, self._early, self._watching = self._early, None, False
        if early is None or not alpha:
            return None
        _, ce, kl = early.tolist()
        share = alpha / 2 * kl / ce if ce else math.inf
        return share if share < INERT_SHARE else None


def log_fields(means: tuple[float, float, float], settings: Settings, alpha: float) -> dict[str, float]:
    """Make what a training log line gains of its mean loss, CE and KL.

    Args:
        means: what `LossLog.means` returned.
        settings: of the training.
        alpha: at this optimizer step.

    Returns:
        `ce_loss`, `kl_loss`, `kl_share` = (alpha / 2 * KL) / CE, and with a schedule `rdrop_alpha`, the average alpha
        of the logged steps, weighted by their KL: ``loss = ce_loss + alpha / 2 * kl_loss``.
    """
    loss, ce, kl = means
    fields = {"ce_loss": ce, "kl_loss": kl}
    weight = settings.alpha
    if weight and settings.alpha_schedule != "constant":
        weight = fields["rdrop_alpha"] = float(f"{2 * (loss - ce) / kl:.4g}") if kl else alpha
    return {**fields, "kl_share": weight / 2 * kl / ce if ce else 0.0}


def warn_of_inert(share: float, alpha: float, model: nn.Module) -> None:
    """Say that the divergence term does nothing (`share` is alpha/2 * KL over CE), and which knob to turn."""
    rates = sorted({source.rate for source in inspect_dropout(model) if source.rate > 0})
    logger.warning(
        f"R-Drop: over the first {INERT_STEPS} steps alpha/2 * KL was {share:.2%} of the cross-entropy, under "
        f"{INERT_SHARE:.0%}: the agreement term hardly changes the training. The sub-models already agree: "
        f"raise the dropout rate (rdrop_dropout; now {rates}) or rdrop_alpha (now {alpha:g}), or save the "
        "second pass with rdrop_alpha=0."
    )


def _to_tensor(sums: list[float] | None, device: Any) -> Tensor | None:
    return None if sums is None else torch.tensor(sums, device=device)
