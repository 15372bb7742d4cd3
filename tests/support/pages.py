"""The project's pages: their code blocks, commands, links and figures, and the files that the figures come from."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from support import ROOT

CARDS_FOLDER = ROOT / "model_cards"
REFERENCE = CARDS_FOLDER / "reference"
README = ROOT / "README.md"
PAGES = [
    README,
    CARDS_FOLDER / "r-drop.md",
    *sorted((CARDS_FOLDER / "guides").glob("*.md")),
    CARDS_FOLDER / "benchmark" / "README.md",
    CARDS_FOLDER / "families" / "README.md",
    *sorted(REFERENCE.rglob("README.md")),
    ROOT / "scripts" / "README.md",
    ROOT / "tests" / "README.md",
]
CARDS = sorted(REFERENCE.rglob("cards/*.md"))


def name(page: Path) -> str:
    """The page's path in the repository."""
    return str(page.relative_to(ROOT))


def blocks(language: str, page: Path) -> list[str]:
    """The page's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def bash_lines(page: Path) -> list[str]:
    """The lines of the page's bash blocks: continued lines joined, variables that it sets replaced."""
    text = "\n".join(blocks("bash", page)).replace("\\\n", " ")
    for variable, value in re.findall(r'^(\w+)="(.*)"$', text, flags=re.MULTILINE):
        text = text.replace(f"${variable}", value)
    return [line.strip() for line in text.splitlines() if line.strip()]


def commands(page: Path) -> list[str]:
    """The calls of scripts in the page's bash blocks."""
    return [line[line.index("python scripts/") :] for line in bash_lines(page) if "python scripts/" in line]


def prose(page: Path) -> str:
    """The page without code blocks, code in the text, indented formulas and the targets of links."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "", text))


def anchors(page: Path) -> set[str]:
    """The names of the page's headings in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def comparison(folder: str) -> dict[str, Any]:
    """The committed comparison.json of a folder of model_cards/reference."""
    return json.loads((REFERENCE / folder / "comparison.json").read_text("utf-8"))


@cache
def benchmark(folder: str) -> dict[str, Any]:
    """The committed benchmark.json of a folder of model_cards/benchmark."""
    return json.loads((CARDS_FOLDER / "benchmark" / folder / "benchmark.json").read_text("utf-8"))


def row(folder: str, task: str, arm: str) -> dict[str, Any]:
    """The figures of one setting on one task ("average": over tasks)."""
    found = comparison(folder)
    return next(row for row in [*found["rows"], *found["average"]] if (row["task"], row["arm"]) == (task, arm))
