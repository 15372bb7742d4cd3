"""Calibration against bins filled by hand."""

import math

import numpy as np
import pytest

pytest.importorskip("evaluate", reason="hf_rdrop.metrics needs the scripts extra")

from hf_rdrop.metrics import Calibration

pytestmark = pytest.mark.usefixtures("no_warnings")


def naive_calibration(probabilities, classes):
    bins = [[] for _ in range(15)]
    for row, label in zip(probabilities, classes, strict=True):
        confidence = max(row)
        place = next(b for b in range(15) if confidence <= (b + 1) / 15)
        bins[place].append((confidence, row.index(confidence) == label))
    ece = 0.0
    for rows in filter(None, bins):
        accuracy = sum(right for _, right in rows) / len(rows)
        ece += len(rows) / len(classes) * abs(accuracy - sum(c for c, _ in rows) / len(rows))
    nll = -sum(math.log(row[label]) for row, label in zip(probabilities, classes, strict=True)) / len(classes)
    squares = [
        sum((p - (c == label)) ** 2 for c, p in enumerate(row))
        for row, label in zip(probabilities, classes, strict=True)
    ]
    return {"ece": ece, "nll": nll, "brier": sum(squares) / len(squares)}


@pytest.mark.parametrize("classes", [2, 5])
def test_calibration(classes):
    random = np.random.default_rng(classes)
    probabilities = random.dirichlet([0.5] * classes, size=200).clip(1e-6)
    probabilities /= probabilities.sum(-1, keepdims=True)
    labels = random.integers(0, classes, size=200).tolist()
    found = Calibration().compute(predictions=probabilities, references=labels)
    assert found == pytest.approx(naive_calibration(probabilities.tolist(), labels))


def test_calibration_of_a_perfect_and_of_a_hopeless_model():
    sure = [[1.0, 0.0], [0.0, 1.0]]
    assert Calibration().compute(predictions=sure, references=[0, 1]) == pytest.approx(
        {"ece": 0, "nll": 0, "brier": 0}
    )
    wrong = Calibration().compute(predictions=sure, references=[1, 0])
    assert wrong["ece"] == 1 and wrong["brier"] == 2 and math.isfinite(wrong["nll"]) and wrong["nll"] > 10


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([[2.0, -1.0]], [0], "softmax"),
        ([[0.5, 0.6]], [0], "add up to 1"),
        ([0.5], [0], "add up to 1"),
        ([[float("nan"), 0.5]], [0], "add up to 1"),
        ([[0.5, 0.5]], [2], "hold class 2"),
        ([[0.5, 0.5]], [-1], "no class index"),
    ],
)
def test_calibration_refuses(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        Calibration().compute(predictions=predictions, references=references)
