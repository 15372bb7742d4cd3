"""Parts of a reference run's card, all from the figures of comparison.json."""

import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import ModelCardData

from comparison.card_words import in_words
from comparison.figures import Report, points, trial_scores
from comparison.names import BASELINE, CONTROLS, RDROP
from comparison.report import as_json, choice_table
from comparison.tables import (
    control_table,
    cost_table,
    secondary_tables,
    seed_table,
    short_name,
)
from finetuning.command_line import option_name
from hf_rdrop import RDropArguments, __version__
from hf_rdrop.cards.evidence import comparison_part
from hf_rdrop.cards.facts import HeadFacts
from hf_rdrop.cards.history import curves_part
from hf_rdrop.cards.markdown import code, inline, link, public
from hf_rdrop.cards.metadata import HUB_METRICS, TAG
from hf_rdrop.cards.objective import objective_facts
from hf_rdrop.training.loss_log import INERT_SHARE
from hf_rdrop.training.settings import Settings
from hf_rdrop.training_args import REMOVED
from reporting.markdown import number_cell, plain, table_lines

KINDS = {
    "run_clm.py": "causal",
    "run_glue.py": "sequence",
    "run_ner.py": "token",
    "run_translation.py": "seq2seq",
    "run_image_classification.py": "image",
}
DATA = ("task_name", "dataset_name", "train_file", "validation_file", "train_dir", "validation_dir", "digits")
ROWS = (("train", "training"), ("eval", "evaluation"))
LOGGED = ("epoch", "loss", "ce_loss", "kl_loss")


class Task:
    """One task of a comparison: its rows, runs and choices of settings.

    Args:
        found: the content of comparison.json, with the histories as log lines.
        report: its figures.
        name: of the task.

    Attributes:
        rows: by arm.
        rdrop: the arm that the card tells most of: `rdrop`, or else the first that is no control; None without one.
        options: arguments of that arm (or of the first one) by name, as others may see them.
    """

    def __init__(self, found: Mapping[str, Any], report: Report, name: str) -> None:
        self.name, self.about = name, found.get("about", {})
        self.rows = report.of_task(name)
        self.report = Report(list(self.rows.values()), [], [name], [], report.without_score)
        self.runs = [run for run in found["runs"] if run["task"] == name and run["arm"] in self.rows]
        self.choices = {(name, choice["arm"]): choice for choice in found.get("choices", ()) if choice["task"] == name}
        self.failed = [
            run for run in (*found.get("failed", {}), *report.without_score) if run.startswith(f"{name} / ")
        ]
        arms = [arm for arm in self.rows if arm not in (BASELINE, *CONTROLS)]
        self.rdrop = RDROP if RDROP in arms else next(iter(arms), None)
        self.options = options_of(self.run(self.rdrop or next(iter(self.rows))).get("arguments", ()))
        self.script = self.about.get("tasks", {}).get(name, "").strip("`").partition(" ")[0]

    def run(self, arm: str) -> dict[str, Any]:
        """The first run of an arm."""
        return next(run for run in self.runs if run["arm"] == arm)

    @property
    def metric(self) -> str:
        return next(iter(self.rows.values())).metric

    @property
    def head(self) -> HeadFacts:
        """By the script and by the metrics that it gives for each kind of labels."""
        metrics = self.runs[0]["metrics"]
        problem = "single_label_classification"
        if "eval_pearson" in metrics or "eval_mse" in metrics:
            problem = "regression"
        elif "eval_subset_accuracy" in metrics:
            problem = "multi_label_classification"
        kind = "masked" if "--mlm" in self.runs[0]["arguments"] else KINDS.get(self.script)
        return HeadFacts(kind, None, None, problem, self.options.get("rdrop_agreement", "symmetric_kl"))


def options_of(arguments: Sequence[str]) -> dict[str, str]:
    """Return the arguments of a run by name, of paths the last component; $VARIABLES stay as they are."""
    found: dict[str, str] = {}
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            name = option_name(argument)
            found[name] = public(argument.partition("=")[2])
        else:
            found[name] = f"{found.get(name, '')} {public(argument)}".strip()
    return found


