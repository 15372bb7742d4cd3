"""Compute entity-level precision, recall and F1 for token classification."""

import re
import warnings
from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
from seqeval import scheme as schemes
from seqeval.metrics import accuracy_score, classification_report

from hf_rdrop.metrics import base

_CITATION = """\
@misc{nakayama2018seqeval, title={{seqeval}: A Python framework for sequence labeling evaluation},
  author={Hiroki Nakayama}, url={https://github.com/chakki-works/seqeval}, year={2018}}"""

_SCHEMES = ("IOB1", "IOB2", "IOE1", "IOE2", "IOBES", "BILOU")
# Letters of each scheme, and what seqeval reads them as, which knows begin, inside, end and single.
_LETTERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("BIES", {}),
    ("BILU", {"L": "E", "U": "S"}),
    ("BMES", {"M": "I"}),
    ("BMEW", {"M": "I", "W": "S"}),
    ("BIEW", {"W": "S"}),
)
_ALL = "BIESLUMW"


def read_letters(tags: Iterable[str], suffix: bool = False) -> dict[str, str]:
    """Return what to read the letters of these tags as: B, I, E and S (begin, inside, end, single) alone.

    IOB, IOE and BIOES use these; BILOU's last and unit are E and S, and so are the M and W of BMES and BMEWO.

    Args:
        tags: `"B-person"`, `"O"`, ...
        suffix: tags are written type first (`"person-B"`).

    Raises:
        ValueError: a tag marks no span, or the letters are those of no scheme.
    """
    found = set()
    for tag in set(tags):
        match = re.fullmatch(rf"O|(.*[-_])?([{_ALL}])" if suffix else rf"O|([{_ALL}])([-_].*)?", tag, re.DOTALL)
        if match is None:
            other = re.fullmatch(rf".+-[{_ALL}]" if not suffix else rf"[{_ALL}]-.+", tag)
            hint = f"; it is read right with suffix={not suffix}" if other else ""
            shape = "person-B, person-I" if suffix else "B-person, I-person"
            raise ValueError(
                f"seqeval: the tag {tag!r:.60} marks no span as {shape} or O do{hint}. Entities are counted over such "
                "tags alone: correct the tags, or report the accuracy of single tags instead."
            )
        if tag != "O":
            found.add(tag[-1] if suffix else tag[0])
    for letters, read in _LETTERS:
        if found <= set(letters):
            return read
    raise ValueError(
        f"seqeval: the letters {', '.join(sorted(found))} of the tags belong to no scheme (B I; I E; B I E S; B I L "
        "U; B M E S; B M E W, all with O), so it is unclear where entities end. Correct the tags, or convert them to "
        "one."
    )


