"""Labels of a data set: classes, several classes at once, or numbers; and their model's outputs."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
from transformers import PreTrainedConfig

from finetuning.command_line import closest

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE, MULTI, REGRESSION)
MARKERS = ("-1", "-")  # of rows without a label, in SNLI and others
WHOLE = re.compile(r"-?\d+(\.0*)?")

_LARGEST_NUMBER = 1e18  # float32 ends at 3e38


@dataclass
class Labels:
    """Meaning of label values, and the targets that they become.

    Args:
        problem_type: one of Transformers' problem types.
        names: the classes in the order of the model's outputs; empty for regression.
        index_names: what integers in the data stand for, where the data (or the task) say it. Without it an integer
            is the name of a class itself: 1 to 5 stars are the classes "1" to "5".
        flags: of several classes at once, whether a list holds a 0 or 1 for each class, not the classes that apply.
    """

    problem_type: str
    names: list[str]
    index_names: Sequence[str] | None = None
    flags: bool = False

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
        if self.flags or any(isinstance(item, float) for item in value):  # otherwise the classes that apply
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
            advice = "Correct or remove the row, or add examples to the training data."
            if name in MARKERS:
                advice = "It usually marks a row without a label: give --missing_label drop to leave such rows out."
            raise ValueError(
                f"{name!r:.60} does not occur in the training data{closest(name, self.names)}, so the model has no "
                f"output for it. Known labels: {some(self.names)}. {advice}"
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
            whole = re.sub(r"\.0*$", "", value) if WHOLE.fullmatch(value) else value  # 1.0 is the class 1
            return whole if value not in self.names and whole in self.names else value
        if not isinstance(value, int):
            raise ValueError(f"{value!r:.60} ({type(value).__name__}) is no class: give whole numbers or strings.")
        if names is None:
            return str(value)
        if not 0 <= value < len(names):
            hint = (
                " -1 usually marks a row without a label: remove such rows, or give --missing_label drop."
                if value == -1
                else ""
            )
            raise ValueError(
                f"{int(value)} is out of range: there are {len(names)} classes, 0 to {len(names) - 1} "
                f"({some(names)}).{hint or ' Correct the row, or the choice of task and column.'}"
            )
        return names[value]


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


def labels_of_model(config: PreTrainedConfig, index_names: Sequence[str] | None, flags: bool = False) -> Labels:
    """Return the labels of a fine-tuned model, for a run that does not train; `flags` as in `Labels`."""
    names, unnamed = model_names(config)
    problem_type = config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE)
    if problem_type == REGRESSION:
        return Labels(REGRESSION, [])
    if index_names is not None:
        return follow_model(Labels(problem_type, list(index_names), index_names), config, training=False)
    return Labels(problem_type, names, names if unnamed else None, flags)


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
            f"the model's labels ({some(names)}) are not those of the data ({some(labels.names)}), so its "
            "predictions could not be compared. Choose the model that was trained on these data, or --do_train."
        )
    return labels


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


def some(names: Sequence[str], most: int = 12) -> str:
    """List names, the first ones only when there are many."""
    return f"{', '.join(names[:most]):.300}" + (f" and {len(names) - most} more" if len(names) > most else "")
