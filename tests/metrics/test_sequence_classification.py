"""Accuracy, F1 and errors of other data sets against counts made by hand."""

import numpy as np
import pytest

pytest.importorskip("evaluate", reason="hf_rdrop.metrics needs the scripts extra")

from hf_rdrop.metrics import SequenceClassification
from support.metrics import naive_accuracy, naive_f1, naive_mcc, naive_pearson, random_labels

pytestmark = pytest.mark.usefixtures("no_warnings")


def test_single_label():
    predicted, actual = random_labels(4, classes=4)
    result = SequenceClassification().compute(predictions=predicted, references=actual)
    assert result["accuracy"] == pytest.approx(naive_accuracy(predicted, actual))
    assert result["f1_macro"] == pytest.approx(np.mean([naive_f1(predicted, actual, label) for label in range(4)]))
    binary = random_labels(5)
    result = SequenceClassification("single_label_classification").compute(predictions=binary[0], references=binary[1])
    assert result["matthews_correlation"] == pytest.approx(naive_mcc(*binary))


def test_multi_label():
    columns = [random_labels(seed, size=80) for seed in (6, 7, 8)]
    predicted, actual = (np.stack([column[side] for column in columns], axis=1) for side in (0, 1))
    result = SequenceClassification("multi_label_classification").compute(predictions=predicted, references=actual)
    rows = [list(p) == list(a) for p, a in zip(predicted, actual, strict=True)]
    assert result == {
        "subset_accuracy": pytest.approx(sum(rows) / len(rows)),
        "f1_micro": pytest.approx(naive_f1(predicted.reshape(-1), actual.reshape(-1))),
        "f1_macro": pytest.approx(np.mean([naive_f1(*column) for column in columns])),
    }


def test_regression():
    result = SequenceClassification("regression").compute(predictions=[1.0, 2.0, 6.0], references=[1.0, 4.0, 3.0])
    assert result["mse"] == pytest.approx((0 + 4 + 9) / 3)
    assert result["pearson"] == pytest.approx(naive_pearson([1.0, 2.0, 6.0], [1.0, 4.0, 3.0]))
    assert result["spearmanr"] == pytest.approx(0.5)  # ranks 1 2 3 against 1 3 2: 1 - 6 * 2 / (3 * 8)
