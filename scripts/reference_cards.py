#!/usr/bin/env python
"""Write a card for each task of a comparison: what was trained and how, what came out for every arm, what it cost.

    python scripts/reference_cards.py --comparison model_cards/reference/short/comparison.json \
        --config model_cards/reference/short.yaml --output_dir model_cards/reference/short/cards \
        --consistency sst2=model_cards/reference/short/consistency-sst2/consistency.json

The cards are made from the figures alone, losses like gains, with the template of the model cards. No weights belong
to them, so their metadata claim no results of a model. Paths of this machine are cut to their last component;
$VARIABLES of the comparison's configuration stay as they are.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison.figures import Report, make_report
from comparison.file import not_one, read_comparison
from comparison.history import as_lines
from finetuning.command_line import cli, closest
from finetuning.results import write_file
from hf_rdrop.cards.evidence import read_consistency


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments, checked as far as they can be without the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--comparison", type=Path, required=True, help="a comparison.json that compare.py has written")
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        help="folder for a TASK.md of each task; inside the comparison's folder they show its curves.png",
    )
    parser.add_argument("--tasks", nargs="+", help="these tasks (default: all that have finished runs)")
    parser.add_argument("--config", type=Path, help="YAML file of the comparison, for the command that does it again")
    parser.add_argument(
        "--note", help="sentences on what the figures cannot tell, such as the meaning of $ENCODER and $DATA"
    )
    parser.add_argument(
        "--consistency", nargs="+", default=[], metavar="TASK=FILE", help="consistency.json files of consistency.py"
    )
    args = parser.parse_args(argv)
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise ValueError(f"--output_dir {args.output_dir} is a file: give the name of a folder.")
    return args


def finished_tasks(path: Path, found: Mapping[str, Any]) -> list[str]:
    """Name the tasks of a comparison that have a finished run with a score.

    Raises:
        ValueError: it is no comparison, or no run has finished.
    """
    try:
        metrics = {row["task"]: row["metric"] for row in found["rows"]}
        scored = {
            run["task"]
            for run in found["runs"]
            if run["task"] in metrics and math.isfinite(run["metrics"].get(metrics[run["task"]], math.nan))
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise not_one(path, "--comparison", error) from error
    if not scored:
        raise ValueError(f"--comparison {path}: no run has finished, so there is nothing to make a card of.")
    return [task for task in metrics if task in scored]


def figures_of(path: Path, found: dict[str, Any]) -> Report:
    """Make a comparison's figures anew from its runs, and turn their histories into log lines.

    Raises:
        ValueError: it is no comparison.
    """
    try:
        metrics = {row["task"]: row["metric"] for row in found["rows"]}
        report = make_report(found["runs"], metrics, list(dict.fromkeys(row["arm"] for row in found["rows"])))
        for run in found["runs"]:
            run["history"] = as_lines(run["history"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise not_one(path, "--comparison", error) from error
    return report


def read_pairs(pairs: Sequence[str], tasks: Sequence[str]) -> dict[str, Any]:
    """Read the consistency of tasks, given as TASK=FILE."""
    found = {}
    for pair in pairs:
        task, separator, file = pair.partition("=")
        if not separator or task not in tasks:
            raise ValueError(f"--consistency {pair}: give TASK=FILE, the task being one of {', '.join(tasks)}.")
        found[task] = read_consistency(file)
    return found


def find_picture(comparison: Path, output_dir: Path) -> str | None:
    """Return the comparison's curves.png as cards in a folder within the comparison's can link it."""
    folder, picture = comparison.parent.resolve(), comparison.with_name("curves.png")
    if not picture.is_file() or not output_dir.resolve().is_relative_to(folder):
        return None
    return "../" * len(output_dir.resolve().relative_to(folder).parts) + picture.name


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Write the cards; returns their paths."""
    args = parse(argv)
    found = read_comparison(args.comparison, "--comparison")
    tasks = finished_tasks(args.comparison, found)
    for name in args.tasks or ():
        if name not in tasks:
            raise ValueError(
                f"--tasks {name} has no finished run{closest(name, tasks)}: there are {', '.join(tasks)}."
            )
    consistency, picture = read_pairs(args.consistency, tasks), find_picture(args.comparison, args.output_dir)
    report = figures_of(args.comparison, found)
    # Arguments are refused before this, which takes long to import.
    from comparison.cards import Task, file_name, make_parts, metadata
    from hf_rdrop.cards.markdown import render

    cards = {}
    for name in args.tasks or tasks:
        task = Task(found, report, name)
        parts = make_parts(task, config=args.config, note=args.note, consistency=consistency.get(name))
        if parts["curves"]:
            parts["curves"]["plot"] = picture
        cards[args.output_dir / f"{file_name(name)}.md"] = str(render(metadata(task), **parts))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for path, text in cards.items():
        write_file(path, text)
    print(f"Written to {args.output_dir}: {', '.join(path.name for path in cards)}")
    return list(cards)


if __name__ == "__main__":
    cli(main)
