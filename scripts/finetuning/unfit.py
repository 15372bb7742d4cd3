"""Columns of a file that are no column of a table, such as ids of which some are numbers: refused where they are used.

A data set keeps what was wrong with them in its description, which stays with it when rows are chosen.
"""

import json
from typing import Any

from datasets import Dataset

_STRINGS = 200  # values kept, to tell whether the column holds texts
_NOTE = {"message", "strings", "mixed"}


def note_unfit(dataset: Dataset, found: dict[str, tuple[str, list[Any]]]) -> Dataset:
    """Keep why these columns were left out: of each the message, and its values."""
    notes = {
        name: {
            "message": message,
            "strings": [value for value in values if isinstance(value, str)][:_STRINGS],
            "mixed": not all(isinstance(value, str) for value in values),
        }
        for name, (message, values) in found.items()
    }
    if notes:
        dataset.info.description = json.dumps(notes)
    return dataset


def unfit_columns(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Return the columns that were left out: of each `message`, its first `strings`, and if it is `mixed`."""
    try:
        found = json.loads(dataset.info.description or "{}")
    except ValueError:  # a description in words, of a data set of the Hub
        return {}
    return found if isinstance(found, dict) and all(_is_note(note) for note in found.values()) else {}


def _is_note(note: Any) -> bool:
    return isinstance(note, dict) and note.keys() == _NOTE


def check_fit(dataset: Dataset, *names: str | None) -> None:
    """Raise `ValueError` where one of these columns was left out, with what was wrong in which row."""
    notes = unfit_columns(dataset)
    for name in names:
        if name in notes:
            raise ValueError(notes[name]["message"])
