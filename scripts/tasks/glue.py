"""Data of run_glue.py and run_glue_no_trainer.py: GLUE tasks and data sets of their form."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset

from finetuning.columns import find_text_columns
from finetuning.command_line import closest
from finetuning.data import DataArguments, check_text, load_splits, require_columns, splits_to_load
from finetuning.label_kinds import are_flags, infer_labels
from finetuning.labels import MULTI, REGRESSION, SINGLE, Labels, feature_names, follow_model, labels_of_model
from finetuning.model import ModelArguments
from finetuning.reading import CLASS, DROP, drop_missing_labels, join_label_columns, kept_reading, recall_reading
from hf_rdrop.metrics import Glue, SequenceClassification
from tasks.glue_files import find_file, read_glue

logger = logging.getLogger(f"hf_rdrop.scripts.{__name__}")

# Text columns and class names (none for the regression task) of the GLUE tasks, as on the Hub.
GLUE_TASKS: dict[str, tuple[list[str], list[str] | None]] = {
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
    "sst2": (["sentence"], ["negative", "positive"]),
    "stsb": (["sentence1", "sentence2"], None),
    "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"]),
}


@dataclass
class GlueArguments(DataArguments):
    """Data: a GLUE task (from the Hub, or its columns in your files), a data set of the Hub, or files."""

    task_name: str | None = field(
        default=None,
        metadata={"help": f"GLUE task: {', '.join(GLUE_TASKS)}. With files: these hold that task's columns."},
    )
    glue_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of GLUE's original files (CoLA/train.tsv, ...), or of one task of it, instead of the Hub."
        },
    )
    text_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "One text column, or two for pairs. Default: the task's; without training, those that the model "
            "was trained on; else found by name and content where only one choice is possible."
        },
    )
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels. Default: label."})
    label_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of 0 and 1, one for each class, of which several may apply to a row."}
    )
    missing_label: str | None = field(
        default=None,
        metadata={
            "help": "Rows without a label, and -1 beside 0, 1, ... or - beside names, which often marks them. drop: "
            "leave them out of training and validation, and say how many; class: such a mark is a class. Default: "
            "refuse.",
            "choices": [DROP, CLASS],
        },
    )
    problem_type: str | None = field(
        default=None,
        metadata={
            "help": "Kind of labels. Default: by their type (strings and whole numbers, also 0.0 and 1.0: classes; "
            "other real numbers: regression; lists: several classes at once).",
            "choices": [SINGLE, MULTI, REGRESSION],
        },
    )
    metric: str | None = field(
        default=None,
        metadata={"help": "Use the metric of this GLUE task. Default: the task's, or several that fit the labels."},
    )
    label_noise: float = field(
        default=0.0,
        metadata={
            "help": "Give this share of the training rows, drawn with --seed, a wrong class: to see how much a method "
            "suffers from wrong labels. Validation and test keep theirs."
        },
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longest input in tokens; longer ones are cut."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("task_name", "metric"):
            value = getattr(self, name)
            if value is not None and value.lower() not in GLUE_TASKS:
                raise ValueError(
                    f"--{name} {value} is no GLUE task{closest(value, GLUE_TASKS)}: choose one of "
                    f"{', '.join(GLUE_TASKS)}. For other data leave it out and give --dataset_name or --train_file."
                )
            setattr(self, name, value and value.lower())
        if self.glue_dir and (not self.task_name or self.dataset_name or self.train_file or self.validation_file):
            raise ValueError(
                "--glue_dir holds the data of --task_name: give that, and neither --dataset_name nor files."
            )
        if not (self.task_name or self.dataset_name or self.train_file or self.validation_file or self.test_file):
            raise ValueError("no data: give --task_name, --dataset_name, or --train_file and --validation_file.")
        if self.text_columns and len(self.text_columns) > 2:
            raise ValueError(f"--text_columns takes one column, or two for pairs; got {', '.join(self.text_columns)}.")
        if self.label_columns and (self.label_column or self.task_name or self.problem_type not in (None, MULTI)):
            raise ValueError(
                "--label_columns names a column of 0 and 1 for each of several classes, so --label_column, "
                "--task_name and another --problem_type have no meaning beside it: leave them out."
            )
        if self.label_columns and len(set(self.label_columns)) < max(2, len(self.label_columns)):
            raise ValueError(
                f"--label_columns takes two or more different columns; got {', '.join(self.label_columns)}."
            )
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"--label_noise is a share of the rows, from 0 to 1; got {self.label_noise}.")
        if self.max_seq_length < 3:
            raise ValueError(f"--max_seq_length must be at least 3, got {self.max_seq_length}.")


def load_data(data_args: GlueArguments, model_args: ModelArguments, **wanted: bool) -> dict[str, Dataset]:
    """Load the splits of the run by name; `wanted` says which of train, validation and test it needs."""
    files = data_args.train_file or data_args.validation_file or data_args.test_file
    if not (files or data_args.dataset_name or data_args.glue_dir):
        data_args = replace(data_args, dataset_name="nyu-mll/glue", dataset_config_name=data_args.task_name)
    splits = [split for split, is_wanted in wanted.items() if is_wanted]
    if data_args.task_name == "mnli" and not files:
        both = [(split,) if split == "train" else (f"{split}_matched", f"{split}_mismatched") for split in splits]
        splits = [name for pair in both for name in pair]
    task = data_args.task_name
    if data_args.glue_dir:
        paths = {split: find_file(data_args.glue_dir, task, split) for split in splits_to_load(data_args, splits)}
        return {split: read_glue(path, task) for split, path in paths.items()}
    read = partial(read_glue, task=task, delimiter=data_args.delimiter) if task else None
    return load_splits(data_args, model_args, splits, read=read)


def settle_labels(data_args: GlueArguments, splits: dict[str, Dataset], config: Any) -> dict[str, Dataset]:
    """Settle which columns are meant, and return the splits with their labels in one column, `data_args.label_column`.

    Raises:
        ValueError: a column of the labels is missing, or does not hold what it must.
    """
    recall_reading(data_args, config, splits)
    column = data_args.label_column
    if data_args.label_columns:
        names = list(map(str, config.id2label.values()))
        if sorted(names) == sorted(data_args.label_columns):
            data_args.label_columns = names  # in the order of the model's outputs
        splits = join_label_columns(splits, data_args.label_columns, column)
    for split, dataset in splits.items():
        if not split.startswith("test"):
            require_columns(dataset, [column], split, "label_column, or --label_columns for several of 0 and 1")
    return drop_missing_labels(splits, column) if data_args.missing_label == DROP else splits


def choose_text_columns(data_args: GlueArguments, splits: dict[str, Dataset]) -> list[str]:
    """Choose one text column or a pair: as given, the task's, or the only possible choice; checked in every split."""
    task_columns = GLUE_TASKS[data_args.task_name][0] if data_args.task_name else None
    columns = data_args.text_columns or task_columns
    if columns is None:
        split, dataset = next(iter(splits.items()))
        known = [task[0] for task in GLUE_TASKS.values()] + [["text"]]
        columns = find_text_columns(dataset, split, known, without=[data_args.label_column or "label"])
    for split, dataset in splits.items():
        require_columns(dataset, columns, split, "text_columns")
        check_text(dataset, columns, split)
    return list(columns)


