"""Data files with faults of every kind, drawn from a seeded generator: wrong rows, broken bytes, odd paths."""

import bz2
import contextlib
import csv
import gzip
import io
import json
import os
import pickle
import re
from pathlib import Path
from random import Random
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet

from support.script_data import write

Rows = list[dict[str, Any]]

LONG = "very " * 200_000  # 1 MB


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def junk(draw: Random) -> Any:
    """A value of a kind that a column does not expect."""
    values: list[Any] = [
        *(None, True, False, 0, -1, 1, 2, 7, -100, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400),
        *(0.5, -0.0, 1.0, 1e308, -1e308, 1e-320, 1e20, float("nan"), float("inf"), float("-inf")),
        *("", " ", "\t", "\n", "\r\n", "0", "1", "-1", "01", "1.5", "1_0", "1e999", "nan", "inf", "null", "[]"),
        *("O", "o", "B-", "B-person", "I-god", "X-person", "Bperson", "positive", "Positive", " positive", "perhaps"),
        *("\ud800", "a\udfffb", "\ufeff", "\u2028", "\u200b", "\u202eabc", "e\u0301" * 40),
        *("👩‍👩‍👧", "\x1b[31m", "\x07", "'", '"'),
        *('a","b', "a\tb", "a;b", "<pad>", "[PAD]", "[MASK] [SEP]", "مرحبا", "日本語", "ﬁ", "٣", "½", "word " * 300),
        *([], [None], [[]], [[1]], [""], ["a"], ["a", 1], [1.0, 0.0], [True], ["O"], {}, {"a": 1}, {"en": "x"}),
        *({"en": None, "de": None}, {"": {}}, {"a": {"a": []}}, deep(3), deep(40), deep(100)),
    ]  # fmt: skip
    return LONG if draw.random() < 0.003 else draw.choice(values)


# ---- Faults in rows ----


def spoil_value(rows: Rows, draw: Random) -> None:
    row = draw.choice(rows)
    name = draw.choice(list(row))
    row[name] = spoil_inside(row[name], draw) if draw.random() < 0.6 else junk(draw)


def spoil_inside(value: Any, draw: Random) -> Any:
    """Something wrong within a list or an object; a text changed; anything for other values."""
    if isinstance(value, list):
        value = list(value)
        place = draw.randrange(len(value) + 1)
        how = draw.randrange(3)
        return value[:place] + ([junk(draw)] if how else []) + value[place + (how != 1) :]
    if isinstance(value, dict):
        value = dict(value)
        name = draw.choice(list(value))
        item = value.pop(name)
        if draw.randrange(3):
            value[name if draw.randrange(2) else name.upper()] = junk(draw) if draw.randrange(2) else item
        return value
    if isinstance(value, str):
        return draw.choice(["", " "]) + value + draw.choice(["", " ", "\n", "é", "\x00", '"', ",", "\t", "\ud8ff"])
    return junk(draw)


def spoil_column(rows: Rows, draw: Random) -> None:
    name, value = draw.choice(list(rows[0])), junk(draw)
    for row in rows:
        row[name] = value if draw.random() < 0.8 else junk(draw)


def rename_column(rows: Rows, draw: Random) -> None:
    name = draw.choice(list(rows[0]))
    new = draw.choice(
        [name.upper(), name + "s", name[:-1], "", " " + name, "input_ids", "labels", "first", "é", "\ud800"]
    )
    for row in rows if draw.randrange(3) else rows[: draw.randrange(len(rows))]:
        row[new] = row.pop(name)


def drop_column(rows: Rows, draw: Random) -> None:
    name = draw.choice(list(rows[0]))
    for row in rows if draw.randrange(2) else draw.sample(rows, 1):
        del row[name]


def add_column(rows: Rows, draw: Random) -> None:
    name = draw.choice(
        ["extra", "idx", "input_ids", "labels", "label_ids", "attention_mask", "first", "translation", ""]
    )
    for row in rows if draw.randrange(2) else draw.sample(rows, 1):
        row.setdefault(name, junk(draw))


