"""Choosing each arm's settings on a held-out split of the training data, with the same number of trials for all."""

from collections.abc import Sequence
from typing import Any

from comparison.arms import BUILT_IN, Arm, candidates, run_arguments
from comparison.config import Comparison
from comparison.figures import direction, trial_scores
from comparison.queue import Run

Trials = dict[Run, dict[str, Any]]  # the settings that each tuning run tries, with its arm
Choices = dict[tuple[str, str], dict[str, Any]]  # by task and arm: settings, trials, taken_from


def tuned_arms(arms: Sequence[Arm]) -> list[Arm]:
    """Return the arms whose settings are searched for: those of the comparison, or what they add to."""
    own = {arm.name: arm for arm in arms}
    return [own.get(name) or BUILT_IN[name] for name in dict.fromkeys(arm.settings_of for arm in arms)]


def plan_trials(comparison: Comparison) -> Trials:
    """List the tuning runs and the settings that each tries; none where an arm has but one candidate."""
    planned = {}
    for task in comparison.tasks:
        for arm in tuned_arms(comparison.arms):
            tried = candidates(task, arm, comparison.trials)
            for settings in tried if len(tried) > 1 else []:
                name = ",".join(f"{key}={value}" for key, value in settings.items()).replace("/", "_")
                for seed in comparison.tuning_seeds:
                    arguments = run_arguments(task, arm, settings, seed)
                    arguments += ("--validation_from_train", str(comparison.tuning_share))
                    folder = comparison.folder / "tuning" / task.name / arm.name / name / f"seed-{seed}"
                    run = Run(task.name, f"{arm.name} with {name}", seed, task.script, arguments, folder)
                    planned[run] = {"arm": arm.name, "settings": settings}
    return planned


def choose(comparison: Comparison, planned: Trials, guess: bool = False) -> Choices:
    """Choose the settings of each task and arm: those with the best mean score over the tuning seeds, with all trials.

    Settings that failed with a seed are out. An arm of which no settings are left has no entry, nor have those that
    take their settings from it. With `guess` the first candidate is taken, without a score.
    """
    choices: Choices = {}
    for task in comparison.tasks:
        chosen: dict[str, dict[str, Any]] = {}
        for arm in tuned_arms(comparison.arms):
            tried = candidates(task, arm, comparison.trials)
            done = [
                {"settings": trial["settings"], "seed": run.seed, "score": run.results().get(task.metric)}
                for run, trial in planned.items()
                if (run.task, trial["arm"]) == (task.name, arm.name)
            ]
            scored = trial_scores(done) if len(tried) > 1 and not guess else [(tried[0], 0.0)]
            if scored:
                sign = direction(task.metric)
                chosen[arm.name] = {"settings": max(scored, key=lambda pair: sign * pair[1])[0], "trials": done}
        for arm in comparison.arms:
            if arm.settings_of == arm.name and arm.name in chosen:
                choices[task.name, arm.name] = chosen[arm.name]
            elif arm.settings_of in chosen:
                settings = arm.without_own(chosen[arm.settings_of]["settings"])
                choices[task.name, arm.name] = {"settings": settings, "taken_from": arm.settings_of, "trials": []}
    return choices
