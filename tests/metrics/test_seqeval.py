"""Entities as a whole against spans read by hand."""

import numpy as np
import pytest

pytest.importorskip("evaluate", reason="hf_rdrop.metrics needs the scripts extra")

from hf_rdrop.metrics import Seqeval

pytestmark = pytest.mark.usefixtures("no_warnings")


def naive_spans(tags):
    """Entities of an IOB2 sequence as (type, first, last)."""
    spans, start = [], None
    for place, tag in enumerate([*tags, "O"]):
        if start is not None and tag != f"I-{tags[start][2:]}":
            spans.append((tags[start][2:], start, place - 1))
            start = None
        if tag.startswith("B-"):
            start = place
    return spans


def random_tags(rng, length):
    """A valid IOB2 sequence of two types."""
    tags = []
    for _ in range(length):
        before = tags[-1] if tags else "O"
        choices = ["O", "O", "B-x", "B-y"] + ([f"I-{before[2:]}"] * 2 if before != "O" else [])
        tags.append(str(rng.choice(choices)))
    return tags


def test_seqeval_counts_whole_entities():
    rng = np.random.default_rng(9)
    actual = [random_tags(rng, length) for length in rng.integers(1, 12, 60)]
    predicted = [tags if rng.random() < 0.6 else random_tags(rng, len(tags)) for tags in actual]
    result = Seqeval().compute(predictions=predicted, references=actual)

    found = [
        {(row, *span) for row, tags in enumerate(side) for span in naive_spans(tags)} for side in (predicted, actual)
    ]
    for kind in ("x", "y", None):
        p, a = ({span for span in spans if kind in (None, span[1])} for spans in found)
        precision, recall = len(p & a) / len(p), len(p & a) / len(a)
        f1 = 2 * precision * recall / (precision + recall)
        if kind:
            expected = {"precision": precision, "recall": recall, "f1": f1, "number": len(a)}
            assert result[kind] == pytest.approx(expected)
        else:
            overall = (result["overall_precision"], result["overall_recall"], result["overall_f1"])
            assert overall == pytest.approx((precision, recall, f1))
    words = [pair for p, a in zip(predicted, actual, strict=True) for pair in zip(p, a, strict=True)]
    assert result["overall_accuracy"] == pytest.approx(sum(p == a for p, a in words) / len(words))
    assert set(result) == {"x", "y", "overall_precision", "overall_recall", "overall_f1", "overall_accuracy"}


def test_seqeval_strict_mode():
    predicted, actual = [["O", "I-x", "O", "B-y"]], [["O", "B-x", "O", "B-y"]]
    assert Seqeval().compute(predictions=predicted, references=actual)["overall_f1"] == 1.0
    strict = Seqeval().compute(predictions=predicted, references=actual, mode="strict", scheme="IOB2")
    # The entity that starts with I- does not count: one right of one predicted and two real ones.
    assert strict["overall_precision"] == 1.0
    assert strict["overall_recall"] == 0.5


def test_seqeval_without_entities():
    nothing = [["O", "O"], []]
    result = Seqeval().compute(predictions=nothing, references=nothing)
    assert (result["overall_f1"], result["overall_accuracy"]) == (0.0, 1.0)
    assert Seqeval().compute(predictions=nothing, references=nothing, zero_division=1)["overall_f1"] == 1.0