def swap_columns(rows: Rows, draw: Random) -> None:
    names = draw.sample(list(rows[0]), 2) if len(rows[0]) > 1 else list(rows[0]) * 2
    for row in rows if draw.randrange(2) else draw.sample(rows, 1):
        row[names[0]], row[names[1]] = row[names[1]], row[names[0]]


def change_rows(rows: Rows, draw: Random) -> None:
    how, place = draw.randrange(4), draw.randrange(len(rows))
    if how == 0:
        del rows[place:]
    elif how == 1:
        rows.insert(place, dict(rows[place]))
    elif how == 2:
        rows.insert(place, {})
    else:
        rows[place] = draw.choice([{}, {"x": 1}, dict.fromkeys(rows[place]), {name: [] for name in rows[place]}])


ROW_FAULTS = (
    *(spoil_value, spoil_value, spoil_value, spoil_column, rename_column, drop_column, add_column, swap_columns),
    change_rows,
)

# ---- Faults in bytes ----


def parquet(draw: Random) -> bytes:
    buffer, table = io.BytesIO(), pa.table({"text": ["a", "b"], "label": [0, 1]})
    if draw.randrange(2):
        pyarrow.parquet.write_table(table, buffer)
    else:
        with pa.ipc.new_file(buffer, table.schema) as writer:
            writer.write_table(table)
    return buffer.getvalue()


def encode_otherwise(data: bytes, draw: Random) -> bytes:
    text = data.decode("utf-8", "replace").replace("a", draw.choice(["a", "ä", "€", "日"]))
    name = draw.choice(["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7", "shift-jis"])
    return text.encode(name, "replace")


def edit_lines(data: bytes, draw: Random) -> bytes:
    lines = data.split(b"\n")
    place = draw.randrange(len(lines))
    line = lines[place]
    lines[place : place + 1] = draw.choice(
        [
            [],
            [b"", line],
            [b"  ", line, b""],
            [line, line],
            [line[: len(line) // 2], line[len(line) // 2 :]],
            [line + line],
            [line + b","],
            [b"# comment", line],
            [line.replace(b'"', b"'")],
            [line.replace(b",", b";")],
            [line.replace(b",", b"\t").replace(b"\t", b",")],
            [line.replace(b'"', b"", 1)],
            [line.replace(b":", b"", 1)],
            [b'"' + line],
            [line + b" \\"],
            [b"[" * 5000 + line],
            [b'{"a":' * 3000 + b"1" + b"}" * 3000],
            [line.replace(b"{", b'{"label": 0, "label": 1, "tokens": [], ', 1)],
            [line.replace(b"1", b"9" * 5000)],
            [b"null"],
            [b"{}"],
            [b'"text"'],
            [b'{"data": [' + line + b"]}"],
            [line + LONG.encode()],
        ]
    )
    return b"\n".join(lines)


def spoil_bytes(data: bytes, draw: Random) -> bytes:
    place, length = draw.randrange(len(data)), draw.randrange(1, 20)
    choices = [
        lambda: data[:place],
        lambda: data[: -draw.randrange(1, 6)],
        lambda: data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :],
        lambda: data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :],
        lambda: data[:place] + draw.randbytes(length) + data[place:],
        lambda: data[:place] + data[place + length :],
        lambda: data[:place] + b"\0" * length + data[place:],
        lambda: data[:place] + draw.choice([b"\r", b"\n", b'"', b"\\", b"\x1a", b"\xc3"]) + data[place:],
        lambda: b"\xef\xbb\xbf" * draw.randrange(1, 3) + data,
        lambda: encode_otherwise(data, draw),
        lambda: encode_otherwise(data, draw),
        lambda: edit_lines(data, draw),
        lambda: edit_lines(data, draw),
        lambda: edit_lines(data, draw),
        lambda: edit_lines(data, draw),
        lambda: data.replace(b"\n", draw.choice([b"\r\n", b"\r", b"", b"\n\n", b" \n", b",\n"])),
        lambda: data + data,
        lambda: data + data[:place],
        lambda: b"",
        lambda: b"\n" * length,
        lambda: draw.randbytes(length * 20),
        lambda: parquet(draw),
        lambda: bz2.compress(data),
        lambda: b"PK\x03\x04" + data,
        lambda: b"{" * 100_000,
        lambda: b"[" + data + b"]",
        lambda: b'{"data": ' + data + b"}",
    ]
    return draw.choice(choices)()


