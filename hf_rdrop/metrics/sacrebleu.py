"""Compute corpus BLEU and chrF by sacreBLEU."""

from typing import Any

import datasets
import evaluate
from sacrebleu.metrics import BLEU, CHRF

from hf_rdrop.metrics import base

_CITATION = """\
@inproceedings{post2018call, title={A Call for Clarity in Reporting {BLEU} Scores}, author={Post, Matt},
  booktitle={Proceedings of the Third Conference on Machine Translation}, year={2018}}"""


class SacreBleu(base.LocalMetric):
    """Corpus BLEU with the result keys of Hugging Face's own `sacrebleu` metric, and chrF beside it.

    `predictions` are strings; `references` a string, or a list of strings, for each prediction. Rows may have
    different numbers of references. Texts are to be plain (detokenised): sacreBLEU tokenises them itself.

    Keys: `score` (BLEU, 0 to 100), `chrf` (chrF2, 0 to 100), `counts`, `totals` and `precisions` (per n-gram order),
    `bp` (brevity penalty), `sys_len`, `ref_len`, and `signature` and `chrf_signature`, which state every setting that
    the two scores depend on and are to be quoted with them.

    Options of `compute`, all for BLEU (`lowercase` for both):
        tokenize (`str`, *optional*): sacreBLEU's tokeniser: `"13a"` when left out; `"zh"`, `"ja-mecab"`, `"char"`,
            `"intl"`, `"none"`, ...
        lowercase (`bool`, defaults to `False`): Ignore case.
        smooth_method (`str`, defaults to `"exp"`): `"exp"`, `"floor"`, `"add-k"` or `"none"`.
        smooth_value (`float`, *optional*): Of `"floor"` and `"add-k"`.
        use_effective_order (`bool`, defaults to `False`): Leave out n-gram orders without a match (single sentences).
        force (`bool`, defaults to `False`): No warning about text that looks tokenised.

    Raises:
        ValueError: Text is not a string, a row has no reference, or an option is unknown to sacreBLEU.

    Source: Post 2018; Popović 2015 (chrF).

    Example:
        >>> scores = SacreBleu().compute(predictions=["the cat sat down"], references=["the cat sat down"])
        >>> round(scores["score"]), round(scores["chrf"])
        (100, 100)
    """

    def _info(self) -> evaluate.MetricInfo:
        text, about = datasets.Value("string"), "Corpus BLEU and chrF by sacreBLEU."
        inputs = "predictions: strings; references: strings or lists of strings."
        urls = ["https://github.com/mjpost/sacrebleu"]
        return base.info(about, inputs, text, datasets.Sequence(text), citation=_CITATION, reference_urls=urls)

    def check_inputs(self, predictions: Any, references: Any) -> tuple[list, list]:
        return base.check_texts("sacrebleu", predictions, references)

    def _compute(
        self,
        predictions: Any,
        references: Any,
        tokenize: str | None = None,
        lowercase: bool = False,
        smooth_method: str = "exp",
        smooth_value: float | None = None,
        use_effective_order: bool = False,
        force: bool = False,
    ) -> dict[str, Any]:
        try:
            smoothing: Any = {"smooth_method": smooth_method, "smooth_value": smooth_value}
            bleu = BLEU(lowercase, force, tokenize, **smoothing, effective_order=use_effective_order)
        except (AssertionError, KeyError, ImportError) as error:
            raise ValueError(f"sacrebleu does not accept these options: {error}") from error
        chrf = CHRF(lowercase=lowercase)
        # sacreBLEU wants one list per reference position, as long as the predictions; None: this row has no more.
        most = max(len(row) for row in references)
        streams: Any = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
        result = bleu.corpus_score(list(predictions), streams)
        return {
            "score": float(result.score),
            "chrf": float(chrf.corpus_score(list(predictions), streams).score),
            **{name: list(getattr(result, name)) for name in ("counts", "totals", "precisions")},
            **{"bp": float(result.bp), "sys_len": int(result.sys_len), "ref_len": int(result.ref_len)},
            "signature": str(bleu.get_signature()),
            "chrf_signature": str(chrf.get_signature()),
        }
