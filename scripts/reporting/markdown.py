"""Cells and tables of a markdown report."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_rdrop.cards.markdown import NOTHING, table

__all__ = ["NOTHING", "number_cell", "plain", "table_lines"]


def number_cell(value: float | None, form: str, unit: str = "") -> str:
    """Write a number in a format, if there is one."""
    return NOTHING if value is None else f"{value:{form}}{unit}"


def plain(value: Any) -> str:
    """Write a value, or a dict or list of values, as a text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def table_lines(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a markdown table."""
    return table(columns, rows).split("\n")
