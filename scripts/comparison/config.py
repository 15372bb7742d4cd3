"""Request of a comparison: the command line, or a YAML file for several tasks at once."""

import argparse
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from comparison.arms import BUILT_IN, SCRIPTS, Arm, Task, check_task, make_arms, split_line
from comparison.demo import demo_tasks
from comparison.devices import accelerator, visible_gpus
from finetuning.command_line import closest

# What a YAML file may say, and of what type.
TEXT, LIST, MAPPING = ("text", str), ("a list", list), ("a mapping", dict)
TASK_KEYS = {
    "script": TEXT,
    "metric": TEXT,
    "arguments": TEXT,
    "rdrop_alpha": ("a number", (int, float)),
    "tune": MAPPING,
}
CONFIG_KEYS = {
    "tasks": MAPPING,
    "arguments": TEXT,
    "arms": LIST,
    "own_arms": MAPPING,
    "tuned_arms": LIST,
    "tune": MAPPING,
    "trials": ("a whole number", int),
    "seeds": LIST,
    "tuning_seeds": LIST,
}


@dataclass(frozen=True)
class Comparison:
    """Everything that decides what is run and how."""

    tasks: list[Task]
    arms: list[Arm]
    seeds: list[int]
    tuning_seeds: list[int]
    trials: int
    tuning_share: float
    folder: Path
    jobs: int
    demo: bool
    dry_run: bool
    report_only: bool
    keep_models: bool
    take_from: list[Path]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--demo", action="store_true", help="compare on the embedded demo data (4 minutes on 2 cores)")
    add("--quick", action="store_true", help="with --demo: one task, one seed (under a minute)")
    add("--config", type=Path, help="YAML file with tasks, arms, seeds and tuning (see scripts/README.md)")
    add("--tasks", nargs="+", metavar="TASK", help="only these tasks of --config")
    add("--script", choices=SCRIPTS, help="training script of a single task")
    add("--metric", help="score to compare, as in the script's eval_results.json, e.g. eval_accuracy")
    add("--rdrop_alpha", type=float, nargs="+", help="alpha of the R-Drop arms; several: chosen on training data")
    add("--arms", nargs="+", metavar="ARM", help=f"of {', '.join(BUILT_IN)} (default: baseline rdrop)")
    add("--own_arm", nargs="+", default=[], metavar="NAME=LINE", help="arms as lines of the script's arguments")
    add("--seeds", type=int, nargs="+", help="seeds of each arm (default: 0 1 2)")
    add("--tune", nargs="+", metavar="NAME=A,B", help="values to try, such as learning_rate=2e-5,5e-5")
    add("--trials", type=int, help="settings tried for each tuned arm (default: 8)")
    add("--tuning_seeds", type=int, nargs="+", help="seeds of the trials (default: 1000)")
    add("--tuned_arms", nargs="+", metavar="ARM", help="arms with a search of their own (default: all)")
    add("--tuning_share", type=float, default=0.2, help="share of the training rows that trials are scored on")
    add("--output_dir", type=Path, help="folder to write (default: outputs/demo for --demo)")
    add("--jobs", type=int, help="runs at once (default: one a GPU, or one a CPU core without)")
    add("--keep_models", action="store_true", help="keep the trained weights of the compared runs")
    add("--take_from", type=Path, nargs="+", default=[], help="comparison.json files with runs made elsewhere")
    add("--dry_run", action="store_true", help="list what would run, and stop")
    add("--report_only", action="store_true", help="write the report of the runs that have finished, and stop")
    add("arguments", nargs="*", help="after --: the script's arguments; {seed} is replaced")
    return parser


