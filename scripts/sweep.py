#!/usr/bin/env python
"""Search alpha, dropout rate and learning rate for one task, with optuna through `Trainer.hyperparameter_search`.

    python scripts/sweep.py --script run_glue.py --metric eval_accuracy --num_trials 20 --output_dir outputs/sweep \
        --rdrop_alpha 0.1 5 --rdrop_dropout 0.05 0.3 --learning_rate 1e-5 1e-4 \
        -- --task_name mrpc --model_name_or_path bert-base-cased --num_train_epochs 4
    python scripts/sweep.py --script run_glue.py --metric eval_accuracy --num_trials 20 \
        --output_dir outputs/sweep-baseline --rdrop_alpha 0 -- ...

Two values are a range to search, one value is fixed. The second line tunes plain fine-tuning: compare tuned R-Drop
with a baseline that had as many trials. What follows -- goes to the script, with --do_train and --do_eval.

Every trial starts from the same weights (the new head's included) and the script's own --seed, and is evaluated after
each epoch; its score is the one at the end of its training. Parameters are drawn by optuna's TPE sampler. In the
second half of its training, a trial that is below the median of the complete ones at the same step is given up
(pruned). Trials are judged on a share of the training rows, held out, so that the validation data stay unused for the
report. No model is saved: train with the command that is printed at the end.

The folder gets sweep.json (every trial), sweep.md, sweep.png, and trials.db (optuna's storage). Killed and started
again with the same arguments, the sweep goes on with the trials not finished; a larger --num_trials adds to it.
"""

import argparse
import importlib
import logging
import math
import os
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from finetuning.command_line import cli, option_names
from finetuning.results import LOWER_IS_BETTER
from hf_rdrop.alpha import check_alpha
from reporting.folder import check_same_comparison, sole_user
from sweeping import LOG_SCALE

if TYPE_CHECKING:
    from transformers import Trainer

    from sweeping.report import Trial

