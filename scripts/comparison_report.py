"""What came out of a comparison: one table, one JSON file, one plot."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from rich import box
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BASELINE = "baseline"
# Okabe and Ito's colours, which people with colour blindness can tell apart.
COLOURS = ("#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


@dataclass(frozen=True)
class Row:
    """One arm on one task beside the baseline; differences and ratios are paired by seed."""

    task: str
    metric: str
    arm: str
    seeds: list[int]
    baseline: list[float]
    scores: list[float]
    seconds_ratio: float

    @property
    def gains(self) -> list[float]:
        return [score - base for score, base in zip(self.scores, self.baseline, strict=True)]


def make_rows(
    results: Mapping[tuple[str, str, int], Mapping[str, float]], metrics: Mapping[str, str], arms: Sequence[str]
) -> list[Row]:
    """Rows of the table from the finished runs.

    Args:
        results: metrics of each finished run by task, arm and seed.
        metrics: name of the metric by task; values from 0 to 1 are shown in per cent.
        arms: the arms beside the baseline.
    """
    rows = []
    for task, metric in metrics.items():
        scale = 1 if metric.endswith(("bleu", "chrf", "score")) else 100
        for arm in arms:
            seeds = [s for t, a, s in results if (t, a) == (task, arm) and (task, BASELINE, s) in results]
            if not seeds:
                continue
            pairs = [(results[task, BASELINE, seed], results[task, arm, seed]) for seed in seeds]
            ratio = statistics.median(b["train_runtime"] / a["train_runtime"] for a, b in pairs)
            base, ours = ([scale * run[metric] for run in runs] for runs in zip(*pairs, strict=True))
            rows.append(Row(task, metric, arm, seeds, base, ours, ratio))
    return rows


def markdown_table(rows: Sequence[Row]) -> str:
    """A markdown table: mean ± standard deviation over seeds, paired gain, cost."""
    lines = [
        "| task | metric | baseline | arm | arm's score | gain | time ratio | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row.task} | {row.metric.removeprefix('eval_')} | {_spread(row.baseline)} | {row.arm} | "
            f"{_spread(row.scores)} | {_spread(row.gains, sign='+')} | {row.seconds_ratio:.2f}x | {len(row.seeds)} |"
        )
    return "\n".join(lines) + "\n"


def terminal_table(rows: Sequence[Row]) -> Table:
    """The same table for a terminal of 80 columns."""
    seeds = sorted({len(row.seeds) for row in rows})
    table = Table(
        box=box.SIMPLE_HEAD, title=f"mean ± std over {'-'.join(map(str, seeds))} seeds, gains paired by seed"
    )
    for name in ("task", "baseline", "arm", "score", "gain", "time"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        task = f"{row.task}\n  {row.metric.removeprefix('eval_')}"
        spreads = _spread(row.baseline), row.arm, _spread(row.scores), _spread(row.gains, "+")
        table.add_row(task, *spreads, f"{row.seconds_ratio:.2f}x")
    return table


def _spread(values: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.fmean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with every figure behind them."""
    return [
        {
            "task": row.task,
            "metric": row.metric,
            "arm": row.arm,
            "seeds": row.seeds,
            "baseline_scores": row.baseline,
            "scores": row.scores,
            "gains": row.gains,
            "mean_gain": statistics.fmean(row.gains),
            "train_seconds_ratio": row.seconds_ratio,
        }
        for row in rows
    ]


def plot(rows: Sequence[Row], path: Path) -> None:
    """One panel a task: every seed as a point, lines joining the same seed, bars at the means."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.2 * len(tasks) + 0.8, 3.6), squeeze=False, dpi=150)
    for axis, task in zip(axes[0], tasks, strict=True):
        of_task = [row for row in rows if row.task == task]
        arms = [(BASELINE, of_task[0].baseline), *((row.arm, row.scores) for row in of_task)]
        for row, x in zip(of_task, range(1, len(arms)), strict=True):
            for base, score in zip(row.baseline, row.scores, strict=True):
                axis.plot((0, x), (base, score), color="#cccccc", linewidth=0.8, zorder=1)
        for x, (_, scores) in enumerate(arms):
            colour = COLOURS[x % len(COLOURS)]
            axis.scatter([x] * len(scores), scores, s=26, color=colour, zorder=3, edgecolor="white", linewidth=0.6)
            axis.hlines(statistics.fmean(scores), x - 0.22, x + 0.22, color=colour, linewidth=2.4, zorder=2)
        gains = "\n".join(f"{row.arm}: {_spread(row.gains, '+')}, {row.seconds_ratio:.2f}x time" for row in of_task)
        axis.set_title(f"{task}\n{gains}", fontsize=9)
        axis.set_xticks(range(len(arms)), [name for name, _ in arms])
        axis.set_xlim(-0.6, len(arms) - 0.4)
        axis.set_ylabel(of_task[0].metric.removeprefix("eval_").replace("_", " "))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#eeeeee", zorder=0)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
