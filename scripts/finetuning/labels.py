"""Labels of a data set: classes, several classes at once, or numbers; and their model's outputs."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
from transformers import PreTrainedConfig

from finetuning.run import closest

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE, MULTI, REGRESSION)

_LARGEST_NUMBER = 1e18  # float32 ends at 3e38


@dataclass
class Labels:
    """Meaning of label values, and the targets that they become.

    Args:
        problem_type: one of Transformers' problem types.
        names: the classes in the order of the model's outputs; empty for regression.
        index_names: what integers in the data stand for, where the data (or the task) say it. Without it an integer
            is the name of a class itself: 1 to 5 stars are the classes "1" to "5".
    """

    problem_type: str
    names: list[str]
    index_names: Sequence[str] | None = None

    def config_changes(self) -> dict[str, Any]:
        """Return the values that the model's configuration must have for a head with these outputs."""
        if self.problem_type == REGRESSION:
            return {"num_labels": 1, "problem_type": REGRESSION}
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
            "problem_type": self.problem_type,
        }

    def encode(self, value: Any) -> int | float | list[float]:
        """Return the target for one value: a class index, a number, or a 0/1 vector.

        Raises:
            ValueError: the value is of the wrong type, out of range, or a class that is not known.
        """
        if self.problem_type == REGRESSION:
            return _number(value)
        if self.problem_type == SINGLE:
            return self._index(value)
        if not isinstance(value, list):
            raise ValueError(f"{value!r:.60} is no list of labels.")
        if any(isinstance(item, float) for item in value):  # a 0/1 vector; otherwise the classes that apply
            if len(value) != len(self.names) or any(flag not in (0, 1) for flag in value):
                raise ValueError(f"{value!r:.60} is no vector of {len(self.names)} flags, each 0 or 1.")
            return [float(flag) for flag in value]
        indices = [self._index(item) for item in value]
        if len(set(indices)) < len(indices):
            raise ValueError(f"{value!r:.60} names a label twice. For 0/1 flags write real numbers: [0.0, 1.0].")
        return [float(index in indices) for index in range(len(self.names))]

    def encode_rows(self, values: Iterable[Any], column: str, split: str) -> list[Any]:
        """`encode` for each row; errors name the row."""
        targets = []
        for row, value in enumerate(values, 1):
            try:
                targets.append(self.encode(value))
            except ValueError as error:
                raise ValueError(f"row {row} of the {split} data, column {column!r}: label {error}") from error
        return targets

    def withheld(self, values: Sequence[Any]) -> bool:
        """Tell whether a test set hides its labels: missing, or -1 where that is no label of its own."""
        hidden = {None, ""}
        if "-1" not in self.names and self.problem_type != MULTI:
            hidden |= {-1, "-1"}
        if self.problem_type == REGRESSION and any(isinstance(v, (list, dict)) or v not in hidden for v in values):
            hidden = {None, ""}  # among other numbers, -1 is a number
        return any(not isinstance(value, (list, dict)) and value in hidden for value in values)

    def _index(self, value: Any) -> int:
        name = self._name(value)
        if name not in self.names:
            raise ValueError(
                f"{name!r:.60} does not occur in the training data{closest(name, self.names)}, so the model has no "
                f"output for it. Known labels: {_some(self.names)}. Correct or remove the row, or add examples to the "
                "training data."
            )
        return self.names.index(name)

    def _name(self, value: Any) -> str:
        names = self.index_names
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str) and names is not None and value not in names and re.fullmatch(r"-?\d+", value):
            value = int(value)
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            raise ValueError(f"{value!r} is missing. Fill it in, or remove the row.")
        if isinstance(value, str):
            return value
        if not isinstance(value, int):
            raise ValueError(f"{value!r:.60} ({type(value).__name__}) is no class: give whole numbers or strings.")
        if names is None:
            return str(value)
        if not 0 <= value < len(names):
            hint = " -1 usually marks a row without a label: remove such rows." if value == -1 else ""
            raise ValueError(
                f"{int(value)} is out of range: there are {len(names)} classes, 0 to {len(names) - 1} "
                f"({_some(names)}).{hint or ' Correct the row, or the choice of task and column.'}"
            )
        return names[value]