SCRIPTS = ("run_clm.py", "run_glue.py", "run_ner.py", "run_translation.py", "run_image_classification.py")
# The paper's alphas lie between 0.1 (GLUE) and 5 (translation), the usual dropout rate is 0.1, and the learning rates
# are those of fine-tuning (training from scratch wants higher ones).
RANGES = {"rdrop_alpha": (0.1, 5.0), "rdrop_dropout": (0.05, 0.3), "learning_rate": (1e-5, 1e-4)}
SET_HERE = (*RANGES, "output_dir", "validation_from_train", "eval_strategy", "save_strategy")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=SCRIPTS, required=True)
    parser.add_argument("--metric", required=True, help="score to optimise, as in eval_results.json: eval_accuracy")
    parser.add_argument("--num_trials", type=int, default=20, help="trials in all, pruned and failed ones included")
    for name, (low, high) in RANGES.items():
        scale = "log scale" if name in LOG_SCALE else "linear"
        text = f"range to search, {scale} (default: {low:g} {high:g}), or one value to fix"
        parser.add_argument(f"--{name}", type=float, nargs="+", default=[low, high], metavar="VALUE", help=text)
    parser.add_argument(
        "--validation_from_train",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="judge trials on this share of the training rows, held out (default: 0.2). 0: on the script's validation "
        "data, which should then not be those that you report a score on",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the parameters that are drawn (default: 0)")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("arguments", nargs="*", help="after --: the script's arguments")
    args = parser.parse_args(argv)
    if args.num_trials < 1 or args.seed < 0:
        raise ValueError("--num_trials must be at least 1, and --seed at least 0.")
    if not 0 <= args.validation_from_train < 1:
        raise ValueError("--validation_from_train is a share of the training rows: at least 0 and less than 1.")
    for name in RANGES:
        check_range(name, getattr(args, name))
    if all(len(getattr(args, name)) == 1 for name in RANGES):
        raise ValueError(f"nothing to search: give a range (low and high) for one of --{', --'.join(RANGES)}.")
    check_script_arguments(args.arguments)
    return args


def check_range(name: str, values: Sequence[float]) -> None:
    """Check one value of an argument, or the two ends of its range.

    Raises:
        ValueError: with what to change.
    """
    given = f"--{name} {' '.join(f'{value:g}' for value in values)}"
    if len(values) > 2 or (len(values) == 2 and not values[0] < values[1]):
        raise ValueError(f"{given}: give a range, low before high, or one value to fix.")
    if name == "rdrop_alpha":
        for value in values:
            check_alpha(value)
    elif name == "rdrop_dropout" and not all(0 <= value < 1 for value in values):
        raise ValueError(f"{given}: a dropout rate lies in [0, 1).")
    elif name == "learning_rate" and not all(0 < value < math.inf for value in values):
        raise ValueError(f"{given}: a learning rate is above 0.")
    if len(values) == 2 and name in LOG_SCALE and values[0] == 0:
        raise ValueError(
            f"{given}: a log scale has no 0. Begin above it, such as at 0.1. To tune plain fine-tuning, give --{name} "
            "0 alone, in another --output_dir."
        )


def check_script_arguments(arguments: Sequence[str]) -> None:
    """Check that the script's arguments leave alone what a sweep sets.

    Raises:
        ValueError: with where the argument belongs.
    """
    given = option_names(arguments)
    for name in SET_HERE:
        if name in given:
            change = "leave it out" if name.endswith("strategy") else "give it before the --"
            raise ValueError(f"--{name} is set by sweep.py for all trials: {change}.")
    if "do_predict" in given:
        raise ValueError("--do_predict has no place in a search: leave it out, and predict with the final model.")


def script_arguments(args: argparse.Namespace, output_dir: str) -> list[str]:
    """Return the script's command line that makes the trainer of all trials."""
    line = [*args.arguments, "--do_train", "--do_eval", "--eval_strategy", "epoch", "--save_strategy", "no"]
    if args.validation_from_train:
        line += ["--validation_from_train", str(args.validation_from_train)]
    for name in RANGES:
        # Of a range the high end: a model whose own dropout is 0 would be refused before a trial sets the rate.
        line += [f"--{name}", str(getattr(args, name)[-1])]
    return [*line, "--output_dir", output_dir]


def final_command(args: argparse.Namespace, parameters: dict[str, float]) -> str:
    """Return the command that trains with these parameters on all training rows, and evaluates."""
    given, values = option_names(args.arguments), {name: getattr(args, name)[0] for name in RANGES} | parameters
    line = ["python", os.path.relpath(Path(__file__).with_name(args.script)), *args.arguments, "--do_train"]
    if not given & {"train_file", "train_dir"} or given & {"validation_file", "validation_dir"}:
        line.append("--do_eval")
    for name in RANGES:
        line += [f"--{name}", f"{values[name]:g}"]
    return shlex.join([*line, "--output_dir", str(args.output_dir / "best")])


def search(trainer: "Trainer", args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Run the sweep with the trainer that the script made; returns the best trial.

    Raises:
        ValueError: there is no such metric, the folder holds something else, or no trial was completed.
    """
    # What takes long to import is not needed before.
    from transformers import PrinterCallback, ProgressCallback

    from sweeping.report import Sweep, terminal_table, write_report
    from sweeping.search import run_trials

    folder, console = args.output_dir, Console()
    if trainer.args.world_size > 1:
        raise ValueError("sweep.py runs its trials in one process: start it with python, without a launcher.")
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    logging.getLogger("hf_rdrop").setLevel(logging.WARNING)
    if not (folder / "trials.db").exists():  # before anything is written
        metrics = trainer.evaluate()
        if args.metric not in metrics:
            known = ", ".join(sorted(name for name in metrics if name.startswith("eval_")))
            raise ValueError(f"--metric {args.metric} is not among the results of {args.script}: {known}.")
    check_same_comparison(folder, settings)

    share = args.validation_from_train
    held_out = f"{len(trainer.eval_dataset)} {'held-out training' if share else 'validation'} rows"
    minimize = bool(LOWER_IS_BETTER.search(args.metric))

    def report(trials: "list[Trial]") -> Sweep:
        sweep = Sweep(args.script, args.metric, minimize, held_out, trials)
        command = final_command(args, sweep.ranked[0].parameters) if sweep.ranked else None
        write_report(sweep, folder, LOG_SCALE, command, settings=settings)
        return sweep

    with sole_user(folder):
        trials = run_trials(
            trainer,
            {name: values for name in RANGES if len(values := getattr(args, name)) == 2},
            args.metric,
            minimize=minimize,
            num_trials=args.num_trials,
            seed=args.seed,
            storage=folder / "trials.db",
            console=console,
            report=report,
        )
    sweep = report(trials)
    if not sweep.ranked:
        raise ValueError(f"none of the {len(trials)} trials was completed. The last: {trials[-1].error}")
    console.print(terminal_table(sweep))
    console.print(sweep.summary, highlight=False)
    console.print("One seed a trial: differences as small as between seeds tell nothing.", highlight=False)
    console.print(f"Written to {folder}: sweep.md, sweep.json, sweep.png. Train with:", highlight=False)
    console.print(final_command(args, sweep.ranked[0].parameters), highlight=False, markup=False, soft_wrap=True)
    return asdict(sweep.ranked[0])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the sweep; returns the best trial as a dict."""
    args = parse(argv)
    settings = {name: getattr(args, name) for name in ("script", "metric", *RANGES, "validation_from_train", "seed")}
    settings["arguments"] = args.arguments
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        check_same_comparison(args.output_dir, settings)  # before the data are loaded
    with tempfile.TemporaryDirectory() as unused:  # trials leave nothing but their scores
        return importlib.import_module(args.script.removesuffix(".py")).main(
            script_arguments(args, unused), use_trainer=lambda trainer: search(trainer, args, settings)
        )


if __name__ == "__main__":
    cli(main)
