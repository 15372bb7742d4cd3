#!/usr/bin/env python
"""Compare R-Drop with plain fine-tuning: the same script, data, data order and hyper-parameters, several seeds.

    python scripts/compare.py --demo
    python scripts/compare.py --script run_glue.py --metric eval_accuracy --rdrop_alpha 1.0 --seeds 0 1 2 \
        --output_dir outputs/own -- --train_file train.csv --validation_file dev.csv \
        --model_name_or_path outputs/tiny --do_train --do_eval --num_train_epochs 3

--demo writes small made-up corpora for three heads (demo_data.py), makes randomly initialised models with tokenizers
for them (init_model.py), and trains plainly and with R-Drop, with three seeds each, through run_glue.py, run_ner.py
and run_translation.py. Whatever the table then says is what it says: the models are tiny, trained from scratch for
seconds, and the alphas are the paper's, not tuned.

The folder gets comparison.md (the table), comparison.json (every score), comparison.png, and runs/ with each run's
command, log and results. Killed and started again with the same arguments, it goes on with the runs not finished.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import demo_data
import init_model
from common import cli, write_file, write_json
from comparison_report import BASELINE, as_json, make_rows, markdown_table, plot, terminal_table
from rich.console import Console
from run_queue import Run, check_same_comparison, run_all
from transformers.utils import logging

from hf_rdrop.loss import check_alpha


@dataclass(frozen=True)
class Task:
    """What is trained in every arm: a script with its arguments, and the metric that counts."""

    name: str
    script: str
    metric: str
    rdrop_alpha: float
    arguments: tuple[str, ...]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="compare on the embedded demo data (3 minutes on 2 cores)")
    parser.add_argument("--script", choices=["run_glue.py", "run_ner.py", "run_translation.py"])
    parser.add_argument("--metric", help="what to compare, as in the script's eval_results.json, e.g. eval_accuracy")
    parser.add_argument(
        "--rdrop_alpha",
        type=float,
        help="alpha of the R-Drop arm: loss = CE + alpha/2 * KL. Default: 1; in the demo the paper's",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of each arm (default: 0 1 2)")
    parser.add_argument("--output_dir", type=Path, help="where to write (default: outputs/demo for --demo)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once (default: one a core)")
    parser.add_argument("arguments", nargs="*", help="after --: the script's arguments; {seed} is replaced")
    args = parser.parse_args(argv)
    if args.demo == bool(args.script):
        raise ValueError("give either --demo, or --script and --metric with the script's arguments after --.")
    if args.script and not (args.metric and args.output_dir and args.arguments):
        raise ValueError("--script also needs --metric, --output_dir and, after --, the script's arguments.")
    if args.demo and (args.metric or args.arguments):
        raise ValueError("--demo brings its own data, metric and arguments: leave --metric and what follows -- out.")
    if args.rdrop_alpha is not None:
        check_alpha(args.rdrop_alpha)
        if args.rdrop_alpha == 0:
            raise ValueError("--rdrop_alpha 0 is the baseline itself: give the alpha of the other arm, above 0.")
    if len(set(args.seeds)) < len(args.seeds) or args.jobs < 1:
        raise ValueError("--seeds must all be different, and --jobs at least 1.")
    for name in ("--seed", "--output_dir", "--rdrop_alpha"):
        if any(argument == name or argument.startswith(f"{name}=") for argument in args.arguments):
            raise ValueError(f"{name} is set for each run by compare.py: leave it out after --.")
    args.output_dir = args.output_dir or Path("outputs/demo")
    return args


# Model and training of each demo task: sizes for init_model.py, then the script's own arguments. They were chosen by
# looking at plain training: long enough that it overfits and its score has stopped rising. (Translation had 20 epochs
# when R-Drop was first run; the README has both results.) Dropout is the usual 0.1.
DEMO_SIZES = ["--hidden_size", "64", "--intermediate_size", "128", "--max_length", "64", "--dropout", "0.1"]
DEMO_MODELS = {
    "classification": ["--text_columns", "sentence", "--num_layers", "2", "--vocab_size", "1000"],
    "ner": ["--text_columns", "tokens", "--num_layers", "2", "--vocab_size", "800"],
    "translation": [
        *("--text_columns", "translation.en", "translation.xx", "--architecture", "encoder-decoder"),
        *("--num_layers", "1", "--vocab_size", "600"),
    ],
}
DEMO_TRAINING = {
    "classification": ["--learning_rate", "2e-3", "--num_train_epochs", "10"],
    "ner": ["--learning_rate", "1e-3", "--num_train_epochs", "25"],
    "translation": [
        *("--learning_rate", "5e-3", "--num_train_epochs", "40", "--label_smoothing_factor", "0.1"),
        *("--source_lang", "en", "--target_lang", "xx", "--predict_with_generate", "--val_max_target_length", "40"),
    ],
}


def demo_tasks(folder: Path, alpha: float | None) -> list[Task]:
    """The three demo tasks. Alphas are the paper's: 1 for classification, 5 for translation."""
    common = ["--do_train", "--do_eval", "--use_cpu", "--report_to", "none", "--save_strategy", "no"]
    common += ["--per_device_train_batch_size", "32", "--per_device_eval_batch_size", "64", "--warmup_steps", "0.1"]
    common += ["--disable_tqdm", "True", "--logging_steps", "10"]

    def task(name: str, script: str, metric: str, paper_alpha: float) -> Task:
        data = [f"--{split}_file={folder}/data/{name}/{split}.jsonl" for split in ("train", "validation")]
        model = f"--model_name_or_path={folder}/models/{name}-{{seed}}"
        return Task(name, script, metric, alpha or paper_alpha, (*data, model, *common, *DEMO_TRAINING[name]))

    return [
        task("classification", "run_glue.py", "eval_accuracy", 1.0),
        task("ner", "run_ner.py", "eval_f1", 1.0),
        task("translation", "run_translation.py", "eval_bleu", 5.0),
    ]