def spoil_gzip(data: bytes, draw: Random) -> bytes:
    packed = bytearray(gzip.compress(data, mtime=0))
    how = draw.randrange(6)
    if how == 0:
        return bytes(packed[: draw.randrange(len(packed))])
    if how == 1:
        packed[draw.randrange(len(packed))] ^= 1 << draw.randrange(8)
        return bytes(packed)
    if how == 2:
        return bytes(packed) + draw.choice([b"\0" * 9, b"more", bytes(packed)])
    if how == 3:
        return gzip.compress(bytes(packed))
    return data if how == 4 else gzip.compress(spoil_bytes(data, draw))


# ---- Paths ----


def odd_path(path: Path, draw: Random) -> Path:
    how = draw.randrange(9)
    if how == 0:
        path.mkdir()
    elif how == 1:
        os.mkfifo(path)
    elif how == 2:
        return Path("/dev/null")
    elif how == 3:
        path.symlink_to(path)
    elif how == 4:
        path.symlink_to(path.with_name("gone"))
    elif how == 5:
        return path.with_name("x" * 300 + path.suffix)
    elif how == 6:
        return path.with_suffix(draw.choice(["", ".txt", ".parquet", ".pkl", ".xlsx", ".gz", ".JSONL", ".zip"]))
    elif how == 7:
        path = path.with_suffix(draw.choice([".pkl", ".txt", ".bin", ".jsonl", ".csv"]))
        path.write_bytes(pickle.dumps(Payload(path.with_name("payload"))))
    return path


def make_file(folder: Path, split: str, rows: Rows, formats: list[str], draw: Random) -> Path:
    """Write good rows with one fault in them (or two); returns the path to give to the script."""
    rows = json.loads(json.dumps(rows))
    path = folder / f"{split}{draw.choice(formats)}"
    level = draw.random()
    if level < 0.04:
        return odd_path(path, draw)
    if level < 0.5:
        for _ in range(draw.choice([1, 1, 1, 2])):
            if rows and rows[0]:
                with contextlib.suppress(KeyError, IndexError):  # the second may not fit what the first one left
                    draw.choice(ROW_FAULTS)(rows, draw)
        write_any(path, rows)
        return path
    write(path, rows)
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    path.write_bytes(spoil_gzip(data, draw) if path.suffix == ".gz" else spoil_bytes(data, draw))
    return path


def write_any(path: Path, rows: Rows) -> None:
    """`support.script_data.write` for rows that need not have the same columns, or be encodable."""
    if path.suffix in (".csv", ".tsv"):
        names = list(dict.fromkeys(name for row in rows for name in row))
        texts = [{name: "" if row.get(name) is None else row.get(name) for name in names} for row in rows]
        stream = io.StringIO(newline="")
        if path.suffix == ".tsv":
            lines = [names, *([re.sub(r"[\t\r\n]", " ", str(text)) for text in row.values()] for row in texts)]
            stream.write("".join("\t".join(line) + "\n" for line in lines))
        else:
            csv.writer(stream).writerows([names, *([row[name] for name in names] for row in texts)])
        path.write_bytes(stream.getvalue().encode("utf-8", "surrogatepass"))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


# ---- Reading, written once more ----


def read_again(path: Path) -> Rows:
    """The rows of a file that the scripts took for a good one, by another reader where there is one."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = b"".join(gzip.GzipFile(fileobj=io.BytesIO(data)).readlines())
        path = path.with_suffix("")
    text = data.decode("utf-8").removeprefix("\ufeff")
    if path.suffix in (".csv", ".tsv"):
        style: dict[str, Any] = {"sep": "\t", "quoting": 3} if path.suffix == ".tsv" else {}
        table = pandas.read_csv(
            io.StringIO(text, newline=""), dtype=str, keep_default_na=False, index_col=False, **style
        )
        assert not table.isna().any().any()
        return table.to_dict("records")
    if text.lstrip()[0] == "[":
        return json.loads(text, object_pairs_hook=unique)
    return [json.loads(line, object_pairs_hook=unique) for line in text.split("\n") if line.strip()]


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), f"a name came twice: {pairs}"
    return dict(pairs)
