"""Compute metrics for any data set that `AutoModelForSequenceClassification` can be trained on."""

from functools import partial
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from hf_rdrop.metrics import base

SEQUENCE_CLASSIFICATION_CONFIGS = ("single_label_classification", "multi_label_classification", "regression")


class SequenceClassification(base.LocalMetric):
    """Metrics by the model's `problem_type`, for data sets outside GLUE.

    | config_name (= `config.problem_type`) | predictions, references | keys |
    | --- | --- | --- |
    | single_label_classification | class indices `[N]` | accuracy, f1_macro, matthews_correlation |
    | multi_label_classification | 0/1 `[N, labels]` | subset_accuracy, f1_micro, f1_macro |
    | regression | real numbers `[N]` | mse, pearson, spearmanr |

    Macro F1 is the plain mean over the classes that occur on either side (for multi-label: over all labels).
    `subset_accuracy` counts a row only when all its labels are right. Undefined scores are 0, as in [`Glue`].

    Args:
        config_name (`str`, *optional*, defaults to `"single_label_classification"`): The problem type.
        kwargs: See [`LocalMetric`].

    Raises:
        ValueError: `config_name` is not a problem type.

    Example:
        >>> SequenceClassification("regression").compute(predictions=[1.0, 2.0], references=[1.0, 4.0])["mse"]
        2.0
    """

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        super().__init__(config_name or SEQUENCE_CLASSIFICATION_CONFIGS[0], **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        base.check_config("sequence_classification", self.config_name, SEQUENCE_CLASSIFICATION_CONFIGS)
        feature: Any = datasets.Value("float64" if self.config_name == "regression" else "int64")
        if self.config_name == "multi_label_classification":
            feature = datasets.Sequence(feature)
        inputs = "predictions and references: see the class."
        return base.info("Metrics for text classification and regression.", inputs, feature)

    def check_inputs(self, predictions: Any, references: Any) -> tuple[list, list]:
        metric, multi = f"sequence_classification/{self.config_name}", self.config_name == "multi_label_classification"
        labels = partial(base.check_labels, ndim=2, binary=True) if multi else base.check_labels
        check: Any = partial(base.check_values if self.config_name == "regression" else labels, metric)
        p, y = check("predictions", predictions), check("references", references)
        if multi and len(p[0]) != len(y[0]):
            raise ValueError(f"{metric}: predictions have {len(p[0])} labels a row, references {len(y[0])}.")
        return p, y

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        y_pred, y_true = np.asarray(list(predictions)), np.asarray(list(references))
        if self.config_name == "regression":
            mse = float(np.mean((y_pred - y_true) ** 2))
            return {"mse": mse, **base.correlations(y_pred.tolist(), y_true.tolist())}
        accuracy = float(accuracy_score(y_true, y_pred))
        f1_macro = float(f1_score(y_true, y_pred, average="macro", zero_division=0.0))
        if self.config_name == "single_label_classification":
            mcc = float(matthews_corrcoef(y_true, y_pred))
            return {"accuracy": accuracy, "f1_macro": f1_macro, "matthews_correlation": mcc}
        f1_micro = float(f1_score(y_true, y_pred, average="micro", zero_division=0.0))
        return {"subset_accuracy": accuracy, "f1_micro": f1_micro, "f1_macro": f1_macro}