def infer_labels(
    values: Sequence[Any],
    column: str,
    split: str = "training",
    index_names: Sequence[str] | None = None,
    problem_type: str | None = None,
) -> Labels:
    """Find out what the labels of a training set are.

    Args:
        values: the label column.
        column: its name, for error messages.
        split: the split's name, for error messages.
        index_names: names of the classes where the data or the task give them.
        problem_type: what they are to be taken as; found out from the values by default. Strings, whole numbers and
            booleans are classes, real numbers regression, lists multi-label.

    Raises:
        ValueError: a label is missing or of no use, or there is only one class.
    """
    present = [value for value in values if value is not None and value != ""]
    if not present:
        raise ValueError(f"column {column!r} of the {split} data holds no label. Choose another column.")
    problem_type = problem_type or _guess_problem_type(values, column, split, index_names)
    labels = Labels(problem_type, list(index_names or ()), index_names)
    if problem_type == REGRESSION:
        return labels
    if problem_type == MULTI and any(isinstance(item, float) for row in present for item in _items(row)):
        labels.names = labels.names or [str(index) for index in range(len(present[0]))]
    elif index_names is None:
        rows = (_items(value) if problem_type == MULTI else [value] for value in values)
        labels.names = collect_names(rows, column, split)
    if len(labels.names) < 2 and problem_type == SINGLE:
        raise ValueError(
            f"every row of the {split} data has the label {labels.names[0]!r:.60} in column {column!r}: there is "
            "nothing to tell apart. Choose another column, or check how the file was made."
        )
    return labels


def collect_names(
    rows: Iterable[Sequence[Any]], column: str, split: str, index_names: Sequence[str] | None = None
) -> list[str]:
    """Collect the names of all classes in rows of labels, in a fixed order; errors name the row."""
    labels, names = Labels(SINGLE, [], index_names), set()
    for row, values in enumerate(rows, 1):
        try:
            names.update(labels._name(value) for value in values)
        except ValueError as error:
            raise ValueError(f"row {row} of the {split} data, column {column!r}: label {error}") from error
    return sort_names(names)


def sort_names(names: Iterable[str]) -> list[str]:
    """Class names in a fixed order: as numbers where all are whole numbers."""
    names = list(names)
    return sorted(names, key=int if all(re.fullmatch(r"-?\d+", name) for name in names) else str)


def feature_names(feature: Any) -> list[str] | None:
    """Return the names that a `ClassLabel` column, or a column of lists of them, gives its integers."""
    inner = getattr(feature, "feature", feature)
    return list(inner.names) if isinstance(inner, datasets.ClassLabel) else None


def model_names(config: PreTrainedConfig) -> tuple[list[str], bool]:
    """Return the labels that a model's configuration names, and whether they are the library's LABEL_0, ..."""
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    return names, all(name == f"LABEL_{index}" for index, name in enumerate(names))


def labels_of_model(config: PreTrainedConfig, index_names: Sequence[str] | None) -> Labels:
    """Return the labels of a fine-tuned model, for a run that does not train."""
    names, unnamed = model_names(config)
    problem_type = config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE)
    if problem_type == REGRESSION:
        return Labels(REGRESSION, [])
    if index_names is not None:
        return follow_model(Labels(problem_type, list(index_names), index_names), config, training=False)
    return Labels(problem_type, names, names if unnamed else None)


def follow_model(labels: Labels, config: PreTrainedConfig, training: bool) -> Labels:
    """Give the classes the order of the model's outputs when it was trained for the same ones.

    Raises:
        ValueError: the run does not train, and the model's labels are not those of the data.
    """
    names, unnamed = model_names(config)
    by_name = {name.lower(): name for name in labels.names}
    if not unnamed and len(by_name) == len(labels.names) and sorted(by_name) == sorted(name.lower() for name in names):
        return replace(labels, names=[by_name[name.lower()] for name in names])
    if not training and labels.problem_type != REGRESSION and (not unnamed or len(names) != len(labels.names)):
        raise ValueError(
            f"the model's labels ({_some(names)}) are not those of the data ({_some(labels.names)}), so its "
            "predictions could not be compared. Choose the model that was trained on these data, or --do_train."
        )
    return labels


def _guess_problem_type(values: Sequence[Any], column: str, split: str, index_names: Any) -> str:
    kinds = {type(value) for value in values if value is not None and value != ""}
    if list in kinds:
        return MULTI
    if index_names is None and float in kinds:
        return REGRESSION
    if index_names is None and kinds == {str}:
        fractions = [_is_number(value) and not re.fullmatch(r"-?\d+", value) for value in values]
        if any(fractions):
            for row, value in enumerate(values, 1):
                if value and not _is_number(value):
                    raise ValueError(
                        f"row {row} of the {split} data, column {column!r}: label {value!r:.60} is no number, but "
                        f"those of other rows are. Correct the row; if they are names, give --problem_type {SINGLE}."
                    )
            return REGRESSION
    return SINGLE


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_number(value: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value or "") is not None


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or "_" in str(value):  # float() takes 1_0 for 10
        raise ValueError(f"{value!r:.60} is no finite number, as regression needs. Correct or remove the row.")
    if abs(number) > _LARGEST_NUMBER:
        raise ValueError(
            f"{value!r:.60} is too large: its squared error would be infinite. Correct or scale the labels."
        )
    return number


def _some(names: Sequence[str], most: int = 12) -> str:
    return f"{', '.join(names[:most]):.300}" + (f" and {len(names) - most} more" if len(names) > most else "")
