"""Pictures of a benchmark: one a section, from what benchmark.json holds."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarking.loss import CLOSED_FORM, OFFICIAL
from benchmarking.loss import FUSED as FUSED_LOSS
from benchmarking.report import AXES, Group, arm_label, memory_ratio, time_ratio
from benchmarking.steps import DOUBLED, FUSED, PLAIN, RDROP, TRUNK_3_4, TWO_FORWARDS
from reporting.style import plt, save

_ARM_COLOURS = {
    **{PLAIN: "#999999", DOUBLED: "#666666", TWO_FORWARDS: "#E69F00", RDROP: "#0072B2", FUSED: "#D55E00"},
    **{OFFICIAL: "#999999", CLOSED_FORM: "#0072B2", FUSED_LOSS: "#D55E00"},
}


def _colour(arm: str) -> str:
    return _ARM_COLOURS.get(arm, "#009E73" if arm.startswith("trunk") else "#CC79A7")


def plot(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Draw one picture for each section that was measured; returns their files."""
    made = []
    for section, draw in (("loss", _plot_loss), ("steps", _plot_steps), ("growth", _plot_growth)):
        if chosen := [group for group in groups if group["section"] == section and group["arms"]]:
            figure = draw(chosen)
            made.append(folder / f"{section}.png")
            figure.set_dpi(110)
            save(figure, made[-1])
    return made


def _style(axis: Any, grid: str = "y") -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="#e8e8e8")
    axis.set_axisbelow(True)


def _plot_loss(groups: Sequence[Group]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    styles = dict(zip(sorted({group["rows"] for group in groups}, reverse=True), ("-", "--", "-.", ":"), strict=False))
    for axis, ratio, title in zip(
        axes, (time_ratio, memory_ratio), ("times faster", "times less peak memory"), strict=True
    ):
        for arm in (CLOSED_FORM, FUSED_LOSS):
            for rows, style in styles.items():
                line = sorted((g["vocab"], ratio(g, OFFICIAL, arm)) for g in groups if g["rows"] == rows)
                label = f"{arm}, {rows:,} items"
                axis.plot(*zip(*line, strict=True), style, marker="o", markersize=4, color=_colour(arm), label=label)
        axis.axhline(1, color="#444444", linewidth=1)
        axis.set_xscale("log")
        axis.set_yscale("log")
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if _within(tick, axis.get_ylim())]
        axis.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
        values = sorted({group["vocab"] for group in groups})
        axis.set_xticks(values, [_short(value) for value in values])
        axis.minorticks_off()
        axis.set_xlabel("classes or vocabulary V")
        axis.set_title(f"{title} than the official formula", fontsize=10)
        _style(axis)
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle("Loss stage: from hidden states to loss and gradients", fontsize=11)
    return figure


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def _plot_steps(groups: Sequence[Group]) -> Any:
    heights = [len(group["arms"]) + 2 for group in groups]
    size = (8.4, 0.2 * sum(heights) + 0.8)
    figure, axes = plt.subplots(
        len(groups), 2, figsize=size, squeeze=False, sharex="col", height_ratios=heights, layout="constrained"
    )
    for row, group in zip(axes, groups, strict=True):
        arms = list(group["arms"])
        for axis, ratio, quantity in zip(row, (time_ratio, memory_ratio), ("time", "memory"), strict=True):
            values = [ratio(group, arm, PLAIN) for arm in arms]
            axis.barh(range(len(arms)), values, color=[_colour(arm) for arm in arms], height=0.72)
            for y, (arm, value) in enumerate(zip(arms, values, strict=True)):
                # At the foot of the bar, where no mark of the cost model can cover it.
                axis.text(0.04, y, f"{value:.2f}", va="center", fontsize=8, color="white", fontweight="bold")
                if (predicted := group["arms"][arm].get("prediction", {}).get(quantity)) is not None:
                    axis.plot([predicted] * 2, [y - 0.36, y + 0.36], color="black", linewidth=1.4)
            axis.axvline(1, color="#444444", linewidth=1)
            axis.set_ylim(len(arms) - 0.4, -0.6)
            axis.margins(x=0.04)
            axis.set_yticks(range(len(arms)), [arm_label(group, arm) for arm in arms] if quantity == "time" else [])
            axis.tick_params(axis="y", length=0, labelsize=8)
            _style(axis, "x")
        row[0].set_title(group["head"], fontsize=10, loc="left", fontweight="bold")
    axes[-1][0].set_xlabel("time of a step / plain B")
    axes[-1][1].set_xlabel("peak memory of a step / plain B")
    if any(arm.get("prediction") for group in groups for arm in group["arms"].values()):
        figure.suptitle("One training step over a plain one (black: the cost model)", fontsize=11)
    else:
        figure.suptitle("One training step over a plain one", fontsize=11)
    return figure


def _plot_growth(groups: Sequence[Group]) -> Any:
    axes_measured = list(dict.fromkeys(group["axis"] for group in groups))
    figure, axes = plt.subplots(
        2,
        len(axes_measured),
        figsize=(2.6 * len(axes_measured) + 0.6, 5),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    labels = {}
    for column, name in enumerate(axes_measured):
        chosen = sorted((group for group in groups if group["axis"] == name), key=lambda group: group["value"])
        for row, (ratio, quantity) in enumerate(((time_ratio, "time"), (memory_ratio, "memory"))):
            axis = axes[row][column]
            for arm in (RDROP, FUSED, TRUNK_3_4):
                there = [group for group in chosen if arm in group["arms"]]
                if not there:
                    continue
                values = [group["value"] for group in there]
                line = [ratio(group, arm, PLAIN) for group in there]
                (labels[arm],) = axis.plot(values, line, marker="o", markersize=4, color=_colour(arm))
                model = [group["arms"][arm].get("prediction", {}).get(quantity, math.nan) for group in there]
                axis.plot(values, model, ":", color=_colour(arm), linewidth=1.4)
            axis.axhline(1, color="#444444", linewidth=1)
            axis.set_xscale("log")
            axis.set_xticks([g["value"] for g in chosen], [_short(g["value"]) for g in chosen])
            axis.minorticks_off()
            _style(axis)
        axes[0][column].set_title(f"{AXES[name]}\n({chosen[0]['head'].replace('-', ' ')})", fontsize=9)
    axes[0][0].set_ylabel("time / plain B")
    axes[1][0].set_ylabel("peak memory / plain B")
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle("How the cost grows (dotted: the cost model)", fontsize=11)
    return figure


def _short(value: int) -> str:
    return f"{value // 1000}k" if value >= 1000 and value % 1000 == 0 else str(value)
