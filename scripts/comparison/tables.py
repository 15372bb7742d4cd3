"""Tables of a comparison's markdown report."""

import statistics
from collections.abc import Iterable

from comparison.figures import AVERAGE, Report, Row, direction
from comparison.names import BASELINE, CONTROLS
from comparison.statistics import SIGNIFICANT, Difference
from reporting.markdown import NOTHING, number_cell, table_lines

# ---- Cells ----


def spread(row: Row) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{row.mean:.2f}" if row.std is None else f"{row.mean:.2f} ± {row.std:.2f}"


def gain(found: Difference | None) -> str:
    """Mean difference with its interval."""
    if found is None:
        return NOTHING
    if found.interval is None:
        return f"{found.mean:+.2f}"
    return f"{found.mean:+.2f} [{found.interval.low:+.2f}, {found.interval.high:+.2f}]"


def p_cell(value: float | None, mark: bool = False) -> str:
    """Write a p value, bold if `mark` and it is significant."""
    if value is None:
        return NOTHING
    text = "<0.001" if value < 0.001 else f"{value:.3f}"
    return f"**{text}**" if mark and value < SIGNIFICANT else text


def short_name(metric: str) -> str:
    """Return a metric's name for a reader."""
    return metric.removeprefix("eval_").replace("_", " ")


def scored_name(metric: str) -> str:
    """Name the metric that decides, with its direction where that is not the usual one."""
    return short_name(metric) + (", lower is better" if direction(metric) < 0 else "")


# ---- Tables ----


def summary(report: Report) -> list[str]:
    """Mean scores of all arms on all tasks: the table for a README."""
    arms = dict.fromkeys(row.arm for row in report.rows)
    tables = {task: report.of_task(task) for task in report.tables}
    if not tables:
        return ["## Summary", "", "No run has a score."]
    names = [
        task if task == AVERAGE else f"{task} ({scored_name(metric)})" for task, metric in metrics_of(report).items()
    ]
    rows = [[arm, *(spread(of[arm]) if arm in of else NOTHING for of in tables.values())] for arm in arms]
    if report.average:
        names.append("average gain [95%]")
        of = tables[AVERAGE]
        rows = [[*cells, gain(of[arm].gain) if arm in of else NOTHING] for arm, cells in zip(arms, rows, strict=True)]
    return ["## Summary", "", *table_lines(["arm", *names], rows)]


def metrics_of(report: Report) -> dict[str, str]:
    """Name of the metric by table."""
    return {row.task: row.metric for row in (*report.rows, *report.average)}


def task_table(report: Report, task: str) -> list[str]:
    """Show all arms on one task, or on the average, beside the baseline."""
    rows = report.of_task(task)
    lines = [f"## {task}", ""]
    if task == AVERAGE:
        lines = ["## Average over tasks", "", f"Mean by seed over {', '.join(report.averaged)}."]
        if report.not_averaged:
            left_out = ", ".join(report.not_averaged)
            lines[-1] += f" Left out, because an arm lacks a seed, or lower is better: {left_out}."
        if missing := [arm for arm in dict.fromkeys(row.arm for row in report.rows) if arm not in rows]:
            lines[-1] += f" Not here, because they lack a seed of one of these: {', '.join(missing)}."
        lines.append("")
    columns = [
        "arm",
        "seeds",
        scored_name(metrics_of(report)[task]),
        "gain [95%]",
        "p",
        "p (Holm)",
        "beats baseline",
        "time",
    ]
    cells = []
    for row in rows.values():
        found = row.gain
        tests = [p_cell(found.p_value), p_cell(found.holm, mark=True)] if found else [NOTHING] * 2
        chance = f"{found.probability:.0%}" if found else NOTHING
        time = number_cell(row.cost.time, ".2f", "x")
        cells.append([row.arm, str(len(row.scores)), spread(row), gain(found), *tests, chance, time])
    return [*lines, *table_lines(columns, cells)]


