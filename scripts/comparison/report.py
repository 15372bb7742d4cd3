"""Report of a comparison as text: markdown, a table for the terminal, JSON."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from comparison.figures import AVERAGE, Report, points, trial_scores
from comparison.statistics import MIN_SEEDS, SIGNIFICANT
from comparison.tables import (
    control_table,
    cost_table,
    gain,
    metrics_of,
    p_cell,
    scored_name,
    secondary_tables,
    seed_table,
    spread,
    summary,
    task_table,
)
from reporting.markdown import NOTHING, number_cell, plain, table_lines


def markdown(
    report: Report,
    about: Mapping[str, Any],
    choices: Mapping[tuple[str, str], Mapping[str, Any]],
    failed: Mapping[str, str],
    plots: Sequence[Path] = (),
) -> str:
    """Write the report, comparison.md.

    Args:
        report: the figures.
        about: what was compared (data, model, settings, versions, ...): a line for each entry, also of nested ones.
        choices: settings by task and arm with the trials that they were chosen from.
        failed: reason by name of the run.
        plots: pictures in the same folder as the report.
    """
    parts = [
        ["# Comparison"],
        [line for name, value in about.items() for line in _about(name, value)],
        [line for path in plots for line in (f"![{path.stem}]({path.name})", "")][:-1],
        summary(report),
        *(task_table(report, task) for task in report.tables),
        control_table(report),
        cost_table(report),
        seed_table(report),
        secondary_tables(report),
        choice_table(report, choices),
        _failures(report, failed),
        _how_to_read(report),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


# ---- Sections ----


def _about(name: str, value: Any) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"- {name}: {plain(value)}"]
    return [f"- {name}", *(f"  - {inner}: {plain(of_inner)}" for inner, of_inner in value.items())]


def choice_table(report: Report, choices: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    trained = {(row.task, row.arm) for row in report.rows}
    choices = {key: choice for key, choice in choices.items() if key in trained}
    names = list(dict.fromkeys(name for choice in choices.values() for name in choice["settings"]))
    if not names:
        return []
    metrics = metrics_of(report)
    rows = []
    budgets: dict[str, set[int]] = {}
    for (task, arm), choice in choices.items():
        trials = choice.get("trials", ())
        scores = [score for settings, score in trial_scores(trials) if settings == choice["settings"]]
        score = points(metrics[task]) * scores[0] if scores and task in metrics else None
        if source := choice.get("taken_from"):
            budget = f"as {source}"
        else:
            budgets.setdefault(task, set()).add(len(trials))
            budget = str(len(trials))
        values = [plain(choice["settings"].get(name, NOTHING)) for name in names]
        rows.append([task, arm, *values, budget, number_cell(score, ".2f")])
    note = "Nothing was tuned: these were given."
    if any(max(numbers) > 0 for numbers in budgets.values()):
        uneven = [task for task, numbers in budgets.items() if len(numbers) > 1]
        note = (
            "Chosen by the score on a split of the training data, never on the data that the tables above are about. "
            "`trials`: the runs that this took. "
        )
        note += (
            f"The arms did not have the same number on {', '.join(uneven)}." if uneven else "Every arm had as many."
        )
    if any(NOTHING in row[2:-1] for row in rows):
        note += f" {NOTHING}: the arm has none, or its own arguments say it."
    return ["## Settings", "", note, "", *table_lines(["task", "arm", *names, "trials", "score there"], rows)]


def _failures(report: Report, failed: Mapping[str, str]) -> list[str]:
    lines = [f"- {name}: the score is {score}; no figure contains it." for name, score in report.without_score.items()]
    for name, reason in failed.items():
        lines += [f"- {name}:", "", *(f"      {line}".rstrip() for line in reason.splitlines()), ""]
    if not lines:
        return []
    note = (
        "They are missing above. If the runs of an arm fail more often than others, the rest of it may look too good."
    )
    return ["## Runs that failed", "", note, "", *lines]


def _how_to_read(report: Report) -> list[str]:
    numbers = sorted({len(row.scores) for row in report.rows})
    if not numbers:
        return []
    lines = [
        f"- {_seeds(numbers)} for each task and arm. A gain is the mean of the differences to the run of the "
        "baseline with the same seed (the same data order, and the same initial weights where they are drawn). Losses "
        "are shown like gains.",
        "- The interval (bootstrap, BCa, 95%) says how the mean would vary with other seeds, on this validation set "
        "and these settings. It does not contain what another validation set or another choice of settings would "
        f"change. It needs {MIN_SEEDS} seeds and differences that are not all equal.",
    ]
    if coverage := _coverage(numbers):
        lines.append(
            f"- It cannot go beyond the differences seen: with {coverage[0]} seeds at most {coverage[1]:.3g}% of such "
            "intervals contain the true mean, if differences are spread evenly around it, and not 95%."
        )
    lines += [
        "- `p`: paired t-test. `p (Holm)`: corrected for the arms of the table, bold below 0.05; not for the number "
        f"of tables. With {_seeds(numbers[:1])} a gain that is not marked may still be real.",
        "- `beats baseline`: the probability that a run of the arm scores better than one of the baseline, ties half "
        "(50% is no difference).",
    ]
    if any(row.lower_is_better for row in report.rows):
        lines.append("- Where lower is better, a gain is how much lower an arm is: above 0 it is better, as ever.")
    return ["## How to read this", "", *lines]


def _seeds(numbers: Sequence[int]) -> str:
    fewest, most = numbers[0], numbers[-1]
    return f"{fewest} seed{'s' * (most > 1)}" if fewest == most else f"{fewest} to {most} seeds"


def _coverage(numbers: list[int]) -> tuple[int, float] | None:
    """Return the fewest seeds with an interval, and the percentage that it covers at most; None above 5 seeds."""
    few = min((number for number in numbers if number >= MIN_SEEDS), default=6)
    return (few, 100 - 200 / 2**few) if few <= 5 else None


# ---- Other forms ----


def terminal_table(report: Report) -> Table:
    """Scores and gains for a terminal of 80 columns."""
    numbers = sorted({len(row.scores) for row in report.rows})
    title = f"mean ± std over {_seeds(numbers)}; gain over the baseline, paired" if numbers else "no score"
    caption = None
    if coverage := _coverage(numbers):
        caption = f"from {coverage[0]} seeds the intervals hold the true mean in at most {coverage[1]:.3g}% of cases"
    table = Table(box=box.SIMPLE_HEAD, title=title, caption=caption, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold")
    for name in ("score", "gain [95%]", "p (Holm)", "time"):
        table.add_column(name, no_wrap=True)
    for task, metric in metrics_of(report).items():
        table.add_row(f"[bold]{task}[/bold]", "", "" if task == AVERAGE else f"[dim]{scored_name(metric)}[/dim]")
        for row in report.of_task(task).values():
            test = p_cell(row.gain.holm) if row.gain else ""
            table.add_row(
                f" {row.arm}",
                spread(row),
                gain(row.gain).replace("[", r"\[") if row.gain else "",
                f"{test} *" if row.gain and row.gain.holm is not None and row.gain.holm < SIGNIFICANT else test,
                number_cell(row.cost.time, ".2f", "x"),
            )
        table.add_section()
    return table


def as_json(report: Report) -> dict[str, Any]:
    """Every figure of the report; nan and infinity, which JSON does not have, as text."""
    return _json(dataclasses.asdict(report))


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
