"""Pictures of a comparison's training: losses over epochs, and what was tried in tuning."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from comparison.figures import direction, points, trial_scores
from comparison.history import as_lines
from comparison.names import BASELINE, GREY, RDROP
from comparison.tables import scored_name
from reporting.markdown import plain
from reporting.style import DPI, fullest, panels, save, styles, tidy

Choices = Mapping[tuple[str, str], Mapping[str, Any]]


def plot_curves(runs: Sequence[Mapping[str, Any]], tasks: Sequence[str], arms: Sequence[str], path: Path) -> bool:
    """CE and KL while training, a column a task: mean over seeds, with a band of one standard deviation."""
    curves = {
        (task, arm, name): curve
        for task in tasks
        for arm in arms
        for name in ("ce_loss", "kl_loss")
        if (curve := _curve([run["history"] for run in runs if (run["task"], run["arm"]) == (task, arm)], name))
    }
    shown = [task for task in tasks if any(key[0] == task for key in curves)]
    if not shown:
        return False
    look, width = styles(arms, GREY), max(5.0, 1.8 * len(shown) + 0.8)
    figure, axes = plt.subplots(
        2,
        len(shown),
        figsize=(width, 5),
        squeeze=False,
        sharex="col",
        sharey="row",
        layout="constrained",
        dpi=DPI,
    )
    handles = {}
    for (task, arm, name), (epochs, means, stds) in curves.items():
        axis = axes[int(name == "kl_loss")][shown.index(task)]
        colour, _, line = look[arm]
        (handles[arm],) = axis.plot(epochs, means, line, color=colour, linewidth=1.3, label=arm)
        lower = np.maximum(means - stds, means / 3)  # a band that reaches 0 has no end on a logarithmic axis
        axis.fill_between(epochs, lower, means + stds, color=colour, alpha=0.15, linewidth=0)
    for column, task in enumerate(shown):
        axes[0][column].set_title(task, fontsize=9)
        axes[1][column].set_xlabel("epoch", fontsize=9)
        for axis in axes[:, column]:
            axis.set_yscale("log")
            axis.xaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
            low, high = axis.get_ylim()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
            axis.tick_params(labelsize=8)
            tidy(axis, "y")
    for axis, label in zip(axes[:, 0], ("cross-entropy", "divergence (kl_loss)"), strict=True):
        axis.set_ylabel(label, fontsize=9)
    ordered = [arm for arm in arms if arm in handles]
    entry = 0.6 + 0.07 * max(map(len, ordered))  # inches
    figure.legend(
        [handles[arm] for arm in ordered],
        ordered,
        loc="outside lower center",
        ncols=max(1, min(5, len(ordered), int(width / entry))),
        frameon=False,
        fontsize=8,
    )
    return save(figure, path)


def _curve(
    histories: Sequence[Mapping[str, Sequence[Any]]], name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Epochs, means and standard deviations at the steps that every seed has logged; values of 0 are left out."""
    logged = [{entry["step"]: entry for entry in as_lines(history) if entry.get(name)} for history in histories]
    steps = sorted(set.intersection(*(set(of_seed) for of_seed in logged))) if logged else []
    if not steps:
        return None
    values = np.array([[of_seed[step][name] for step in steps] for of_seed in logged], dtype=float)
    epochs = np.array([logged[0][step]["epoch"] for step in steps])
    return epochs, values.mean(0), values.std(0, ddof=1) if len(logged) > 1 else np.zeros(len(steps))


def plot_alphas(choices: Choices, tasks: Mapping[str, str], path: Path) -> bool:
    """Score on the tuning split over alpha, a panel a task: the best for each alpha, the other settings faint."""
    swept: dict[str, dict[str, list[tuple[Mapping[str, Any], float]]]] = {}
    for (task, arm), choice in choices.items():
        scored = [(s, value) for s, value in trial_scores(choice.get("trials", ())) if s.get("rdrop_alpha")]
        if task in tasks and len({settings["rdrop_alpha"] for settings, _ in scored}) > 1:
            swept.setdefault(task, {})[arm] = scored
    if not swept:
        return False
    arms = [BASELINE, RDROP, *(arm for of_task in swept.values() for arm in of_task)]
    look = styles(list(dict.fromkeys(arms)), GREY)
    figure, axes = panels(len(swept), fullest(2, 3, len(swept)), 3, 2.7)
    for axis, (task, of_task) in zip(axes, swept.items(), strict=True):
        scale, better = points(tasks[task]), max if direction(tasks[task]) > 0 else min
        plain_scores = [score for _, score in trial_scores(choices.get((task, BASELINE), {}).get("trials", ()))]
        if plain_scores:
            axis.axhline(scale * better(plain_scores), color=look[BASELINE].colour, linestyle="--", linewidth=1.2)
        alphas = sorted({settings["rdrop_alpha"] for scored in of_task.values() for settings, _ in scored})
        for arm, scored in of_task.items():
            colour, marker, line = look[arm]
            places = [alphas.index(settings["rdrop_alpha"]) for settings, _ in scored]
            values = [scale * score for _, score in scored]
            axis.scatter(places, values, s=14, color=colour, alpha=0.3, linewidth=0)
            best = {place: better(v for p, v in zip(places, values, strict=True) if p == place) for place in places}
            axis.plot(sorted(best), [best[p] for p in sorted(best)], line, color=colour, marker=marker, markersize=4)
            top = better(best, key=best.__getitem__)
            axis.plot(top, best[top], "*", color=colour, markersize=13, markeredgecolor="white", zorder=4)
        axis.set_xticks(range(len(alphas)), [plain(alpha) for alpha in alphas])
        axis.set_xlim(-0.4, len(alphas) - 0.6)
        axis.set_xlabel("alpha", fontsize=9)
        axis.set_title(f"{task}, {scored_name(tasks[task])}", fontsize=9)
        tidy(axis, "y")
    arms = list(dict.fromkeys(arm for of_task in swept.values() for arm in of_task))
    handles = [plt.Line2D([], [], color=look[a].colour, marker=look[a].marker, linestyle=look[a].line) for a in arms]
    handles += [plt.Line2D([], [], color="#777777", marker="*", linestyle="", markersize=10)]
    handles += [plt.Line2D([], [], color=look[BASELINE].colour, linestyle="--")]
    handles += [plt.Line2D([], [], color="#777777", marker="o", linestyle="", markersize=4, alpha=0.4)]
    names = [*(f"{arm}, best at each alpha" for arm in arms), "best of all", "best of the baseline", "other settings"]
    figure.legend(
        handles, names, loc="outside lower center", ncols=4 if len(swept) > 1 else 2, frameon=False, fontsize=8
    )
    figure.supylabel("score on the tuning split", fontsize=9)
    return save(figure, path)
