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


@pytest.mark.parametrize("suffix", [False, True])
@pytest.mark.parametrize("letters", ["BIES", "BILU", "BMES", "BMEW"])
def test_seqeval_reads_every_scheme_alike(letters, suffix):
    """Tags with their last and single words marked score as the same spans in IOB2 do, neighbours included."""
    rng = np.random.default_rng(5)
    actual = [random_tags(rng, length) for length in rng.integers(1, 12, 60)]
    predicted = [tags if rng.random() < 0.6 else random_tags(rng, len(tags)) for tags in actual]

    def marked(tags):
        begin, inside, end, single = letters
        result = ["O"] * len(tags)
        for _, first, last in naive_spans(tags):
            name = tags[first][2:]
            shapes = [single] if first == last else [begin, *inside * (last - first - 1), end]
            for place, letter in enumerate(shapes, first):
                result[place] = f"{name}-{letter}" if suffix else f"{letter}-{name}"
        return result

    expected = Seqeval().compute(predictions=predicted, references=actual)
    sides = {"predictions": list(map(marked, predicted)), "references": list(map(marked, actual))}
    found = Seqeval().compute(**sides, suffix=suffix)
    assert {k: v for k, v in found.items() if "acc" not in k} == {k: v for k, v in expected.items() if "acc" not in k}
    if letters in ("BIES", "BILU"):
        strict = Seqeval().compute(**sides, suffix=suffix, mode="strict")
        assert strict["overall_f1"] == pytest.approx(expected["overall_f1"])


def test_seqeval_tells_one_entity_of_two_words_from_two_of_one():
    found = Seqeval().compute(predictions=[["B-PER", "L-PER"]], references=[["U-PER", "U-PER"]])
    assert found["overall_f1"] == found["overall_accuracy"] == 0.0 and found["PER"]["number"] == 2


@pytest.mark.parametrize(
    ("tags", "options", "words"),
    [
        (["B-x", "L-x", "S-x"], {}, "belong to no scheme"),
        (["x-B", "O"], {}, "suffix=True"),
        (["B-x", "O"], {"suffix": True}, "suffix=False"),
        (["NOUN"], {}, "marks no span"),
        (["I-x"], {"mode": "strict"}, "needs a scheme.*IOB1, IOB2"),
    ],
)
def test_seqeval_refuses_tags_of_no_scheme(tags, options, words):
    with pytest.raises(ValueError, match=words):
        Seqeval().compute(predictions=[tags], references=[tags], **options)


def test_seqeval_without_entities():
    nothing = [["O", "O"], []]
    result = Seqeval().compute(predictions=nothing, references=nothing)
    assert (result["overall_f1"], result["overall_accuracy"]) == (0.0, 1.0)
    assert Seqeval().compute(predictions=nothing, references=nothing, zero_division=1)["overall_f1"] == 1.0
