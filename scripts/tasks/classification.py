"""Classes and numbers of texts and of images: targets, label noise, predictions and scores."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.special import softmax
from transformers import EvalPrediction

from finetuning.labels import MULTI, REGRESSION, SINGLE, Labels
from finetuning.unfit import check_fit
from hf_rdrop.metrics import Calibration


def read_targets(splits: dict[str, Dataset], labels: Labels, column: str) -> dict[str, list[Any] | None]:
    """Return the model's targets in each split; None where a test set withholds them."""
    targets: dict[str, list[Any] | None] = {}
    for split, dataset in splits.items():
        check_fit(dataset, column)
        values = list(dataset[column]) if column in dataset.column_names else [None]
        hidden = split.startswith("test") and labels.withheld(values)
        targets[split] = None if hidden else labels.encode_rows(values, column, split)
    return targets


def flip_labels(targets: list[int], labels: Labels, share: float, seed: int) -> list[int]:
    """Replace this share of the targets, rounded, by another class, all others equally likely."""
    if labels.problem_type != SINGLE:
        raise ValueError(f"--label_noise flips classes, and has no meaning for {labels.problem_type}: leave it out.")
    random, flipped = np.random.default_rng(seed), np.asarray(targets)
    rows = random.choice(len(flipped), size=round(share * len(flipped)), replace=False)
    flipped[rows] = (flipped[rows] + random.integers(1, len(labels.names), size=len(rows))) % len(labels.names)
    return flipped.tolist()


def predict_labels(logits: np.ndarray, labels: Labels) -> np.ndarray:
    """Class indices, 0/1 vectors or numbers from the model's outputs."""
    if labels.problem_type == REGRESSION:
        return logits.squeeze(-1)
    return (logits > 0).astype(int) if labels.problem_type == MULTI else logits.argmax(-1)


def metric_names(labels: Labels, compute: Callable[[Any, Any], dict[str, float]]) -> list[str]:
    """Return the names of the metrics that `score` will compute, from made-up outputs."""
    count = max(len(labels.names), 1)
    references: Any = np.arange(4) % count
    if labels.problem_type != SINGLE:
        references = np.arange(4.0) if labels.problem_type == REGRESSION else np.resize([1.0, 0.0, 0.0], (4, count))
    outputs = np.resize([0.1, 0.7, -0.4, 0.3, -0.2], (4, count))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(score(EvalPrediction(outputs, references), labels, compute))


def score(p: EvalPrediction, labels: Labels, compute: Callable[[Any, Any], dict[str, float]]) -> dict[str, float]:
    """Compute the task's metrics and, for classes, how far the probabilities can be believed."""
    metrics = compute(predict_labels(p.predictions, labels), p.label_ids)
    if labels.problem_type == SINGLE:
        probabilities = softmax(p.predictions.astype(np.float64), axis=-1)
        metrics |= Calibration().compute(predictions=probabilities, references=p.label_ids)
    return metrics
