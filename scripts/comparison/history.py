"""Log lines of a run as columns, which is how comparison.json has them: a third of their size."""

from collections.abc import Mapping, Sequence
from typing import Any

# What the curves are drawn from; the rest of a log line can be read in the run's own folder.
COLUMNS = ("step", "epoch", "loss", "ce_loss", "kl_loss")


def as_columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Turn lines into columns, those of `COLUMNS` that occur, to six digits (float32 has seven); None for no value."""
    return {
        name: [None if (value := line.get(name)) is None else _short(value) for line in lines]
        for name in COLUMNS
        if any(name in line for line in lines)
    }


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def as_lines(columns: Mapping[str, Sequence[float | None]]) -> list[dict[str, float]]:
    """Turn the columns of `as_columns` back into log lines.

    Raises:
        ValueError: the columns have different lengths.
    """
    lines = zip(*columns.values(), strict=True)
    return [{name: value for name, value in zip(columns, line, strict=True) if value is not None} for line in lines]
