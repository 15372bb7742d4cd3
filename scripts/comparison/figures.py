"""From finished runs to the figures of a comparison: scores, differences and costs of every arm on every task."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from comparison.cost import Cost, cost_ratios, gain_per_cost, mean_cost, share_kept
from comparison.names import BASELINE, CONTROLS, RDROP
from comparison.statistics import Difference, difference, holm, spread_ratio, with_holm
from finetuning.results import LOWER_IS_BETTER

AVERAGE = "average"
# Scores that are in points, or in a unit of their own (nats, perplexity), as they are; the rest are shares.
NOT_SHARES = ("bleu", "chrf", "score", "rouge1", "rouge2", "rougeL", "rougeLsum", "loss", "nll", "mse", "perplexity")
NOT_SCORES = ("runtime", "per_second", "samples", "preparation_time", "_mem_")

Run = Mapping[str, Any]
Scores = dict[int, float]  # by seed


@dataclass(frozen=True)
class Row:
    """One arm on one task, or on the average over tasks. Scores are in points: per cent, BLEU, ...

    Attributes:
        scores: by seed.
        std: sample standard deviation over seeds; None with one seed.
        lower_is_better: whether the score is a loss; differences are positive where the arm is better, then too.
        best: the best score of the seeds, which grows better with their number; `worst` the worst.
        differences: to the baseline and the controls, by their names.
        best_control: of these, the one with the best mean score.
        spread_ratio: `std` over the baseline's; `spread_p` its p value, corrected for the arms.
        gain_per_cost: gain over the baseline divided by the extra cost (time ratio - 1).
        share_kept: gain over the baseline divided by that of the arm `rdrop`, for the arms made from it.
        secondary: the other metrics of the evaluation by name and seed, as the script wrote them.
    """

    task: str
    metric: str
    arm: str
    lower_is_better: bool
    scores: Scores
    mean: float
    std: float | None
    best: float
    worst: float
    differences: dict[str, Difference]
    best_control: str | None
    spread_ratio: float | None
    spread_p: float | None
    cost: Cost
    gain_per_cost: float | None
    share_kept: float | None
    secondary: dict[str, Scores]

    @property
    def gain(self) -> Difference | None:
        """The difference to the baseline; None for the baseline itself and for an arm that shares no seed with it."""
        return self.differences.get(BASELINE)


@dataclass(frozen=True)
class Report:
    """All figures of a comparison.

    Attributes:
        rows: by task, then by arm.
        average: rows of the mean over `averaged` tasks, of the arms that have every seed of them; empty when these are
            fewer than two.
        averaged: tasks in which the baseline and `rdrop` have every seed (every arm where there is no `rdrop`), and
            higher scores are better.
        not_averaged: the others.
        without_score: runs whose score is not a finite number, with that score; no figure contains them.
    """

    rows: list[Row]
    average: list[Row]
    averaged: list[str]
    not_averaged: list[str]
    without_score: dict[str, float]

    def of_task(self, task: str) -> dict[str, Row]:
        """The rows of a task, or of `AVERAGE`, by arm."""
        return {row.arm: row for row in (*self.rows, *self.average) if row.task == task}

    @property
    def tables(self) -> list[str]:
        """The tasks that have rows, and `AVERAGE` last if there is one."""
        return list(dict.fromkeys(row.task for row in (*self.rows, *self.average)))


def points(metric: str) -> int:
    """Return the factor of a metric: shares become per cent."""
    return 1 if metric.endswith(NOT_SHARES) else 100


def direction(metric: str) -> int:
    """1 for a score that is better when higher, -1 for a loss."""
    return -1 if LOWER_IS_BETTER.search(metric) else 1


def trial_scores(trials: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float]]:
    """Average the scores of each tried settings over seeds; those that failed with a seed are left out."""
    found: list[tuple[Mapping[str, Any], list[float]]] = []
    for trial in trials:
        scores = next((scores for settings, scores in found if settings == trial["settings"]), None)
        if scores is None:
            found.append((trial["settings"], scores := []))
        scores.append(math.nan if trial["score"] is None else trial["score"])
    means = [(settings, statistics.fmean(scores)) for settings, scores in found]
    return [(settings, mean) for settings, mean in means if math.isfinite(mean)]


def make_report(runs: Sequence[Run], tasks: Mapping[str, str], arms: Sequence[str]) -> Report:
    """Compute all figures of the finished runs.

    Args:
        runs: dicts with task, arm, seed and metrics (those of the run's all_results.json).
        tasks: name of the metric by task.
        arms: all names in order, the baseline among them.

    Raises:
        ValueError: a run lacks its task's metric, two runs are the same arm, task and seed, or a task is called
            `AVERAGE`.
    """
    if AVERAGE in tasks:
        raise ValueError(f"a task is called {AVERAGE!r}, as the mean over the tasks is: give it another name.")
    by_task: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {task: {} for task in tasks}
    without_score = {}
    for run in runs:
        task, arm, seed, metrics = run["task"], run["arm"], run["seed"], run["metrics"]
        if task not in tasks or arm not in arms:
            continue
        name = f"{task} / {arm} / seed {seed}"
        if tasks[task] not in metrics:
            known = ", ".join(sorted(key for key in metrics if key.startswith("eval_")))
            raise ValueError(f"metric {tasks[task]} is not among the results of {name}. Choose one of: {known}.")
        if seed in by_task[task].setdefault(arm, {}):
            raise ValueError(f"{name} is there twice: pairing by seed needs one run for each arm, task and seed.")
        if math.isfinite(metrics[tasks[task]]):
            by_task[task][arm][seed] = metrics
        else:
            without_score[name] = metrics[tasks[task]]

    rows = []
    for task, metric in tasks.items():
        found = {arm: by_task[task][arm] for arm in arms if by_task[task].get(arm)}
        scores = {arm: {s: points(metric) * m[metric] for s, m in of_arm.items()} for arm, of_arm in found.items()}
        costs = {arm: cost_ratios(of_arm, found.get(BASELINE, {})) for arm, of_arm in found.items()}
        secondary = {arm: _secondary(of_arm, metric) for arm, of_arm in found.items()}
        rows += _make_rows(task, metric, scores, costs, secondary)
    average, averaged = _average(rows)
    not_averaged = [task for task in dict.fromkeys(row.task for row in rows) if task not in averaged]
    return Report(rows, average, averaged, not_averaged, without_score)


def _make_rows(
    task: str,
    metric: str,
    scores: Mapping[str, Scores],
    costs: Mapping[str, Cost],
    secondary: Mapping[str, dict[str, Scores]],
) -> list[Row]:
    sign = direction(metric)
    means = {arm: statistics.fmean(of_arm.values()) for arm, of_arm in scores.items()}
    better = {arm: {seed: sign * score for seed, score in of_arm.items()} for arm, of_arm in scores.items()}
    references = [arm for arm in (BASELINE, *CONTROLS) if arm in scores]
    best = max(references, key=lambda arm: sign * means[arm], default=None)
    tables = {}
    for other in references:
        found = {arm: difference(of_arm, better[other], other) for arm, of_arm in better.items() if arm != other}
        tables[other] = with_holm({arm: value for arm, value in found.items() if value is not None})
    against_base = tables.get(BASELINE, {})
    spreads = {arm: spread_ratio(scores[arm], scores[BASELINE]) for arm in against_base}
    spread_p = holm({arm: p for arm, (_, p) in spreads.items()})
    rows = []
    for arm, of_arm in scores.items():
        rows.append(
            Row(
                task=task,
                metric=metric,
                arm=arm,
                lower_is_better=sign < 0,
                scores=of_arm,
                mean=means[arm],
                std=statistics.stdev(of_arm.values()) if len(of_arm) > 1 else None,
                best=sign * max(better[arm].values()),
                worst=sign * min(better[arm].values()),
                differences={other: table[arm] for other, table in tables.items() if arm in table},
                best_control=best,
                spread_ratio=spreads[arm][0] if arm in spreads else None,
                spread_p=spread_p.get(arm),
                cost=costs[arm],
                gain_per_cost=gain_per_cost(against_base.get(arm), costs[arm]),
                share_kept=share_kept(against_base.get(arm), against_base.get(RDROP)) if _is_economy(arm) else None,
                secondary=secondary.get(arm, {}),
            )
        )
    return rows


def _is_economy(arm: str) -> bool:
    return arm.startswith(f"{RDROP}-")


def _secondary(runs: Mapping[int, Mapping[str, Any]], metric: str) -> dict[str, Scores]:
    found: dict[str, Scores] = {}
    for seed, metrics in runs.items():
        for name, value in metrics.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name.startswith("eval_") and name != metric and is_number and not any(s in name for s in NOT_SCORES):
                found.setdefault(name, {})[seed] = value
    return found


def _average(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Rows of the mean over the tasks that are averaged, and these tasks (see `Report`)."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    seeds = {seed for row in rows for seed in row.scores}
    # A further arm that was run on some tasks only is not in the average; it doesn't take these tasks out of it.
    needed = {BASELINE, RDROP} if RDROP in arms else set(arms)
    complete: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.scores.keys() == seeds and not row.lower_is_better:
            complete.setdefault(row.task, {})[row.arm] = row
    averaged = {task: of_task for task, of_task in complete.items() if needed <= of_task.keys()}
    if len(averaged) < 2:
        return [], []
    chosen = {
        arm: [of_task[arm] for of_task in averaged.values()]
        for arm in arms
        if all(arm in of_task for of_task in averaged.values())
    }
    scores = {
        arm: {seed: statistics.fmean(row.scores[seed] for row in of_arm) for seed in sorted(seeds)}
        for arm, of_arm in chosen.items()
    }
    costs = {arm: mean_cost([row.cost for row in of_arm]) for arm, of_arm in chosen.items()}
    return _make_rows(AVERAGE, "score", scores, costs, {}), list(averaged)
