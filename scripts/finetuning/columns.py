"""Columns that may hold texts: what the values of a column look like, and which one or two are meant."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset

from finetuning.unfit import unfit_columns

# What a value looks like. The first four are never texts, whatever stands beside them.
EMPTY, NUMBER, DATE, CODE, WORD, TEXT = "empty", "numbers", "dates", "ids or codes", "single words", "text"
NEVER = (EMPTY, NUMBER, DATE, CODE)

_MOST = 2000  # values looked at: the kind of a column shows in far fewer
_ID_NAME = re.compile(
    r"(.*[_\s.-])?(id|ids|idx|index|guid|uuid|uid|pid|date|datetime|time|timestamp|url|split)\d*", re.I
)
_ID_CAMEL = re.compile(r".*[a-z](ID|Id)|Unnamed: \d+|")
_CALENDAR = re.compile(
    r"(?i)\b(mon|tues?|wed(nes)?|thu(rs)?|fri|sat(ur)?|sun)(day)?\b|\b(jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|may|june?|"
    r"july?|aug(ust)?|sept?(ember)?|oct(ober)?|nov(ember)?|dec(ember)?)\b|\b(am|pm|utc|gmt|[ecmp][sd]t)\b|(?<=\d)[TZ]|(?<=\d)(st|nd|rd|th)\b"
)
_NO_BLANKS = re.compile(
    "[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u1000-\u109f]"
)  # Thai, Chinese, ...


def kind_of_value(value: Any) -> str:
    """Tell what one value looks like."""
    text = value.strip() if isinstance(value, str) else ""
    if not text or text.lower() in ("na", "n/a", "nan", "null", "none", "-"):
        return EMPTY
    if re.fullmatch(r"\W*\d[\W\d]*([eE][-+]?\d+)?\W*([^\W\d_]{1,3})?", text):
        return DATE if re.fullmatch(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}([\sT]+[\d:.,+Zz-]+)?", text) else NUMBER
    if any(sign.isdigit() for sign in text) and not re.search(r"[^\W\d_]", _CALENDAR.sub("", text)):
        return DATE if re.search(r"[^\W\d_]", text) else CODE
    if _NO_BLANKS.search(text):
        return TEXT
    if re.search(r"\s", text):  # "case 7" and "SW1A 1AA" are names of things
        words = re.search(r"(?<!\S)\W*[^\W\d_]+([-'’][^\W\d_]+)*\W*(?!\S)", text)
        return CODE if words is None or re.fullmatch(r"[^\W\d_]+\s[#-]?\d+", text) else TEXT
    return WORD if re.fullmatch(r"[^\W\d_]+(['’-][^\W\d_]+)*[.,;:!?…]*", text) else CODE


def kind_of_column(name: str, values: Iterable[Any]) -> str:
    """Tell what the values of a column look like; its name counts where it says that they are no texts."""
    kinds = Counter(map(kind_of_value, values))
    kinds.pop(EMPTY, None)
    if not kinds:
        return EMPTY
    count = sum(kinds.values())
    if kinds[TEXT] >= 0.1 * count and not (_ID_NAME.fullmatch(name) or _ID_CAMEL.fullmatch(name)):
        return TEXT
    kind = kinds.most_common(1)[0][0]
    return CODE if kind in (TEXT, WORD) and (_ID_NAME.fullmatch(name) or _ID_CAMEL.fullmatch(name)) else kind


def column_kinds(dataset: Dataset, without: Iterable[str] = ()) -> dict[str, str]:
    """Return what each column of strings looks like, but for those of the names in `without`."""
    kinds = {}
    for name, feature in dataset.features.items():
        if name not in without and getattr(feature, "dtype", "") in ("string", "large_string"):
            kinds[name] = kind_of_column(name, dataset.select(range(min(_MOST, len(dataset))))[name])
    for name, note in unfit_columns(dataset).items():  # texts of which one cannot be read are texts
        if name not in without and (not note["mixed"] or kind_of_column(name, note["strings"]) == TEXT):
            kinds[name] = TEXT
    return kinds


def find_text_columns(
    dataset: Dataset, split: str, known: Sequence[Sequence[str]], without: Iterable[str] = ()
) -> list[str]:
    """Find the one or two columns of texts, where there is only one reading.

    Args:
        dataset: the first split of the run.
        split: its name, for error messages.
        known: names that say what they hold, such as `["premise", "hypothesis"]`.
        without: columns that are no texts, such as the labels.

    Raises:
        ValueError: there is none, or it is open which ones are meant.
    """
    kinds = column_kinds(dataset, without)
    texts = [name for name, kind in kinds.items() if kind == TEXT]
    words = [name for name, kind in kinds.items() if kind == WORD]
    named = [names for names in known if all(kinds.get(name) in (TEXT, WORD) for name in names)]
    if named:
        others = [name for name in texts if name not in named[0]]
        if not others:
            return list(named[0])
    elif len(texts) + len(words) == 1:
        return texts or words
    elif len(texts) == 1 and not any(_vary(dataset, name) for name in words):
        return texts
    look = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    if not texts and not words:
        raise ValueError(
            f"no column holds text: the columns of the {split} data are {', '.join(dataset.column_names):.300}"
            f"{f'; they look like this: {look:.300}' if look else ''}. Ids, dates and numbers are never taken for "
            "text: check the data, or name the column with --text_columns."
        )
    raise ValueError(
        f"it is unclear which columns of the {split} data are the texts to classify: {look:.400}. A wrong choice "
        f"would train and predict without a word. Give --text_columns with one name, or two for pairs, such as "
        f"--text_columns {' '.join((texts or words)[:1]):.100}."
    )


def _vary(dataset: Dataset, name: str) -> bool:
    """Tell whether single words are more than a few categories: then they may be short texts."""
    values = list(dataset.select(range(min(_MOST, len(dataset))))[name])
    return len(set(values)) > 0.5 * len(values)
