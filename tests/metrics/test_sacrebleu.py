"""BLEU and chrF against n-grams counted by hand."""

import math
from collections import Counter

import pytest

pytest.importorskip("evaluate", reason="hf_rdrop.metrics needs the scripts extra")

from hf_rdrop.metrics import SacreBleu
from support.metrics import HYPOTHESES, REFERENCES

pytestmark = pytest.mark.usefixtures("no_warnings")


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
