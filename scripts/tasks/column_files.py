"""Files with a word and its tag on each line: CoNLL's and their relatives, and csv files with a row for each word."""

import csv
import io
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, Features, List, Value

from finetuning.files import FORMATS, read_table, read_text

logger = logging.getLogger(f"hf_rdrop.scripts.{__name__}")

# Endings of column files as they are distributed (eng.testa of CoNLL-2003, emerging.test.annotated of WNUT).
COLUMN_FILES = (
    *(
        ".txt",
        ".conll",
        ".tsv",
        ".bio",
        ".iob",
        ".iob1",
        ".iob2",
        ".bioes",
        ".bilou",
        ".bmes",
        ".ner",
        ".col",
        ".tags",
    ),
    *(".conllu", ".conll03", ".annotated", ".train", ".dev", ".valid", ".test", ".testa", ".testb", ".data", ".dat"),
)
WORD_NAMES = ("tokens", "token", "word", "words", "text", "form")
TAG_NAMES = ("ner_tags", "ner_tag", "ner", "tag", "tags", "label", "labels", "iob", "bio", "entity")
_SENTENCE = re.compile(r"(?i)sent(ence)?s?([\s_.-]*(#|no|nr|num|number|idx?|index))?")
_DOCUMENT = re.compile(r"(?i)(doc|document|file|article)s?([\s_.-]*(#|no|num|number|name|idx?|index))?")
_TAG = re.compile(r"O|[BIESLUMW]-\S.*|\S.*-[BIESLUMW]")


def read_words(
    path: str,
    words: str,
    tags: str,
    positions: Sequence[int] | None = None,
    sentences: str | None = None,
    task: str = "ner",
) -> Dataset:
    """Read a file of words and tags: json as it is, column files and csv with a row for each sentence.

    Args:
        path: the file.
        words: column of the words in the result (and in the header of a csv file, if it has one of that name).
        tags: the same of the tags, which are left out where a column file has words alone.
        positions: columns of word and tag in a file without a header, from 1, or from the end as -1.
        sentences: column of the sentences' numbers in a csv file.
        task: of pos and chunk, tags are looked for in CoNLL's second and third column.

    Raises:
        ValueError: with the file, and the line where the fault is.
    """
    file = Path(path).expanduser()
    suffix = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    if suffix not in (".csv", *COLUMN_FILES) or not file.is_file():
        return read_table(path, (*FORMATS, *COLUMN_FILES))
    text = read_text(file)
    first = re.split(r"[\t,;]", text.split("\n", 1)[0].strip().lower())
    has_header = suffix == ".csv" or (
        suffix == ".tsv" and len(first) > 1 and any(n in first for n in (words.lower(), *WORD_NAMES)) and
        any(n in first for n in (tags.lower(), *TAG_NAMES))
    )  # fmt: skip
    read = (
        _read_header_file(file, text, words, tags, sentences)
        if has_header
        else _read_columns(file, text, positions, task)
    )
    found_words, found_tags = read
    if not found_words:
        raise ValueError(f"{path} is empty: it holds no example. Check that it was written completely.")
    columns = {words: found_words} | ({} if found_tags is None else {tags: found_tags})
    return Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, List(Value("string")))))


# ---- Without a header ----


def _read_columns(
    file: Path, text: str, positions: Sequence[int] | None, task: str
) -> tuple[list[list[str]], list[list[str]] | None]:
    lines = [line.rstrip("\r") for line in text.split("\n")]
    filled = [line for line in lines if line.strip() and not line.startswith(("-DOCSTART-", "#"))]
    tabs = sum("\t" in line.strip() for line in filled) > len(filled) / 2
    rows = [_fields(line, tabs) for line in lines]
    widths = Counter(len(row) for row in rows if row and not row[0].startswith(("-DOCSTART-", "#")))
    width = widths.most_common(1)[0][0] if widths else 0
    if positions is None and width > 2:
        positions = {"pos": (1, 2), "chunk": (1, 3)}.get(task)
    place_word, place_tag = _places(file, rows, width, positions)
    last_is_tag = place_tag is not None and all(
        _TAG.fullmatch(row[place_tag])
        for row in rows
        if len(row) == width and not row[0].startswith(("#", "-DOCSTART-"))
    )
    words, tags, sentence = [], [], ([], [])  # type: ignore[var-annotated]
    for number, row in enumerate([*rows, []], 1):
        if not row or row[0].startswith("-DOCSTART-"):
            if sentence[0]:
                words.append(sentence[0])
                tags.append(sentence[1])
            sentence = ([], [])
            continue
        comment = row[0].startswith("#") and (
            len(row) != width or (last_is_tag and not _TAG.fullmatch(row[place_tag or 0]))
        )
        if comment:
            continue
        if len(row) != width:
            raise ValueError(
                f"{file}, line {number}: {len(row)} column(s) ({' '.join(row):.60}), but most lines have {width}, so "
                f"it is unclear what is word and tag. Columns are parted by {'tabs' if tabs else 'blanks'}, sentences "
                "by blank lines: correct the line."
            )
        sentence[0].append(row[place_word])
        if place_tag is not None:
            sentence[1].append(row[place_tag])
    logger.info(
        "%s: %d sentences, word in column %d%s of %d.",
        *(file.name, len(words), place_word + 1),
        *("" if place_tag is None else f", tag in column {place_tag + 1}", width),
    )
    return words, None if place_tag is None else tags


