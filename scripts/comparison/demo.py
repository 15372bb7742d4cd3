"""Demo of compare.py: made-up corpora and real digits, tiny models from scratch, and how long they are trained."""

import sys
from collections.abc import Sequence
from pathlib import Path

from comparison.arms import Task
from comparison.warm import WarmProcess
from demo.corpora import SIZES as CORPORA
from demo.corpora import write_demo_data

# Model and training of each demo task: sizes for init_model.py, then the script's own arguments. They were chosen by
# looking at plain training: long enough that it overfits and its score has stopped rising. (Translation had 20 epochs
# when R-Drop was first run; model_cards/reference/README.md has both results.) Dropout is the usual 0.1.
SIZES = ["--hidden_size", "64", "--intermediate_size", "128", "--max_length", "64", "--dropout", "0.1"]
MODELS = {
    "classification": ["--text_columns", "sentence", "--num_layers", "2", "--vocab_size", "1000"],
    "ner": ["--text_columns", "tokens", "--num_layers", "2", "--vocab_size", "800"],
    "translation": [
        *("--text_columns", "translation.en", "translation.xx", "--architecture", "encoder-decoder"),
        *("--num_layers", "1", "--vocab_size", "600"),
    ],
    "digits": [
        *("--architecture", "vision", "--image_size", "8", "--patch_size", "2", "--num_channels", "1"),
        *("--num_layers", "2"),
    ],
}
TRAINING = {
    "classification": ["--learning_rate", "2e-3", "--num_train_epochs", "10"],
    "ner": ["--learning_rate", "1e-3", "--num_train_epochs", "25"],
    "translation": [
        *("--learning_rate", "5e-3", "--num_train_epochs", "40", "--label_smoothing_factor", "0.1"),
        *("--source_lang", "en", "--target_lang", "xx", "--predict_with_generate", "--val_max_target_length", "40"),
    ],
    "digits": [
        *("--digits", "--max_train_samples", "400", "--sample_seed", "0"),
        *("--learning_rate", "2e-3", "--num_train_epochs", "25"),
    ],
}


def demo_tasks(folder: Path, alpha: float | None) -> list[Task]:
    """Make the demo tasks. Alphas are the paper's: 1 for classification, 5 for translation, 0.6 for ViT."""
    common = ["--do_train", "--do_eval", "--use_cpu", "--report_to", "none", "--save_strategy", "no"]
    common += ["--per_device_train_batch_size", "32", "--per_device_eval_batch_size", "64", "--warmup_steps", "0.1"]
    common += ["--disable_tqdm", "True", "--logging_steps", "10"]

    def task(name: str, script: str, metric: str, paper_alpha: float) -> Task:
        splits = ("train", "validation") if name in CORPORA else ()
        data = [f"--{split}_file={folder}/data/{name}/{split}.jsonl" for split in splits]
        model = f"--model_name_or_path={folder}/models/{name}-{{seed}}"
        return Task(
            name, script, metric, (*data, model, *common, *TRAINING[name]), paper_alpha if alpha is None else alpha
        )

    return [
        task("classification", "run_glue.py", "eval_accuracy", 1.0),
        task("ner", "run_ner.py", "eval_f1", 1.0),
        task("translation", "run_translation.py", "eval_bleu", 5.0),
        task("digits", "run_image_classification.py", "eval_accuracy", 0.6),
    ]


def make_demo_inputs(folder: Path, tasks: Sequence[Task], seeds: Sequence[int], warm: WarmProcess | None) -> None:
    """Do `write_demo_inputs` in a fork of the warm process where there is one, so that this one imports no torch."""
    names = [task.name for task in tasks]
    if warm is not None:
        warm.load(["from_scratch.model"])
        log = folder / "inputs.txt"
        started = warm.start([__file__, folder, ",".join(names), *map(str, seeds)], log)
        if started is not None and started.wait() == 0:
            return
    write_demo_inputs(folder, names, seeds)


def write_demo_inputs(folder: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Write the demo's corpora, and random weights and a tokenizer by task and seed; the same bytes every time."""
    from transformers.utils import logging

    from finetuning.run import parse_arguments
    from from_scratch.arguments import InitModelArguments
    from from_scratch.model import init_model

    logging.disable_progress_bar()
    data = write_demo_data(folder / "data", seed=0)
    for name in names:
        for seed in seeds:
            output = folder / "models" / f"{name}-{seed}"
            if not output.exists():
                text = ["--train_files", str(data[name]["train"])] if name in data else []
                line = [*text, "--output_dir", str(output), "--seed", str(seed), *SIZES, *MODELS[name]]
                init_model(*parse_arguments([InitModelArguments], line, None))


if __name__ == "__main__":  # in a fork of the warm process: with the folder, the tasks and the seeds
    write_demo_inputs(Path(sys.argv[1]), sys.argv[2].split(","), [int(seed) for seed in sys.argv[3:]])
