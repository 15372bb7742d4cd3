"""Made-up corpora of demo_data.py: their sizes, and the wrong labels in their training sets."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from demo.grammars import InventedLanguage, Row, make_names, report, review, sentence_pair
from finetuning.results import write_file

SIZES = {"classification": (800, 500), "ner": (300, 300), "translation": (400, 200)}  # train, validation
# Of the training set: share of rows with the other label, of entities with a wrong or no type, of rows with a word
# translated wrongly.
NOISE = {"classification": 0.10, "ner": 0.10, "translation": 0.10}


def flip_label(rng: random.Random, rows: list[Row], rate: float) -> None:
    """Give this share of the rows the other label."""
    for index in rng.sample(range(len(rows)), round(rate * len(rows))):
        rows[index]["label"] = 1 - rows[index]["label"]


def spoil_entities(rng: random.Random, rows: list[Row], rate: float) -> None:
    """Give this share of all entities another type, or none."""
    starts = [(row, place) for row in rows for place, tag in enumerate(row["ner_tags"]) if tag.startswith("B-")]
    for row, start in rng.sample(starts, round(rate * len(starts))):
        tags = row["ner_tags"]
        kind = rng.choice([kind for kind in ("PER", "LOC", "ORG", None) if kind != tags[start][2:]])
        end = start + 1
        while end < len(tags) and tags[end].startswith("I-"):
            end += 1
        for place in range(start, end):
            tags[place] = "O" if kind is None else f"{'B' if place == start else 'I'}-{kind}"


def mistranslate(rng: random.Random, rows: list[Row], rate: float) -> None:
    """Replace one word of the target by a word of another row's target, in this share of the rows."""
    texts = [row["translation"]["xx"].split() for row in rows]
    for index in rng.sample(range(len(rows)), round(rate * len(rows))):
        text = list(texts[index])
        place = rng.randrange(len(text) - 1)  # the full stop stays
        text[place] = rng.choice([word for other in texts for word in other[:-1] if word != text[place]])
        rows[index]["translation"]["xx"] = " ".join(text)


def distinct(draw: Callable[[], Row], count: int, seen: set[str]) -> list[Row]:
    """Draw rows until `count` have a source text that is not in `seen`, and add those texts to it."""
    rows: list[Row] = []
    while len(rows) < count:
        row = draw()
        text = source_text(row)
        if text not in seen:
            seen.add(text)
            rows.append(row)
    return rows


def source_text(row: Row) -> str:
    """Return what a model reads of a row."""
    if "tokens" in row:
        return " ".join(row["tokens"])
    return row["sentence"] if "sentence" in row else row["translation"]["en"]


def corpus(head: str, seed: int, noise: bool = True) -> dict[str, list[Row]]:
    """Return the rows of `train` and `validation` for one head; `noise=False` leaves the training set right too."""
    rng = random.Random(f"{head}-{seed}")
    train_size, validation_size = SIZES[head]
    if head == "classification":
        draws, spoil = [lambda: review(rng)] * 2, flip_label
    elif head == "ner":
        draws, spoil = [lambda names=names: report(rng, names) for names in make_names(rng)], spoil_entities
    else:
        language = InventedLanguage(rng)
        draws, spoil = [lambda: sentence_pair(rng, language)] * 2, mistranslate
    seen: set[str] = set()
    train = distinct(draws[0], train_size, seen)
    validation = distinct(draws[1], validation_size, seen)
    if noise:
        spoil(rng, train, NOISE[head])
    return {"train": train, "validation": validation}


def write_demo_data(output_dir: str | Path, seed: int = 0) -> dict[str, dict[str, Path]]:
    """Write `{classification,ner,translation}/{train,validation}.jsonl` below a folder.

    Args:
        output_dir: Folder to write; made when it does not exist, files of these names are replaced.
        seed: The same seed gives the same bytes.

    Returns:
        Head to split to path.
    """
    paths: dict[str, dict[str, Path]] = {}
    for head in SIZES:
        folder = Path(output_dir, head)
        folder.mkdir(parents=True, exist_ok=True)
        paths[head] = {}
        for split, rows in corpus(head, seed).items():
            path = folder / f"{split}.jsonl"
            write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            paths[head][split] = path
    return paths
