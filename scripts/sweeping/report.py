"""Report of a sweep: the trials as JSON, a table, and a plot."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import optuna
from optuna.trial import TrialState
from rich import box
from rich.table import Table

from finetuning.results import write_file, write_json
from reporting.markdown import table_lines

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# Of Okabe and Ito's colours, which people with colour blindness can tell apart.
GREY, BLUE, ORANGE = "#999999", "#0072B2", "#D55E00"
SHORT = {"rdrop_alpha": "alpha", "rdrop_dropout": "dropout", "learning_rate": "learning rate"}
STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.RUNNING: "running"}


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep.

    Args:
        number: counted from 0 in the order of their beginnings.
        state: `complete`; `pruned`; `failed`; `interrupted`, when its process was killed (then it is drawn again and
            does not count); or `running`.
        parameters: those that were searched.
        score: at the end of the training, or where it was pruned; None for other states.
        evaluations: `(step, score)` of each evaluation.
        seconds: how long it took; None when it was interrupted.
        error: why it failed.
    """

    number: int
    state: str
    parameters: dict[str, float]
    score: float | None
    evaluations: list[tuple[int, float]]
    seconds: float | None
    error: str | None

    @property
    def counts(self) -> bool:
        """Tell whether the trial is one of --num_trials: it has ended, well or badly."""
        return self.state in ("complete", "pruned", "failed")

    def describe(self, metric: str) -> str:
        """Describe the trial in a line for the terminal."""
        values = ", ".join(f"{SHORT[name]} {value:g}" for name, value in self.parameters.items())
        if self.state == "failed":
            outcome = f"FAILED ({self.error})"
        else:
            outcome = f"{metric.removeprefix('eval_')} {self.score:.4g}"
            outcome += f", pruned at step {self.evaluations[-1][0]}" if self.state == "pruned" else ""
        return f"trial {self.number}: {values}: {outcome}, {self.seconds:.0f} s"


@dataclass(frozen=True)
class Sweep:
    """All trials of a sweep, and how they were judged.

    Args:
        script: such as `run_glue.py`.
        metric: as in `eval_results.json`.
        minimize: whether lower is better.
        judged_on: the data that the scores are of, in words.
        trials: in the order of their beginnings.
    """

    script: str
    metric: str
    minimize: bool
    judged_on: str
    trials: Sequence[Trial]

    @property
    def ranked(self) -> list[Trial]:
        """Return the complete trials, the best first; of equals the earlier."""
        complete = [trial for trial in self.trials if trial.state == "complete"]
        return sorted(complete, key=lambda trial: trial.score if self.minimize else -trial.score)

    @property
    def summary(self) -> str:
        """Count the trials of each state, and sum up their scores."""
        states = [trial.state for trial in self.trials]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        better = "lower" if self.minimize else "higher"
        return f"{self.metric} of {self.script}, {better} is better, on {self.judged_on}. Trials: {counts}."


def round_parameters(parameters: dict[str, float]) -> dict[str, float]:
    """To three digits: what is shown is exactly what was trained with."""
    return {name: float(f"{value:.3g}") for name, value in parameters.items()}


def read_trials(study: optuna.Study) -> list[Trial]:
    """Read the trials in optuna's storage; the reasons of failed ones are in the study's attribute `errors`."""
    errors, trials = study.user_attrs.get("errors", {}), []
    for trial in study.get_trials(deepcopy=False):
        error = errors.get(str(trial.number))
        state = STATES.get(trial.state, "failed" if error else "interrupted")
        # One whose process was killed was only found dead later.
        seconds = trial.duration.total_seconds() if trial.duration and state != "interrupted" else None
        score = trial.value if state in ("complete", "pruned") else None
        steps = sorted(trial.intermediate_values.items())
        trials.append(Trial(trial.number, state, round_parameters(trial.params), score, steps, seconds, error))
    return trials


def write_report(sweep: Sweep, folder: Path, log_scale: Sequence[str], command: str | None, **further: Any) -> None:
    """Write sweep.json, sweep.md and, once a trial is complete, sweep.png.

    Args:
        sweep: what to report.
        folder: where to.
        log_scale: the parameters whose axis is logarithmic.
        command: trains with the best parameters; None while there are none.
        further: more entries for the JSON file.
    """
    best = sweep.ranked[0].number if sweep.ranked else None
    write_json(folder / "sweep.json", {**asdict(sweep), "best": best, "command": command, **further})
    write_file(folder / "sweep.md", markdown(sweep, command))
    if sweep.ranked:
        write_file(folder / "sweep.png", lambda path: plot(sweep, path, log_scale))


