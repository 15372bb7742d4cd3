"""Runs of a comparison and what they leave behind: comparison.json, the report and the plots."""

import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from comparison.arms import Arm
from comparison.config import Comparison
from comparison.devices import accelerator, cuda_name
from comparison.figures import make_report
from comparison.file import not_one, read_comparison, write_comparison
from comparison.history import as_columns, as_lines
from comparison.queue import RUN_FILE, Run
from comparison.report import as_json, markdown, terminal_table
from finetuning.results import LAST_RESULT_FILE, write_file, write_json

MARKER = "settings.json"
PACKAGES = ("hf_rdrop", "torch", "transformers", "accelerate", "datasets")


def describe(run: Run, metric: str) -> str:
    """Describe a finished run in a line.

    Raises:
        ValueError: it has no such metric.
    """
    results = run.results()
    if metric not in results:
        known = ", ".join(sorted(name for name in results if name.startswith("eval_")))
        raise ValueError(f"--metric {metric} is not among the results of {run.script}: {known}.")
    return f"{metric.removeprefix('eval_')} {results[metric]:.4g}, {results['train_runtime']:.1f} s"


def list_runs(console: Console, comparison: Comparison, runs: Sequence[Run]) -> None:
    """Print the commands of the runs that have neither finished nor can be taken over, for a dry run."""
    made = _made_elsewhere(comparison.take_from)
    waiting = [run for run in runs if not run.results() and _key(run) not in made]
    for run in waiting:
        console.print(f"{run.name}:\n  python scripts/{' '.join([run.script, *run.command[2:]])}", highlight=False)
    jobs = comparison.jobs
    console.print(f"{len(waiting)} of {len(runs)} runs would start, {jobs} at once.", highlight=False)


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds other things than a comparison.

    Raises:
        ValueError: it does.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).exists())):
        raise ValueError(f"--output_dir {folder} holds other files: choose a new folder for the comparison.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MARKER, {"made_by": "compare.py"})


def take_runs(runs: Sequence[Run], files: Sequence[Path]) -> None:
    """Take over the finished runs of other comparisons: those with the same arguments, task, arm and seed.

    Raises:
        ValueError: a file cannot be read, or is no comparison.json.
    """
    made = _made_elsewhere(files)
    for run in runs:
        if _key(run) in made and not run.results():
            file, same = made[_key(run)]
            if run.output.exists():
                shutil.rmtree(run.output)
            run.output.mkdir(parents=True)
            write_json(run.output / "trainer_state.json", {"log_history": same["history"]})
            write_json(run.output / LAST_RESULT_FILE, same["metrics"])
            write_json(run.folder / RUN_FILE, {"command": run.command[1:], "taken_from": str(file)})


def _made_elsewhere(files: Sequence[Path]) -> dict[tuple[Any, ...], tuple[Path, dict[str, Any]]]:
    """Read the runs in these files, by what makes them the same: each with the first file that has it."""
    made: dict[tuple[Any, ...], tuple[Path, dict[str, Any]]] = {}
    for file in files:
        found = read_comparison(file, "--take_from")
        try:
            for run in [*found["runs"], *found["trials"]]:
                key = (run["task"], run["arm"], run["seed"], *run["arguments"])
                made.setdefault(key, (file, {**run, "history": as_lines(run["history"])}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise not_one(file, "--take_from", error) from error
    return made


def _key(run: Run) -> tuple[Any, ...]:
    return (run.task, run.arm, run.seed, *run.arguments)


def _record(run: Run) -> dict[str, Any]:
    on_gpu = "--use_cpu" not in run.arguments and accelerator() == "cuda"
    return {
        "task": run.task,
        "arm": run.arm,
        "seed": run.seed,
        "arguments": list(run.arguments),
        "metrics": run.results() | {"device": "cuda" if on_gpu else "cpu"},
        "history": as_columns(run.history()),
    }


def setup() -> dict[str, Any]:
    """Versions and hardware; nothing that names the machine or its user."""
    return {
        "device": cuda_name() or f"{os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def write_results(
    comparison: Comparison,
    trials: Sequence[Run],
    runs: Sequence[Run],
    choices: Mapping[tuple[str, str], Mapping[str, Any]],
    failed: Mapping[Run, str],
    console: Console,
) -> list[dict[str, Any]]:
    """Write what has finished, and print the table; returns the table's rows, none if only trials have finished.

    Raises:
        ValueError: nothing has finished.
    """
    folder, tasks = comparison.folder, {task.name: task for task in comparison.tasks}
    records = [_record(run) for run in runs if run.results()]
    tried = [{**_record(run), "history": {}} for run in trials if run.results()]
    reasons = {run.name: reason.replace(str(folder), "OUTPUT") for run, reason in failed.items()}
    if not records and not tried:
        told = "".join(f"\n{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"no run of {folder} has finished: there is nothing to report.{told}")
    about = {
        "tasks": {name: f"`{task.script} {' '.join(task.arguments)}`" for name, task in tasks.items()},
        "arms, beside the arguments of the task": {arm.name: _added(arm) for arm in comparison.arms},
        "tuning": _tuning(comparison),
        "setup": setup(),
    }
    metrics = {name: task.metric for name, task in tasks.items()}
    report = make_report(records, metrics, [arm.name for arm in comparison.arms])
    figures, written = as_json(report), ["comparison.json"]
    if records:
        from comparison.plots import plot_all  # matplotlib takes long, and a dry run needs none of it

        plots = plot_all(report, records, metrics, choices, folder)
        write_file(folder / "comparison.md", markdown(report, about, choices, reasons, plots))
        written += ["comparison.md", *(path.name for path in plots)]
        console.print(terminal_table(report))
    chosen = [{"task": task, "arm": arm, **choice} for (task, arm), choice in choices.items()]
    everything = {"about": about, "choices": chosen, **figures, "failed": reasons, "runs": records, "trials": tried}
    write_comparison(folder / "comparison.json", everything)
    console.print(f"Written to {folder}: {', '.join(written)}, runs/", highlight=False)
    return figures["rows"]


def _added(arm: Arm) -> str:
    """Say what an arm adds to the task's arguments, in words for a reader."""
    words = [*([] if arm.sets("rdrop_alpha") else ["--rdrop_alpha", "ALPHA"]), *arm.arguments]
    longer = f", {arm.epochs} times the epochs" if arm.epochs > 1 else ""
    return f"`{' '.join(words)}`{longer}"


def _tuning(comparison: Comparison) -> dict[str, Any]:
    """Describe how the settings were chosen."""
    tried = {f"tried for {task.name}": dict(task.tune) for task in comparison.tasks if task.tune}
    if not tried:
        return {"none": "every arm has the settings of its task"}
    return {
        "scored on": f"{comparison.tuning_share:.0%} of the training rows, which are not trained on",
        "seeds": comparison.tuning_seeds,
        "settings tried for each tuned arm": f"{comparison.trials}, of all combinations where there are more",
        **tried,
    }
