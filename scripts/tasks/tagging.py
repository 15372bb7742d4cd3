"""Data of run_ner.py: lists of words with a tag each, and their tokens."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction

from finetuning.data import DataArguments, require_columns
from finetuning.labels import SINGLE, Labels, collect_names, feature_names, follow_model, labels_of_model, sort_names
from finetuning.unfit import check_fit
from hf_rdrop.metrics import Seqeval
from tasks.column_files import read_words
from tasks.tag_schemes import PREFIX, SUFFIX, complete, find_shape, join_tag, split_tag

logger = logging.getLogger(f"hf_rdrop.scripts.{__name__}")


@dataclass
class NerArguments(DataArguments):
    """Data: rows of words and tags, from the Hub or from json files."""

    task_name: str = field(
        default="ner", metadata={"help": "ner, pos or chunk: the column of the tags is `<task_name>_tags`."}
    )
    text_column_name: str = field(default="tokens", metadata={"help": "Column of the lists of words."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of the tags, if of another name."})
    column_positions: list[int] | None = field(
        default=None,
        metadata={
            "help": "Files with a word and its tag on each line (CoNLL): the columns of word and tag, counted from 1, "
            "or from the end as -1. Default: 1 and -1 (pos: 2, chunk: 3 of four columns)."
        },
    )
    sentence_column_name: str | None = field(
        default=None, metadata={"help": "csv files with a row for each word: column of the sentences' numbers."}
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Longest input in tokens; words beyond it are lost. Default: what the model can take."},
    )
    label_all_tokens: bool = field(
        default=False,
        metadata={"help": "Train on every sub-token of a word (B- becomes I- inside it), not on the first alone."},
    )
    return_entity_level_metrics: bool = field(
        default=False, metadata={"help": "Report precision, recall and F1 of each entity type too."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.dataset_name or self.train_file or self.validation_file or self.test_file):
            raise ValueError("no data: give --dataset_name, or --train_file and --validation_file.")
        if self.max_seq_length is not None and self.max_seq_length < 3:
            raise ValueError(f"--max_seq_length must be at least 3, got {self.max_seq_length}.")
        if self.column_positions and len(self.column_positions) != 2:
            raise ValueError(
                "--column_positions takes two numbers, of word and tag; got "
                f"{' '.join(map(str, self.column_positions))}."
            )
        self.label_column_name = self.label_column_name or f"{self.task_name.lower()}_tags"


# ---- Data ----


def read_file(path: str, data_args: NerArguments) -> Dataset:
    """Read a file of words and tags: rows of lists, or a word and its tag on each line."""
    return read_words(
        path,
        data_args.text_column_name,
        data_args.label_column_name,
        data_args.column_positions,
        data_args.sentence_column_name,
        data_args.task_name.lower(),
    )


def check_rows(dataset: Dataset, split: str, data_args: NerArguments) -> None:
    """Check that each row is a list of words and, where there are tags, as many of them."""
    words_column, tags_column = data_args.text_column_name, data_args.label_column_name
    require_columns(dataset, [words_column], split, "text_column_name")
    check_fit(dataset, tags_column)
    if split != "test":
        require_columns(dataset, [tags_column], split, "label_column_name")
    tags = list(dataset[tags_column]) if tags_column in dataset.column_names else [None] * len(dataset)
    for row, (words, row_tags) in enumerate(zip(dataset[words_column], tags, strict=True), 1):
        place = f"row {row} of the {split} data"
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{place}: column {words_column!r} holds {words!r:.60}; it must be a list of words.")
        if row_tags is None and split == "test":
            continue
        if not isinstance(row_tags, list):
            raise ValueError(f"{place}: column {tags_column!r} holds {row_tags!r:.60}; it must be a list of tags.")
        if len(words) != len(row_tags):
            raise ValueError(
                f"{place}: {len(words)} words in {words_column!r} but {len(row_tags)} tags in {tags_column!r}, so it "
                "is unclear which tag belongs to which word. Correct or remove the row."
            )


def choose_labels(data_args: NerArguments, splits: dict[str, Dataset], config: Any) -> Labels:
    """Return the tags of the training data, or of the model when the run does not train."""
    column = data_args.label_column_name
    names = feature_names(next(iter(splits.values())).features.get(column))
    if "train" not in splits:
        return labels_of_model(config, names)
    seen = collect_names(splits["train"][column], column, "train", names)
    if len(seen) < 2:
        raise ValueError(
            f"the train data hold no other tag in column {column!r} than {', '.join(seen) or 'none':.300}: there is "
            "nothing to tell apart. Choose another column, or check how the file was made."
        )
    if unwritable := next((name for name in seen if re.search(r"[\t\n\r]", name)), None):
        raise ValueError(
            f"the tag {unwritable!r:.60} in column {column!r} of the train data holds a tab or a line break, so "
            "predictions could not be told apart. Rename it."
        )
    odd = [name for name in seen if find_shape([name]) is None]
    if find_shape(seen) is None and any(name[:2] == "B-" for name in seen):
        odd = odd or [name for name in seen if PREFIX.fullmatch(name) is None and name != "O"]
        logger.warning(
            "The tag %s marks no span as B-... and I-... do, so accuracy alone is reported, and no F1. Correct it if "
            "it is a slip.",
            odd[0],
        )
    if names is None:
        seen = sort_names(complete(seen))
    return follow_model(Labels(SINGLE, names or seen, names), config, training=True)


def read_targets(dataset: Dataset, split: str, labels: Labels, data_args: NerArguments) -> list[list[int]] | None:
    """Return the index of each word's tag; None where a test set withholds them."""
    column = data_args.label_column_name
    tags = list(dataset[column]) if column in dataset.column_names else [None]
    if split == "test" and any(row is None or labels.withheld(row) for row in tags):
        return None
    targets = []
    for row, row_tags in enumerate(tags, 1):
        try:
            targets.append([labels.encode(tag) for tag in row_tags])
        except ValueError as error:
            raise ValueError(f"row {row} of the {split} data, column {column!r}: label {error}") from error
    return targets


