"""Runs for the tests that kill, damage and stop them, and what makes two runs the same."""

import json
import shlex

import pytest

from support import script_data as made
from support.faults import finish, script_run
from support.training import make_rows

SCHEDULE = {
    **{"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    **{"save_strategy": "steps", "save_steps": 2, "logging_steps": 3, "learning_rate": 1e-2, "rdrop_alpha": 2.0},
}


def ragged_rows():
    """30 rows of several lengths: the last step of an epoch has fewer."""
    return make_rows("single", 30)


def step_lines(file):
    lines = [line for line in json.loads(file.read_text())["log_history"] if "loss" in line]
    assert lines
    return lines


def assert_same_run(folder, other, alpha=2.0):
    assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    ours = step_lines(folder / "trainer_state.json")
    assert ours == step_lines(other / "trainer_state.json")
    for line in ours:
        assert line["loss"] == pytest.approx(line["ce_loss"] + alpha / 2 * line["kl_loss"], rel=1e-5)


SCRIPT_SCHEDULE = """
--do_train --do_eval --use_cpu --disable_tqdm true --report_to none --learning_rate 1e-2 --rdrop_alpha 2
--num_train_epochs 3 --per_device_train_batch_size 3 --gradient_accumulation_steps 2
--save_steps 2 --logging_steps 3 --train_sampling_strategy group_by_length
"""


def glue_like(folder, name):
    """A script's arguments but for its output folder, and its uninterrupted run."""
    rows = {
        "run_glue": lambda rows, seed: made.classification_rows("pairs", rows, seed),
        "run_ner": made.ner_rows,
        "run_translation": made.translation_rows,
    }[name]
    files = {
        split: made.write(folder / f"{split}.jsonl", rows(22, seed)) for seed, split in enumerate(("train", "dev"))
    }
    model = (made.make_seq2seq if name == "run_translation" else made.make_encoder)(folder / "model")
    argv = [f"--train_file={files['train']}", f"--validation_file={files['dev']}", f"--model_name_or_path={model}"]
    argv += shlex.split(SCRIPT_SCHEDULE)
    if name == "run_translation":
        argv += ["--source_lang", "en", "--target_lang", "de"]
    assert finish(script_run, folder / "log.txt", name, [*argv, "--output_dir", folder / "out"]) == 0
    return argv, folder / "out"


def assert_same_results(out, reference):
    assert_same_run(out, reference)
    ours, theirs = (json.loads((folder / "eval_results.json").read_text()) for folder in (out, reference))
    assert ours["eval_loss"] == theirs["eval_loss"]
