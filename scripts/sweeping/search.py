"""Trials of a sweep: optuna through `Trainer.hyperparameter_search`, each trial recorded, none run twice."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from sweeping import LOG_SCALE
from sweeping.report import Trial, read_trials, round_parameters

STARTUP_TRIALS = 5  # complete before the first one is pruned: the median of fewer says little

Ranges = Mapping[str, Sequence[float]]


def run_trials(
    trainer: Trainer,
    ranges: Ranges,
    metric: str,
    *,
    minimize: bool,
    num_trials: int,
    seed: int,
    storage: Path,
    console: Console,
    report: Callable[[list[Trial]], None],
) -> list[Trial]:
    """Run the trials that the storage does not hold yet, all from the trainer's present weights.

    A trial that fails is recorded with its reason, and counts. One that was running when its process was killed does
    not: it is drawn again, with the same parameters, because what a trial is given depends on `seed`, on how many were
    counted before it, and on what came of them.

    Args:
        trainer: evaluates at the end of each epoch; any Trainer with R-Drop's mixin.
        ranges: low and high of each argument to search.
        metric: a key of what `trainer.evaluate` returns.
        minimize: whether lower is better.
        num_trials: how many trials the storage holds afterwards.
        seed: of the drawn parameters, >= 0.
        storage: SQLite file; made if it is not there.
        console: for progress, and a line for each trial.
        report: called with all trials after each one.

    Returns:
        All trials.
    """
    # SQLite undoes a write that a kill cut short; half a line in optuna's journal file makes all of it unreadable.
    database = optuna.storages.RDBStorage(f"sqlite:///{storage.resolve()}")
    direction = "minimize" if minimize else "maximize"
    options: dict[str, Any] = {"storage": database, "study_name": "sweep", "direction": direction}
    options["load_if_exists"] = True
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # each trial is told of below
    study = optuna.create_study(**options)
    for running in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(running.number, state=TrialState.FAIL)  # it died with an earlier process

    initial = trainer.model.cpu()
    trainer.model_init = lambda: copy.deepcopy(initial)
    logging.set_verbosity_error()  # what there was to say about model and tokenizer has been said
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("Trials", total=num_trials)
        steps = _StepBar(progress)
        trainer.add_callback(steps)
        while (done := sum(trial.counts for trial in read_trials(study))) < num_trials:
            progress.update(bar, completed=done)
            try:
                trainer.hyperparameter_search(
                    backend="optuna",
                    hp_space=lambda trial: draw_parameters(trial, ranges),
                    compute_objective=lambda metrics: read_score(metrics, metric),
                    n_trials=1,
                    sampler=optuna.samplers.TPESampler(seed=trial_seed(seed, done)),
                    pruner=LatePruner(trainer),
                    **options,
                )
            except Exception as error:
                _record_failure(study, error)
            trials = read_trials(study)
            if trials[-1].state == "failed":  # the Trainer tidies up after the others
                trainer.model = trainer.model_wrapped = trainer.optimizer = None
                trainer.accelerator.free_memory()
            progress.console.print(trials[-1].describe(metric), highlight=False, markup=False, soft_wrap=True)
            report(trials)
        progress.update(bar, completed=done)
        progress.remove_task(steps.bar)
    return read_trials(study)


def trial_seed(seed: int, number: int) -> int:
    """Return a seed for the parameters of one trial, independent of other trials and other sweeps."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def draw_parameters(trial: optuna.Trial, ranges: Ranges) -> dict[str, float]:
    """Draw the trial's parameters: at the first call, the same at every later one."""
    for name, (low, high) in ranges.items():
        trial.suggest_float(name, low, high, log=name in LOG_SCALE)
    return round_parameters(trial.params)


def read_score(metrics: Mapping[str, float], metric: str) -> float:
    """Return the score of an evaluation.

    Raises:
        FloatingPointError: score or loss is not finite.
    """
    for name in ("eval_loss", metric):
        if name in metrics and not math.isfinite(metrics[name]):
            raise FloatingPointError(f"{name} is {metrics[name]}: the training diverged")
    return metrics[metric]


def _record_failure(study: optuna.Study, error: Exception) -> None:
    """Note why the last trial failed; raises the error again if no trial failed by it."""
    trial, reasons = study.get_trials(deepcopy=False)[-1], study.user_attrs.get("errors", {})
    if trial.state != TrialState.FAIL or str(trial.number) in reasons:
        raise error
    study.set_user_attr("errors", {**reasons, str(trial.number): f"{type(error).__name__}: {error}"})


class LatePruner(optuna.pruners.MedianPruner):
    """Median rule in the second half of a training, and not at its end, when nothing is left to save.

    Not in the first half, because R-Drop learns more slowly per step: an early median would prefer little of it.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(n_startup_trials=STARTUP_TRIALS)
        self.trainer = trainer

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        steps = self.trainer.state.max_steps
        return steps / 2 <= trial.last_step < steps and super().prune(study, trial)


class _StepBar(TrainerCallback):
    """Shows how far the running trial is."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.bar = progress, progress.add_task("Steps", total=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.reset(self.bar, total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.bar, completed=state.global_step)
