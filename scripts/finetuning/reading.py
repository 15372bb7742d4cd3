"""How a run read its data: told once, kept in the model's configuration, and used again when that model predicts."""

import logging
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig

from finetuning.data import require_columns
from finetuning.label_kinds import count_classes, is_marker
from finetuning.labels import MULTI, REGRESSION, Labels
from finetuning.unfit import check_fit, unfit_columns

logger = logging.getLogger(f"hf_rdrop.scripts.{__name__}")

KEPT = "data_reading"  # attribute of the model's configuration
DROP, CLASS = "drop", "class"  # what --missing_label says


def kept_reading(config: PreTrainedConfig) -> dict[str, Any]:
    """Return how the data were read that the model was fine-tuned on; empty for other models."""
    found = getattr(config, KEPT, None)
    return found if isinstance(found, dict) else {}


def keep_reading(config: PreTrainedConfig, columns: Sequence[str], data_args: Any, labels: Labels) -> None:
    """Keep in the model's configuration which columns are text and label, and whether lists of labels are flags."""
    reading = {"text_columns": list(columns), "label_column": data_args.label_column}
    if data_args.label_columns:
        reading |= {"label_column": None, "label_columns": list(data_args.label_columns)}
    setattr(config, KEPT, reading | {"flags": labels.flags})


def recall_reading(data_args: Any, config: PreTrainedConfig, splits: dict[str, Dataset]) -> None:
    """Fill in the columns that were not given: as the model's own data were read, where the run does not train."""
    kept = {} if "train" in splits else kept_reading(config)
    texts = kept.get("text_columns")
    if texts and data_args.text_columns is None and not data_args.task_name:
        names = [{*dataset.column_names, *unfit_columns(dataset)} for dataset in splits.values()]
        if any(set(texts) & found for found in names):
            data_args.text_columns = list(texts)
        else:
            logger.warning("The model was trained on the text of %s, which these data lack.", " + ".join(texts))
    if data_args.label_column is None and data_args.label_columns is None and not data_args.task_name:
        data_args.label_columns = kept.get("label_columns")
        data_args.label_column = kept.get("label_column")
    data_args.label_column = data_args.label_column or "label"


def join_label_columns(splits: dict[str, Dataset], columns: Sequence[str], name: str) -> dict[str, Dataset]:
    """Put the 0/1 columns of several classes into one column of flags; a test set may lack them, or hold -1.

    Raises:
        ValueError: a column is missing, or holds anything but 0 and 1; names the row.
    """
    joined = {}
    for split, dataset in splits.items():
        check_fit(dataset, *columns)
        if split.startswith("test") and not set(columns) <= set(dataset.column_names):
            joined[split] = dataset
            continue
        require_columns(dataset, columns, split, "label_columns")
        rows: list[list[float] | None] = []
        for number, values in enumerate(zip(*(dataset[column] for column in columns), strict=True), 1):
            if all(value is None or value == "" or is_marker(value) for value in values):
                rows.append(None)
                continue
            flags = [_flag(value) for value in values]
            if None in flags:
                odd = flags.index(None)
                raise ValueError(
                    f"row {number} of the {split} data: column {columns[odd]!r} of --label_columns holds "
                    f"{values[odd]!r:.60}. Each must say with 0 or 1 whether the class applies: correct the row, or "
                    "name other columns."
                )
            rows.append(flags)
        others = dataset.remove_columns([column for column in (*columns, name) if column in dataset.column_names])
        joined[split] = others.add_column(name, rows)
    return joined


def _flag(value: Any) -> float | None:
    text = str(value).strip().lower()
    return {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}.get(text)


def drop_missing_labels(splits: dict[str, Dataset], column: str) -> dict[str, Dataset]:
    """Leave out the rows without a label, of all splits but the test set; says how many."""
    kept = {}
    for split, dataset in splits.items():
        kept[split] = dataset
        if split.startswith("test"):
            continue
        values = list(dataset[column])
        rows = [row for row, v in enumerate(values) if not (v is None or v == "" or v != v or is_marker(v))]
        if not rows:
            raise ValueError(f"no row of the {split} data has a label in column {column!r}: nothing is left.")
        if len(rows) < len(values):
            logger.warning(
                "%s: %d of %d rows without a label are left out (--missing_label drop).",
                *(split, len(values) - len(rows), len(values)),
            )
            kept[split] = dataset.select(rows)
    return kept


def tell_reading(
    texts: Sequence[str], columns: Sequence[str], labels: Labels, targets: dict[str, list[Any] | None]
) -> None:
    """Tell what was taken for text and label, the problem type, and how often each class occurs."""
    split, values = next(((split, found) for split, found in targets.items() if found is not None), ("", None))
    told = ""
    if values is not None and labels.problem_type == REGRESSION:
        told = f" {min(values):g} to {max(values):g} in {len(values)} rows of the {split} data."
    elif values is not None:
        counts = count_classes(values, labels)
        most = [f"{name:.40} ({counts[name]})" for name in labels.names[:20]]
        more = f" and {len(labels.names) - 20} more" if len(labels.names) > 20 else ""
        told = f" Rows of the {split} data by class: {', '.join(most)}{more}."
        if labels.problem_type == MULTI and (none := sum(not any(row) for row in values)):
            told += f" {none} of {len(values)} rows have none."
    logger.info(
        "Read as text: %s; label: %s; problem type: %s.%s Others: --text_columns, --label_column(s), --problem_type.",
        *(" + ".join(texts), ", ".join(columns), labels.problem_type, told),
    )