def file_name(name: str) -> str:
    """Turn a name into that of a file."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "task"


def metadata(task: Task) -> ModelCardData:
    """Tag, language, data set and metric: nothing about a model, as none is published."""
    metric = HUB_METRICS.get(task.metric.removeprefix("eval_"))
    is_glue = "task_name" in task.options
    data_set = "glue" if is_glue else task.options.get("dataset_name")
    return ModelCardData(
        tags=[TAG],
        language="en" if is_glue else None,
        datasets=[data_set] if data_set else None,
        metrics=[metric] if metric else None,
    )


def make_parts(task: Task, *, config: Path | None, note: str | None, consistency: Any) -> dict[str, Any]:
    """Return the parts of a task's card for the template."""
    report, base = task.report, task.rows.get(BASELINE)
    tables = (control_table(report), cost_table(report), seed_table(report), secondary_tables(report))
    history = _mean_history(task)
    rdrop = _rdrop_part(task, history)
    return {
        "title": f"R-Drop on {task.name}",
        "reference": {"summary": _summary(task, note), "arm": task.rdrop, "limitations": _limitations(task)},
        "outcome": [in_words(row, base) for row in task.rows.values() if row.arm != BASELINE],
        "comparison": comparison_part(as_json(report)["rows"]),
        "tables": [_section(lines, task.name) for lines in tables if lines],
        "consistency": consistency,
        "rdrop": rdrop,
        "curves": rdrop and curves_part(history, task.head, float(rdrop["alpha"]), rdrop["interval"]),
        "settings": {"text": _settings(task)},
        "reproduce": _again(task, config),
        "versions": list(task.about.get("setup", {}).items()),
        "library": __version__,
    }


def _section(lines: Sequence[str], task: str) -> dict[str, str]:
    text = "\n".join(line for line in lines[2:] if line != f"### {task}")
    return {"title": lines[0].removeprefix("## "), "text": text}


def _summary(task: Task, note: str | None) -> str:
    sentences = [
        "What came out of fine-tuning with and without [R-Drop](https://arxiv.org/abs/2106.14448) on the task "
        f"{code(task.name)} ({inline(short_name(task.metric))}), by `scripts/compare.py`.",
        "No weights are published with this card.",
    ]
    return " ".join([*sentences, inline(public(note))] if note else sentences)


def _limitations(task: Task) -> list[str]:
    numbers = sorted({len(row.scores) for row in task.rows.values()})
    seeds = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    told = [
        f"{seeds} seed{'' if numbers == [1] else 's'} an arm. Intervals and tests are about other seeds, not about "
        "another validation set, other settings or another model.",
        "One model and one data set: nothing here says what R-Drop does on others.",
    ]
    trials = {len(c.get("trials", ())) for c in task.choices.values() if not c.get("taken_from")}
    if max(trials, default=0):
        count = f"{max(trials)}" if len(trials) == 1 else f"at most {max(trials)}"
        told.append(f"Settings were chosen from {count} trials an arm: there may be better ones for any of them.")
    else:
        told.append("Nothing was tuned: with other settings the arms may change places.")
    device = task.about.get("setup", {}).get("device")
    told.append(f"Costs were measured on {inline(device) if device else 'one machine'}; they differ on others.")
    if task.failed:
        told.append(f"Runs without a result, which no figure contains: {', '.join(map(inline, task.failed))}.")
    return told


# ---- How it was trained ----


