"""Data of run_contrastive.py: sentences to train on, and pairs with a similarity score to evaluate on."""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding

from finetuning.data import DataArguments, check_text, load_splits, require_columns
from finetuning.files import FORMATS, TEXT
from finetuning.model import ModelArguments
from finetuning.unfit import unfit_columns

logger = logging.getLogger(f"hf_rdrop.scripts.{__name__}")


@dataclass
class ContrastiveArguments:
    """Sentences for training, and pairs of sentences with a score of their similarity (STS) for evaluation."""

    train_file: str | None = field(
        default=None,
        metadata={"help": "Sentences: .txt (one a line), or a column of a .csv, .tsv, .json or .jsonl; also .gz."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data set of the Hub, or a local folder, in place of --train_file; and of --validation_file, if "
            "that is not given and the data set has a validation split."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of --dataset_name."})
    text_column: str | None = field(
        default=None, metadata={"help": "Column of the sentences. Default: text or sentence, or the only text column."}
    )
    validation_file: str | None = field(
        default=None,
        metadata={
            "help": "Sentence similarity (STS) data: pairs with a score, as .csv, .tsv, .json or .jsonl; also .gz."
        },
    )
    pair_columns: list[str] = field(
        default_factory=lambda: ["sentence1", "sentence2"],
        metadata={"help": "Two columns with the texts of each pair."},
    )
    score_column: str = field(
        default="score", metadata={"help": "Column of the score: a number, higher for more similar, of any scale."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N sentences."})
    sample_seed: int | None = field(
        default=None, metadata={"help": "Draw the --max_train_samples sentences at random with this seed instead."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first N pairs."})
    max_seq_length: int = field(default=128, metadata={"help": "Longest sentence in tokens (SimCSE trains with 32)."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for the tokenization."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Redo the tokenization of a cached data set."})

    def __post_init__(self) -> None:
        if self.train_file and self.dataset_name:
            raise ValueError("--dataset_name and --train_file were both given: it is unclear which to use. Give one.")
        if len(self.pair_columns) != 2:
            raise ValueError(f"--pair_columns takes two columns, got {', '.join(self.pair_columns)}.")
        if self.max_seq_length < 3:
            raise ValueError(f"--max_seq_length must be at least 3, got {self.max_seq_length}.")
        self.source("train_file")  # checks the numbers

    def source(self, file: str) -> DataArguments:
        """Return the source of one of the two kinds of data, as the other scripts' loading takes it."""
        path = getattr(self, file)
        return DataArguments(
            **{file: path},
            dataset_name=None if path else self.dataset_name,
            dataset_config_name=self.dataset_config_name,
            max_train_samples=self.max_train_samples,
            sample_seed=self.sample_seed,
            max_eval_samples=self.max_eval_samples,
            preprocessing_num_workers=self.preprocessing_num_workers,
        )


def load_sentences(data_args: ContrastiveArguments, model_args: ModelArguments) -> Dataset:
    """Load the sentences to train on, in a column `text`.

    Raises:
        ValueError: there is no source, it cannot be read, or a row of it is no text or empty.
    """
    source = data_args.source("train_file")
    dataset = load_splits(source, model_args, ["train"], (TEXT, *FORMATS))["train"]
    column = data_args.text_column or _find_text_column(dataset)
    require_columns(dataset, [column], "train", "text_column")
    dataset = source.choose_rows({"train": dataset})["train"].select_columns(column)
    _check_sentences(dataset, [column], "train")
    return dataset if column == "text" else dataset.rename_column(column, "text")


def load_pairs(data_args: ContrastiveArguments, model_args: ModelArguments) -> Dataset:
    """Pairs in columns `a` and `b`, with their similarity as real numbers in `label`.

    Raises:
        ValueError: there is no source, it cannot be read, or a row of it lacks a sentence or a number.
    """
    source = data_args.source("validation_file")
    dataset = load_splits(source, model_args, ["validation"])["validation"]
    require_columns(dataset, data_args.pair_columns, "validation", "pair_columns")
    require_columns(dataset, [data_args.score_column], "validation", "score_column")
    dataset = source.choose_rows({"validation": dataset})["validation"]
    _check_sentences(dataset, data_args.pair_columns, "validation")
    scores = _read_scores(dataset[data_args.score_column], data_args.score_column)
    a, b = data_args.pair_columns
    return Dataset.from_dict({"a": list(dataset[a]), "b": list(dataset[b]), "label": scores})


def _find_text_column(dataset: Dataset) -> str:
    names = [name for name, feature in dataset.features.items() if getattr(feature, "dtype", "") == "string"]
    names += unfit_columns(dataset)
    known = next(([name] for name in ("text", "sentence") if name in names), names)
    if len(known) != 1:
        raise ValueError(
            f"the train data have {len(names)} columns of text ({', '.join(names):.300}): say with --text_column "
            "which one holds the sentences."
        )
    logger.info("Sentences: column %s (choose another with --text_column).", known[0])
    return known[0]


def _check_sentences(dataset: Dataset, columns: Iterable[str], split: str) -> None:
    check_text(dataset, columns, split)
    for column in columns:
        for row, text in enumerate(dataset[column], 1):
            if not text.strip():
                raise ValueError(
                    f"row {row} of the {split} data: column {column!r} is empty, so there is no sentence to embed. "
                    "Remove the row."
                )


def _read_scores(values: Iterable[Any], column: str) -> list[float]:
    scores = []
    for row, value in enumerate(values, 1):
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(
                f"row {row} of the validation data: column {column!r} holds {value!r:.60}, which is no number. The "
                "score says how similar the sentences are: correct the row, or choose another --score_column."
            )
        scores.append(score)
    if len(set(scores)) < 2:
        raise ValueError(
            f"all {len(scores)} scores of the validation data are {scores[0]:g}, so no correlation with them is "
            "defined. Give more pairs, or another --score_column."
        )
    return scores


def tokenize(dataset: Dataset, split: str, tokenizer: Any, data_args: ContrastiveArguments) -> Dataset:
    """Model inputs, without padding: of a sentence, or lists of two for the sentences of a pair, and its `label`."""

    def encode(texts: list[str]) -> dict[str, list[Any]]:
        return tokenizer(texts, truncation=True, max_length=data_args.max_seq_length)

    def encode_rows(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if "text" in rows:
            return encode(rows["text"])
        a, b = encode(rows["a"]), encode(rows["b"])
        return {name: [list(pair) for pair in zip(a[name], b[name], strict=True)] for name in a}

    return dataset.map(
        encode_rows,
        batched=True,
        remove_columns=[name for name in dataset.column_names if name != "label"],
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=not data_args.overwrite_cache,
        desc=f"Tokenizing {split}",
    )


class SentenceCollator(DataCollatorWithPadding):
    """Pads sentences to `[B, T]`, pairs to `[B, 2, T]` with `labels` `[B]`."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if "label" not in rows[0]:
            return super().__call__(rows)
        names = [name for name in rows[0] if name != "label"]
        sentences = super().__call__([{name: row[name][side] for name in names} for row in rows for side in (0, 1)])
        labels = torch.tensor([row["label"] for row in rows], dtype=torch.float32)
        return {**{name: tensor.unflatten(0, (-1, 2)) for name, tensor in sentences.items()}, "labels": labels}
