"""Result files: their names, and writing them so that each is either whole or not there."""

import json
import re
from pathlib import Path
from typing import Any

from hf_rdrop.files import write_atomically as write_file

LOWER_IS_BETTER = re.compile(r"(loss|nll|ece|brier|mse|perplexity)$")  # by the end of a metric's name
LAST_RESULT_FILE = "all_results.json"  # written after everything else: only a finished run has it
RESULT_FILES = (
    *("train_results.json", "eval_results.json", "predict_results.json", "trainer_state.json"),
    "consistency.json",
    *("predict_results*.txt", "predictions.txt", "generated_predictions.txt"),
)


def remove_results(folder: Path) -> None:
    """Take away the results of an earlier part of a run that goes on: they are not those of its end."""
    for pattern in (LAST_RESULT_FILE, *RESULT_FILES):
        for file in folder.glob(pattern):
            file.unlink()


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write metrics as the Transformers scripts do: sorted, indented by four."""
    write_file(path, json.dumps(values, indent=4, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds, or nothing when it is not there."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
