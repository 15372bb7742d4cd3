"""Draws the README's picture of R-Drop: one example, two dropout sub-models, both right and in agreement.

python scripts/draw_overview.py --output model_cards/overview.png
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

from finetuning.command_line import cli
from reporting.style import COLOURS, DPI, plt, save

BLUE, ORANGE, GREEN = COLOURS[:3]
GREY = "#c4c4c4"
LAYERS = (3, 5, 5, 3)  # units of each layer
DROPPED = ({(1, 1), (1, 4), (2, 0), (2, 3)}, {(1, 0), (1, 2), (2, 1), (2, 4)})  # (layer, unit), pass by pass
PREDICTIONS = ((0.64, 0.25, 0.11), (0.47, 0.41, 0.12))
ROWS = (1.75, -1.75)  # height of each pass


def draw(path: Path) -> None:
    """Write the picture."""
    figure, axis = plt.subplots(figsize=(8.4, 3.6), dpi=DPI, layout="constrained")
    axis.set(xlim=(-1.9, 11.2), ylim=(-3.35, 3.35), aspect="equal")
    axis.axis("off")
    _box(axis, -1.05, 0, "example x", "#333333", width=1.5)
    for y, dropped, prediction, colour, number in zip(ROWS, DROPPED, PREDICTIONS, (BLUE, ORANGE), (1, 2), strict=True):
        _arrow(axis, (-0.25, 0.12 * (1 if y > 0 else -1)), (0.75, y), "#333333")
        _network(axis, y, dropped, colour)
        axis.text(2.75, y + 1.38, f"pass {number}: dropout mask {number}", ha="center", color=colour, fontsize=9)
        _arrow(axis, (4.75, y), (5.4, y), colour)
        _bars(axis, y, prediction, colour)
        axis.text(6.1, y + 0.98, f"$P_{number}$", ha="center", color=colour, fontsize=11)
        _arrow(axis, (6.95, y), (7.85, y), colour)
        _box(axis, 9.2, y, f"be right: CE$_{number}$", colour, width=2.5)
    _arrow(axis, (6.1, 0.75), (6.1, -0.45), GREEN, style="<->")
    _arrow(axis, (6.35, 0.12), (7.55, 0.12), GREEN)
    _box(axis, 9.2, 0.12, "agree: KL($P_1$, $P_2$)", GREEN, width=3.2)
    axis.text(
        9.2,
        -3.1,
        r"loss = (CE$_1$ + CE$_2$ + $\alpha\,$KL) / 2",
        ha="center",
        va="center",
        fontsize=11,
        color="#333333",
    )
    save(figure, path)


def _network(axis: Any, y: float, dropped: set[tuple[int, int]], colour: str) -> None:
    """Layers of units from left to right; dropped ones are crosses without connections."""
    places = [[(1.1 + 1.1 * x, y + 0.46 * (i - (n - 1) / 2)) for i in range(n)] for x, n in enumerate(LAYERS)]
    for x, (left, right) in enumerate(itertools.pairwise(places)):
        for i, start in enumerate(left):
            for j, end in enumerate(right):
                if (x, i) not in dropped and (x + 1, j) not in dropped:
                    axis.plot(*zip(start, end, strict=True), color=colour, alpha=0.28, linewidth=0.8, zorder=1)
    for x, layer in enumerate(places):
        for i, place in enumerate(layer):
            if (x, i) in dropped:
                axis.plot(*place, "x", color=GREY, markersize=6, markeredgewidth=1.6, zorder=2)
            else:
                axis.plot(*place, "o", color=colour, markersize=6, zorder=2)


def _bars(axis: Any, y: float, prediction: tuple[float, ...], colour: str) -> None:
    for i, p in enumerate(prediction):
        axis.bar(5.7 + 0.4 * i, 1.9 * p, width=0.3, bottom=y - 0.6, color=colour)
    axis.plot([5.45, 6.75], [y - 0.6, y - 0.6], color="#333333", linewidth=0.8)


def _box(axis: Any, x: float, y: float, text: str, colour: str, width: float) -> None:
    axis.add_patch(
        plt.matplotlib.patches.FancyBboxPatch(
            (x - width / 2, y - 0.38), width, 0.76, boxstyle="round,pad=0.06", facecolor="white", edgecolor=colour
        )
    )
    axis.text(x, y, text, ha="center", va="center", color=colour, fontsize=9.5)


def _arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], colour: str, style: str = "->") -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": style, "color": colour, "linewidth": 1.4})


def main(argv: list[str] | None = None) -> None:
    """Run the script with these arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("model_cards/overview.png"), help="picture to write")
    args = parser.parse_args(argv)
    if not args.output.parent.is_dir():
        raise ValueError(f"--output {args.output}: the folder {args.output.parent} does not exist. Make it first.")
    draw(args.output)


if __name__ == "__main__":
    cli(main)
