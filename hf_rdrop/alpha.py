"""The range of alpha; needs no torch."""

import math


def check_alpha(alpha: float) -> None:
    """Raise `ValueError` unless alpha is a finite number >= 0."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha < 0:
        raise ValueError(
            f"rdrop_alpha must be a finite number >= 0, got {alpha!r}: it weighs the agreement of the passes in "
            "loss = CE + alpha / 2 * KL. Use 0 for plain fine-tuning, 0.1 to 1 for classification, 5 for translation."
        )
