"""Rows without labels of run_glue.py: a file, or training rows whose labels are put aside."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from finetuning.data import DataArguments, check_text, require_columns
from finetuning.files import read_table
from finetuning.labels import MULTI, REGRESSION, Labels
from finetuning.unlabeled_batches import RATIO
from hf_rdrop import RDropTrainingArguments

logger = logging.getLogger(f"hf_rdrop.scripts.{__name__}")


@dataclass
class UnlabeledArguments:
    """Source of rows without labels, and their number beside each labelled one."""

    unlabeled_file: str | None = field(
        default=None,
        metadata={
            "help": "Rows without labels (.csv, .tsv, .json or .jsonl, also .gz), with the training data's text "
            "columns; labels in it are not looked at. They take part in the agreement alone (--rdrop_unlabeled, which "
            "this sets); with --rdrop_alpha 0 they are left out."
        },
    )
    unlabeled_from_train: int | None = field(
        default=None,
        metadata={
            "help": "Take up to N training rows that --max_train_samples leaves out, without their labels, "
            "as rows without labels: to see what labels are worth."
        },
    )
    unlabeled_ratio: int | None = field(
        default=None,
        metadata={
            "help": f"Rows without labels for each labelled row of a batch (default: {RATIO}). They come on top of "
            "--per_device_train_batch_size, and epochs are counted over the labelled rows, so the number of steps "
            "stays that of training without them. They are gone through in a new order each time."
        },
    )

    def __post_init__(self) -> None:
        if self.unlabeled_file and self.unlabeled_from_train is not None:
            raise ValueError("--unlabeled_file and --unlabeled_from_train were both given: give one of them.")
        for name in ("unlabeled_from_train", "unlabeled_ratio"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}: leave it out for no such rows.")
        if self.unlabeled_ratio is not None and not self.source:
            raise ValueError("--unlabeled_ratio needs rows without labels: give --unlabeled_file too.")

    @property
    def source(self) -> str | None:
        """Return the argument that says where they come from."""
        names = ("unlabeled_file", "unlabeled_from_train")
        return next((f"--{name}" for name in names if getattr(self, name)), None)

    @property
    def ratio(self) -> int:
        """Return the number of them beside each labelled row."""
        return self.unlabeled_ratio or RATIO


def load_unlabeled(
    unlabeled_args: UnlabeledArguments,
    data_args: DataArguments,
    training_args: RDropTrainingArguments,
    train: Dataset | None,
    columns: Sequence[str],
) -> Dataset | None:
    """Load the rows without labels that the run trains on, or None; sets `rdrop_unlabeled` where there are some.

    Args:
        unlabeled_args: where they come from.
        data_args: which of the training rows are labelled ones.
        training_args: of the run.
        train: all rows of the training data.
        columns: the text columns.

    Raises:
        ValueError: when there are none, or they are no texts in these columns.
    """
    source = unlabeled_args.source
    if source is None:
        if training_args.rdrop_unlabeled:
            raise ValueError("--rdrop_unlabeled needs rows without labels: give --unlabeled_file.")
        return None
    if train is None:
        raise ValueError(f"{source} brings rows to train on: it needs --do_train.")
    if training_args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(f"{source} and --train_sampling_strategy batch_rebalance cannot be used together.")
    if unlabeled_args.unlabeled_file:
        rows = read_table(unlabeled_args.unlabeled_file, delimiter=data_args.delimiter)
        require_columns(rows, columns, "unlabelled")
        check_text(rows, columns, "unlabelled")
    else:
        rows = _rows_left(data_args, train, unlabeled_args.unlabeled_from_train or 0)
    if not training_args.rdrop_alpha:
        logger.info("The %d rows of %s are left out: without agreement they add nothing.", len(rows), source)
        return None
    training_args.rdrop_unlabeled = True
    logger.info("%d rows without labels (%s), %d beside each labelled one.", len(rows), source, unlabeled_args.ratio)
    return rows


def _rows_left(data_args: DataArguments, train: Dataset, count: int) -> Dataset:
    """Return up to `count` of the rows behind those that `DataArguments.choose_rows` takes."""
    first = data_args.max_train_samples
    if first is None or first >= len(train):
        raise ValueError(
            "--unlabeled_from_train takes training rows that --max_train_samples leaves out, but it leaves none: give "
            f"it a number below the {len(train)} rows of the training data."
        )
    return data_args.in_order(train).select(range(first, min(first + count, len(train))))


def no_targets(labels: Labels, count: int) -> list[Any]:
    """Return the targets of rows without labels: -100, in the type and shape of the labelled ones'."""
    if labels.problem_type == MULTI:
        return [[-100.0] * len(labels.names)] * count
    return [-100.0 if labels.problem_type == REGRESSION else -100] * count