def _fields(line: str, tabs: bool) -> list[str]:
    if not line.strip():
        return []
    return line.split("\t") if tabs else re.split(r"[ \t]+", line.strip(" \t"))


def _places(file: Path, rows: list[list[str]], width: int, positions: Sequence[int] | None) -> tuple[int, int | None]:
    """Return where word and tag are, from 0: as asked for, else first and last; refuses what looks otherwise."""
    if positions is not None:
        if any(not 1 <= abs(position) <= max(width, 1) for position in positions):
            raise ValueError(
                f"--column_positions {' '.join(map(str, positions))}: {file} has {width} columns. Count them from 1, "
                "or from the end as -1."
            )
        word, tag = ((p - 1) if p > 0 else width + p for p in positions)
        return word, tag
    if width < 2:
        return 0, None
    sample = [row for row in rows if len(row) == width and not row[0].startswith(("#", "-DOCSTART-"))][:5000]
    if all(row[0].isdigit() for row in sample) or (
        all(_TAG.fullmatch(row[0]) for row in sample) and not all(_TAG.fullmatch(row[-1]) for row in sample)
    ):
        raise ValueError(
            f"{file}: the first of its {width} columns holds numbers or tags, no words (first row: "
            f"{' | '.join(sample[0]):.100}). Say with --column_positions where word and tag are, such as "
            "--column_positions 2 3."
        )
    return 0, width - 1


# ---- With a header: a row for each word ----


def _read_header_file(
    file: Path, text: str, words: str, tags: str, sentences: str | None
) -> tuple[list[list[str]], list[list[str]] | None]:
    header, *_ = text.split("\n", 1)
    delimiter = max(",;\t", key=header.count)
    style: dict = {"quoting": csv.QUOTE_NONE} if file.name.endswith((".tsv", ".tsv.gz")) else {"strict": True}
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, **style)
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: malformed csv ({error}).") from error
    names = rows[0][1] if rows else []
    for number, row in rows:
        if row and any(row) and len(row) != len(names):
            raise ValueError(f"{file}, line {number}: {len(row)} fields, but the header has {len(names)}.")
    word = _find(file, names, words, WORD_NAMES, "text_column_name", "the words")
    tag = _find(file, names, tags, TAG_NAMES, "label_column_name", "the tags", needed=False)
    keys = [
        i for i, name in enumerate(names) if name == sentences or (sentences is None and _SENTENCE.fullmatch(name))
    ]
    if (sentences is not None and not keys) or len(keys) > 1:
        raise ValueError(
            f"{file}: it is unclear which column numbers the sentences; there are {', '.join(names):.300}. Name it "
            "with --sentence_column_name."
        )
    documents = [i for i, name in enumerate(names) if keys and i not in keys and _DOCUMENT.fullmatch(name)]
    blank = [not any(row) for _, row in rows]
    if not keys and not any(blank[1:-1]):
        raise ValueError(
            f"{file} has a row for each word ({names[word]!r}), and nothing says where a sentence ends: no column of "
            f"sentence numbers among {', '.join(names):.300}, and no blank lines. Name it with "
            "--sentence_column_name, or give a jsonl file with a list of words in each row."
        )
    found: tuple[list[list[str]], list[list[str]]] = ([], [])
    last, seen = None, set()
    for number, row in rows[1:]:
        if not any(row):
            last = None if not keys else last
            continue
        key = tuple(row[i] for i in (*documents, *keys))
        if keys and not row[keys[0]] and last is not None:  # written once, at the sentence's first word
            key = last
        if key != last or not found[0]:
            if keys and key in seen and not key[-1].strip().isdigit():
                raise ValueError(
                    f"{file}, line {number}: the sentence {key[-1]!r:.60} goes on after another one. Sort the rows by "
                    "sentence, in the order of the words."
                )
            seen.add(key)
            found[0].append([])
            found[1].append([])
        last = key
        found[0][-1].append(row[word])
        if tag is not None:
            found[1][-1].append(row[tag])
    told = "" if tag is None else f", tag in {names[tag]!r}"
    logger.info("%s: %d sentences, word in column %r%s.", file.name, len(found[0]), names[word], told)
    return found[0], None if tag is None else found[1]


def _find(
    file: Path, names: list[str], own: str, usual: Sequence[str], argument: str, what: str, needed: bool = True
) -> int | None:
    """Return where a column of the header is: by its own name, else the only one with a usual name."""
    if own in names:
        return names.index(own)
    found = [i for i, name in enumerate(names) if name.lower() in usual]
    if len(found) == 1:
        return found[0]
    if not found and not needed:
        return None
    raise ValueError(
        f"{file}: it is unclear which column holds {what}; there are {', '.join(names):.300}. Name it with "
        f"--{argument}."
    )
