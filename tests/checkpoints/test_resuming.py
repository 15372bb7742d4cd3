"""Runs that were killed or out of disk, and resumed: the same as the uninterrupted run, bit for bit."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers

from hf_rdrop import RDropSeq2SeqTrainer, RDropTrainer
from support import ROOT, faults, settings
from support.faults import finish, plain_run, script_run, start
from support.killed_runs import SCHEDULE, assert_same_results, assert_same_run, glue_like, ragged_rows
from support.training import make_model, step_logs, train

CONFIGS = {
    "plain": {},
    "economies": {
        **{"rdrop_shared_layers": 1, "rdrop_interval": 2, "train_sampling_strategy": "group_by_length"},
        **{"lr_scheduler_type": "linear", "warmup_steps": 3, "save_total_limit": 2},
    },
}


@pytest.fixture(scope="module", params=[pytest.param("plain", marks=pytest.mark.slow), "economies"])
def whole(request, tmp_path_factory):
    """The uninterrupted run."""
    folder, args = tmp_path_factory.mktemp("whole"), {**SCHEDULE, **CONFIGS[request.param]}
    assert finish(plain_run, folder / "log.txt", folder / "out", ragged_rows(), **args) == 0
    return folder / "out", args


# ---- Within one process ----

RESUMED = [
    ("single", "default"),
    ("multi", "three passes"),
    ("regression", "plain"),
    ("token", "shared layer + interval"),
    ("token", "label smoothing"),
    ("seq2seq", "fused head + schedule"),
    ("causal", "inserted dropout"),
    ("choice", "two divergences"),
    ("masked", "hidden states"),
    ("gpt2", "layer drop"),
    ("question", "unlabeled"),
    ("tuple", "default"),
    ("image", "layer drop"),  # its weights are saved under other names than the model's
    ("audio", "default"),
]


@pytest.mark.parametrize(("head", "option"), RESUMED)
def test_resumed_is_the_uninterrupted_run(head, option, tmp_path):
    """From a checkpoint within an epoch and between two log lines, with dropout: bit for bit, and so are the logs."""
    args = {"dropout": 0.3, "size": 8, "rows": settings.rows_for(head, option, 32), "max_steps": 6, "logging_steps": 3}
    args |= {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3}

    class Resuming(RDropSeq2SeqTrainer if head == "seq2seq" else RDropTrainer):
        def train(self):
            return super().train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))

    assert settings.fits(head, option)
    whole = settings.run(head, option, output_dir=str(tmp_path / "whole"), **args)
    resumed = settings.run(head, option, output_dir=str(tmp_path / "again"), trainer_class=Resuming, **args)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    lines, rel = step_logs(whole), 1e-4 if "schedule" in option else 1e-5
    assert [line["step"] for line in lines] == [3, 6] and step_logs(resumed) == lines
    for line in lines:
        alpha = line.get("rdrop_alpha", whole.args.rdrop_alpha)
        assert line["loss"] == pytest.approx(line["ce_loss"] + alpha / 2 * line["kl_loss"], rel=rel)
        assert (line["kl_loss"] > 0) == (option != "plain")


# ---- Killed ----

KILLS = [("step", 5), ("step", 10), ("model.safetensors", 4), ("optimizer.pt", 6), ("rng_state.pth", 2)]


@pytest.mark.parametrize("kill", [*KILLS, ("trainer_state.json", 8)], ids=lambda kill: "-".join(map(str, kill)))
def test_killed_and_resumed_is_the_uninterrupted_run(whole, tmp_path, kill):
    """Also within an epoch and between two log lines."""
    reference, args = whole
    out = tmp_path / "out"
    assert finish(plain_run, tmp_path / "log.txt", out, ragged_rows(), kill, **args) == -signal.SIGKILL
    assert not (out / "final").exists()
    assert finish(plain_run, tmp_path / "log.txt", out, ragged_rows(), **args) == 0
    assert_same_run(out / "final", reference / "final")
    if kill[0] not in ("step", "rng_state.pth"):  # at step 2 there was no earlier one
        assert "is passed over, as it is unfinished" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_killed_at_random_moments(whole, tmp_path):
    """From outside, wherever it is: between two steps, in one, in any file of a checkpoint."""
    reference, args = whole
    generator, kills = random.Random(0), 0
    out, log = tmp_path / "out", tmp_path / "log.txt"
    while not (out / "final" / "trainer_state.json").exists():
        process = start(plain_run, log, out, ragged_rows(), ("slow", 0), **args)
        before = len(list(out.glob("*"))), time.monotonic()
        while len(list(out.glob("*"))) == before[0] and process.is_alive() and time.monotonic() < before[1] + 60:
            time.sleep(0.005)  # until it is at work
        time.sleep(generator.uniform(0, 0.4))
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills >= 5
    assert_same_run(out / "final", reference / "final")


@pytest.mark.parametrize(
    "name", ["run_glue", *(pytest.param(name, marks=pytest.mark.slow) for name in ("run_ner", "run_translation"))]
)
def test_scripts_killed_and_resumed(name, tmp_path, request):
    argv, reference = request.getfixturevalue("glue") if name == "run_glue" else glue_like(tmp_path, name)
    out, log = tmp_path / "killed", tmp_path / "log.txt"
    argv = [*argv, "--output_dir", out]
    assert finish(script_run, log, name, argv, ("optimizer.pt", 4)) == -signal.SIGKILL
    argv += ["--resume_from_checkpoint", "last"]
    assert finish(script_run, log, name, argv, ("step", 7)) == -signal.SIGKILL
    assert finish(script_run, log, name, argv) == 0
    assert_same_results(out, reference)


# ---- Disk full ----


def test_a_full_disk_leaves_the_last_checkpoint(glue, tmp_path):
    argv, reference = glue
    out, log = tmp_path / "out", tmp_path / "log.txt"
    argv = [*argv, "--output_dir", out, "--save_total_limit", 1]
    assert finish(script_run, log, "run_glue", argv, ("full", 6)) == 2
    said = log.read_text()
    assert "Traceback" not in said and "error: " in said and "checkpoint-6 could not be saved" in said
    assert "MiB are free" in said and f"--resume_from_checkpoint {out / 'checkpoint-4'}" in said
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]
    argv += ["--resume_from_checkpoint", out / "checkpoint-4"]
    assert finish(script_run, log, "run_glue", argv) == 0
    assert_same_results(out, reference)


@pytest.mark.slow
def test_a_file_system_without_room(glue, tmp_path):
    """As above, with the errors of a real one: it takes two checkpoints and a half."""
    argv, reference = glue
    pages = sum(-(-file.stat().st_size // 4096) for file in (reference / "checkpoint-2").iterdir())
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size={pages * 10}k none "$0" && exec "$@"', tmp_path]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "scripts" / "run_glue.py", *argv, "--output_dir", out]
    show = f'"$@"; code=$?; ls {out}; exit $code'  # what is left goes with the mount
    done = subprocess.run([*mount, "sh", "-c", show, "sh", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "checkpoint-6 could not be saved: " in done.stderr and "checkpoint-4." in done.stderr
    assert [name for name in done.stdout.split() if "-" in name] == ["checkpoint-2", "checkpoint-4"]


def test_the_faults_are_real(tmp_path):
    """A run with none planned ends well: what the others see is the fault's doing."""
    assert finish(plain_run, tmp_path / "log", tmp_path / "out", ragged_rows(), max_steps=1) == 0
    assert faults.finish(faults.kill, tmp_path / "log") == -signal.SIGKILL


def test_resuming_with_true_names_the_only_checkpoint_when_it_is_unfinished(tmp_path):
    args = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    trainer = train(make_model("single"), **args)
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 is unfinished: .* Start anew in another output folder"):
        trainer.train(resume_from_checkpoint=True)


def test_restoring_callbacks_warns_of_none_that_is_not_one(tmp_path, monkeypatch):
    args = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    trainer = train(make_model("single"), **args)
    trainer.args.restore_callback_states_from_checkpoint = True
    warnings = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", lambda message, *args: warnings.append(str(message)))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not any("RDropLossLog" in message for message in warnings)
    assert "RDropLossLog" in trainer.state.stateful_callbacks  # the sums themselves are kept