def markdown(sweep: Sweep, command: str | None) -> str:
    """Write the table of all trials, the best first, and the command that trains with the best parameters."""
    names = list(dict.fromkeys(name for trial in sweep.trials for name in trial.parameters))
    order = ("pruned", "failed", "interrupted", "running")
    others = sorted((t for t in sweep.trials if t.state in order), key=lambda trial: order.index(trial.state))
    columns = ["trial", sweep.metric.removeprefix("eval_"), *names, "state", "seconds"]
    image = ["![Score over each parameter](sweep.png)", ""] if sweep.ranked else []
    rows = []
    for trial in (*sweep.ranked, *others):
        score = "" if trial.score is None else f"{trial.score:.4f}"
        values = [f"{trial.parameters[name]:g}" if name in trial.parameters else "" for name in names]
        seconds = "" if trial.seconds is None else f"{trial.seconds:.1f}"
        rows.append([str(trial.number), score, *values, trial.state, seconds])
    lines = [sweep.summary, "", *image, *table_lines(columns, rows)]
    failed = [f"- trial {trial.number}: {' '.join(trial.error.split())}" for trial in others if trial.error]
    if failed:
        lines += ["", "Failed:", "", *failed]
    if command:
        lines += ["", "To train with the best parameters:", "", "```bash", command, "```"]
    return "\n".join(lines) + "\n"


def terminal_table(sweep: Sweep, rows: int = 5) -> Table:
    """Show the best complete trials."""
    table = Table(box=box.SIMPLE_HEAD, title=f"Best of {len(sweep.trials)} trials")
    names = list(sweep.ranked[0].parameters)
    for name in ("trial", sweep.metric.removeprefix("eval_"), *map(SHORT.get, names), "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for trial in sweep.ranked[:rows]:
        values = [f"{trial.parameters[name]:g}" for name in names]
        table.add_row(str(trial.number), f"{trial.score:.4f}", *values, f"{trial.seconds:.0f}")
    return table


def plot(sweep: Sweep, path: Path, log_scale: Sequence[str]) -> None:
    """Draw the score over each searched parameter, and over the trials with the best one so far.

    Args:
        sweep: what to draw; at least one trial is complete.
        path: of the PNG file.
        log_scale: the parameters whose axis is logarithmic.
    """
    best, score = sweep.ranked[0], sweep.metric.removeprefix("eval_").replace("_", " ")
    groups = {
        "pruned, last evaluation": ([t for t in sweep.trials if t.state == "pruned"], "x", GREY, 34),
        "complete": ([t for t in sweep.trials if t.state == "complete" and t is not best], "o", BLUE, 30),
        "best": ([best], "*", ORANGE, 170),
    }
    panels = [*best.parameters, "trial"]
    columns = 2 if len(panels) == 4 else len(panels)
    size = (3.7 * columns + 0.4, 2.9 * math.ceil(len(panels) / columns) + 0.5)
    figure, axes = plt.subplots(math.ceil(len(panels) / columns), columns, figsize=size, squeeze=False, dpi=150)
    handles = {}
    for axis, panel in zip(axes.flat, panels, strict=True):
        for label, (trials, marker, colour, area) in groups.items():
            xs = [trial.number if panel == "trial" else trial.parameters[panel] for trial in trials]
            edge = {} if marker == "x" else {"edgecolor": "white", "linewidth": 0.6}
            dots = axis.scatter(
                xs, [t.score for t in trials], s=area, color=colour, marker=marker, zorder=3, label=label, **edge
            )
            if trials:
                handles[label] = dots
        if panel == "trial":
            handles["best so far"] = _draw_best_so_far(axis, sweep)
            axis.set_xlim(-0.5, len(sweep.trials) - 0.5)
            axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        elif panel in log_scale:
            _set_log_scale(axis, [trial.parameters[panel] for trial in sweep.trials if trial.score is not None])
        axis.set_xlabel(SHORT.get(panel, panel))
        axis.set_ylabel(score)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#eeeeee", zorder=0)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / size[1]))
    figure.legend(handles.values(), handles, loc="upper center", ncols=len(handles), frameon=False, fontsize=9)
    figure.savefig(path, format="png")
    plt.close(figure)


def _set_log_scale(axis: Any, values: Sequence[float]) -> None:
    """Make the x axis logarithmic, with plain numbers; also between the powers of ten where there is room."""
    axis.set_xscale("log")
    few_decades = max(values) < 100 * min(values)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
    axis.xaxis.set_major_formatter(
        lambda value, _: f"{value:g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")
    )
    axis.xaxis.set_minor_formatter(NullFormatter())


def _draw_best_so_far(axis: Any, sweep: Sweep) -> Any:
    better, xs, ys = min if sweep.minimize else max, [], []
    for trial in sweep.trials:
        if trial.state == "complete":
            xs.append(trial.number)
            ys.append(better([trial.score, *ys[-1:]]))
    xs.append(sweep.trials[-1].number)
    (line,) = axis.plot(xs, [*ys, ys[-1]], drawstyle="steps-post", color=ORANGE, linewidth=1.4, zorder=2)
    return line
