"""The pictures of a comparison are written when there is something to show, and names do not cover one another."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image, ImageColor

from comparison.curves import plot_alphas, plot_curves
from comparison.figures import make_report
from comparison.names import GREY
from comparison.plots import pareto_front, plot_all, plot_gains, plot_pareto
from reporting.style import DPI, fullest, place_labels, save, styles
from support.comparison_data import ARMS, METRICS, make_choices, make_runs


def test_all_pictures(tmp_path):
    runs = make_runs()
    made = plot_all(make_report(runs, METRICS, ARMS), runs, METRICS, make_choices(), tmp_path)
    assert [path.name for path in made] == ["gains.png", "curves.png", "pareto.png", "alphas.png"]
    for path in made:
        with Image.open(path) as picture:
            assert picture.width >= 600 and len(picture.convert("RGB").getcolors(10**6)) > 5  # not an empty canvas
    assert plt.get_fignums() == []  # all closed


def test_nothing_to_show_writes_nothing(tmp_path):
    path = tmp_path / "plot.png"
    alone = [dict(run, history={}) for run in make_runs() if run["arm"] == "baseline"]
    report = make_report(alone, METRICS, ARMS)
    assert not plot_gains(report, path) and not plot_pareto(report, path)
    assert not plot_curves(alone, list(METRICS), ARMS, path)
    same_alpha = make_choices()
    same_alpha["ner", "rdrop"]["trials"] = [
        trial for trial in same_alpha["ner", "rdrop"]["trials"] if trial["settings"]["rdrop_alpha"] == 1.0
    ]
    assert not plot_alphas(same_alpha, METRICS, path) and not plot_alphas({}, METRICS, path)
    assert plot_all(make_report([], METRICS, ARMS), [], METRICS, {}, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_one_seed_and_of_histories_that_differ(tmp_path):
    runs = [run for run in make_runs() if run["seed"] == 0]
    assert len(plot_all(make_report(runs, METRICS, ARMS), runs, METRICS, {}, tmp_path)) == 3
    runs = make_runs()  # one with fewer log lines
    runs[0]["history"] = {name: values[:3] for name, values in runs[0]["history"].items()}
    assert plot_curves(runs, list(METRICS), ARMS, tmp_path / "curves.png")


def test_the_legend_of_many_arms_is_inside_the_picture(tmp_path, monkeypatch):
    arms = ["baseline", *(f"rdrop-shared-{i}" for i in range(9))]
    runs = [dict(run, arm=arm) for arm in arms for run in make_runs() if run["arm"] == "rdrop"]
    figures = []
    monkeypatch.setattr("comparison.curves.save", lambda figure, path: figures.append(figure))
    plot_curves(runs, list(METRICS), arms, tmp_path / "curves.png")
    figures[0].draw_without_rendering()
    legend, inside = figures[0].legends[0].get_window_extent(), figures[0].bbox
    assert len(figures[0].legends[0].texts) == 10
    assert inside.x0 <= legend.x0 and legend.x1 <= inside.x1 and inside.y0 <= legend.y0
    plt.close(figures[0])


def test_the_best_alpha_of_a_loss_is_the_one_with_the_lowest(monkeypatch):
    figures = []
    monkeypatch.setattr("comparison.curves.save", lambda figure, path: figures.append(figure))
    for metric in ("eval_bleu", "eval_perplexity"):
        assert plot_alphas(make_choices(), {"ner": metric}, None) is None
    stars = [
        tuple(map(float, (line.get_xdata()[0], line.get_ydata()[0])))
        for figure in figures
        for line in figure.axes[0].lines
        if line.get_marker() == "*"
    ]
    # 0.5 + alpha / 10 - dropout, for alpha 0.5, 1, 2 and dropout 0.1, 0.2
    assert stars == [pytest.approx((2, 0.6)), pytest.approx((0, 0.35))]
    titles = [figure.axes[0].get_title() for figure in figures]
    assert titles == ["ner, bleu", "ner, perplexity, lower is better"]
    for figure in figures:
        plt.close(figure)


def test_pareto_front():
    pairs = [(1.0, 0.0), (1.9, 1.0), (1.5, 1.2), (1.2, 0.4), (1.2, 0.6), (1.1, -0.5), (2.0, 1.2)]
    front = pareto_front(pairs)
    assert front == [(1.0, 0.0), (1.2, 0.6), (1.5, 1.2)]
    for cost, gain in pairs:
        dominated = any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in pairs)
        assert ((cost, gain) in front) == (not dominated)


def test_every_arm_looks_different():
    arms = ["baseline", "baseline-2x", "doubled", *(f"arm-{i}" for i in range(18))]
    looks = styles(arms, GREY)
    assert len({(look.colour, look.line) for look in looks.values()}) == len(arms)
    assert len({(look.colour, look.marker) for look in looks.values()}) == len(arms)


def test_a_written_picture_keeps_the_colours_of_all_arms(tmp_path):
    """A rare colour among shades of others was changed into a neighbour when pictures were made smaller."""
    look = styles([*GREY, *(f"rdrop-{index}" for index in range(6))], GREY)
    figure, axes = plt.subplots(dpi=DPI)
    for place, style in enumerate(look.values()):
        width = 0.5 if place in (5, 6) else 4  # of the line, in points: two arms with few pixels
        axes.plot([0, 1 if width > 1 else 0.1], [place, place + 0.3], color=style.colour, linewidth=width)
        for start in range(5 * (width > 1)):
            axes.fill_between([0, 1], start, place + 2, color=style.colour, alpha=0.15, linewidth=0)
    save(figure, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        shown = np.array(picture.convert("RGB"), dtype=int).reshape(-1, 3)
    for arm, style in look.items():
        assert np.abs(shown - ImageColor.getrgb(style.colour)).sum(1).min() <= 12, arm  # of 3 x 255


@pytest.mark.parametrize(("number", "columns"), [(3, 3), (4, 4), (5, 3), (6, 3), (7, 4), (8, 4), (9, 3)])
def test_columns_leave_few_places_empty(number, columns):
    assert fullest(3, 4, number) == columns


def test_names_do_not_cover_one_another_nor_points():
    figure, axis = plt.subplots(figsize=(5, 3))
    points = [(1.0, 0.0), (1.02, 0.05), (1.05, 0.02), (1.3, 0.6), (1.9, 1.0), (1.92, 0.97), (2.0, 0.4), (2.0, 0.4)]
    axis.plot(*zip(*points, strict=True), "o", linestyle="none")
    axis.margins(0.2)
    figure.draw_without_rendering()
    place_labels(axis, points, [f"rdrop-arm-{i}" for i in range(len(points))], ["black"] * len(points))
    boxes = [text.get_window_extent() for text in axis.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.contains(x, y) for box in boxes for x, y in axis.transData.transform(points))
    inside = axis.get_window_extent().padded(-2 * figure.dpi / 72)  # nor the axes
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
    plt.close(figure)
