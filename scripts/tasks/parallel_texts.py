"""Translations in two text files, a sentence on each line, or in a TMX file."""

import logging
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from finetuning.files import FORMATS, read_table, read_text

logger = logging.getLogger(f"hf_rdrop.scripts.{__name__}")


def read_translations(
    paths: Sequence[str], languages: tuple[str | None, str | None], delimiter: str | None
) -> Dataset:
    """Read pairs of texts: one table, a TMX file, two text files, or the PREFIX of two as Moses names them.

    Args:
        paths: one path or two.
        languages: of source and target; in summarisation none.
        delimiter: of a csv file.

    Raises:
        ValueError: with the file, and the line where the fault is.
    """
    source, target = languages
    if len(paths) > 2:
        raise ValueError(f"two text files are parallel, a source and a target; got {len(paths)}: {', '.join(paths)}.")
    if len(paths) == 1:
        file = Path(paths[0]).expanduser()
        suffix = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
        pair = [f"{paths[0]}.{language}" for language in languages]
        if suffix == ".tmx":
            return _read_tmx(file, source, target)
        if (
            source and file.is_file() and suffix in (".txt", f".{source.split('_')[0]}")
        ):  # of a test set, sources alone
            return Dataset.from_dict({"translation": [{source: line} for line in _read_lines(file)]})
        if file.exists() or suffix in FORMATS or not source:
            return read_table(paths[0], FORMATS, delimiter)
        found = [
            next((path for path in (name, f"{name}.gz") if Path(path).expanduser().is_file()), None) for name in pair
        ]
        if None in found:
            raise ValueError(
                f"{paths[0]} does not exist, and neither are there {' and '.join(pair)} to be read as parallel texts: "
                f"give a data file ({', '.join(FORMATS)}, .tmx), two text files, or their common beginning."
            )
        paths = [name for name in found if name]
    if not source or not target:
        raise ValueError(
            f"two files of text ({', '.join(paths)}) are translations: give --source_lang, --target_lang."
        )
    return _read_pair([Path(path).expanduser() for path in paths], (source, target))


def _read_pair(files: Sequence[Path], languages: tuple[str, str]) -> Dataset:
    sides = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} does not exist: give two files of text, a sentence on each line.")
        sides.append(_read_lines(file))
    # A file whose name says the other language would be learnt in the wrong direction.
    names = [(file.with_suffix("") if file.suffix == ".gz" else file).suffix[1:].split("-")[0] for file in files]
    if names == [language.split("_")[0] for language in reversed(languages)] and names[0] != names[1]:
        raise ValueError(
            f"{files[0]} and {files[1]} are in the order {names[0]}, {names[1]}, but --source_lang is {languages[0]} "
            f"and --target_lang {languages[1]}. Give the files in the order source, target."
        )
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"{files[0]} has {len(sides[0])} lines and {files[1]} {len(sides[1])}, so it is unclear which line is the "
            "translation of which. Each line must be one sentence: check that both files are complete."
        )
    if not sides[0]:
        raise ValueError(f"{files[0]} is empty: it holds no example. Check that it was written completely.")
    empty = [
        (file, row) for file, side in zip(files, sides, strict=True) for row, t in enumerate(side, 1) if not t.strip()
    ]
    if empty:
        raise ValueError(
            f"{empty[0][0]}, line {empty[0][1]}: empty, so there is nothing to translate; {len(empty)} lines of the "
            "two files are. Remove such lines from both files."
        )
    logger.info("%s, %s: %d pairs of lines.", *(file.name for file in files), len(sides[0]))
    return Dataset.from_dict(dict(zip(languages, sides, strict=True)))


def _read_lines(file: Path) -> list[str]:
    lines = [line.rstrip("\r") for line in read_text(file).split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def _read_tmx(file: Path, source: str | None, target: str | None) -> Dataset:
    if not source or not target:
        raise ValueError(f"{file} holds translations: give --source_lang and --target_lang.")
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give the path of a TMX file.")
    text = read_text(file)
    if "<!ENTITY" in text:
        raise ValueError(f"{file} defines entities of its own, which could grow without end. Write them out.")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{file}, line {error.position[0]}: malformed XML ({error}).") from error
    pairs: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for number, unit in enumerate(root.iter("tu"), 1):
        texts = {}
        for variant in unit.iter("tuv"):
            name = variant.get("{http://www.w3.org/XML/1998/namespace}lang") or variant.get("lang") or ""
            segment = variant.find("seg")
            texts[name.lower()] = " ".join("".join(segment.itertext()).split()) if segment is not None else ""
        seen |= texts.keys()
        for side, language in zip(pairs, (source, target), strict=True):
            short = language.lower().replace("_", "-")
            keys = [key for key in texts if key == short] or [
                key for key in texts if key.split("-")[0] == short.split("-")[0]
            ]
            if len(keys) != 1 or not texts[keys[0]]:
                problem = "is empty" if len(keys) == 1 else "is missing" if not keys else f"may be {', '.join(keys)}"
                raise ValueError(
                    f"{file}, translation unit {number}: the text in {language!r} {problem} (languages: "
                    f"{', '.join(texts) or 'none'}). Correct or remove the unit, or choose other languages."
                )
            side.append(texts[keys[0]])
    if not pairs[0]:
        raise ValueError(f"{file} is empty: it holds no translation unit. Check that it was written completely.")
    logger.info(
        "%s: %d translation units, %s to %s (of %s).", file.name, len(pairs[0]), source, target, ", ".join(seen)
    )
    return Dataset.from_dict({source: pairs[0], target: pairs[1]})