def _rdrop_part(task: Task, history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if task.rdrop is None or REMOVED.keys() & task.options.keys():  # no longer an objective of this library
        return None
    options, head = task.options, task.head
    alpha, settings = float(options.get("rdrop_alpha", 1)), _settings_of(options)
    last = history[-1] if history else {}
    dropout, shared = options.get("rdrop_dropout"), float(options.get("rdrop_shared_layers", 0))
    return {
        **objective_facts(settings, head.problem == "regression"),
        "alpha": f"{alpha:g}",
        "half": f"{alpha / 2:g}",
        "passes": int(options.get("rdrop_passes", 2)),
        "interval": int(options.get("rdrop_interval", 1)),
        "trunk": {"shared": f"{shared:g}" if shared >= 1 else f"{shared:.0%}", "layers": None} if shared else None,
        "fused_head": False,
        "head": head,
        "dropout": f"{dropout}, set everywhere" if dropout else None,
        "smoothing": options.get("label_smoothing_factor"),
        "trained": True,
        "share": alpha / 2 * last["kl_loss"] / last["ce_loss"] if alpha and last.get("ce_loss") else None,
        "inert_share": INERT_SHARE,
        "share_step": last.get("step"),
    }


def _settings_of(options: Mapping[str, str]) -> Settings:
    """Read R-Drop's settings off the arguments of a run, which are text."""
    given = SimpleNamespace()
    for name, text in options.items():
        default = getattr(RDropArguments, name, None) if name.startswith("rdrop_") else None
        if isinstance(default, bool):
            setattr(given, name, text.lower() not in ("false", "0", "no"))
        elif name.startswith("rdrop_"):
            setattr(given, name, text if isinstance(default, str) else float(text))
    return Settings.of(given)


def _mean_history(task: Task) -> list[dict[str, Any]]:
    """Return the log lines of the R-Drop arm as means over seeds, at the steps that all have logged."""
    histories = [run["history"] for run in task.runs if run["arm"] == task.rdrop]
    by_step = [
        {line["step"]: line for line in history if all(name in line for name in LOGGED)} for history in histories
    ]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    return [
        {name: statistics.fmean(of_run[step][name] for of_run in by_step) for name in LOGGED} | {"step": step}
        for step in steps
    ]


def _settings(task: Task) -> str:
    """Model, data and rows; the chosen settings, and the trials that they were chosen from."""
    options, metrics = task.options, task.run(task.rdrop or next(iter(task.rows)))["metrics"]
    data = [code(options[name] or f"--{name}") for name in DATA if name in options]
    counts = [f"{metrics[f'{name}_samples']:,} for {what}" for name, what in ROWS if f"{name}_samples" in metrics]
    model = options.get("model_name_or_path", "")
    lines = [f"- Model: {code(model) if model.startswith('$') else link(model)}"] if model else []
    lines += [f"- Data: {', '.join(data)}"] if data else []
    lines += [f"- Rows: {', '.join(counts)}"] if counts else []
    lines += [f"- Script: `scripts/{task.script}`"] if task.script else []
    if table := choice_table(task.report, task.choices)[2:]:
        lines += ["", *table]
    trials = []
    for (_, arm), choice in task.choices.items():
        for settings, score in trial_scores(choice.get("trials", ())):
            chosen = "chosen" if settings == choice["settings"] else ""
            value = number_cell(points(task.metric) * score, ".2f")
            trials.append([inline(arm), inline(plain(settings)), value, chosen])
    if trials:
        lines += ["", "All trials:", "", *table_lines(["arm", "settings", "score there", ""], trials)]
    return "\n".join(lines)


def _again(task: Task, config: Path | None) -> str:
    """List the commands: the whole comparison where its configuration is known, and a run of each arm."""
    options = {arm: options_of(task.run(arm).get("arguments", ())) for arm in task.rows}
    gone = {arm: names for arm, given in options.items() if (names := [name for name in given if name in REMOVED])}
    arms, parts = [arm for arm in task.rows if arm not in gone], []
    if config is not None:
        seeds = sorted({seed for row in task.rows.values() for seed in row.scores})
        file = config.name if config.is_absolute() or ".." in config.parts else config.as_posix()
        words = ["--config", file, "--tasks", task.name, "--arms", *arms, "--seeds", *map(str, seeds)]
        parts += ["The comparison:", "", *_bash(["compare.py", *words, "--output_dir", "outputs/again"]), ""]
    if task.script and all(run.get("arguments") for run in task.runs):
        parts += ["A run of each arm, with its first seed:", ""]
        commands = []
        for arm in arms:
            output = f"outputs/{file_name(f'{task.name}-{arm}')}"
            commands.append([task.script, *map(public, task.run(arm)["arguments"]), "--output_dir", output])
        parts += _bash(*commands)
    if gone and parts:
        told = [f"{code(arm)} ({', '.join(map(code, names))})" for arm, names in gone.items()]
        parts += ["", f"Arms with an argument that `hf_rdrop` no longer has cannot be run again: {', '.join(told)}."]
    return "\n".join(parts)


def _bash(*commands: Sequence[str]) -> list[str]:
    # $VARIABLES are the shell's to fill in.
    lines = (
        " ".join(word if re.fullmatch(r"[\w$./,:=@%+-]+", word) else shlex.quote(word) for word in words)
        for words in commands
    )
    return ["```bash", *(f"python scripts/{line}" for line in lines), "```"]
