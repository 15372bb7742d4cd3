"""Share an `evaluate.Metric` that stays in memory, checks of its input, and correlations among the metrics."""

import warnings
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy import stats


class LocalMetric(evaluate.Metric):
    """`evaluate.Metric` that needs no network, keeps its examples in memory, and checks them as they are added.

    `evaluate.Metric` writes the examples to a locked cache file with the same name in every run, for which runs wait
    for each other. Gathering through files over `num_process > 1` processes still works: give `num_process`,
    `process_id` and an `experiment_id` of your own. Subclasses define `_info`, `_compute` and `check_inputs`.

    Args:
        config_name (`str`, *optional*): The configuration, where a metric has several.
        keep_in_memory (`bool`, *optional*): Defaults to `True` for `num_process=1` and `False` otherwise.
        num_process (`int`, *optional*, defaults to 1): Number of processes whose examples are gathered by files.
        kwargs: Further arguments of `evaluate.Metric`.
    """

    def __init__(
        self, config_name: str | None = None, keep_in_memory: bool | None = None, num_process: int = 1, **kwargs: Any
    ) -> None:
        keep_in_memory = num_process == 1 if keep_in_memory is None else keep_in_memory
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, num_process=num_process, **kwargs)

    def _build_data_dir(self) -> str:
        # The base class creates its cache folder even when nothing is ever written there.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def check_inputs(self, predictions: Any, references: Any) -> tuple[list, list]:
        """Return predictions and references as plain lists, or raise `ValueError`."""
        raise NotImplementedError

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch of predictions and references (lists, numpy arrays or CPU tensors of equal length).

        Raises:
            ValueError: Lengths differ, nothing was given, or a value does not fit the metric.
        """
        if predictions is None or references is None:
            missing = "predictions" if predictions is None else "references"
            raise ValueError(f"{self.name}: {missing} missing; give both predictions and references.")
        if len(predictions) != len(references):
            sizes = f"{len(predictions)} predictions for {len(references)} references"
            raise ValueError(f"{self.name}: {sizes}; each reference needs exactly one prediction.")
        if len(predictions) == 0:
            raise ValueError(f"{self.name}: predictions and references are empty; a score needs at least one example.")
        predictions, references = self.check_inputs(predictions, references)
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one prediction and its reference; see `add_batch`."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """Score the examples given here together with those added before.

        Args:
            predictions, references: As for `add_batch`; leave both out to score what was added.
            kwargs: Options of the metric.

        Returns:
            `dict`: The scores (`None` on processes other than the first when `num_process > 1`).

        Raises:
            ValueError: As `add_batch`, or nothing was added.
        """
        if predictions is None and references is None and self.writer is None:
            raise ValueError(f"{self.name}: nothing to score; give predictions and references, or add batches first.")
        return super().compute(predictions=predictions, references=references, **kwargs)


def info(
    description: str, inputs: str, predictions: Any, references: Any = None, **others: Any
) -> evaluate.MetricInfo:
    """Describe a metric to `evaluate`; references are of the type of predictions by default."""
    types = {"predictions": predictions, "references": predictions if references is None else references}
    others = {"citation": "", "features": datasets.Features(types)} | others
    return evaluate.MetricInfo(description=description, inputs_description=inputs, **others)


def check_config(metric: str, config_name: str, known: Any) -> str:
    """Return `config_name`, or raise `ValueError` with the names in `known`."""
    if config_name not in known:
        given = "no config_name" if config_name == "default" else f"config_name={config_name!r}"
        raise ValueError(f"{metric}: {given} is not one of its configurations; choose from {', '.join(known)}.")
    return config_name


def _array(metric: str, name: str, values: Any, ndim: int) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:  # ragged rows
        raise ValueError(f"{metric}: {name} are not a regular array ({error}).") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{metric}: {name} must be numbers, got values like {values[0]!r}.")
    if array.ndim != ndim:
        hint = " Logits? Give `logits.argmax(-1)`." if ndim == 1 and array.ndim == 2 and array.shape[1] > 1 else ""
        raise ValueError(f"{metric}: {name} must have {ndim} dimension(s), got shape {array.shape}.{hint}")
    return array


def check_labels(metric: str, name: str, values: Any, ndim: int = 1, binary: bool = False) -> list[Any]:
    """Return class indices as a list of `int` (lists of `int` for `ndim=2`), or raise `ValueError`."""
    array = _array(metric, name, values, ndim)
    if array.dtype.kind == "f" and not np.all(array == np.floor(array)):  # NaN and inf - inf fail here as well
        raise ValueError(f"{metric}: {name} must be class indices, got fractions or NaN; probabilities or logits?")
    if array.min() < 0:
        raise ValueError(
            f"{metric}: {name} hold {array.min():g}, which is no class index. GLUE's test sets hide their labels as "
            "-1, and -100 marks ignored positions: neither can be scored."
        )
    if binary and array.max() > 1:
        raise ValueError(f"{metric}: {name} must be 0 or 1, got {array.max():g}.")
    return array.astype(np.int64).tolist()


def check_values(metric: str, name: str, values: Any) -> list[float]:
    """Return real numbers `[N]` (or `[N, 1]`) as a list of `float`, or raise `ValueError`."""
    array = np.asarray(values)
    array = _array(metric, name, array.reshape(-1) if array.shape[1:] == (1,) else values, ndim=1)
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{metric}: {name} hold NaN or infinity; training has probably diverged.")
    return array.astype(np.float64).tolist()


def check_texts(metric: str, predictions: Any, references: Any) -> tuple[list[str], list[list[str]]]:
    """Return texts, and for each a list of reference texts, or raise `ValueError`."""
    rows = [[row] if isinstance(row, str) or row is None else list(row) for row in references]
    for index, (prediction, row) in enumerate(zip(predictions, rows, strict=True)):
        if not row or not all(isinstance(text, str) for text in (prediction, *row)):
            raise ValueError(
                f"{metric}: row {index} needs a prediction string and at least one reference string, got "
                f"{prediction!r:.60} and {row!r:.60}; decode token ids to text first."
            )
    return [str(text) for text in predictions], [[str(text) for text in row] for row in rows]


def correlations(predictions: list[float], references: list[float]) -> dict[str, float]:
    """Compute Pearson's and Spearman's correlation; 0 where undefined (a constant side, or a single example).

    NaN would compare false with everything and break `metric_for_best_model`.
    """
    if len(set(predictions)) < 2 or len(set(references)) < 2:
        return {"pearson": 0.0, "spearmanr": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nearly constant input
        pearson = stats.pearsonr(predictions, references)[0]
        spearman = stats.spearmanr(predictions, references)[0]
    return {"pearson": float(np.nan_to_num(pearson)), "spearmanr": float(np.nan_to_num(spearman))}
