"""hf_rdrop.metrics against counts made by hand: none of the libraries behind the metrics is used as the reference."""

import math
import subprocess
import sys
import warnings
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("evaluate", reason="hf_rdrop.metrics needs the scripts extra")

from hf_rdrop.metrics import Calibration, Glue, SacreBleu, Seqeval, SequenceClassification


@pytest.fixture(autouse=True)
def no_warnings():
    """Degenerate input is answered with a defined value, not with a warning on every evaluation."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- naive references ---


def naive_accuracy(predicted, actual):
    return sum(p == a for p, a in zip(predicted, actual, strict=True)) / len(actual)


def naive_f1(predicted, actual, positive=1):
    hits = sum(p == a == positive for p, a in zip(predicted, actual, strict=True))
    total = sum(p == positive for p in predicted) + sum(a == positive for a in actual)
    return 2 * hits / total if total else 0.0


def naive_mcc(predicted, actual):
    pairs = Counter(zip(predicted, actual, strict=True))
    tp, tn, fp, fn = pairs[1, 1], pairs[0, 0], pairs[1, 0], pairs[0, 1]
    denominator = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / denominator if denominator else 0.0


def naive_pearson(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def naive_ranks(values):
    """Ranks from 1; equal values share the mean of their places."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


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


def naive_bleu(hypotheses, references):
    """Corpus BLEU with one reference, without smoothing, words separated by blanks."""
    logs, length, reference_length = 0.0, 0, 0
    for order in range(1, 5):
        matched = total = 0
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            h, r = hypothesis.split(), reference.split()
            grams = Counter(tuple(h[i : i + order]) for i in range(len(h) - order + 1))
            known = Counter(tuple(r[i : i + order]) for i in range(len(r) - order + 1))
            matched += sum((grams & known).values())
            total += sum(grams.values())
        logs += math.log(matched / total) / 4
    length = sum(len(text.split()) for text in hypotheses)
    reference_length = sum(len(text.split()) for text in references)
    return 100 * min(1.0, math.exp(1 - reference_length / length)) * math.exp(logs)


def naive_chrf(hypothesis, reference, beta=2):
    """chrF of one pair: character n-grams 1 to 6 without blanks, precision and recall averaged over the orders."""
    h, r = hypothesis.replace(" ", ""), reference.replace(" ", "")
    precisions, recalls = [], []
    for order in range(1, 7):
        grams = Counter(h[i : i + order] for i in range(len(h) - order + 1))
        known = Counter(r[i : i + order] for i in range(len(r) - order + 1))
        matched = sum((grams & known).values())
        precisions.append(matched / sum(grams.values()))
        recalls.append(matched / sum(known.values()))
    p, r_ = sum(precisions) / 6, sum(recalls) / 6
    return 100 * (1 + beta**2) * p * r_ / (beta**2 * p + r_)


def random_labels(seed, classes=2, size=200):
    rng = np.random.default_rng(seed)
    actual = rng.integers(0, classes, size)
    return np.where(rng.random(size) < 0.7, actual, rng.integers(0, classes, size)), actual


# --- GLUE ---

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


# --- other data sets ---


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


# --- seqeval ---


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


# --- sacreBLEU ---

HYPOTHESES = ["the small dog sees an old cat today", "a king paints the long river near the house"]
REFERENCES = ["the small dog saw an old cat today", "the king paints the long river near a big house"]


def test_bleu_and_chrf():
    result = SacreBleu().compute(predictions=HYPOTHESES, references=REFERENCES)
    assert result["score"] == pytest.approx(naive_bleu(HYPOTHESES, REFERENCES))
    assert (result["sys_len"], result["ref_len"]) == (17, 18)
    assert result["bp"] == pytest.approx(math.exp(1 - 18 / 17))
    assert result["precisions"] == pytest.approx(
        [100 * match / total for match, total in zip(result["counts"], result["totals"], strict=True)]
    )
    for part in ("nrefs:1", "case:mixed", "tok:13a", "smooth:exp", "version:"):
        assert part in result["signature"]
    assert "nc:6" in result["chrf_signature"]
    one = SacreBleu().compute(predictions=HYPOTHESES[:1], references=REFERENCES[:1])
    assert one["chrf"] == pytest.approx(naive_chrf(HYPOTHESES[0], REFERENCES[0]))


def test_references_as_strings_or_lists():
    plain = SacreBleu().compute(predictions=HYPOTHESES, references=REFERENCES)
    assert SacreBleu().compute(predictions=HYPOTHESES, references=[[text] for text in REFERENCES]) == plain
    ragged = SacreBleu().compute(predictions=HYPOTHESES, references=[[REFERENCES[0], HYPOTHESES[0]], REFERENCES[1]])
    assert ragged["score"] > plain["score"]


def test_bleu_options():
    upper = [text.upper() for text in HYPOTHESES]
    folded = SacreBleu().compute(predictions=upper, references=REFERENCES, lowercase=True)
    assert folded["score"] == pytest.approx(naive_bleu(HYPOTHESES, REFERENCES))
    assert SacreBleu().compute(predictions=["x"], references=["y"])["score"] == 0.0
    with pytest.raises(ValueError, match="sacrebleu"):
        SacreBleu().compute(predictions=["x"], references=["y"], tokenize="no such tokenizer")


# --- what all of them share ---

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


# --- Calibration ---


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
