"""Consistency of several models as a table and a plot, from what their consistency.json files hold."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from finetuning.command_line import closest
from reporting.markdown import table_lines
from reporting.style import Style, panels, save, styles, tidy

CONTROLS = ("baseline", "baseline-2x", "doubled")  # names of models that are drawn in grey
USUAL_SCORES = ("f1", "accuracy", "pearson")
Sets = Mapping[str, Mapping[str, Any]]  # by validation set, the fields of `hf_rdrop.consistency.measure.Consistency`


def choose_score(sets: Sets, wanted: str | None) -> str:
    """Choose the score to show beside the loss.

    Raises:
        ValueError: the wanted one was not measured.
    """
    known = [name for name in next(iter(sets.values()))["scores"] if name != "loss"]
    if wanted is not None and wanted not in known:
        raise ValueError(f"--score {wanted} was not measured{closest(wanted, known)}: there are {', '.join(known)}.")
    return wanted or next((name for name in USUAL_SCORES if name in known), known[0])


def _by_set(models: Mapping[str, Sets]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in next(iter(models.values())):
        yield name, {model: sets[name] for model, sets in models.items()}


def _distance(measured: Mapping[str, Any]) -> str:
    return "KL" if "accuracy" in next(iter(measured.values()))["scores"] else "squared difference"  # of a regression


def markdown_table(models: Mapping[str, Sets], score: str) -> str:
    """Write a markdown table for each validation set: one row a model; sub-models as mean ± standard deviation.

    Args:
        models: by model and validation set what was measured.
        score: the score to show beside the loss.
    """
    parts = []
    for name, measured in _by_set(models):
        n, items = (next(iter(measured.values()))[key] for key in ("num_samples", "items"))
        columns = ["model"]
        for shown in ("loss", score):
            columns += [f"{shown}: dropout off", f"{shown}: sub-model", f"{shown}: ensemble of {n}"]
        distance = _distance(measured)
        pairs = "between sub-models", "sub-model to dropout off", f"ensemble of {n} to dropout off"
        columns += [f"{distance} {pair}" for pair in pairs]
        rows = []
        for model, found in measured.items():
            cells = [model]
            for values in (found["scores"]["loss"], found["scores"][score]):
                spread = f"{values['mean']:.4f} ± {values['std']:.4f}"
                cells += [f"{values['dropout_off']:.4f}", spread, f"{values['ensembles'][-1]:.4f}"]
            distances = found["between_sub_models"], found["to_dropout_off"], found["ensembles_to_dropout_off"][-1]
            rows.append([*cells, *(f"{value:.3g}" for value in distances)])
        parts.append("\n".join([f"Data: {name}, {items:,} items.", "", *table_lines(columns, rows), ""]))
    return "\n".join(parts)


def plot(models: Mapping[str, Sets], score: str, path: Path) -> None:
    """Draw a row of panels a validation set: loss and score of ensembles of n, and how far they are from dropout off.

    One colour a model: points on a line for the ensembles, a dashed line for dropout off, a dotted one for the mean of
    single sub-models with a band of one standard deviation.
    """
    rows = list(_by_set(models))
    looks = styles(list(models), CONTROLS)
    figure, grid = panels(3 * len(rows), 3, 3.6, 3.2)
    for row, (name, measured) in enumerate(rows):
        axes = grid[3 * row : 3 * row + 3]
        for model, found in measured.items():
            for axis, shown in zip(axes, ("loss", score), strict=False):
                values = found["scores"][shown]
                band = values["mean"] - values["std"], values["mean"] + values["std"]
                axis.axhspan(*band, color=looks[model].colour, alpha=0.13, linewidth=0)
                _plot_model(axis, looks[model], values["ensembles"], values["mean"])
                axis.axhline(values["dropout_off"], linestyle="--", linewidth=1.5, color=looks[model].colour)
            _plot_model(axes[2], looks[model], found["ensembles_to_dropout_off"], found["to_dropout_off"])
        axes[2].set_yscale("log")
        axes[2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[2].yaxis.set_major_formatter("{x:g}")
        axes[2].yaxis.set_minor_formatter(NullFormatter())
        for axis, title in zip(axes, ("loss", score, f"{_distance(measured)} to dropout off"), strict=True):
            axis.set_title(title if len(rows) == 1 else f"{title} ({name})", fontsize=10)
            axis.set_xlabel("sub-models in the ensemble, n", fontsize=9)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            tidy(axis, "y")
    figure.legend(handles=_legend(looks), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, path)


def _plot_model(axis: Any, look: Style, ensembles: Sequence[float], sub_models: float) -> None:
    axis.axhline(sub_models, linestyle=":", linewidth=1.5, color=look.colour)
    axis.plot(range(1, len(ensembles) + 1), ensembles, marker=look.marker, markersize=3.5, color=look.colour)


def _legend(looks: Mapping[str, Style]) -> list[Any]:
    forms = {
        "ensemble of n": {"marker": "o", "markersize": 4},
        "dropout off": {"linestyle": "--"},
        "single sub-model, mean": {"linestyle": ":"},
    }
    return [
        *(Line2D([], [], color="black", linewidth=1.5, label=label, **form) for label, form in forms.items()),
        Patch(color="black", alpha=0.15, linewidth=0, label="± one standard deviation"),
        *(Patch(color=look.colour, label=model) for model, look in looks.items()),
    ]