def control_table(report: Report) -> list[str]:
    """Gains over what costs as much as R-Drop, where such arms were trained."""
    rows = []
    controls = [name for name in CONTROLS if any(row.arm == name for row in report.rows)]
    for row in (*report.rows, *report.average):
        if row.arm in (BASELINE, *CONTROLS) or not controls:
            continue
        best = row.differences.get(row.best_control or "")
        cells = [gain(row.differences.get(name)) for name in controls]
        tests = [p_cell(best.p_value), p_cell(best.holm, mark=True)] if best else [NOTHING] * 2
        rows.append([row.task, row.arm, *cells, row.best_control or NOTHING, gain(best), *tests])
    if not rows:
        return []
    columns = ["task", "arm", *(f"over {name}" for name in controls), "best of the controls", "gain over it"]
    note = (
        "The best of the controls and the baseline by mean score on the same runs, which favours it: the gain over it "
        "is, if anything, too small."
    )
    return ["## Against the controls", "", note, "", *table_lines([*columns, "p", "p (Holm)"], rows)]


def cost_table(report: Report) -> list[str]:
    """Ratios of cost, and what was gained for it."""
    rows = []
    for row in (*report.rows, *report.average):
        if row.arm == BASELINE:
            continue
        ratios = (row.cost.time, row.cost.examples_per_second, row.cost.memory)
        gains = gain(row.gain), number_cell(row.gain_per_cost, "+.2f"), number_cell(row.share_kept, ".0%")
        figures = (number_cell(ratio, ".2f", "x") for ratio in ratios)
        rows.append([row.task, row.arm, *figures, row.cost.clock or "–", *gains])
    if not rows:
        return []
    note = (
        "Ratios to the baseline with the same seed, medians; the averages are geometric means over tasks. `clock`: "
        "processor seconds of the training process (CPU) or wall time. Time is that of the whole training, so tuned "
        "numbers of epochs count; examples/s are per second of wall time. `gain per cost`: points for each extra "
        "training as long as the baseline's, gain / (time - 1), left out below 5% extra time. `kept`: the share of "
        "`rdrop`'s gain; it means little where the interval of `rdrop`'s own gain contains 0."
    )
    columns = ["task", "arm", "time", "examples/s", "memory", "clock", "gain [95%]", "gain per cost", "kept"]
    return ["## Cost", "", note, "", *table_lines(columns, rows)]


def seed_table(report: Report) -> list[str]:
    """Best and worst seed, and the spread."""
    rows = []
    for row in (*report.rows, *report.average):
        if len(row.scores) > 1:
            ends = f"{row.best:.2f}", f"{row.worst:.2f}", number_cell(row.std, ".2f")
            ratio = number_cell(row.spread_ratio, ".2f", "x")
            rows.append([row.task, row.arm, str(len(row.scores)), *ends, ratio, p_cell(row.spread_p, mark=True)])
    if not rows:
        return []
    note = (
        "For those who ask for the best of n: it grows with n and with the spread, says nothing about the next run, "
        "and must not be compared with a mean. `std / baseline`: spread over seeds beside the baseline's, with the p "
        "value of the Pitman-Morgan test (equal variances, paired by seed; Holm over the arms of a task). With a few "
        "seeds it finds only differences of many times."
    )
    columns = ["task", "arm", "n", "best of n", "worst of n", "std", "std / baseline", "p (Holm)"]
    return ["## Best, worst and spread over seeds", "", note, "", *table_lines(columns, rows)]


def secondary_tables(report: Report) -> list[str]:
    """Show the other metrics of the evaluation, a table a task."""
    lines = ["## Other metrics", "", "Mean ± standard deviation over seeds, as the script wrote them."]
    for task in report.tables:
        rows = report.of_task(task).values()
        if names := list(dict.fromkeys(name for row in rows for name in row.secondary)):
            cells = [[row.arm, *(_values(row.secondary.get(name, {}).values()) for name in names)] for row in rows]
            lines += ["", f"### {task}", "", *table_lines(["arm", *map(short_name, names)], cells)]
    return lines if len(lines) > 3 else []


def _values(values: Iterable[float]) -> str:
    found = list(values)
    if not found:
        return NOTHING
    mean = statistics.fmean(found)
    digits = 4 if abs(mean) < 10 else 2
    return f"{mean:.{digits}f} ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else f"{mean:.{digits}f}"
