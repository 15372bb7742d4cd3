"""Measure how far a classifier's probabilities can be believed."""

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import log_loss

from hf_rdrop.metrics import base


class Calibration(base.LocalMetric):
    """Calibration of predicted class probabilities: expected calibration error, negative log-likelihood, Brier score.

    | key | formula, over N rows with probabilities p `[N, C]` and classes y `[N]` | range, best |
    | --- | --- | --- |
    | ece | sum over 15 bins of equal width b of (N_b / N) * abs(accuracy_b - mean confidence_b), where a row's confidence is its largest probability | 0 to 1, 0 |
    | nll | -mean log p[y], in nats | 0 to inf, 0 |
    | brier | mean over rows of the sum over classes of (p - onehot(y))^2 | 0 to 2, 0 |

    Source: Guo et al. 2017 (arXiv 1706.04599) for ece with 15 bins; Brier 1950.

    Args:
        kwargs: See [`LocalMetric`].

    Example:
        >>> scores = Calibration().compute(predictions=[[0.8, 0.2], [0.6, 0.4]], references=[0, 1])
        >>> round(scores["ece"], 3), round(scores["brier"], 3)  # (0.2 + 0.6) / 2, (0.08 + 0.72) / 2
        (0.4, 0.4)
    """  # noqa: E501

    bins = 15

    def _info(self) -> evaluate.MetricInfo:
        probabilities: Any = datasets.Sequence(datasets.Value("float64"))
        inputs = "predictions: probabilities [N, C]; references: class indices [N]."
        return base.info("Calibration of class probabilities.", inputs, probabilities, datasets.Value("int64"))

    def check_inputs(self, predictions: Any, references: Any) -> tuple[list, list]:
        probabilities = np.asarray(predictions, dtype=np.float64)
        if probabilities.ndim != 2 or not np.allclose(probabilities.sum(-1), 1, atol=1e-3) or probabilities.min() < 0:
            raise ValueError(
                f"calibration: predictions must be probabilities [N, C] with rows that add up to 1, got shape "
                f"{probabilities.shape}. Logits? Give their softmax."
            )
        classes = base.check_labels("calibration", "references", references)
        if max(classes) >= probabilities.shape[1]:
            raise ValueError(
                f"calibration: references hold class {max(classes)}, but predictions have {probabilities.shape[1]} "
                "classes."
            )
        return probabilities.tolist(), classes

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        p, y = np.asarray(list(predictions)), np.asarray(list(references))
        confidence, right = p.max(-1), p.argmax(-1) == y
        # Bins (0, 1/15], (1/15, 2/15], ...; the sum needs each bin's total only.
        index = np.clip(np.ceil(confidence * self.bins).astype(int) - 1, 0, self.bins - 1)
        gaps = np.bincount(index, weights=right - confidence, minlength=self.bins)
        brier = np.mean(np.sum((p - np.eye(p.shape[1])[y]) ** 2, axis=-1))
        nll = log_loss(y, p / p.sum(-1, keepdims=True), labels=range(p.shape[1]))
        return {"ece": float(np.abs(gaps).sum() / len(y)), "nll": float(nll), "brier": float(brier)}
