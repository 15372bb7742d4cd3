"""Output folder of many runs: one process at work in it, and one set of settings."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finetuning.results import read_json, write_json


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the lock goes with the process, however that ends.

    Raises:
        ValueError: another process holds it.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another process is at work in {folder}: wait for its end, or choose another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_same_comparison(folder: Path, settings: dict[str, Any]) -> None:
    """Remember what is compared in a folder; refuse to mix another comparison into it.

    Raises:
        ValueError: the folder holds something else.
    """
    file = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if folder.exists() and any(folder.iterdir()) and (not file.exists() or read_json(file) != settings):
        raise ValueError(
            f"--output_dir {folder} holds {'another comparison' if file.exists() else 'other files'}: finished runs "
            "would be mixed with others. Give the same arguments to go on with it, or choose another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)