def parse(argv: Sequence[str] | None, description: str | None = None) -> Comparison:
    """Read the comparison that a command line asks for.

    Raises:
        ValueError: with what to change.
    """
    args = make_parser(description).parse_args(argv)
    if (args.demo, bool(args.config), bool(args.script)).count(True) != 1:
        raise ValueError("give either --demo, or --config, or --script and --metric with arguments after --.")
    if args.quick and not args.demo:
        raise ValueError("--quick makes the demo short: give --demo too.")
    if args.script and not (args.metric and args.output_dir and args.arguments):
        raise ValueError("--script also needs --metric, --output_dir and, after --, the script's arguments.")
    if args.config and not args.output_dir:
        raise ValueError("--config also needs --output_dir.")
    if args.tasks and not args.config:
        raise ValueError("--tasks chooses among the tasks of --config: give that too.")
    if not args.script and (args.metric or args.arguments or args.tune):
        brings = "--demo" if args.demo else "--config"
        raise ValueError(
            f"{brings} brings its own data, metric and arguments: leave --metric and what follows -- out."
        )
    if args.config and args.rdrop_alpha:
        raise ValueError("--rdrop_alpha: with --config say it there, as rdrop_alpha of a task or under tune.")
    if args.demo and len(args.rdrop_alpha or []) > 1:
        raise ValueError("--demo tunes nothing: give one --rdrop_alpha.")
    folder = args.output_dir or Path("outputs/demo")
    config = _read_config(args.config) if args.config else {}
    if args.config:
        if unknown := [name for name in args.tasks or () if name not in config["tasks"]]:
            raise ValueError(f"--tasks {unknown[0]}: {args.config} has only {', '.join(config['tasks'])}.")
        tasks = [_task(name, config["tasks"][name], config) for name in args.tasks or config["tasks"]]
    elif args.demo:
        tasks = demo_tasks(folder, (args.rdrop_alpha or [None])[0])
        tasks = tasks[:1] if args.quick else tasks
    else:
        tune = _tune_values(args.tune or [])
        alphas = args.rdrop_alpha or [1.0]
        tune |= {"rdrop_alpha": alphas} if len(alphas) > 1 else {}
        name = args.script.removeprefix("run_").removesuffix(".py")
        tasks = [Task(name, args.script, args.metric, tuple(args.arguments), alphas[0], tune)]

    own, more = config.get("own_arms") or {}, dict(_own_arm(given) for given in args.own_arm)
    names = args.arms or [*(config.get("arms") or ["baseline", "rdrop"]), *own]
    seeds = args.seeds or config.get("seeds") or ([0] if args.quick else [0, 1, 2])
    tuning_seeds = (
        args.tuning_seeds
        or config.get("tuning_seeds")
        or [next(seed for seed in itertools.count(1000) if seed not in seeds)]
    )
    trials = args.trials if args.trials is not None else config.get("trials", 8)
    for numbers, flag in ((seeds, "seeds"), (tuning_seeds, "tuning_seeds")):
        if not all(isinstance(n, int) and n >= 0 for n in numbers) or len(set(numbers)) < len(numbers):
            raise ValueError(f"--{flag} must all be different whole numbers of at least 0; got {numbers}.")
    if set(seeds) & set(tuning_seeds):
        raise ValueError("--tuning_seeds must not be among --seeds: what is chosen on a seed looks better on it.")
    if (args.jobs is not None and args.jobs < 1) or trials < 1:
        raise ValueError("--jobs and --trials must be at least 1.")
    if not 0 < args.tuning_share < 1:
        raise ValueError(f"--tuning_share is a share of the training rows between 0 and 1; got {args.tuning_share}.")
    tasks = [check_task(task) for task in tasks]
    arms = make_arms([*names, *more], own | more, args.tuned_arms or config.get("tuned_arms") or ())
    jobs = args.jobs if args.jobs is not None else _default_jobs(tasks)  # last: it may have to ask torch
    return Comparison(
        tasks=tasks,
        arms=arms,
        seeds=seeds,
        tuning_seeds=tuning_seeds,
        trials=trials,
        tuning_share=args.tuning_share,
        folder=folder,
        jobs=jobs,
        demo=args.demo,
        dry_run=args.dry_run,
        report_only=args.report_only,
        keep_models=args.keep_models,
        take_from=args.take_from,
    )


def _default_jobs(tasks: Sequence[Task]) -> int:
    """Return one run for each GPU, or for each core where only these are used."""
    if not all("--use_cpu" in task.arguments for task in tasks) and accelerator():
        return max(1, len(visible_gpus()))
    return os.cpu_count() or 1


def _own_arm(given: str) -> tuple[str, str]:
    name, equals, line = given.partition("=")
    if not equals:
        raise ValueError(
            f'--own_arm takes NAME=LINE such as "smooth=rdrop --label_smoothing_factor 0.1"; got {given!r}.'
        )
    return name, line


def _tune_values(given: Sequence[str]) -> dict[str, list[Any]]:
    values = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals or not name or not text:
            raise ValueError(f"--tune takes NAME=VALUE,VALUE such as learning_rate=2e-5,5e-5; got {item!r}.")
        values[name.removeprefix("--")] = [_number(value) for value in text.split(",")]
    return values


def _number(value: Any) -> Any:
    """Return a number where the text is one: YAML 1.1 reads 1e-4 as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    return value if isinstance(value, bool) or not math.isfinite(number) else number


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is no valid YAML ({error}).") from error
    if not isinstance(config, dict) or not config.get("tasks"):
        raise ValueError(
            f"--config {path} must hold `tasks:` with a name and arguments for each (see scripts/README.md)."
        )
    _check_keys(path, config, CONFIG_KEYS)
    for name, task in config["tasks"].items():
        if not isinstance(task, dict) or not {"script", "metric", "arguments"} <= task.keys():
            raise ValueError(f"--config {path}: task {name} needs script, metric and arguments.")
        _check_keys(path, task, TASK_KEYS)
    for name, line in (config.get("own_arms") or {}).items():
        if not isinstance(name, str) or not isinstance(line, str):
            raise ValueError(f"--config {path}: own_arms {name} must be a line of arguments, got {line!r}.")
    return config


def _check_keys(
    path: Path, given: Mapping[str, Any], kinds: Mapping[str, tuple[str, type | tuple[type, ...]]]
) -> None:
    for key, value in given.items():
        if key not in kinds:
            known = ", ".join(kinds)
            raise ValueError(f"--config {path}: unknown key {key!r}{closest(str(key), kinds)}. Known: {known}.")
        name, kind = kinds[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"--config {path}: {key} must be {name}, got {value!r}.")


def _task(name: str, task: Mapping[str, Any], config: Mapping[str, Any]) -> Task:
    arguments = (*split_line(config.get("arguments") or ""), *split_line(task["arguments"]))
    tune = {**(config.get("tune") or {}), **(task.get("tune") or {})}
    tune = {
        key: [_number(value) for value in values] if isinstance(values, list) else values
        for key, values in tune.items()
    }
    return Task(str(name), task["script"], task["metric"], arguments, float(task.get("rdrop_alpha", 1.0)), tune)
