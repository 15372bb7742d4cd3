"""Write the readable table of a survey."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from reporting.markdown import table_lines

from .pairs import HEADS

WORDS = {"right": "yes", "refused": "refused", "no": "–", "": "–", "wrong": "**wrong**", "error": "**error**"}

LONGEST = 150  # characters of a reason in the table of what was not tried


def write_table(file: Path, survey: dict[str, Any]) -> None:
    """Write the README.md of a survey."""
    file.write_text("\n".join(lines(survey)) + "\n", encoding="utf-8")


def lines(survey: dict[str, Any]) -> list[str]:
    """Write a survey as markdown."""
    records = list(survey["pairs"].values())
    notes = _Notes()
    found: list[str] = []
    for head in HEADS:
        rows = sorted((r for r in records if r["head"] == head and r["status"] != "not tried"), key=_family)
        if rows:
            found += ["", f"## {head[0].upper()}{head[1:]}", "", *_table(rows, notes)]
    counts = Counter(r["status"] for r in records)
    tried = sum(counts.values()) - counts["not tried"]
    return [
        "# Families",
        "",
        f"R-Drop on a tiny model of the families in the auto mappings of transformers {survey['transformers']}, with "
        f"torch {survey['torch']} on a CPU. Last tried on {survey['date']} at commit {survey['commit']}, written by "
        "`python scripts/families.py`; [families.json](families.json) has every figure, and the commit of each pair.",
        "",
        f"Of {sum(counts.values())} pairs of head and family {tried} were tried. {counts['right']} train with the "
        f"right values, {counts['refused']} are refused with a reason, {counts['wrong']} have a wrong value, and "
        f"{counts['error']} raise an error. {counts['not tried']} [could not be tried](#not-tried).",
        "",
        "Each model has random weights and is trained for one step in several ways. The values are compared with "
        "those recomputed in float64 from the logits that the model gave. That shows the objective to be right, and "
        "says nothing of what R-Drop gains. Language models that also hear were given text alone. So were those that "
        "also see where a remark says so.",
        "",
        "- **R-Drop**: `ce_loss` is the model's own loss of both passes, `kl_loss` the divergence at the scored "
        "positions, and `loss` their sum with alpha. Four batches of two rows give the loss and gradients of one of "
        "eight. `rdrop_alpha=0` gives those of the plain Trainer. Remarks name exceptions.",
        '- **Fused head**: `rdrop_fused_head="on"` gives the loss and gradients of full logits.',
        "- **Trunk**: the values are right with `rdrop_shared_layers=1`, too.",
        "- **Dropout**: whether two passes differ by default, or else the argument that makes them differ "
        "(`drop_path_rate`: the model was loaded with it).",
        "- A number in brackets is a [remark or reason](#remarks-and-reasons).",
        *found,
        "",
        "## Remarks and reasons",
        "",
        *notes.lines(),
        "",
        "## Not tried",
        "",
        *_not_tried(records),
    ]


def _family(record: dict[str, Any]) -> str:
    return record["family"]


def _table(rows: list[dict[str, Any]], notes: "_Notes") -> list[str]:
    columns = ("family", "R-Drop", "fused head", "trunk", "dropout", "remarks")
    return table_lines(columns, [_row(row, notes) for row in rows])


def _row(record: dict[str, Any], notes: "_Notes") -> tuple[str, ...]:
    def cell(part: str) -> str:
        reason = record["reasons"].get(part)
        return WORDS[record[part]] + (f" {notes.number(reason, record)}" if reason else "")

    others = [
        record["reasons"][name] for name in ("accumulation", "alpha_zero", "process") if name in record["reasons"]
    ]
    remarks = " ".join(notes.number(text, record) for text in [*record["remarks"], *others])
    dropout = {"default": "by default", "none": "none", "": "–"}.get(record["dropout"], f"`{record['dropout']}`")
    if record["rdrop"] == "refused" and record["dropout"] == "default":
        dropout = "by default"
    return (record["family"], cell("rdrop"), cell("fused_head"), cell("trunk"), dropout, remarks)


class _Notes:
    """Numbers the remarks; the same words with other figures or names are one."""

    def __init__(self) -> None:
        self.texts: dict[str, tuple[int, str]] = {}

    def number(self, text: str, record: dict[str, Any]) -> str:
        key = _kind(text, record)
        number, _ = self.texts.setdefault(key, (len(self.texts) + 1, key))
        return f"[{number}]"

    def lines(self) -> list[str]:
        return [f"{number}. {text}" for number, text in self.texts.values()] or ["None."]


def _kind(text: str, record: dict[str, Any]) -> str:
    """Take what belongs to a single model out of a reason, and the advice after its first sentence."""
    text = text.replace(record["model_class"], "the model")
    while (shorter := re.sub(r"\s*\([^()]*\)", "", text)) != text:
        text = shorter
    text = re.split(r"(?<=[a-z\d])\.\s", text)[0].rstrip(".")
    text = re.sub(r"(?<![=\w.])\d+\.\d+(e-?\d+)?", "…", text)
    return re.sub(r"\d+ lists", "several lists", text)


def _not_tried(records: list[dict[str, Any]]) -> list[str]:
    rows = sorted((r for r in records if r["status"] == "not tried"), key=lambda r: (r["head"], r["family"]))
    if not rows:
        return ["Every pair was tried."]
    return [
        "No tiny model could be built here (mostly for a library that is not installed), or the plain Trainer cannot "
        "train it on the rows that are made here.",
        "",
        *table_lines(("head", "family", "why"), [(r["head"], r["family"], _short(r)) for r in rows]),
    ]


def _short(record: dict[str, Any]) -> str:
    text = record["reasons"]["not tried"].replace("|", "/")
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(' ', 1)[0]} ..."
