"""Compute ROUGE of summaries by Google's rouge_score."""

from typing import Any

import datasets
import evaluate
import numpy as np

from hf_rdrop.metrics import base

_CITATION = """\
@inproceedings{lin2004rouge, title={{ROUGE}: A Package for Automatic Evaluation of Summaries}, author={Lin, Chin-Yew},
  booktitle={Text Summarization Branches Out}, year={2004}}"""
_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(base.LocalMetric):
    """ROUGE F1 with the result keys of Hugging Face's own `rouge` metric: shared words of summary and reference.

    With precision P (share of the prediction's units that the reference has) and recall R (the reverse),
    ``F1 = 2 P R / (P + R)``, averaged over the rows without a bootstrap. `predictions` are strings; `references` a
    string, or a list of strings, for each prediction. Each score takes the best of several references.

    Keys, each from 0 to 1: `rouge1` and `rouge2` (units are words, pairs of words), `rougeL` (longest common
    subsequence of the whole texts), `rougeLsum` (of sentences, which are lines: for each one of the reference the
    union of its common subsequences with those of the prediction). Papers call `rougeLsum` ROUGE-L for summaries of
    several sentences. Words are made of the letters a to z and digits, in lower case: other scripts score 0.

    Options of `compute`:
        use_stemmer (`bool`, defaults to `False`): Compare English words by their stems (Porter).

    Raises:
        ValueError: Text is not a string, or a row has no reference.

    Source: Lin 2004.

    Example:
        >>> scores = Rouge().compute(predictions=["the cat sat"], references=["the cat lay down"])
        >>> round(scores["rouge1"], 3), round(scores["rouge2"], 3)
        (0.571, 0.4)
    """

    def _info(self) -> evaluate.MetricInfo:
        text, about = datasets.Value("string"), "ROUGE-1, ROUGE-2 and ROUGE-L by rouge_score."
        inputs = "predictions: strings; references: strings or lists of strings."
        urls = ["https://github.com/google-research/google-research/tree/master/rouge"]
        return base.info(about, inputs, text, datasets.Sequence(text), citation=_CITATION, reference_urls=urls)

    def check_inputs(self, predictions: Any, references: Any) -> tuple[list, list]:
        return base.check_texts(self.name, predictions, references)

    def _compute(self, predictions: Any, references: Any, use_stemmer: bool = False) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer  # only here: it loads all of nltk, which takes a second

        scorer = RougeScorer(_TYPES, use_stemmer=use_stemmer)
        scores = [scorer.score_multi(row, text) for text, row in zip(predictions, references, strict=True)]
        return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in _TYPES}