def choose_labels(data_args: GlueArguments, splits: dict[str, Dataset], config: Any) -> Labels:
    """Choose the meaning of labels: by the task, the training data, or the model when the run does not train."""
    column = data_args.label_column
    dataset = next(iter(splits.values()))
    names = GLUE_TASKS[data_args.task_name][1] if data_args.task_name else feature_names(dataset.features.get(column))
    problem_type = REGRESSION if data_args.task_name == "stsb" else data_args.problem_type
    if "train" not in splits:
        flags = bool(data_args.label_columns) or kept_reading(config).get("flags")
        if flags is None and column in dataset.column_names:
            flags = are_flags(list(dataset[column]))
        return labels_of_model(config, names, bool(flags))
    if data_args.label_columns:
        labels = Labels(MULTI, list(data_args.label_columns), flags=True)
    else:
        refuse = data_args.missing_label != CLASS
        labels = infer_labels(list(splits["train"][column]), column, "train", names, problem_type, refuse)
    return follow_model(labels, config, training=True)


def tokenize(
    dataset: Dataset,
    split: str,
    tokenizer: Any,
    columns: list[str],
    targets: list[Any] | None,
    data_args: GlueArguments,
) -> Dataset:
    """Model inputs, without padding, and the targets in `labels`."""
    dataset = dataset.map(
        lambda rows: tokenizer(
            *(rows[column] for column in columns),
            truncation=True,
            max_length=data_args.max_seq_length,
            padding="max_length" if data_args.pad_to_max_length else False,
        ),
        batched=True,
        remove_columns=dataset.column_names,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=not data_args.overwrite_cache,
        desc=f"Tokenizing {split}",
    )
    return dataset if targets is None else dataset.add_column("labels", targets)


def build_metric(data_args: GlueArguments, labels: Labels) -> Callable[[Any, Any], dict[str, float]]:
    """Return a function of predictions and references that computes the metrics of the task."""
    task = data_args.metric or data_args.task_name
    metric = Glue(task) if task else SequenceClassification(labels.problem_type)

    def compute(predictions: Any, references: Any) -> dict[str, float]:
        scores = metric.compute(predictions=predictions, references=references)
        if task and len(scores) > 1:
            scores["combined_score"] = float(np.mean(list(scores.values())))
        return scores

    return compute


def format_predictions(predictions: np.ndarray, labels: Labels) -> str:
    """Write the text of a prediction file: a header, then row number and label."""
    if labels.problem_type == REGRESSION:
        values = [f"{value:.3f}" for value in predictions]
    elif labels.problem_type == MULTI:
        values = [",".join(n for n, flag in zip(labels.names, row, strict=True) if flag) for row in predictions]
    else:
        values = [labels.names[index] for index in predictions]
    return "".join(f"{index}\t{value}\n" for index, value in [("index", "prediction"), *enumerate(values)])
