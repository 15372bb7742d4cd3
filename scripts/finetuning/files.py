"""Reading data files: csv, tsv, json, jsonl and plain text, also .gz.

They are read here and not by `load_dataset`, because a fault is then reported with its line, nothing is taken from a
stale cache, text such as "null" or "007" stays text, and no request leaves the machine.
"""

import csv
import gzip
import io
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from pyarrow import parquet

from finetuning.unfit import note_unfit

logger = logging.getLogger(f"hf_rdrop.scripts.{__name__}")

TABLES = (".parquet", ".arrow", ".feather")
FORMATS = (".csv", ".tsv", ".json", ".jsonl", *TABLES)
TEXT = ".txt"  # of scripts that need no columns


def read_table(path: str, formats: tuple[str, ...] = FORMATS, delimiter: str | None = None) -> Dataset:
    """Read one csv, tsv, json or jsonl file (also .gz), or a parquet or arrow file, into memory.

    The `delimiter` of a csv file is by default the comma, or what its header has in place of one.

    A column whose values do not fit together is left out, and refused where it is used (`unfit.py`).
    With .txt among the `formats` also plain text: a row with the column `text` for each line that is not blank.

    Raises:
        ValueError: with the file, and the line or row where the fault is.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        kind = "is a folder" if file.is_dir() else "is no regular file" if file.exists() else "does not exist"
        raise ValueError(f"{path} {kind}: give the path of a data file ({', '.join(formats)}, also .gz).")
    suffix = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    if suffix not in formats:
        raise ValueError(f"{path} is of no known format: the name must end in {', '.join(formats)}, also with .gz.")
    if suffix in TABLES:
        return _read_arrow(file, suffix)
    text = read_text(file)
    if suffix == TEXT:
        rows: list[dict[str, Any]] = [{"text": line.rstrip("\r")} for line in text.split("\n") if line.strip()]
    else:
        rows = list(_csv_rows(file, text, suffix, delimiter) if suffix in (".csv", ".tsv") else _json_rows(file, text))
    if not rows:
        raise ValueError(f"{path} is empty: it holds no example. Check that it was written completely.")
    names = dict.fromkeys(name for row in rows for name in row)
    for name in names:
        if not _is_text(name):
            raise ValueError(f"{file}: the name of column {name!r:.60} is no valid Unicode text. Rename it.")
    columns, unfit = {}, {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = _column(file, name, values)
        except ValueError as error:  # of a column that nobody may use
            unfit[name] = str(error), values
    if unfit and not columns:
        raise ValueError(next(iter(unfit.values()))[0])
    try:
        return note_unfit(Dataset(pa.table(columns)), unfit)
    except (pa.ArrowException, RecursionError) as error:
        raise ValueError(
            f"{file}: its rows are no table ({error}). Give columns of texts, numbers or lists."
        ) from error


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file, also of a .gz one.

    Raises:
        ValueError: it is broken, or no text; with the line where that is known.
    """
    try:
        data = file.read_bytes()
        if file.suffix == ".gz":
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is not a complete gzip file ({error}): compress or copy it again.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}, line {line}: not UTF-8 text ({error.reason}). Convert the file to UTF-8."
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{file}, line {line}: holds a NUL byte, so it is no text file. Give UTF-8 text.")
    return text


def _json_rows(file: Path, text: str) -> Iterator[dict[str, Any]]:
    if text.lstrip().startswith("["):
        rows, place = list(enumerate(_parse_json(file, text, 1), 1)), "row"
    else:
        rows, place = list(_json_lines(file, text)), "line"
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(
                f"{file}, {place} {number}: {row!r:.60} is no JSON object. Each row must be an object such as "
                '{"sentence": "...", "label": 0}.'
            )
        yield row


def _json_lines(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): strings may hold U+2028 and its like
        if line.strip():
            yield number, _parse_json(file, line, number)


def _parse_json(file: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"{file}, line {line + error.lineno - 1}"
        found = text[error.pos - error.colno + 1 :].split("\n", 1)[0][:60]
        raise ValueError(
            f"{place}: malformed JSON ({error.msg} at column {error.colno}): {found!r}. In a .jsonl file each line "
            "must be one complete JSON object, otherwise the file one list of them."
        ) from error
    except RecursionError as error:
        raise ValueError(f"{file}, line {line}: JSON of too many levels. Give plain rows.") from error
    except ValueError as error:  # `_object`'s own, and integers of thousands of digits
        raise ValueError(f"{file}, line {line}: JSON that cannot be read ({error}).") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; of a name that comes twice the last value would count and the other be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.60} comes more than once in an object")
    return found


