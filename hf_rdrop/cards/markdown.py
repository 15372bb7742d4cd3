"""Write the text of model cards: one template, markdown that no name can break, no paths of this machine."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, StrictUndefined

NOTHING = "–"
TEMPLATE = Path(__file__).with_name("template.md")
#: Parts of the template; each is left out when nothing is given for it.
PARTS = (
    *("title", "about", "reference", "evaluation", "usage", "rdrop", "curves", "outcome", "comparison", "tables"),
    *("consistency", "settings", "reproduce", "hyperparameters", "versions", "limitations", "library"),
)
_MARKDOWN = re.compile(r"(?<!\w)_|_(?!\w)|[\\`*{}\[\]<>~$&]")
_PATH_START = re.compile(r"file:|~|/|\\|\.{1,2}[/\\]|[A-Za-z]:[/\\]")
# A path within a text; not the slashes of an address (https://) or of en/de.
_PATH_INSIDE = re.compile(r"(?:file:/*|(?<![\w/])(?:~|\.{1,2}|[A-Za-z]:)?(?!//)[/\\])[^\s\"'`,;()]*[^\s\"'`,;()/\\]")


# ---- Names ----


def last_part(path: str) -> str:
    """Return the last component of a path of any system; "" when it has none."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else ""


def public(value: Any) -> str:
    """Cut every path of this machine in a value to its last component."""
    text = str(value)
    if _PATH_START.match(text) or (re.search(r"[/\\]", text) and Path(text).exists()):
        return last_part(text)
    return _PATH_INSIDE.sub(lambda found: last_part(found[0]), text)


def is_hub_id(name: Any) -> bool:
    """Tell whether this can be the name of a repository on the Hub, and is not that of a folder here."""
    if not isinstance(name, str) or not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


# ---- Markdown ----


def inline(value: Any) -> str:
    """Escape a text for a line of markdown."""
    line = "".join(letter for letter in " ".join(str(value).split()) if letter.isprintable())
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", line)


def code(value: Any) -> str:
    """Mark a text as code within a line."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39)) or ' '}`"


def link(name: str, kind: str = "") -> str:
    """Link a name if it can be one on the Hub; `kind` is "datasets/" for a data set."""
    return f"[{inline(name)}](https://huggingface.co/{kind}{name})" if is_hub_id(name) else inline(public(name))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Build a markdown table of cells that are markdown already."""
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines)


def number(value: Any) -> str:
    """Format a figure with four significant digits, other values as text, None as a dash."""
    if value is None:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, Real):
        return inline(public(value))
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{float(value):.0f}" if abs(float(value)) >= 1e4 else f"{float(value):.4g}"


def spread(mean: float, std: float | None, form: str = ".2f") -> str:
    """Format mean ± standard deviation."""
    return f"{mean:{form}}" if std is None else f"{mean:{form}} ± {std:{form}}"


# ---- The card ----


def render(data: ModelCardData, **parts: Any) -> ModelCard:
    """Fill metadata and any of `PARTS` into the template.

    Raises:
        ValueError: `huggingface_hub` does not accept the metadata.
    """
    # ModelCard.from_template would render the undefined as nothing, and leaves an empty line for every {% if %}.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters |= {"inline": inline, "code": code, "quoted": partial(json.dumps, ensure_ascii=False)}
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    text = template.render(dict.fromkeys(PARTS) | {"metadata": data.to_yaml()} | parts)
    return ModelCard(re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n")
