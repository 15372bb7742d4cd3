"""CE, KL and alpha in a Trainer's log lines, and a word where the agreement does nothing."""

import logging
from typing import Any

from ..dropout import inspect_dropout
from .loss_log import INERT_SHARE, INERT_STEPS, LossLog
from .settings import RunMixin

logger = logging.getLogger(__name__)


class StepLogMixin(RunMixin):
    """Adds `ce_loss`, `kl_loss`, `kl_share` (and `rdrop_alpha` where it changes) to every training log line."""

    _log: LossLog

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and (means := self._log.take(self.state.global_step, self.accelerator.gather)) is not None:
            loss, ce, kl = means
            logs["ce_loss"], logs["kl_loss"] = ce, kl
            alpha = self.rdrop_argument("alpha")
            if alpha and self.rdrop_argument("alpha_schedule") != "constant":
                alpha = float(f"{2 * (loss - ce) / kl:.4g}") if kl else self._alpha  # their mean, weighted by KL
                logs["rdrop_alpha"] = alpha
            logs["kl_share"] = alpha / 2 * kl / ce if ce else 0.0
        super().log(logs, *args, **kwargs)

    def _warn_if_inert(self) -> None:
        """Say once, after the first hundred steps, when the agreement term does nothing."""
        alpha = self.rdrop_argument("alpha") if self.rdrop_argument("alpha_schedule") == "constant" else 0
        share = self._log.inert_share(self.state.global_step, alpha)
        if share is not None and self.is_world_process_zero():
            rates = sorted({s.rate for s in inspect_dropout(self.base_model) if s.rate > 0})
            logger.warning(
                f"R-Drop: over the first {INERT_STEPS} steps alpha/2 * KL was {share:.2%} of the cross-entropy, under "
                f"{INERT_SHARE:.0%}: the agreement term hardly changes the training. The sub-models already agree: "
                f"raise the dropout rate (rdrop_dropout; now {rates}) or rdrop_alpha (now {alpha:g}), or save the "
                "second pass with rdrop_alpha=0."
            )
