"""How tags mark spans of words: letter and type in either order, and IOB1 converted to IOB2."""

import logging
import re
from collections.abc import Iterable, Sequence

from datasets import Dataset, Features, List, Value

from hf_rdrop.metrics.seqeval import read_letters

logger = logging.getLogger(f"hf_rdrop.scripts.{__name__}")

PREFIX, SUFFIX = re.compile(r"(?P<letter>[BIESLUMW])-(?P<type>.+)"), re.compile(r"(?P<type>.+)-(?P<letter>[BIESLUMW])")
_NAMES = {"BI": "IOB2", "IE": "IOE", "BIES": "BIOES", "BILU": "BILOU", "BMES": "BMES", "BMEW": "BMEWO", "I": "IO"}


def find_shape(names: Iterable[str]) -> re.Pattern[str] | None:
    """Return the shape of tags that mark spans, B-person or person-B; None for those of single words (NOUN, VERB)."""
    names = set(names) - {"O"}
    return next((shape for shape in (PREFIX, SUFFIX) if all(map(shape.fullmatch, names))), None)


def split_tag(tag: str, shape: re.Pattern[str]) -> tuple[str, str]:
    """Return letter and type of a tag; both are empty for O."""
    match = shape.fullmatch(tag)
    return (match["letter"], match["type"]) if match else ("", "")


def join_tag(letter: str, kind: str, shape: re.Pattern[str]) -> str:
    """Return the tag of a letter and a type."""
    return f"{letter}-{kind}" if shape is PREFIX else f"{kind}-{letter}"


def complete(names: Sequence[str]) -> list[str]:
    """Add the tags of words inside and at the end: a type of single words in training may have more elsewhere."""
    shape = find_shape(names)
    if shape is None:
        return list(names)
    found = [split_tag(name, shape) for name in names if name != "O"]
    letters = {letter for letter, _ in found}
    read_letters(names, shape is SUFFIX)  # refuses those of no scheme before training
    if "I" not in letters and not letters & set("ESLUMW"):
        return list(names)
    wanted = letters if letters & set("ESLUMW") else {"I"}
    kinds = {kind for letter, kind in found if letter in "BESLUW"}
    return sorted({*names, *(join_tag(letter, kind, shape) for letter in wanted for kind in kinds)})


def scheme_name(rows: Iterable[Sequence[str]], shape: re.Pattern[str]) -> str:
    """Return the name of the scheme that rows of tags follow."""
    letters, iob1, iob2 = set(), False, False
    for tags in rows:
        before = ("", "")
        for tag in tags:
            letter, kind = split_tag(tag, shape)
            letters |= {letter} - {""}
            iob1 |= letter == "I" and before[1] != kind
            iob2 |= letter == "B" and before[1] != kind
            before = (letter, kind)
    if letters <= {"B", "I"} and iob1 and not iob2:
        return "IOB1"
    return next((name for own, name in _NAMES.items() if letters <= set(own)), "unknown")


def to_iob2(tags: Sequence[str], shape: re.Pattern[str]) -> list[str]:
    """Convert a row from IOB1, where B- only parts neighbours of one type, to IOB2, where it begins every span."""
    found, before = [], ""
    for tag in tags:
        letter, kind = split_tag(tag, shape)
        found.append(join_tag("B", kind, shape) if letter == "I" and before != kind else tag)
        before = kind
    return found


def settle_schemes(splits: dict[str, Dataset], column: str) -> dict[str, Dataset]:
    """Say which scheme the tags follow, and convert those of IOB1; tags that are numbers or mark no spans stay."""
    settled = {}
    for split, dataset in splits.items():
        settled[split] = dataset
        if column not in dataset.column_names:
            continue
        rows = [row or [] for row in dataset[column]]
        if not all(isinstance(tag, str) and tag for row in rows for tag in row):
            continue  # refused where they are read
        shape = find_shape({tag for row in rows for tag in row})
        if shape is None or not any(tag != "O" for row in rows for tag in row):
            continue
        name = scheme_name(rows, shape)
        style = ", the type before the letter" if shape is SUFFIX else ""
        logger.info("Tags of the %s data: scheme %s%s%s.", split, name, style, " -> IOB2" if name == "IOB1" else "")
        if name == "IOB1":
            rows = [to_iob2(row, shape) for row in rows]
            table = Dataset.from_dict({column: rows}, features=Features({column: List(Value("string"))}))
            settled[split] = dataset.remove_columns(column).add_column(column, table.data.column(column))
    return settled
