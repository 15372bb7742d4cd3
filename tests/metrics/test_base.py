"""What all metrics share: batches, bad input, random state, and runs at once."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("evaluate", reason="hf_rdrop.metrics needs the scripts extra")

from hf_rdrop.metrics import Glue, SacreBleu, Seqeval, SequenceClassification
from support.metrics import HYPOTHESES, REFERENCES

pytestmark = pytest.mark.usefixtures("no_warnings")


EXAMPLES = [
    (Glue("mrpc"), [1, 0, 1, 1], [1, 0, 0, 1]),
    (Glue("stsb"), [1.0, 2.0, 0.5, 3.0], [1.5, 2.0, 0.0, 2.0]),
    (SequenceClassification("multi_label_classification"), [[1, 0], [0, 1], [1, 1], [0, 0]], [[1, 1]] * 4),
    (Seqeval(), [["B-x"], ["O", "B-y"], ["O"], ["B-x"]], [["B-x"], ["B-y", "O"], ["O"], ["O"]]),
    (SacreBleu(), [*HYPOTHESES, *HYPOTHESES], [*REFERENCES, *REFERENCES]),
]


@pytest.mark.parametrize(("metric", "predicted", "actual"), EXAMPLES)
def test_batches_equal_all_at_once(metric, predicted, actual):
    together = metric.compute(predictions=predicted, references=actual)
    metric.add_batch(predictions=predicted[:3], references=actual[:3])
    metric.add(prediction=predicted[3], reference=actual[3])
    assert metric.compute() == together
    assert metric.compute(predictions=predicted, references=actual) == together  # nothing left over


@pytest.mark.parametrize(("metric", "predicted", "actual"), EXAMPLES)
def test_wrong_lengths_leave_nothing_behind(metric, predicted, actual):
    together = metric.compute(predictions=predicted, references=actual)
    with pytest.raises(ValueError, match="3 predictions for 4 references"):
        metric.compute(predictions=predicted[:3], references=actual)
    with pytest.raises(ValueError, match="empty"):
        metric.compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="nothing to score"):
        metric.compute()
    with pytest.raises(ValueError, match="references missing"):
        metric.compute(predictions=predicted)
    assert metric.compute(predictions=predicted, references=actual) == together


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Glue(), "no config_name"),
        (lambda: Glue("colla"), "'colla'.*cola"),
        (lambda: SequenceClassification("binary"), "single_label_classification"),
        (lambda: Glue("sst2").compute(predictions=[[0.1, 0.9]], references=[1]), "argmax"),
        (lambda: Glue("sst2").compute(predictions=[0.9], references=[1]), "class indices"),
        (lambda: Glue("sst2").compute(predictions=[float("nan")], references=[1]), "class indices"),
        (lambda: Glue("sst2").compute(predictions=[1], references=[-1]), "hide their labels"),
        (lambda: Glue("sst2").compute(predictions=["1"], references=[1]), "must be numbers"),
        (lambda: Glue("mrpc").compute(predictions=[2], references=[1]), "0 or 1"),
        (lambda: Glue("stsb").compute(predictions=[float("nan"), 1.0], references=[1.0, 2.0]), "NaN"),
        (lambda: Glue("stsb").compute(predictions=[1.0, 1.0], references=[1.0, float("inf")]), "infinity"),
        (lambda: SequenceClassification("regression").compute(predictions=[[1, 2]], references=[1.0]), "shape"),
        (
            lambda: SequenceClassification("multi_label_classification").compute(
                predictions=[[1, 0, 1]], references=[[1, 0]]
            ),
            "3 labels a row, references 2",
        ),
        (lambda: Seqeval().compute(predictions=[["O"]], references=[["O", "O"]]), "sequence 0 has 1 predicted"),
        (lambda: Seqeval().compute(predictions=[[0]], references=[["O"]]), "not a list of tag strings"),
        (lambda: Seqeval().compute(predictions=["O"], references=["O"]), "not a list of tag strings"),
        (lambda: Seqeval().compute(predictions=[[]], references=[[]]), "all sequences are empty"),
        (lambda: Seqeval().compute(predictions=[["O"]], references=[["O"]], scheme="IOB3"), "IOB2"),
        (lambda: Seqeval().compute(predictions=[["O"]], references=[["O"]], mode="lax"), "strict"),
        (lambda: SacreBleu().compute(predictions=[3], references=["a"]), "decode"),
        (lambda: SacreBleu().compute(predictions=["a"], references=[[]]), "at least one reference"),
    ],
)
def test_user_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_random_state_is_left_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    Glue("sst2").compute(predictions=[1, 0], references=[1, 1])
    assert np.random.get_state()[1].tolist() == before


def test_nothing_is_written(tmp_path):
    cache = tmp_path / "cache"
    Glue("sst2", cache_dir=str(cache)).compute(predictions=[1, 0], references=[1, 1])
    Glue("sst2", cache_dir=str(cache), experiment_id="shared").compute(predictions=[1], references=[1])
    assert not cache.exists()


def test_many_runs_at_once(tmp_path):
    """Each process holds an unfinished evaluation while the other one scores: neither waits, mixes or fails."""
    program = (
        "import sys\n"
        "from hf_rdrop.metrics import Glue\n"
        "metric = Glue('sst2', cache_dir=sys.argv[1])\n"
        "right = int(sys.argv[2])\n"
        "metric.add_batch(predictions=[1] * 4, references=[1] * right + [0] * (4 - right))\n"
        "print('added', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(metric.compute()['accuracy'], flush=True)\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), str(right)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for right in (1, 3)
    ]
    try:
        assert [run.stdout.readline().strip() for run in runs] == ["added", "added"]
        assert [float(run.communicate("go\n", timeout=60)[0]) for run in runs] == [0.25, 0.75]
    finally:
        for run in runs:
            run.kill()


def test_package_does_not_import_evaluate():
    program = "import hf_rdrop, sys; assert 'evaluate' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
