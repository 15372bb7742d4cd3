"""The configurations in scripts/accelerate load, and the scripts run unchanged under the one that needs no GPU."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from hf_rdrop import RDropTrainer, RDropTrainingArguments
from support import ROOT
from support import script_data as made
from support.processes import CONFIGS, launcher
from support.training import make_model, make_rows

TYPES = {
    "cpu": DistributedType.MULTI_GPU,  # its way to start several processes; the script's --use_cpu makes it gloo's
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}


def test_every_configuration_is_known_here():
    assert {path.stem for path in CONFIGS.iterdir()} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_configuration_loads_and_its_launch_line_is_right(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == TYPES[name]
    assert config.num_processes == 2 and config.use_cpu == (name == "cpu")
    assert config.mixed_precision == ("no" if name in ("cpu", "ddp") else "bf16")
    if name.startswith("deepspeed"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
    # What is not known to `accelerate launch` is silently ignored.
    known = {*vars(launch_command_parser().parse_args(["script.py"]))}
    known |= {"fsdp_version", "fsdp_reshard_after_forward"}  # FSDP2's, not known to accelerate before 1.6
    assert known >= {*config.fsdp_config, *config.deepspeed_config}
    header = re.sub(r"\\?\n# *", " ", (CONFIGS / f"{name}.yaml").read_text("utf-8"))
    command = re.search(r"accelerate launch (--config_file .*?) \.\.\.", header).group(1).split()
    args = launch_command_parser().parse_args(command)
    assert args.config_file == f"scripts/accelerate/{name}.yaml"
    assert (ROOT / args.training_script).is_file()
    assert ("--use_cpu" in args.training_script_args) == (name == "cpu")


SCRIPTS = {
    "run_glue.py": (made.make_encoder, lambda rows, seed: made.classification_rows("pairs", rows, seed), []),
    "run_ner.py": (made.make_encoder, made.ner_rows, []),
    "run_translation.py": (
        made.make_seq2seq,
        made.translation_rows,
        ["--source_lang=en", "--target_lang=de", "--predict_with_generate", "--max_target_length=12", "--num_beams=1"],
    ),
}


def launch_script(folder, script, *more):
    make, rows, own = SCRIPTS[script]
    options = {"model_name_or_path": make(folder / "model"), "output_dir": folder / "out", "max_steps": 2}
    options |= {"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    for split, size in (("train", 24), ("validation", 7)):
        options[f"{split}_file"] = made.write(folder / f"{split}.jsonl", rows(size, size))
    line = ["--do_train", "--do_eval", *(f"--{name}={value}" for name, value in options.items()), *own, *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *launcher("cpu.yaml"), ROOT / "scripts" / script, *line]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.parametrize(
    "script",
    ["run_glue.py", *(pytest.param(name, marks=pytest.mark.slow) for name in ("run_ner.py", "run_translation.py"))],
)
def test_scripts_run_under_accelerate_launch(tmp_path, script):
    """Two ranks, one of which writes: the files are whole, and there once."""
    run = launch_script(tmp_path, script, "--use_cpu")
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_samples"] == 7
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "ce_loss" in entry]
    assert len(logs) == 2 and all(entry["kl_loss"] > 0 for entry in logs)
    assert logs[-1]["epoch"] == pytest.approx(2 / 3)  # 24 rows are three steps of 2 x 4: both ranks have their half
    assert all(torch.isfinite(weight).all() for weight in load_file(tmp_path / "out" / "model.safetensors").values())
    assert not list((tmp_path / "out").rglob("*.tmp*"))


@pytest.mark.slow
def test_two_processes_that_do_not_join_are_refused(tmp_path):
    """Without --use_cpu each of the two would train alone, and write the same folder (accelerate 1.3 joins them)."""
    run = launch_script(tmp_path, "run_glue.py")
    if run.returncode == 0:
        state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
        assert state["log_history"][0]["epoch"] == pytest.approx(1 / 3)
    else:
        assert "--use_cpu" in run.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, r"2 processes were started.*--use_cpu"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, "has started one.*torchrun"),
    ],
)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_one_process_in_place_of_several_is_refused(tmp_path, monkeypatch, environment, message, alpha):
    args = RDropTrainingArguments(str(tmp_path), use_cpu=True, rdrop_alpha=alpha, max_steps=1, report_to=[])
    trainer = RDropTrainer(model=make_model("single"), args=args, train_dataset=make_rows("single"))
    for name in ("WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