def write_demo_inputs(folder: Path, seeds: Sequence[int]) -> None:
    """The demo's data, and for each task and seed a tokenizer and random weights; the same bytes every time."""
    logging.disable_progress_bar()
    data = demo_data.write_demo_data(folder / "data", seed=0)
    for name, model in DEMO_MODELS.items():
        for seed in seeds:
            output = folder / "models" / f"{name}-{seed}"
            if not output.exists():
                fixed = ["--train_files", str(data[name]["train"]), "--output_dir", str(output), "--seed", str(seed)]
                init_model.main([*fixed, *DEMO_SIZES, *model])


def plan(tasks: Sequence[Task], seeds: Sequence[int], folder: Path) -> list[Run]:
    """All runs; the arms of one seed beside each other, so that a change in the machine's load meets both."""
    return [
        Run(
            task.name,
            arm,
            seed,
            task.script,
            (*(argument.replace("{seed}", str(seed)) for argument in task.arguments), "--rdrop_alpha", str(alpha)),
            folder / "runs" / task.name / arm / f"seed-{seed}",
        )
        for task in tasks
        for seed in seeds
        for arm, alpha in ((BASELINE, 0), ("r-drop", task.rdrop_alpha))
    ]


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Run the comparison; returns the rows of the table as dicts."""
    args = parse(argv)
    folder: Path = args.output_dir
    if args.demo:
        tasks = demo_tasks(folder, args.rdrop_alpha)
    else:
        name = args.script.removeprefix("run_").removesuffix(".py")
        tasks = [Task(name, args.script, args.metric, args.rdrop_alpha or 1.0, tuple(args.arguments))]
    runs = plan(tasks, args.seeds, folder)
    check_same_comparison(folder, {"tasks": [vars(task) for task in tasks], "seeds": args.seeds})
    if args.demo:
        write_demo_inputs(folder, args.seeds)

    metrics = {task.name: task.metric for task in tasks}
    console = Console()
    failed = run_all(runs, args.jobs, lambda run: _describe(run, metrics[run.task]), console)

    results = {(run.task, run.arm, run.seed): run.results() for run in runs if run not in failed}
    rows = make_rows(results, metrics, ["r-drop"])
    if rows:
        write_file(folder / "comparison.md", markdown_table(rows))
        plot(rows, folder / "comparison.png")
        write_json(folder / "comparison.json", {"rows": as_json(rows), "failed": [run.name for run in failed]})
        console.print(terminal_table(rows))
        console.print(f"Written to {folder}: comparison.md, comparison.json, comparison.png, runs/", highlight=False)
    if failed:
        reasons = "\n\n".join(f"{run.name}: {reason}" for run, reason in failed.items())
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed; the others are kept.\n{reasons}")
    return as_json(rows)


def _describe(run: Run, metric: str) -> str:
    results = run.results()
    if metric not in results:
        known = ", ".join(sorted(name for name in results if name.startswith("eval_")))
        raise ValueError(f"--metric {metric} is not among the results of {run.script}: {known}.")
    return f"{metric.removeprefix('eval_')} {results[metric]:.4g}, {results['train_runtime']:.1f} s"


if __name__ == "__main__":
    cli(main)
