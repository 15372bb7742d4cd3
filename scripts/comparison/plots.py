"""Pictures of a comparison; each function returns whether there was something to show."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison.curves import Choices, plot_alphas, plot_curves
from comparison.figures import AVERAGE, Report
from comparison.names import BASELINE, GREY
from comparison.tables import short_name
from reporting.style import fullest, panels, place_labels, save, styles, tidy


def plot_all(
    report: Report, runs: Sequence[Mapping[str, Any]], tasks: Mapping[str, str], choices: Choices, folder: Path
) -> list[Path]:
    """Draw what there is to draw into gains.png, curves.png, pareto.png and alphas.png; returns those written."""
    arms = list(dict.fromkeys(row.arm for row in report.rows))
    drawn = {
        folder / "gains.png": lambda path: plot_gains(report, path),
        folder / "curves.png": lambda path: plot_curves(runs, list(tasks), arms, path),
        folder / "pareto.png": lambda path: plot_pareto(report, path),
        folder / "alphas.png": lambda path: plot_alphas(choices, tasks, path),
    }
    return [path for path, draw in drawn.items() if draw(path)]


def plot_gains(report: Report, path: Path) -> bool:
    """Gain over the baseline of every arm, a panel a task: mean, 95% interval, and each seed as a faint dot."""
    tables = {task: [row for row in report.of_task(task).values() if row.gain] for task in _average_first(report)}
    tables = {task: rows for task, rows in tables.items() if rows}
    if not tables:
        return False
    arms = [arm for arm in dict.fromkeys(row.arm for row in report.rows) if arm != BASELINE]
    look = styles([BASELINE, *arms], GREY)
    figure, axes = panels(len(tables), fullest(3, 4, len(tables)), 2.6, 0.26 * len(arms) + 0.8, sharey=True)
    for axis, (task, rows) in zip(axes, tables.items(), strict=True):
        axis.axvline(0, color="#444444", linewidth=1)
        for row in rows:
            y, colour, found = arms.index(row.arm), look[row.arm].colour, row.gain
            axis.scatter(found.values, [y + 0.27] * len(found.values), s=12, color=colour, alpha=0.4, linewidth=0)
            if found.interval is not None:
                axis.plot(found.interval, [y, y], color=colour, linewidth=1.8, solid_capstyle="butt")
            axis.plot(found.mean, y, look[row.arm].marker, color=colour, markersize=5.5)
        axis.set_yticks(range(len(arms)), arms, fontsize=8)
        axis.set_ylim(len(arms) - 0.4, -0.6)
        axis.set_title(_title(report, task), fontsize=9)
        axis.locator_params(axis="x", nbins=5)
        tidy(axis, "x")
    figure.supxlabel("gain over the baseline in points: mean, 95% interval over seeds, single seeds", fontsize=9)
    return save(figure, path)


def plot_pareto(report: Report, path: Path) -> bool:
    """Gain over training time, a panel a task; the line joins the arms that no other beats in both."""
    tables = {}
    for task in _average_first(report):
        rows = [row for row in report.of_task(task).values() if row.gain and row.cost.time is not None]
        if rows:
            tables[task] = [(BASELINE, 1.0, 0.0, None), *((r.arm, r.cost.time, r.gain.mean, r.gain) for r in rows)]
    if not tables:
        return False
    look = styles(list(dict.fromkeys(row.arm for row in report.rows)), GREY)
    figure, axes = panels(len(tables), 2, 4.5, 3)
    for axis, (task, found) in zip(axes, tables.items(), strict=True):
        axis.axhline(0, color="#444444", linewidth=0.8)
        front = pareto_front([(time, gain) for _, time, gain, _ in found])
        axis.plot(*zip(*front, strict=True), color="#cccccc", linewidth=3, zorder=1, solid_joinstyle="round")
        for arm, time, gain, difference in found:
            if difference is not None and difference.interval is not None:
                axis.plot([time, time], difference.interval, color=look[arm].colour, linewidth=1, alpha=0.45)
            axis.plot(time, gain, look[arm].marker, color=look[arm].colour, markersize=6, zorder=3)
        axis.set_title(_title(report, task), fontsize=9)
        axis.margins(x=0.18, y=0.14)
        tidy(axis, "both")
    clocks = " or ".join(dict.fromkeys(row.cost.clock for row in report.rows if row.cost.clock is not None))
    figure.supxlabel(f"training time ({clocks}) / baseline", fontsize=9)
    figure.supylabel("gain over the baseline in points,\n95% interval over seeds", fontsize=9)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axis, found in zip(axes, tables.values(), strict=True):
        names = [arm for arm, *_ in found]
        place_labels(axis, [(x, y) for _, x, y, _ in found], names, [look[arm].colour for arm in names])
    return save(figure, path)


def pareto_front(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the pairs (cost, gain) for which no other costs at most as much and gains at least as much, by cost."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(set(pairs), key=lambda pair: (pair[0], -pair[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def _average_first(report: Report) -> list[str]:
    return sorted(report.tables, key=lambda task: task != AVERAGE)


def _title(report: Report, task: str) -> str:
    if task == AVERAGE:
        return f"average of {len(report.averaged)} tasks"
    return f"{task}, {short_name(next(row.metric for row in report.rows if row.task == task))}"
