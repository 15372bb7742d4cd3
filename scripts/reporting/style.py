"""Look of pictures: colours and markers by name, panels, names beside points."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which people with colour blindness can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREYS = ("#999999", "#555555", "#000000")
DPI = 150
MARKERS, LINES = "osD^vP", ("-", "--", ":")
_DISTANCES = (7, 14, 22, 32, 44)  # in points, from the marker
_ANGLES = (0, 45, -45, 90, -90, 135, -135, 180)


class Style(NamedTuple):
    """Look of one name in every picture."""

    colour: str
    marker: str
    line: str


def styles(names: Sequence[str], controls: Sequence[str] = ()) -> dict[str, Style]:
    """Give each name its look; marker and line tell more names apart than colours.

    Args:
        names: what the picture shows.
        controls: up to three names, shown or not, that are grey: what the others are compared with.
    """
    made = {}
    coloured = [name for name in names if name not in controls]
    for name in names:
        if name in controls:
            place = controls.index(name)
            made[name] = Style(GREYS[place], MARKERS[place], "-")
        else:
            turn, which = divmod(coloured.index(name), len(COLOURS))
            made[name] = Style(COLOURS[which], MARKERS[(which + turn) % len(MARKERS)], LINES[turn % len(LINES)])
    return made


def fullest(fewest: int, most: int, number: int) -> int:
    """Choose the number of columns that leaves the fewest places of the last row empty."""
    return min(range(fewest, most + 1), key=lambda columns: (-number % columns, -columns))


def panels(number: int, columns: int, width: float, height: float, sharey: bool = False) -> tuple[Any, list[Any]]:
    """Axes for `number` panels in a grid, with sizes in inches of each."""
    columns = min(columns, number)
    rows = math.ceil(number / columns)
    size = (max(5.0, width * columns), height * rows + 0.5)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, dpi=DPI, squeeze=False, sharey=sharey, layout="constrained"
    )
    for axis in axes.flat[number:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:number])


def tidy(axis: Any, grid: str) -> None:
    """No frame at the top and right, a light grid, small numbers."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="#e8e8e8")
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)


def save(figure: Any, path: Path) -> bool:
    """Write a figure at its own resolution and close it; True."""
    figure.savefig(path, dpi="figure")
    plt.close(figure)
    with Image.open(path) as picture:  # a third of the size; rare colours are kept
        picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1).save(path, optimize=True)
    return True


def place_labels(
    axis: Any, points: Sequence[tuple[float, float]], names: Sequence[str], colours: Sequence[str]
) -> None:
    """Write each name as near to its point as it goes without covering a point, another name or, if possible, a line.

    Args:
        axis: with its final limits, in a figure that was laid out.
        points: x and y of each name, in data coordinates.
        names: the texts.
        colours: of the texts.
    """
    figure = axis.figure
    scale = figure.dpi / 72
    pixels = axis.transData.transform(points)
    taken = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in pixels]
    lines = [line.get_path().transformed(line.get_transform()) for line in axis.lines if len(line.get_xdata()) > 1]
    inside = axis.get_window_extent().padded(-3 * scale)
    for (x, y), point, name, colour in sorted(
        zip(pixels, points, names, colours, strict=True), key=lambda item: -item[0][1]
    ):
        text = axis.annotate(
            name, point, (0, 0), textcoords="offset points", fontsize=7.5, color=colour, va="center", zorder=4
        )
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        size = text.get_window_extent()
        best = None
        for distance, angle in itertools.product(_DISTANCES, _ANGLES):
            across, up = (distance * f(math.radians(angle)) * scale for f in (math.cos, math.sin))
            left = x + across - (size.width if across < -1 else size.width / 2 if abs(across) <= 1 else 0)
            box = Bbox.from_bounds(left, y + up - size.height / 2, size.width, size.height)
            outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            crossed = sum(path.intersects_bbox(box, filled=False) for path in lines)
            cost = 4 * box.count_overlaps(taken) + 8 * outside + crossed
            if best is None or cost < best[0]:
                best = cost, box, distance
            if cost == 0:
                break
        assert best is not None  # there are candidates
        _, box, distance = best
        taken.append(box)
        text.set_position(((box.x0 - x) / scale, ((box.y0 + box.y1) / 2 - y) / scale))
        if distance > _DISTANCES[1]:
            end = axis.transData.inverted().transform((min(max(x, box.x0), box.x1), (box.y0 + box.y1) / 2))
            axis.plot([point[0], end[0]], [point[1], end[1]], color=colour, linewidth=0.5, alpha=0.6, zorder=1)
