"""Where the scripts' examples come from: csv, tsv, json and jsonl files (also .gz), or a data set of the Hub.

Files are read here and not by `load_dataset`, because a fault is then told with its line, nothing is taken from a
stale cache, text such as "null" or "007" stays text, and no request leaves the machine.
"""

import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset

FORMATS = (".csv", ".tsv", ".json", ".jsonl")
TEXT = ".txt"  # of scripts that need no columns
FILE_ARGUMENTS = {"train": "train_file", "validation": "validation_file", "test": "test_file"}


@dataclass
class DataArguments:
    """Arguments of all scripts about the data: a data set of the Hub (or a local folder of one), or files."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set of the Hub, or a local folder, as datasets.load_dataset takes it."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of --dataset_name."})
    train_file: str | None = field(
        default=None, metadata={"help": "Training data: .csv, .tsv (tabs, no quoting), .json or .jsonl, also .gz."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, in the same formats."})
    test_file: str | None = field(default=None, metadata={"help": "Data to predict; labels may be missing or -1."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N training rows."})
    sample_seed: int | None = field(
        default=None, metadata={"help": "Draw the --max_train_samples rows at random with this seed instead."}
    )
    validation_from_train: float | None = field(
        default=None,
        metadata={
            "help": "Hold out this share of the training rows, always the same ones, and validate on them instead of "
            "on the validation data: for choosing hyper-parameters."
        },
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first N validation rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict only the first N test rows."})
    consistency_samples: int = field(
        default=0,
        metadata={
            "help": "Draw N sub-models by dropout on the validation data, and compare dropout off with them and with "
            "their ensemble: eval_consistency_* (KL divergences in nats: kl_between sub-models, kl_to_off from them "
            "to dropout off, kl_ensemble from their ensemble to it; of each score: _off, _sub and _std over "
            "sub-models, _ensemble) and consistency.json with the curves over 1 to N. 0: not measured."
        },
    )
    card_comparison: list[str] | None = field(
        default=None,
        metadata={
            "help": "A comparison.json of compare.py, whose figures the model card shows, and if it has several tasks "
            "of which none is named as the data set or --output_dir is, the name of the task."
        },
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for the tokenization."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Redo the tokenization of a cached data set."})
    pad_to_max_length: bool = field(
        default=False,
        metadata={
            "help": "Pad every row to the maximum length instead of to its batch's longest (R-Drop pays twice)."
        },
    )

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples", "preprocessing_num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}: leave it out to use everything.")
        if self.card_comparison and len(self.card_comparison) > 2:
            raise ValueError(
                f"--card_comparison takes a comparison.json and the name of a task, got {self.card_comparison}."
            )
        if self.consistency_samples < 0 or self.consistency_samples == 1:
            raise ValueError(
                f"--consistency_samples must be 0 or at least 2, as sub-models are compared with each other; got "
                f"{self.consistency_samples}."
            )
        if self.sample_seed is not None and (self.max_train_samples is None or self.sample_seed < 0):
            raise ValueError("--sample_seed draws --max_train_samples rows: give that too, and a seed of at least 0.")
        if self.validation_from_train is not None and not 0 < self.validation_from_train < 1:
            raise ValueError(
                f"--validation_from_train must be between 0 and 1, the share of training rows to hold out; got "
                f"{self.validation_from_train}."
            )
        if self.dataset_name and any(getattr(self, name) for name in FILE_ARGUMENTS.values()):
            raise ValueError("--dataset_name and files were both given: it is unclear which to use. Give one of them.")

    def in_order(self, train: Dataset) -> Dataset:
        """The training rows in the order of which --max_train_samples takes the first."""
        return train if self.sample_seed is None else train.shuffle(seed=self.sample_seed)

    def choose_rows(self, splits: dict[str, Dataset]) -> dict[str, Dataset]:
        """The rows of each split that the run uses, as --max_*_samples and --validation_from_train say."""
        chosen = {}
        for split, dataset in splits.items():
            name = {"train": "max_train_samples", "test": "max_predict_samples"}.get(split.split("_")[0])
            limit = getattr(self, name or "max_eval_samples")
            if limit is not None:
                if split == "train":
                    dataset = self.in_order(dataset)
                dataset = dataset.select(range(min(limit, len(dataset))))
            chosen[split] = dataset
        if self.validation_from_train is not None:
            rows = len(chosen["train"])
            held_out = round(rows * self.validation_from_train)
            if not 0 < held_out < rows:
                raise ValueError(
                    f"--validation_from_train {self.validation_from_train} of {rows} training rows leaves no row on "
                    "one of the sides: give more rows or another share."
                )
            parts = chosen["train"].train_test_split(test_size=held_out, seed=0)
            others = {split: dataset for split, dataset in chosen.items() if split != "train"}
            chosen = {"train": parts["train"], "validation": parts["test"], **others}
        return chosen


def load_splits(
    data_args: DataArguments, model_args: Any, splits: Iterable[str], formats: tuple[str, ...] = FORMATS
) -> dict[str, Dataset]:
    """Load the splits that the run needs; `formats` are those that a file may have.

    Raises:
        ValueError: a split has no source, a file cannot be read or is empty, or the data set cannot be loaded.
    """
    splits = splits_to_load(data_args, splits)
    if data_args.dataset_name:
        return _load_from_hub(data_args, model_args, splits)
    loaded = {}
    for split in splits:
        argument = FILE_ARGUMENTS[split.split("_")[0]]
        path = getattr(data_args, argument)
        if path is None:
            task = {"train": "--do_train", "validation": "--do_eval", "test": "--do_predict"}[split.split("_")[0]]
            raise ValueError(f"{task} needs data: give --{argument} (or --dataset_name for a data set of the Hub).")
        loaded[split] = read_table(path, formats)
    return loaded


def splits_to_load(data_args: DataArguments, splits: Iterable[str]) -> list[str]:
    """The splits that the run needs, without validation data where training rows take their place."""
    splits = list(splits)
    if data_args.validation_from_train is None:
        return splits
    if "train" not in splits:
        raise ValueError("--validation_from_train holds out training rows: it needs --do_train.")
    return [split for split in splits if not split.startswith("validation")]


def _load_from_hub(data_args: DataArguments, model_args: Any, splits: Iterable[str]) -> dict[str, Dataset]:
    name = " ".join(filter(None, (data_args.dataset_name, data_args.dataset_config_name)))
    try:
        loaded = datasets.load_dataset(
            data_args.dataset_name,
            data_args.dataset_config_name,
            cache_dir=model_args.cache_dir,
            token=model_args.token,
        )
    except Exception as error:  # many kinds, from the Hub, the network and the data set's own files
        reason = f"{' '.join(str(error).split()):.300}"
        raise ValueError(
            f"the data set {name} could not be loaded ({type(error).__name__}: {reason}). Check --dataset_name and "
            "--dataset_config_name; without a network, give local files with --train_file and --validation_file."
        ) from error
    for split in splits:
        if split not in loaded:
            raise ValueError(
                f"the data set {name} has no split {split!r}, only {', '.join(loaded)}: give the data as files, or "
                "leave out the step that needs it (--do_train, --do_eval, --do_predict)."
            )
        if len(loaded[split]) == 0:
            raise ValueError(f"split {split!r} of the data set {name} has no rows: nothing to work on.")
    return {split: loaded[split] for split in splits}


def read_table(path: str, formats: tuple[str, ...] = FORMATS) -> Dataset:
    """Read one csv, tsv, json or jsonl file (also .gz) into memory.

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
    text = read_text(file)
    if suffix == TEXT:
        rows: list[dict[str, Any]] = [{"text": line.rstrip("\r")} for line in text.split("\n") if line.strip()]
    else:
        rows = list(_csv_rows(file, text, suffix) if suffix in (".csv", ".tsv") else _json_rows(file, text))
    if not rows:
        raise ValueError(f"{path} is empty: it holds no example. Check that it was written completely.")
    names = dict.fromkeys(name for row in rows for name in row)
    for name in names:
        if not _is_text(name):
            raise ValueError(f"{file}: the name of column {name!r:.60} is no valid Unicode text. Rename it.")
    columns = {name: _column(file, name, [row.get(name) for row in rows]) for name in names}
    try:
        return Dataset(pa.table(columns))
    except (pa.ArrowException, RecursionError) as error:
        raise ValueError(
            f"{file}: its rows are no table ({error}). Give columns of texts, numbers or lists."
        ) from error


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, also of a .gz one.

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
    """A JSON object; of a name that comes twice the last value would count and the other be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.60} comes more than once in an object")
    return found


def _csv_rows(file: Path, text: str, suffix: str) -> Iterator[dict[str, str]]:
    csv.field_size_limit(2**31 - 1)
    # Tab-separated files (GLUE's own among them) hold single quotation marks as plain text.
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {"strict": True}
    reader = csv.reader(io.StringIO(text, newline=""), **style)
    try:
        header = next(reader, [])
        if repeated := {name for name in header if header.count(name) > 1}:
            raise ValueError(
                f"{file}, line 1: the header names {sorted(repeated)!s:.300} more than once. Rename the columns."
            )
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(
                    f"{file}, line {reader.line_num}: {len(row)} fields, but the header has {len(header)} "
                    f"({', '.join(header):.300}). A field that holds the separator must be in quotation marks (csv)."
                )
            if row:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: malformed {suffix[1:]} ({error}).") from error


def _is_text(value: str) -> bool:
    """Whether all its characters can be written: JSON can hold halves of them ("\\ud83d")."""
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


def require_columns(dataset: Dataset, columns: Iterable[str], split: str, argument: str | None = None) -> None:
    """Raise `ValueError` when a column is missing, with the columns there are and the closest name."""
    for name in columns:
        if name not in dataset.column_names:
            advice = f"Rename it in the data, or give --{argument}." if argument else "Rename it in the data."
            raise ValueError(
                f"the {split} data have no column {name!r:.60}{closest(name, dataset.column_names)}: their columns "
                f"are {', '.join(dataset.column_names):.300}. {advice}"
            )


def closest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is near."""
    if len(str(name)) > 100:  # no name, and comparing it would take long
        return ""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_text(dataset: Dataset, columns: Iterable[str], split: str) -> None:
    """Raise `ValueError` unless every value of these columns is text; names the first row that is not."""
    for name in columns:
        if dataset.features[name] != datasets.Value("string") or dataset.data.column(name).null_count:
            for row, value in enumerate(dataset[name], 1):
                if not isinstance(value, str):
                    raise ValueError(
                        f"row {row} of the {split} data: column {name!r} holds {value!r:.60}, which is no text. "
                        "Fill it in, remove the row, or choose another column."
                    )
