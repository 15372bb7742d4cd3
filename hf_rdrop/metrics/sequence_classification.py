"""Metrics for any data set that `AutoModelForSequenceClassification` can be trained on."""

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

    ```python
    >>> from hf_rdrop.metrics import SequenceClassification
    >>> SequenceClassification("regression").compute(predictions=[1.0, 2.0], references=[1.0, 4.0])["mse"]
    2.0

    ```
    """

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        super().__init__(config_name or SEQUENCE_CLASSIFICATION_CONFIGS[0], **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        base.check_config("sequence_classification", self.config_name, SEQUENCE_CLASSIFICATION_CONFIGS)
        feature: Any = datasets.Value("float64" if self.config_name == "regression" else "int64")
        if self.config_name == "multi_label_classification":
            feature = datasets.Sequence(feature)
        return evaluate.MetricInfo(
            description="Metrics for text classification and regression.",
            citation="",
            inputs_description="predictions and references: see the class.",
            features=datasets.Features({"predictions": feature, "references": feature}),
        )

    def check_inputs(self, predictions: Any, references: Any) -> tuple[list, list]:
        metric, given = f"sequence_classification/{self.config_name}", (predictions, references)
        names = ("predictions", "references")
        checked: list[list[Any]]
        if self.config_name == "regression":
            checked = [base.check_values(metric, *item) for item in zip(names, given, strict=True)]
        elif self.config_name == "single_label_classification":
            checked = [base.check_labels(metric, *item) for item in zip(names, given, strict=True)]
        else:
            checked = [base.check_labels(metric, *item, 2, binary=True) for item in zip(names, given, strict=True)]
            if len(checked[0][0]) != len(checked[1][0]):
                raise ValueError(
                    f"{metric}: predictions have {len(checked[0][0])} labels a row, references {len(checked[1][0])}."
                )
        return checked[0], checked[1]

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