def _rest_of_word(name: str, names: Sequence[str]) -> str:
    """Return the tag of a word's further sub-tokens: B- becomes I- inside it."""
    shape = find_shape(names)
    letter, kind = split_tag(name, shape) if shape else ("", "")
    rest = join_tag("I", kind, shape) if shape and letter == "B" else name
    return rest if rest in names else name


def tokenize(
    dataset: Dataset,
    split: str,
    tokenizer: Any,
    labels: Labels,
    targets: list[list[int]] | None,
    data_args: NerArguments,
) -> tuple[Dataset, list[list[int]]]:
    """Model inputs with `labels`, and for each row which word each first sub-token belongs to (elsewhere -1).

    A word is labelled on its first sub-token (with --label_all_tokens and for training, on all), the rest is -100.
    """
    words_column = data_args.text_column_name
    inside = [labels.names.index(_rest_of_word(name, labels.names)) for name in labels.names]
    label_all = data_args.label_all_tokens and split == "train"
    # RoBERTa's kind of tokenizer knows a word by the blank before it, which words in a list have lost.
    blank = " " if "ByteLevel" in repr(tokenizer.backend_tokenizer.pre_tokenizer) else ""

    def encode(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
        batch = tokenizer(
            [[blank + word for word in row] for row in rows[words_column]],
            is_split_into_words=True,
            truncation=True,
            max_length=data_args.max_seq_length,
            padding="max_length" if data_args.pad_to_max_length else False,
        )
        batch["first"], batch["labels"] = [], []
        for position, row in enumerate(indices):
            words = batch.word_ids(position)
            before = [None, *words[:-1]]
            first = [-1 if word in (None, last) else word for word, last in zip(words, before, strict=True)]
            batch["first"].append(first)
            if targets is not None:
                target = [targets[row][word] if word >= 0 else -100 for word in first]
                if label_all:
                    rest = [word is not None and word != start for word, start in zip(words, first, strict=True)]
                    target = [
                        inside[targets[row][word]] if is_rest else label
                        for word, is_rest, label in zip(words, rest, target, strict=True)
                    ]
                batch["labels"].append(target)
        if targets is None:
            del batch["labels"]
        return batch

    encoded = dataset.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=not data_args.overwrite_cache,
        desc=f"Tokenizing {split}",
    )
    first = list(encoded["first"])
    lost = [len(words) - sum(w >= 0 for w in row) for words, row in zip(dataset[words_column], first, strict=True)]
    if not any(word >= 0 for row in first for word in row):
        raise ValueError(
            f"the {split} data hold no word that the model sees: column {words_column!r} is empty in every row, or "
            "the tokenizer has no token for what is in it. Check how the file was made."
        )
    if any(lost):
        logger.warning(
            "%s: %d words in %d of %d rows are lost to the model: they lie beyond --max_seq_length (%d tokens), or "
            "the tokenizer has no token for them. They are neither trained on nor scored, and are predicted as O.",
            *(split, sum(lost), sum(map(bool, lost)), len(lost), data_args.max_seq_length),
        )
    return encoded.remove_columns("first"), first


# ---- Metrics and predictions ----


def compute_metrics(p: EvalPrediction, labels: Labels, data_args: NerArguments) -> dict[str, float]:
    """seqeval's entity scores over the words' first sub-tokens; accuracy alone where the tags mark no spans."""
    pairs = [(row[gold != -100], gold[gold != -100]) for row, gold in zip(p.predictions, p.label_ids, strict=True)]
    predictions, references = ([[labels.names[i] for i in row] for row in side] for side in zip(*pairs, strict=True))
    if (shape := find_shape(labels.names)) is None:
        words = [
            a == b for row, gold in zip(predictions, references, strict=True) for a, b in zip(row, gold, strict=True)
        ]
        return {"accuracy": float(np.mean(words))}
    scores = Seqeval().compute(predictions=predictions, references=references, suffix=shape is SUFFIX)
    metrics = {name: scores[f"overall_{name}"] for name in ("precision", "recall", "f1", "accuracy")}
    if data_args.return_entity_level_metrics:
        types = {name: score for name, score in scores.items() if isinstance(score, dict)}
        metrics |= {f"{name}_{key}": value for name, score in types.items() for key, value in score.items()}
    return metrics


def metric_names(labels: Labels, data_args: NerArguments) -> list[str]:
    """Return the names of the metrics that an evaluation will have, if every tag occurs in it."""
    every = np.arange(len(labels.names))[None]
    return list(compute_metrics(EvalPrediction(every, every), labels, data_args))


def format_predictions(predictions: np.ndarray, first: list[list[int]], words: list[list[str]], labels: Labels) -> str:
    """Write one line a row with one tag a word; words that were lost to the model get O, or _ where there is no O.

    Between tags is a blank, or a tab where there are blanks in tags.
    """
    between = "\t" if any(re.search(r"\s", name) for name in labels.names) else " "
    lines = []
    for row, row_first, row_words in zip(predictions, first, words, strict=True):
        tags = ["O" if "O" in labels.names else "_"] * len(row_words)
        for index, word in zip(row, row_first, strict=False):  # the predictions are padded
            if word >= 0:
                tags[word] = labels.names[index]
        lines.append(between.join(tags) + "\n")
    return "".join(lines)
