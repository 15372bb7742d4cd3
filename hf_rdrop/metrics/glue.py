"""Compute the metrics of the nine GLUE tasks."""

from functools import partial
from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

# Only the module is imported: `evaluate.load("path/to/glue.py")` takes the first Metric class it finds by name here.
from hf_rdrop.metrics import base

_CITATION = """\
@inproceedings{wang2019glue, booktitle={International Conference on Learning Representations}, year={2019},
  title={{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author={Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and Bowman, Samuel R.}}"""

_ACCURACY = ("sst2", "mnli", "mnli_matched", "mnli_mismatched", "ax", "hans", "qnli", "rte", "wnli")
_ACCURACY_AND_F1 = ("mrpc", "qqp")
GLUE_CONFIGS = ("cola", *_ACCURACY_AND_F1, "stsb", *_ACCURACY)


class Glue(base.LocalMetric):
    """Metric of a GLUE task, with the result keys of Hugging Face's own `glue` metric.

    | config_name | keys |
    | --- | --- |
    | cola | matthews_correlation |
    | mrpc, qqp | accuracy, f1 (of class 1) |
    | stsb | pearson, spearmanr |
    | sst2, mnli, mnli_matched, mnli_mismatched, qnli, rte, wnli, ax, hans | accuracy |

    Undefined scores are 0: Matthews correlation and both correlations when a side is constant, and F1 when class 1
    occurs on neither side.

    Args:
        config_name (`str`): The task.
        kwargs: See [`LocalMetric`].

    Raises:
        ValueError: `config_name` is not a GLUE task.

    Source: Wang et al. 2019, table 1.

    Example:
        >>> Glue("mrpc").compute(predictions=[1, 0, 1, 1], references=[1, 0, 0, 1])
        {'accuracy': 0.75, 'f1': 0.8}
    """

    def _info(self) -> evaluate.MetricInfo:
        base.check_config("glue", self.config_name, GLUE_CONFIGS)
        value = datasets.Value("float64" if self.config_name == "stsb" else "int64")
        inputs = "predictions and references `[N]`: class indices, for stsb real numbers."
        return base.info("Metrics of the GLUE tasks.", inputs, value, citation=_CITATION, format="numpy")

    def check_inputs(self, predictions: Any, references: Any) -> tuple[list, list]:
        check: Any = partial(base.check_labels, binary=self.config_name in _ACCURACY_AND_F1)
        check = partial(base.check_values if self.config_name == "stsb" else check, f"glue/{self.config_name}")
        return check("predictions", predictions), check("references", references)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        if self.config_name == "stsb":
            return base.correlations(list(predictions), list(references))
        if self.config_name == "cola":
            return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
        scores = {"accuracy": float(accuracy_score(references, predictions))}
        if self.config_name in _ACCURACY_AND_F1:
            scores["f1"] = float(f1_score(references, predictions, zero_division=0.0))
        return scores
