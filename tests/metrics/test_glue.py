"""GLUE's metrics against counts made by hand: scikit-learn and scipy are never the reference."""

import math

import numpy as np
import pytest

pytest.importorskip("evaluate", reason="hf_rdrop.metrics needs the scripts extra")

from hf_rdrop.metrics import Glue
from support.metrics import naive_accuracy, naive_f1, naive_mcc, naive_pearson, random_labels

pytestmark = pytest.mark.usefixtures("no_warnings")


def naive_ranks(values):
    """Ranks from 1; equal values share the mean of their places."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


ACCURACY_TASKS = ["sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli", "ax", "hans"]


@pytest.mark.parametrize("task", ACCURACY_TASKS)
def test_accuracy_tasks(task):
    predicted, actual = random_labels(0, classes=3)
    result = Glue(task).compute(predictions=predicted, references=actual)
    assert result == {"accuracy": pytest.approx(naive_accuracy(predicted, actual))}


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_pair_tasks(task):
    predicted, actual = random_labels(1)
    result = Glue(task).compute(predictions=predicted, references=actual)
    assert result == {
        "accuracy": pytest.approx(naive_accuracy(predicted, actual)),
        "f1": pytest.approx(naive_f1(predicted, actual)),
    }


def test_cola():
    predicted, actual = random_labels(2)
    result = Glue("cola").compute(predictions=predicted, references=actual)
    assert result == {"matthews_correlation": pytest.approx(naive_mcc(predicted, actual))}
    assert 0.1 < result["matthews_correlation"] < 0.9


def test_stsb_with_ties():
    rng = np.random.default_rng(3)
    actual = rng.integers(0, 6, 50).astype(np.float32)
    predicted = (actual + rng.normal(0, 1, 50)).astype(np.float32)
    predicted[:10] = predicted[0]
    result = Glue("stsb").compute(predictions=predicted[:, None], references=actual)
    assert set(result) == {"pearson", "spearmanr"}
    assert result["pearson"] == pytest.approx(naive_pearson(predicted.tolist(), actual.tolist()))
    ranks = naive_pearson(naive_ranks(predicted.tolist()), naive_ranks(actual.tolist()))
    assert result["spearmanr"] == pytest.approx(ranks)


def test_degenerate_scores_are_zero():
    ones, mixed = [1, 1, 1, 1], [1, 0, 1, 0]
    assert Glue("cola").compute(predictions=ones, references=mixed) == {"matthews_correlation": 0.0}
    assert Glue("mrpc").compute(predictions=[0, 0], references=[0, 0]) == {"accuracy": 1.0, "f1": 0.0}
    constant = Glue("stsb").compute(predictions=[2.5, 2.5, 2.5], references=[1.0, 2.0, 3.0])
    assert constant == {"pearson": 0.0, "spearmanr": 0.0}
    assert Glue("stsb").compute(predictions=[2.5], references=[1.0]) == {"pearson": 0.0, "spearmanr": 0.0}
    nearly = Glue("stsb").compute(predictions=[1.0, 1.0 + 1e-15, 1.0], references=[1.0, 2.0, 3.0])
    assert all(math.isfinite(value) for value in nearly.values())
