#!/usr/bin/env python
"""Compare fine-tuned models in how far dropout off is what their dropout sub-models are, on held-out data.

    python scripts/consistency.py --script run_glue.py --models baseline=outputs/baseline r-drop=outputs/r-drop \
        --num_samples 16 --output_dir outputs/consistency -- --task_name mrpc --validation_file dev.jsonl

For each model, in one pass over the validation data: score and loss with dropout off (weight averaging), of single
sub-models that dropout draws (mean and standard deviation), and of the ensemble of 1 to N of them (model averaging:
the mean of their probabilities); and the symmetric KL divergences, in nats per item (row, word or token), between the
sub-models, from them to dropout off, and from the ensemble to dropout off. A consistent model has small ones, and its
ensemble scores as it does. Each model is measured at the dropout rates that its configuration says; to measure all at
one rate, give --rdrop_dropout after --.

What follows -- are arguments of the script (that of --script) for the data and for evaluation; --bf16, --use_cpu and
--per_device_eval_batch_size among them. --do_eval is added.

The folder gets consistency.md (a table), consistency.json (every figure and curve), consistency.png, and a folder a
model with the script's own results.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import run_clm
import run_glue
import run_image_classification
import run_ner
import run_translation
from finetuning.command_line import cli, option_names, without_folders
from finetuning.results import read_json, write_file, write_json
from reporting.consistency import choose_score, markdown_table, plot

SCRIPTS: dict[str, Callable[[list[str]], Any]] = {
    "run_clm.py": run_clm.main,
    "run_glue.py": run_glue.main,
    "run_ner.py": run_ner.main,
    "run_translation.py": run_translation.main,
    "run_image_classification.py": run_image_classification.main,
}
DATA = ("validation_file", "validation_dir", "dataset_name", "task_name", "digits")
FILES = ("consistency.md", "consistency.json", "consistency.png")
OWN = ("model_name_or_path", "output_dir", "do_train", "do_eval", "do_predict", "consistency_samples", "push_to_hub")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the arguments; nothing on disk is changed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--script", choices=SCRIPTS, required=True, help="training script that fine-tuned the models")
    parser.add_argument(
        "--models", nargs="+", required=True, metavar="NAME=FOLDER", help="saved models, with a name for each"
    )
    parser.add_argument("--num_samples", type=int, default=16, help="sub-models to draw, 2 or more (default: 16)")
    parser.add_argument("--score", help="score to show beside the loss; default: f1, accuracy or pearson")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("arguments", nargs="*", help="after --: the script's arguments")
    args = parser.parse_args(argv)
    if args.num_samples < 2:
        raise ValueError(
            f"--num_samples must be at least 2, to compare sub-models with each other; got {args.num_samples}."
        )
    args.models = _read_models(args.models)
    given = option_names(args.arguments)
    for name in OWN:
        if name in given:
            raise ValueError(f"--{name} is set for each model by consistency.py: leave it out after --.")
    if not given.intersection(DATA):
        raise ValueError(f"no data: give one of --{', --'.join(DATA)} after --.")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise ValueError(f"--output_dir {args.output_dir} is a file: give the name of a folder.")
    others = {file.name for file in args.output_dir.glob("*")} - {*FILES, *args.models}
    if others:
        raise ValueError(
            f"--output_dir {args.output_dir} holds other files ({', '.join(sorted(others)[:3])}), which the results "
            "would be mixed with. Choose another folder."
        )
    return args


def _read_models(given: Sequence[str]) -> dict[str, Path]:
    models: dict[str, Path] = {}
    for item in given:
        name, separator, folder = item.partition("=")
        if not separator or not re.fullmatch(r"\w[\w.+ -]*", name) or name in FILES:
            raise ValueError(f"--models {item}: give NAME=FOLDER, such as baseline=outputs/baseline.")
        if name in models:
            raise ValueError(f"--models names {name!r} twice: give each model a name of its own.")
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"--models {item}: {folder} is no folder of a saved model (with a config.json).")
        models[name] = Path(folder)
    return models


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure all models; returns what consistency.json holds."""
    args = parse(argv)
    found: dict[str, Any] = {}
    score = None
    for name, model in args.models.items():
        output = args.output_dir / name
        fixed = [f"--model_name_or_path={model}", f"--output_dir={output}", "--do_eval"]
        SCRIPTS[args.script]([*args.arguments, *fixed, f"--consistency_samples={args.num_samples}"])
        found[name] = read_json(output / "consistency.json")
        score = choose_score(found[name], args.score)
    results = {
        "script": args.script,
        "arguments": [without_folders(argument) for argument in args.arguments],
        "num_samples": args.num_samples,
        "score": score,
        "models": found,
    }
    table = markdown_table(found, score)
    write_json(args.output_dir / "consistency.json", results)
    write_file(args.output_dir / "consistency.md", table)
    plot(found, score, args.output_dir / "consistency.png")
    print(f"\n{table}\nWritten to {args.output_dir}: {', '.join(FILES)}")
    return results


if __name__ == "__main__":
    cli(main)
