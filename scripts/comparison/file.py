"""comparison.json: the one place where it is written, and where the scripts read it.

Its format is owned by `hf_rdrop.cards.evidence`, which describes the keys and puts a comparison on model cards.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetuning.results import write_file
from hf_rdrop.cards.evidence import FORMAT, check_format


def write_comparison(path: Path, content: Mapping[str, Any]) -> None:
    """Write everything that is known of a comparison, its format first, with a line for each item of a list."""
    lines = (f"{json.dumps(name)}: {_compact(value)}" for name, value in {"format": FORMAT, **content}.items())
    write_file(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read_comparison(path: Path, option: str) -> dict[str, Any]:
    """Return the content of a comparison.json that was given by this option of the command line.

    Raises:
        ValueError: it cannot be read, or was written in a newer format.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        found.get("format")
    except (OSError, ValueError, AttributeError) as error:
        raise not_one(path, option, error) from error
    check_format(found, f"{option} {path}")
    return found


def not_one(path: Path, option: str, error: Exception) -> ValueError:
    """Make the error for a file that turned out to be something else."""
    return ValueError(
        f"{option} {path} is no comparison.json of compare.py ({type(error).__name__}: {error}). Give the file that "
        "compare.py writes into its --output_dir."
    )


def _compact(value: Any) -> str:
    """Write JSON with a line for each item of a list: hundreds of runs stay readable, and small."""
    if isinstance(value, list):
        return "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
    return json.dumps(value)
