#!/usr/bin/env python
"""Compare R-Drop with plain fine-tuning: the same script, data and data order, several seeds, equal tuning.

    python scripts/compare.py --demo --quick
    python scripts/compare.py --demo
    python scripts/compare.py --script run_glue.py --metric eval_accuracy --rdrop_alpha 0.1 0.5 1.0 --seeds 0 1 2 \
        --arms baseline baseline-2x doubled rdrop --output_dir outputs/own -- --train_file train.csv \
        --validation_file dev.csv --model_name_or_path outputs/tiny --do_train --do_eval --num_train_epochs 3
    python scripts/compare.py --config comparison.yaml --output_dir outputs/all

Arms: `baseline`; `baseline-2x`, the baseline with twice the epochs (the same compute as R-Drop); `doubled`, R-Drop's
doubled batch with cross-entropy alone; `rdrop`; `rdrop-2x`, R-Drop with twice the epochs; `rdrop-shared` and
`rdrop-interval`, cheaper forms of it; and your own, as lines of arguments ("smooth=--label_smoothing_factor 0.1", or
"trunk=rdrop --rdrop_shared_layers 4").

Several alphas (and whatever --tune says) are tried on a held-out part of the training data, never on the validation
data that is reported. --demo writes small made-up corpora (demo_data.py), makes randomly initialised models with
tokenizers for them and one for scikit-learn's digits (init_model.py), and trains plainly and with R-Drop, with three
seeds each. Whatever the table then says is what it says: the models are tiny and trained from scratch for seconds.

The folder gets comparison.md (the report), comparison.json (every run with its arguments and figures), plots, and
runs/ with each run's command, log and results. Killed and started again with the same arguments, it goes on with the
runs not finished; more seeds, arms and tasks can be added in the same way.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console

from comparison.arms import run_arguments
from comparison.config import Comparison, parse
from comparison.demo import make_demo_inputs
from comparison.queue import Run, environment, run_all
from comparison.runs import check_folder, describe, list_runs, take_runs, write_results
from comparison.tuning import Trials, choose, plan_trials
from comparison.warm import WarmProcess, can_fork
from finetuning.command_line import cli
from reporting.folder import sole_user


def plan(comparison: Comparison, choices: dict) -> list[Run]:
    """List all runs, the arms of one seed beside each other, so that a change in the machine's load meets them all."""
    return [
        Run(
            task.name,
            arm.name,
            seed,
            task.script,
            run_arguments(task, arm, choices[task.name, arm.name]["settings"], seed),
            comparison.folder / "runs" / task.name / arm.name / f"seed-{seed}",
        )
        for seed in comparison.seeds
        for task in comparison.tasks
        for arm in comparison.arms
        if (task.name, arm.name) in choices
    ]


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Run the comparison; returns the rows of the report as dicts."""
    comparison = parse(argv, __doc__)
    console = Console()
    trials = plan_trials(comparison)
    if comparison.dry_run:
        # What tuning will choose is not known yet, so every arm is shown with its first candidate.
        list_runs(console, comparison, [*trials, *plan(comparison, choose(comparison, trials, guess=True))])
        return []
    check_folder(comparison.folder)
    with sole_user(comparison.folder):
        return run_comparison(comparison, trials, console)


def run_comparison(comparison: Comparison, trials: Trials, console: Console) -> list[dict]:
    """Tune, train and report what has not finished; returns the rows of the report as dicts."""
    for run in trials:
        run.check()
    with warm_process(comparison) as warm:
        if comparison.demo:
            make_demo_inputs(comparison.folder, comparison.tasks, comparison.seeds, warm)
        return run_with(comparison, trials, console, warm)


def warm_process(comparison: Comparison) -> AbstractContextManager[WarmProcess | None]:
    """Start the process that runs are forked from, where that can be done."""
    if comparison.report_only or not can_fork():
        return nullcontext()
    return WarmProcess(environment(comparison.jobs))


def run_with(
    comparison: Comparison, trials: Trials, console: Console, warm: WarmProcess | None
) -> list[dict[str, Any]]:
    """Train and report, with the warm process."""
    metrics = {task.name: task.metric for task in comparison.tasks}
    failed: dict[Run, str] = {}
    take_runs(list(trials), comparison.take_from)

    def run_these(runs: list[Run], keep_models: bool = False) -> dict[Run, str]:
        jobs = comparison.jobs
        return run_all(runs, jobs, lambda run: describe(run, metrics[run.task]), console, keep_models, warm)

    if trials and not comparison.report_only:
        console.print(f"{len(trials)} runs on a split of the training data choose the settings.", highlight=False)
        failed |= run_these(list(trials))
    choices = choose(comparison, trials)
    runs = plan(comparison, choices)
    for run in runs:
        run.check()
    take_runs(runs, comparison.take_from)
    if not comparison.report_only:
        failed |= run_these(runs, comparison.keep_models)

    rows = write_results(comparison, list(trials), runs, choices, failed, console)
    if failed:
        reasons = "\n\n".join(f"{run.name}: {reason}" for run, reason in failed.items())
        raise ValueError(f"{len(failed)} of {len(trials) + len(runs)} runs failed; the others are kept.\n{reasons}")
    return rows


if __name__ == "__main__":
    cli(main)
