"""Show a training run's logs on its model card: the scores of the model as it is, CE and KL by epoch."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from ..files import write_atomically
from .facts import HeadFacts, training_lines
from .markdown import NOTHING, inline, number, table

MAX_ROWS = 20  # of the table by epoch; the plot has every log line
_NOT_SCORES = re.compile(r"(runtime|per_second|_time|_mem_\w+)$")


def last_evaluation(state: TrainerState, args: TrainingArguments) -> dict[str, Any] | None:
    """Find the scores of the model as it is now: `metrics` by name without eval_, `step`, and if it is the `best`.

    They come from after training, else from its last evaluation, or that of the best checkpoint if it was loaded.
    """
    history = state.log_history
    ends = [place for place, line in enumerate(history) if "train_runtime" in line]
    lines = [line for line in history if _scores(line)]
    after = [line for line in history[ends[-1] :] if _scores(line)] if ends else []
    best = bool(not after and args.load_best_model_at_end and state.best_global_step)
    if best:
        lines = [line for line in lines if line.get("step") == state.best_global_step]
    lines = after or lines
    if not lines:
        return None
    step = lines[-1].get("step", 0)
    metrics: dict[str, Any] = {}
    for line in lines:
        if line.get("step", 0) == step:
            metrics |= _scores(line)
    return {"metrics": metrics, "step": step, "best": best}


def _scores(line: Mapping[str, Any]) -> dict[str, Any]:
    found = {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
    return {name: value for name, value in found.items() if not _NOT_SCORES.search(name)}


def curves_part(
    history: Sequence[Mapping[str, Any]], head: HeadFacts, alpha: float, interval: int = 1
) -> dict[str, Any] | None:
    """Tabulate CE and KL by epoch: means of the log lines, weighted by the number of their steps.

    Lines without a `rdrop_alpha` of their own have the one that is given; with 0 only the loss is shown.
    """
    epochs: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
    before = 0
    for line in training_lines(history):
        epochs.setdefault(_epoch(line), []).append((max(1, line["step"] - before), line))
        before = line["step"]
    if not epochs:
        return None
    scores = {_epoch(line): _scores(line) for line in history if "epoch" in line and _scores(line)}
    names = list(dict.fromkeys(name for epoch, found in scores.items() if epoch in epochs for name in found))[:4]
    rows = []
    for epoch, weighted in epochs.items():
        loss, ce, kl = (_mean(weighted, name) for name in ("loss", "ce_loss", "kl_loss"))
        parts = [(n, {"part": line.get("rdrop_alpha", alpha) / 2 * line["kl_loss"]}) for n, line in weighted]
        part = _mean(parts, "part")
        share = f"{part / ce:.1%}" if ce and math.isfinite(part / ce) else NOTHING
        last = weighted[-1][1]
        losses = [number(loss), number(ce), number(kl), share] if alpha else [number(loss)]
        measured = [number(scores.get(epoch, {}).get(name)) for name in names]
        rows.append([f"{last['epoch']:.4g}", str(last["step"]), *losses, *measured])
    if len(rows) > MAX_ROWS:
        rows = [rows[round(i * (len(rows) - 1) / (MAX_ROWS - 1))] for i in range(MAX_ROWS)]
    terms = (head.loss, head.divergence, f"alpha/2 x {head.divergence} over {head.loss}") if alpha else ()
    evaluated = [inline(f"evaluation {name.replace('_', ' ')}") for name in names]
    text = table(["epoch", "step", "loss", *terms, *evaluated], rows)
    thinned = len(epochs) > MAX_ROWS
    return {"table": text, "thinned": thinned, "head": head, "alpha": alpha, "interval": interval, "plot": None}


def _epoch(line: Mapping[str, Any]) -> int:
    return math.ceil(line["epoch"] - 1e-6)


def _mean(weighted: Sequence[tuple[int, Mapping[str, Any]]], name: str) -> float:
    return sum(weight * line[name] for weight, line in weighted) / sum(weight for weight, _ in weighted)


def plot_curves(history: Sequence[Mapping[str, Any]], head: HeadFacts, path: Path) -> bool:
    """Plot CE and KL over epochs beside the card; False without matplotlib or with fewer than two lines."""
    lines = training_lines(history)
    try:
        from matplotlib.figure import Figure  # not pyplot: it would choose a backend for the user's program
    except ImportError:
        return False
    if len(lines) < 2:
        return False
    figure = Figure(figsize=(7.2, 2.6), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    epochs = [line["epoch"] for line in lines]
    left.plot(epochs, [line["ce_loss"] for line in lines], color="#0072B2", label="training")
    right.plot(epochs, [line["kl_loss"] for line in lines], color="#D55E00")
    evaluated = [line for line in history if "eval_loss" in line and "epoch" in line]
    if evaluated:
        points = [line["epoch"] for line in evaluated], [line["eval_loss"] for line in evaluated]
        left.plot(*points, color="#555555", marker="o", markersize=3.5, linestyle="--", label="evaluation")
        left.legend(frameon=False, fontsize=8)
    for axis, title in ((left, head.loss), (right, f"{head.divergence} between the passes")):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e8e8e8")
        axis.set_ylim(0, 1.04 * axis.get_ylim()[1])
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())
    return True