class Seqeval(base.LocalMetric):
    """Entity-level scores of tag sequences, with the result keys of Hugging Face's own `seqeval` metric.

    An entity counts as found when its type, first and last word are all right. Keys: `overall_precision`,
    `overall_recall`, `overall_f1` (micro averages over all entities), `overall_accuracy` (share of right tags), and
    for every type that occurs on either side a `dict` of `precision`, `recall`, `f1`, `number` (of reference
    entities).

    `predictions` and `references` are lists of tag lists (`"B-person"`, `"I-person"`, `"O"`, ...), without the
    positions that the labels mark as ignored.

    Options of `compute`:
        suffix (`bool`, defaults to `False`): Tags are written type first (`"person-B"`).
        mode (`str`, *optional*): `None` reads tags as the conlleval script does (an `I-` after `O` starts an entity);
            `"strict"` counts only entities that `scheme` allows.
        scheme (`str`, *optional*): Of `"strict"`: `"IOB1"`, `"IOB2"`, `"IOE1"`, `"IOE2"`, `"IOBES"` or `"BILOU"`;
            detected from the tags of the references when left out.
        zero_division (`0`, `1` or `"warn"`, defaults to 0): Value of an undefined score (no entities on a side).

    Raises:
        ValueError: Sequences differ in length, tags are not strings or of no scheme (IOB, IOE, BIOES, BILOU, BMES), no
            tag at all, or an unknown option.

    Source: Ramshaw and Marcus 1995; Nakayama 2018 (seqeval).

    Example:
        >>> tags = [["B-person", "I-person", "O"]]
        >>> Seqeval().compute(predictions=tags, references=tags)["overall_f1"]
        1.0
    """

    def _info(self) -> evaluate.MetricInfo:
        tags, inputs = datasets.Sequence(datasets.Value("string")), "predictions and references: lists of tag lists."
        urls = ["https://github.com/chakki-works/seqeval"]
        about = "Entity-level scores of tag sequences."
        return base.info(about, inputs, tags, citation=_CITATION, reference_urls=urls)

    def check_inputs(self, predictions: Any, references: Any) -> tuple[list, list]:
        for index, (predicted, reference) in enumerate(zip(predictions, references, strict=True)):
            for tags in (predicted, reference):
                if isinstance(tags, str) or not all(isinstance(tag, str) and tag for tag in tags):
                    raise ValueError(
                        f"seqeval: sequence {index} is not a list of tag strings ({tags!r:.60}); map label ids to "
                        "their names first."
                    )
            if len(predicted) != len(reference):
                raise ValueError(
                    f"seqeval: sequence {index} has {len(predicted)} predicted tags for {len(reference)} reference "
                    "tags; drop ignored positions from both."
                )
        # str(): numpy strings are not what Arrow takes
        return [[str(tag) for tag in tags] for tags in predictions], [[str(t) for t in tags] for tags in references]

    def _compute(
        self,
        predictions: Any,
        references: Any,
        suffix: bool = False,
        scheme: str | None = None,
        mode: str | None = None,
        zero_division: int | str = 0,
    ) -> dict[str, Any]:
        if scheme is not None and scheme not in _SCHEMES:
            raise ValueError(f"seqeval: scheme={scheme!r} is unknown; choose from {', '.join(_SCHEMES)}.")
        if mode not in (None, "strict"):
            raise ValueError(f"seqeval: mode={mode!r} is unknown; give None or 'strict'.")
        if zero_division not in (0, 1, "warn"):
            raise ValueError(f"seqeval: zero_division={zero_division!r} is unknown; give 0, 1 or 'warn'.")
        y_pred, y_true = [list(tags) for tags in predictions], [list(tags) for tags in references]
        if not any(y_true):
            raise ValueError("seqeval: all sequences are empty; a score needs at least one tag.")
        letters = read_letters((tag for side in (y_true, y_pred) for tags in side for tag in tags), suffix)
        if mode == "strict":
            letters = {letter: read for letter, read in letters.items() if letter in "MW"}  # it knows BILOU itself
            scheme = scheme or _detect(y_true, letters, suffix)
        if letters:
            y_true, y_pred = (
                [[_rewrite(tag, letters, suffix) for tag in tags] for tags in side] for side in (y_true, y_pred)
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # its macro average over no entities, which is not used
            options: Any = {"mode": mode, "scheme": getattr(schemes, scheme) if scheme else None}
            options |= {"suffix": suffix, "zero_division": zero_division}
            report = classification_report(y_true, y_pred, output_dict=True, **options)
        keys = {"precision": "precision", "recall": "recall", "f1": "f1-score"}
        scores: dict[str, Any] = {
            name: {**{key: float(row[its]) for key, its in keys.items()}, "number": int(row["support"])}
            for name, row in report.items()
            if name not in ("micro avg", "macro avg", "weighted avg")
        }
        scores |= {f"overall_{key}": float(report["micro avg"][its]) for key, its in keys.items()}
        return scores | {"overall_accuracy": float(accuracy_score(y_true, y_pred))}


def _rewrite(tag: str, letters: dict[str, str], suffix: bool) -> str:
    if tag == "O":
        return tag
    return tag[:-1] + letters.get(tag[-1], tag[-1]) if suffix else letters.get(tag[0], tag[0]) + tag[1:]


def _detect(sequences: list[list[str]], letters: dict[str, str], suffix: bool) -> str:
    """Return the scheme that the letters of the tags tell."""
    found = {tag[-1 if suffix else 0] for tags in sequences for tag in tags if tag != "O"}
    found = {letters.get(letter, letter) for letter in found}
    for scheme, own in (("IOB2", "BI"), ("IOE2", "IE"), ("IOBES", "BIES"), ("BILOU", "BILU")):
        if found <= set(own) and (not found or found - {"I"}):
            return scheme
    raise ValueError(
        f"seqeval: mode='strict' needs a scheme, and the tags (letters {', '.join(sorted(found))}) may be of more "
        f"than one. Give scheme, one of {', '.join(_SCHEMES)}."
    )
