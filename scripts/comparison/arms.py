"""Tasks of a comparison, the arms every task is trained in, and the settings that are tried for each arm."""

import itertools
import os
import random
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from comparison.names import BASELINE, RDROP
from finetuning.command_line import closest, option_name, option_names
from hf_rdrop.alpha import check_alpha

SCRIPTS = ("run_clm.py", "run_glue.py", "run_ner.py", "run_translation.py", "run_image_classification.py")
SET_BY_COMPARE = ("seed", "output_dir", "rdrop_alpha", "validation_from_train")
# Below the rounding of fp32 (6e-8 of the loss), so the doubled batch is trained with cross-entropy alone, while the
# agreement is still computed and logged.
NO_AGREEMENT = "1e-12"


@dataclass(frozen=True)
class Task:
    """Task that is trained in every arm: a script with its arguments, the metric that counts, and what may be tuned.

    Args:
        name: of the task.
        script: one of `SCRIPTS`.
        metric: the score, as in the script's all_results.json.
        arguments: the script's; `{seed}` stands for the seed.
        rdrop_alpha: alpha of the arms that do not say another.
        tune: values to try by argument name; `rdrop_alpha` among them for the R-Drop arms only.
    """

    name: str
    script: str
    metric: str
    arguments: tuple[str, ...]
    rdrop_alpha: float = 1.0
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One way to train a task.

    Args:
        name: of the arm.
        arguments: what it adds to the task's arguments.
        epochs: factor for the length of the training.
        settings_of: the arm whose tuned settings it takes; its own name when it is tuned itself.
    """

    name: str
    arguments: tuple[str, ...]
    settings_of: str
    epochs: int = 1

    def sets(self, name: str) -> bool:
        """Tell whether this argument is the arm's own choice, so that neither the task's holds nor is it tuned."""
        return name in option_names(self.arguments)

    def without_own(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """These settings without those of which the arm has its own."""
        return {name: value for name, value in settings.items() if not self.sets(name)}


BUILT_IN = {
    arm.name: arm
    for arm in (
        Arm(BASELINE, ("--rdrop_alpha", "0"), BASELINE),
        Arm("baseline-2x", ("--rdrop_alpha", "0"), "baseline-2x", epochs=2),
        Arm("doubled", ("--rdrop_alpha", NO_AGREEMENT), "doubled"),
        Arm(RDROP, (), RDROP),
        Arm("rdrop-2x", (), RDROP, epochs=2),
        Arm("rdrop-shared", ("--rdrop_shared_layers", "0.75"), RDROP),
        Arm("rdrop-interval", ("--rdrop_interval", "2"), RDROP),
    )
}


def make_arms(names: Sequence[str], own: Mapping[str, str], tuned: Sequence[str] = ()) -> list[Arm]:
    """Make the arms by name, built in or `own` lines of arguments; those in `tuned` are tuned by themselves.

    A line that starts with the name of a built-in arm, such as ``rdrop --rdrop_shared_layers 4``, adds to that arm and
    takes its tuned settings; any other is an arm of its own, tuned by itself.

    Raises:
        ValueError: no arm has that name, an own arm has a built-in's, or one is to be tuned that is not there.
    """
    made = {}
    for name, line in own.items():
        if name in BUILT_IN or not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(f"arm {name!r}: choose a name of its own, of letters, digits and -_.+ only.")
        first, *rest = words if (words := split_line(line)) else [""]
        if first in BUILT_IN:
            base = BUILT_IN[first]
            made[name] = replace(base, name=name, arguments=(*base.arguments, *rest))
        else:
            made[name] = Arm(name, tuple(words), name)
    arms = []
    for name in dict.fromkeys([BASELINE, *names]):
        if name not in made and name not in BUILT_IN:
            known = [*BUILT_IN, *made]
            raise ValueError(f"there is no arm {name!r}{closest(name, known)}. Known: {', '.join(known)}.")
        arms.append(made.get(name) or BUILT_IN[name])
    if unknown := [name for name in tuned if name not in {arm.settings_of for arm in arms}]:
        raise ValueError(f"--tuned_arms {unknown[0]} is no arm here with settings of its own.")
    if tuned and BASELINE not in tuned:
        raise ValueError("--tuned_arms must hold baseline: a comparison with an untuned baseline shows nothing.")
    return [arm if not tuned or arm.settings_of in tuned else replace(arm, settings_of=BASELINE) for arm in arms]


def split_line(line: str) -> list[str]:
    """Split a line of arguments as a shell would; $VARIABLES are replaced when a run starts.

    Raises:
        ValueError: a variable is not set, or a quotation mark is not closed.
    """
    if missing := re.findall(r"\$\{?\w+", os.path.expandvars(line)):
        raise ValueError(f"{missing[0]} in {line!r} is not set: export it before, or write the value out.")
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ValueError(f"{line!r} cannot be split into arguments ({error}).") from error


def check_task(task: Task) -> Task:
    """Return the task, if it can be compared.

    Raises:
        ValueError: with what to change.
    """
    if task.script not in SCRIPTS:
        raise ValueError(f"task {task.name}: script must be one of {', '.join(SCRIPTS)}; got {task.script!r}.")
    given = option_names(task.arguments)
    for name in SET_BY_COMPARE:
        if name in given:
            raise ValueError(f"--{name} is set for each run by compare.py: leave it out of the script's arguments.")
    for name, values in task.tune.items():
        if not isinstance(values, (list, tuple)) or not values or len(set(map(str, values))) < len(values):
            raise ValueError(f"task {task.name}: tune {name} needs a list of different values, got {values!r}.")
    for alpha in (task.rdrop_alpha, *task.tune.get("rdrop_alpha", ())):
        check_alpha(alpha)
        if alpha == 0:
            raise ValueError("rdrop_alpha 0 is the baseline itself: give the alpha of the R-Drop arms, above 0.")
    return task


def candidates(task: Task, arm: Arm, trials: int) -> list[dict[str, Any]]:
    """List the settings to try for an arm: the whole grid, or `trials` of it.

    All arms try the same settings in the same order as far as these go; the values of alpha are dealt out evenly over
    the trials of the arms that have one. One candidate needs no trial.
    """
    tuned = arm.without_own(task.tune)
    shared = {name: values for name, values in tuned.items() if name != "rdrop_alpha"}
    grid = [dict(zip(shared, values, strict=True)) for values in itertools.product(*shared.values())]
    alphas = [{"rdrop_alpha": alpha} for alpha in tuned.get("rdrop_alpha", ())]
    if len(grid) * max(1, len(alphas)) <= trials:
        return [{**settings, **alpha} for alpha in alphas or [{}] for settings in grid]
    random.Random(0).shuffle(grid)
    if not alphas:
        return grid[:trials]
    turns = itertools.product(range(len(alphas)), enumerate(grid))
    return [{**settings, **alphas[(turn + i) % len(alphas)]} for turn, (i, settings) in turns][:trials]


def run_arguments(task: Task, arm: Arm, settings: Mapping[str, Any], seed: int) -> tuple[str, ...]:
    """Return the script's arguments for one run, without --seed and --output_dir; what comes later counts."""
    arguments = list(task.arguments)
    if not arm.sets("rdrop_alpha"):
        arguments += ["--rdrop_alpha", str(settings.get("rdrop_alpha", task.rdrop_alpha))]
    for name, value in arm.without_own(settings).items():
        if name != "rdrop_alpha":
            arguments += [f"--{name}", str(value)]
    arguments += arm.arguments
    if arm.epochs > 1:
        arguments += _longer(arguments, arm.epochs)
    return tuple(argument.replace("{seed}", str(seed)) for argument in arguments)


def _longer(arguments: Sequence[str], factor: int) -> list[str]:
    """The arguments that make a training `factor` times as long."""
    given = {}
    for position, argument in enumerate(arguments):
        name, (_, equals, value) = option_name(argument), argument.partition("=")
        if name in ("max_steps", "num_train_epochs"):
            given[name] = float(value if equals else arguments[position + 1])
    name = "max_steps" if given.get("max_steps", -1) > 0 else "num_train_epochs"
    return [f"--{name}", f"{factor * given.get(name, 3.0):g}"]