def _csv_rows(file: Path, text: str, suffix: str, delimiter: str | None) -> Iterator[dict[str, str]]:
    csv.field_size_limit(2**31 - 1)
    # Tab-separated files (GLUE's own among them) hold single quotation marks as plain text.
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {"strict": True}
    if suffix == ".csv":
        style["delimiter"] = delimiter or _guess_delimiter(file, text)
    elif delimiter:
        style["delimiter"] = delimiter
    reader = csv.reader(io.StringIO(text, newline=""), **style)
    try:
        header = next(reader, [])
        if repeated := {name for name in header if header.count(name) > 1}:
            raise ValueError(
                f"{file}, line 1: the header names {sorted(repeated)!s:.300} more than once. Rename the columns."
            )
        advice = "A field that holds the separator must be in quotation marks (csv)."
        if suffix == ".tsv":
            advice = "Fields are parted by tabs, and quotation marks are plain text: correct or remove the line."
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(
                    f"{file}, line {reader.line_num}: {len(row)} fields, but the header has {len(header)} "
                    f"({', '.join(header):.300}). {advice}"
                )
            if row:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: malformed {suffix[1:]} ({error}).") from error


def _guess_delimiter(file: Path, text: str) -> str:
    """Return the comma, or what parts the header and the second line into as many fields where there is no comma."""
    first, second, *_ = [*text.split("\n", 2), ""]
    counts = {sign: first.count(sign) for sign in ";\t|" if 0 < first.count(sign) <= second.count(sign)}
    if "," in first or not counts:
        return ","
    sign = max(counts, key=lambda name: counts[name])
    logger.warning(
        "%s has no comma in its header: read as parted by %r (--delimiter says otherwise).", file.name, sign
    )
    return sign


def _read_arrow(file: Path, suffix: str) -> Dataset:
    """Read a parquet or arrow file; text and lists of text in the types that json files have."""
    try:
        if suffix == ".parquet":
            table = parquet.read_table(file)
        else:
            with pa.memory_map(str(file)) as source:
                try:
                    table = pa.ipc.open_file(source).read_all()
                except pa.ArrowInvalid:  # the format of `datasets`
                    table = pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError, EOFError) as error:
        raise ValueError(
            f"{file} is not complete, or of no known format for {suffix} ({' '.join(str(error).split()):.200}): copy "
            "or write it again."
        ) from error
    if table.num_rows == 0:
        raise ValueError(f"{file} is empty: it holds no example. Check that it was written completely.")
    for place, field in enumerate(table.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or kind != field.type:
            kind = pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind
            table = table.set_column(place, field.name, table.column(place).cast(kind))
    return Dataset(table)


def _is_text(value: str) -> bool:
    """Tell whether all its characters can be written: JSON can hold halves of them ("\\ud83d")."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _column(file: Path, name: str, values: list[Any]) -> pa.Array:
    kinds = [type(value) for value in values]
    if bool in kinds and (number := next((kind for kind in (float, int) if kind in kinds), None)):
        row = kinds.index(bool) + 1  # Arrow takes it for 1.0 among real numbers
        raise ValueError(
            f"{file}, column {name!r:.60}: values of more than one type (row {row} holds {values[row - 1]!r}, row "
            f"{kinds.index(number) + 1} {values[kinds.index(number)]!r:.60}). Use one type."
        )
    try:
        return pa.array(values)
    except UnicodeEncodeError as error:
        odd = next(row for row in range(len(values)) if not _fit(values[row]))
        raise ValueError(
            f"{file}, column {name!r:.60}: row {odd + 1} holds {values[odd]!r:.60}, which is no valid Unicode text "
            "(half of a character). Correct the row."
        ) from error
    except (pa.ArrowException, OverflowError) as error:
        first = next(row for row, value in enumerate(values) if value is not None)
        odd = next((row for row in range(len(values)) if not _fit(values[first], values[row])), None)
        found = f"row {first + 1} holds {values[first]!r:.60}, row {(odd or 0) + 1} {values[odd or 0]!r:.60}"
        found = found if odd is not None else str(error)
        raise ValueError(
            f"{file}, column {name!r:.60}: values of more than one type ({found}). Use one type."
        ) from error


def _fit(*values: Any) -> bool:
    try:
        return pa.array(values) is not None
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return False
