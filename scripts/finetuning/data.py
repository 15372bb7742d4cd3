"""Data of a run: files, or a data set of the Hub, and which of their rows are used."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import datasets
from datasets import Dataset

from finetuning.command_line import closest
from finetuning.files import FORMATS, read_table
from finetuning.unfit import check_fit

FILE_ARGUMENTS = {"train": "train_file", "validation": "validation_file", "test": "test_file"}


@dataclass
class DataArguments:
    """Arguments of all scripts about the data: a data set of the Hub (or a local folder of one), or files."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set of the Hub, or a local folder, as datasets.load_dataset takes it."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of --dataset_name."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training data: .csv, .tsv (tabs, no quoting), .json or .jsonl, also .gz; .parquet, .arrow."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, in the same formats."})
    test_file: str | None = field(default=None, metadata={"help": "Data to predict; labels may be missing or -1."})
    delimiter: str | None = field(
        default=None,
        metadata={
            "help": "What parts the fields of csv files. Default: comma; where a header has none, a guess, told."
        },
    )
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
        self.delimiter = {"\\t": "\t", "tab": "\t"}.get(self.delimiter or "", self.delimiter)
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise ValueError(f"--delimiter must be one character, or tab; got {self.delimiter!r:.60}.")
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
        """Return the training rows in the order of which --max_train_samples takes the first."""
        return train if self.sample_seed is None else train.shuffle(seed=self.sample_seed)

    def choose_rows(self, splits: dict[str, Dataset]) -> dict[str, Dataset]:
        """Return the rows of each split that the run uses, as --max_*_samples and --validation_from_train say."""
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
    data_args: DataArguments,
    model_args: Any,
    splits: Iterable[str],
    formats: tuple[str, ...] = FORMATS,
    read: Callable[[str], Dataset] | None = None,
) -> dict[str, Dataset]:
    """Load the splits that the run needs; `formats` are those that a file may have, `read` another way to read one.

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
        loaded[split] = read(path) if read else read_table(path, formats, data_args.delimiter)
    return loaded


def splits_to_load(data_args: DataArguments, splits: Iterable[str]) -> list[str]:
    """Return the splits that the run needs, without validation data where training rows take their place."""
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


def require_columns(dataset: Dataset, columns: Iterable[str], split: str, argument: str | None = None) -> None:
    """Raise `ValueError` when a column is missing, with the columns there are and the closest name."""
    for name in columns:
        check_fit(dataset, name)
        if name not in dataset.column_names:
            advice = f"Rename it in the data, or give --{argument}." if argument else "Rename it in the data."
            raise ValueError(
                f"the {split} data have no column {name!r:.60}{closest(name, dataset.column_names)}: their columns "
                f"are {', '.join(dataset.column_names):.300}. {advice}"
            )


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
