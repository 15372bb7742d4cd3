"""What the labels of a training set are: classes, several classes at once, or numbers."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from finetuning.labels import MARKERS, MULTI, REGRESSION, SINGLE, WHOLE, Labels, collect_names, some

logger = logging.getLogger(f"hf_rdrop.scripts.{__name__}")

_MOST_CLASSES = 50  # of whole numbers that are written as real ones


def infer_labels(
    values: Sequence[Any],
    column: str,
    split: str = "training",
    index_names: Sequence[str] | None = None,
    problem_type: str | None = None,
    refuse_markers: bool = False,
) -> Labels:
    """Find out what the labels of a training set are.

    Args:
        values: the label column.
        column: its name, for error messages.
        split: the split's name, for error messages.
        index_names: names of the classes where the data or the task give them.
        problem_type: what they are to be taken as; found out from the values by default. Strings, whole numbers (also
            written as 1.0) and booleans are classes, other real numbers regression, lists multi-label.
        refuse_markers: refuse what usually marks a row without a label: -1 beside 0, 1, ..., or a dash beside names.

    Raises:
        ValueError: a label is missing or of no use, there is only one class, or more than one reading.
    """
    present = [value for value in values if value is not None and value != ""]
    if not present:
        raise ValueError(f"column {column!r} of the {split} data holds no label. Choose another column.")
    given, problem_type = problem_type, problem_type or _guess_problem_type(values, column, split, index_names)
    labels = Labels(problem_type, list(index_names or ()), index_names)
    if problem_type == REGRESSION:
        return labels
    if problem_type == MULTI:
        labels.flags = index_names is None and are_flags(present)
    if problem_type == MULTI and (
        labels.flags or any(isinstance(item, float) for row in present for item in _items(row))
    ):
        labels.names = labels.names or [str(index) for index in range(len(present[0]))]
    elif index_names is None:
        if problem_type == SINGLE and _written_as_real(present):
            values = _as_classes(values, column, split, warn=given is None)
        rows = (_items(value) if problem_type == MULTI else [value] for value in values)
        labels.names = collect_names(rows, column, split)
    if refuse_markers and problem_type == SINGLE and index_names is None:
        _check_markers(labels.names, values, column, split)
    if len(labels.names) < 2 and problem_type == SINGLE:
        raise ValueError(
            f"every row of the {split} data has the label {labels.names[0]!r:.60} in column {column!r}: there is "
            "nothing to tell apart. Choose another column, or check how the file was made."
        )
    return labels


def are_flags(values: Sequence[Any]) -> bool:
    """Tell whether lists of labels hold a 0 or 1 for each class: all of one length of two or more, and nothing else.

    As class numbers, [1, 0] and [0, 1] would be the same target, and longer ones name a class twice.
    """
    lists = [value for value in values if isinstance(value, list)]
    lengths = {len(value) for value in lists}
    return bool(lists) and lengths.isdisjoint({0, 1}) and len(lengths) == 1 and all(
        isinstance(item, int | float) and item in (0, 1) for value in lists for item in value
    )  # fmt: skip


def _guess_problem_type(values: Sequence[Any], column: str, split: str, index_names: Any) -> str:
    present = [value for value in values if value is not None and value != ""]
    kinds = {type(value) for value in present}
    if list in kinds:
        return MULTI
    if index_names is not None or (float not in kinds and kinds != {str}):
        return SINGLE
    if kinds == {str} and all(re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL) for value in present):
        raise ValueError(
            f"row 1 of the {split} data, column {column!r}: {present[0]!r:.60} is a list written as text, which a csv "
            "file cannot hold. Give a jsonl file, or a column of 0 and 1 for each class with --label_columns."
        )
    numbers = [not isinstance(value, str) or _is_number(value) for value in present]
    if all(numbers) and all(value != value or _is_whole(value) for value in present):
        return SINGLE
    if kinds == {str} and not any(n and not _is_whole(v) for n, v in zip(numbers, present, strict=True)):
        return SINGLE
    for row, value in enumerate(values, 1):
        if isinstance(value, str) and value and not _is_number(value):
            raise ValueError(
                f"row {row} of the {split} data, column {column!r}: label {value!r:.60} is no number, but "
                f"those of other rows are. Correct the row; if they are names, give --problem_type {SINGLE}."
            )
    return REGRESSION


def _written_as_real(present: Sequence[Any]) -> bool:
    """Tell whether whole numbers are written as real ones, 0.0 and 1.0, in some row."""
    return all(_is_whole(v) or v != v for v in present) and any(
        isinstance(v, float) or (isinstance(v, str) and "." in v) for v in present
    )


def _as_classes(values: Sequence[Any], column: str, split: str, warn: bool) -> list[Any]:
    """Write 1.0 as 1, with a word about it where nobody said that they are classes."""
    found = [int(float(v)) if v is not None and v != "" and _is_whole(v) else v for v in values]
    classes = set(map(str, found))
    if warn and len(classes) > _MOST_CLASSES:
        raise ValueError(
            f"column {column!r} of the {split} data holds {len(classes)} different whole numbers written as real ones "
            f"({values[0]}, ...): it is unclear whether they are classes or quantities. Give --problem_type {SINGLE} "
            f"or --problem_type {REGRESSION}."
        )
    if warn:
        logger.warning(
            "The labels of column %s are whole numbers written as real ones (%s): they are taken for classes. For "
            "numbers to predict, give --problem_type %s.",
            *(column, values[0], REGRESSION),
        )
    return found


def _check_markers(names: Sequence[str], values: Sequence[Any], column: str, split: str) -> None:
    """Refuse -1 beside 0, 1, ... and a dash beside names: usually rows without a label."""
    others = [name for name in names if name not in MARKERS]
    marker = next((name for name in names if name in MARKERS), None)
    if marker is None or not others or (marker == "-1" and not ("0" in others and all(map(str.isdigit, others)))):
        return
    rows = [row for row, value in enumerate(values, 1) if is_marker(value)]
    raise ValueError(
        f"row {rows[0]} of the {split} data, column {column!r}: label {marker} beside {some(others)}, in {len(rows)} "
        f"of {len(values)} rows. It usually marks a row without a label, and would be learnt as a class. Give "
        "--missing_label drop to leave such rows out, or --missing_label class if it is a class of its own."
    )


def is_marker(value: Any) -> bool:
    """Tell whether a value marks a row without a label where there are such marks."""
    if isinstance(value, bool | list | dict):
        return False
    return value in (-1, "-", "-1") or (
        isinstance(value, str) and WHOLE.fullmatch(value) is not None and float(value) == -1
    )


def count_classes(targets: Sequence[Any], labels: Labels) -> Counter[str]:
    """Count the rows of each class."""
    if labels.problem_type == MULTI:
        return Counter(name for row in targets for name, flag in zip(labels.names, row, strict=True) if flag)
    return Counter(labels.names[index] for index in targets)


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_whole(value: Any) -> bool:
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) or (isinstance(value, str) and WHOLE.fullmatch(value) is not None)


def _is_number(value: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value or "") is not None
