"""Runs that were killed, damaged, stopped or out of disk, and what comes of going on."""

import errno
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import save_file

from comparison.queue import Run, run_all
from finetuning.run import cli, find_checkpoint
from hf_rdrop import RDropTrainer
from hf_rdrop.checkpoints import CheckpointError, check_checkpoint, find_damage, last_finished, saving
from hf_rdrop.hub.push import CleanPushMixin, _remove_stale
from support import ROOT, faults
from support import script_data as made
from support.faults import finish, plain_run, script_run, start, wait_for
from support.training import make_model, make_rows, train

SCHEDULE = {
    **{"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    **{"save_strategy": "steps", "save_steps": 2, "logging_steps": 3, "learning_rate": 1e-2, "rdrop_alpha": 2.0},
}
CONFIGS = {
    "plain": {},
    "economies": {
        **{"rdrop_shared_layers": 1, "rdrop_interval": 2, "train_sampling_strategy": "group_by_length"},
        **{"lr_scheduler_type": "linear", "warmup_steps": 3, "save_total_limit": 2},
    },
}


def ragged_rows():
    """30 rows of several lengths: the last step of an epoch has fewer."""
    return make_rows("single", 30)


@pytest.fixture(scope="module", params=[pytest.param("plain", marks=pytest.mark.slow), "economies"])
def whole(request, tmp_path_factory):
    """The uninterrupted run."""
    folder, args = tmp_path_factory.mktemp("whole"), {**SCHEDULE, **CONFIGS[request.param]}
    assert finish(plain_run, folder / "log.txt", folder / "out", ragged_rows(), **args) == 0
    return folder / "out", args


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


SCRIPT_SCHEDULE = """
--do_train --do_eval --use_cpu --disable_tqdm true --report_to none --learning_rate 1e-2 --rdrop_alpha 2
--num_train_epochs 3 --per_device_train_batch_size 3 --gradient_accumulation_steps 2
--save_steps 2 --logging_steps 3 --train_sampling_strategy group_by_length
"""


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    return glue_like(tmp_path_factory.mktemp("glue"), "run_glue")


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


# ---- Damaged ----

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "trainer_state.json")


def damage(file, how):
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "empty":
        os.truncate(file, 0)
    elif how == "zeros":
        file.write_bytes(bytes(file.stat().st_size))
    elif how == "garbage":
        file.write_bytes(random.Random(0).randbytes(file.stat().st_size))
    elif how == "one byte":  # in the header of safetensors; in the data of what torch.save wrote, not its padding
        content, place = bytearray(file.read_bytes()), 2
        if file.suffix != ".safetensors":
            with ZipFile(file) as parts:
                data = parts.read(next(name for name in parts.namelist() if name.endswith("data.pkl")))
            place = content.index(data) + len(data) // 2
        content[place] ^= 255
        file.write_bytes(content)


@pytest.fixture
def checkpoints(glue, tmp_path):
    """The checkpoints of an uninterrupted run, of steps 2 to 12."""
    return Path(shutil.copytree(glue[1], tmp_path / "out"))


# Not every model has a config.json, and with a byte changed JSON is still JSON.
UNNOTICED = (("config.json", "missing"), ("config.json", "one byte"), ("trainer_state.json", "one byte"))
DAMAGE = [
    (name, how)
    for name in FILES
    for how in ("missing", "truncated", "empty", "zeros", "garbage", "one byte")
    if (name, how) not in UNNOTICED
]


@pytest.mark.parametrize(("name", "how"), DAMAGE)
def test_damage_is_named_and_the_previous_checkpoint_offered(checkpoints, name, how):
    last, before = checkpoints / "checkpoint-12", checkpoints / "checkpoint-10"
    assert find_damage(last) is None
    damage(last / name, how)
    damage(before / "model.safetensors", "truncated")
    content = {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    with pytest.raises(ValueError) as error:
        find_checkpoint(str(checkpoints), str(last))
    words = str(error.value)
    assert f"{last} is " in words and name in words
    assert f"--resume_from_checkpoint {checkpoints / 'checkpoint-8'}." in words
    if name == "trainer_state.json":  # killed while it saved: that must not stop what goes on by itself
        damage(before / "trainer_state.json", "missing")
        assert find_checkpoint(str(checkpoints), "last") == str(checkpoints / "checkpoint-8")
    else:
        with pytest.raises(ValueError, match=name):
            find_checkpoint(str(checkpoints), "last")
        assert content == {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}


def test_the_trainer_refuses_a_damaged_checkpoint_and_passes_over_unfinished_ones(tmp_path, caplog):
    out = tmp_path / "out"
    train(make_model("single"), output_dir=str(out), save_strategy="steps", save_steps=1, max_steps=4)
    damage(out / "checkpoint-4" / "trainer_state.json", "truncated")

    class Resuming(RDropTrainer):
        def train(self):
            return super().train(resume_from_checkpoint=self.given)

    Resuming.given = True
    trainer = train(make_model("single"), "single", Resuming, output_dir=str(out), max_steps=4)
    assert trainer.state.global_step == 4 and "checkpoint-4 is passed over" in caplog.text
    damage(out / "checkpoint-3" / "optimizer.pt", "truncated")
    for given in (True, str(out / "checkpoint-3")):
        Resuming.given = given
        with pytest.raises(ValueError) as error:
            train(make_model("single"), "single", Resuming, output_dir=str(out))
        assert "checkpoint-3 is damaged: optimizer.pt is" in str(error.value)
        assert f"resume_from_checkpoint={str(out / 'checkpoint-2')!r}" in str(error.value)


def test_other_kinds_of_checkpoints_are_whole(tmp_path, checkpoints):
    def variant(name, *remove):
        folder = shutil.copytree(checkpoints / "checkpoint-2", tmp_path / name)
        for file in remove:
            (folder / file).unlink()
        return folder

    only_model = variant("only-model", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    ranks = variant("ranks", "rng_state.pth")
    for rank in range(2):
        torch.save({"cpu": torch.get_rng_state()}, ranks / f"rng_state_{rank}.pth")
    adapter = variant("adapter", "model.safetensors", "config.json")
    save_file({"lora": torch.ones(3)}, adapter / "adapter_model.safetensors")
    sharded = variant("sharded", "model.safetensors")
    make_model("single").save_pretrained(sharded, max_shard_size="8KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    deepspeed = variant("deepspeed", "model.safetensors", "optimizer.pt", "scheduler.pt")
    (deepspeed / "global_step2").mkdir()
    torch.save({}, deepspeed / "global_step2" / "mp_rank_00_model_states.pt")
    fsdp = variant("fsdp", "model.safetensors", "optimizer.pt")
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        (fsdp / part).mkdir()
        (fsdp / part / "__0_0.distcp").write_bytes(b"x")
    for folder in (only_model, ranks, adapter, sharded, deepspeed, fsdp):
        assert find_damage(folder) is None, folder
    next(sharded.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"model-00002.* is missing"):
        check_checkpoint(sharded)


def test_a_checkpoint_written_anew_is_unfinished_until_it_is_whole(checkpoints):
    """What an earlier run has left there must not vouch for a mixture of both."""
    checkpoint = checkpoints / "checkpoint-12"
    with pytest.raises(KeyboardInterrupt), saving(checkpoint):
        assert last_finished(checkpoints) == checkpoints / "checkpoint-10"
        raise KeyboardInterrupt
    assert checkpoint.is_dir() and last_finished(checkpoints) == checkpoints / "checkpoint-10"
    with pytest.raises(OSError, match="elsewhere") as error, saving(checkpoint):
        raise ConnectionError("elsewhere")  # not the disk's doing
    assert not isinstance(error.value, CheckpointError) and checkpoint.is_dir()
    with pytest.raises(CheckpointError, match=r"No space left on device .*checkpoint-10\b"), saving(checkpoint):
        raise RuntimeError from OSError(errno.ENOSPC, "No space left on device")
    assert not checkpoint.exists() and (checkpoints / "checkpoint-10").exists()


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


# ---- SIGTERM ----


def at_work(log):
    return lambda: log.exists() and "at work" in log.read_text()


def test_sigterm_saves_and_stops(glue, tmp_path):
    argv, reference = glue
    out, log = tmp_path / "out", tmp_path / "log.txt"
    argv = [*argv, "--output_dir", out, "--save_steps", 100, "--save_total_limit", 1]
    process = start(script_run, log, "run_glue", argv, ("slow", 0))
    wait_for(at_work(log), process)
    for _ in range(2):  # launchers send several
        os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143
    saved = last_finished(out)
    assert saved is not None and 1 <= (step := int(saved.name[11:])) < 12
    said = log.read_text()
    assert f"SIGTERM: stopped after step {step} of 12" in said and "Traceback" not in said
    assert f"--resume_from_checkpoint {saved}" in said
    assert not (out / "all_results.json").exists()
    assert finish(script_run, log, "run_glue", [*argv, "--resume_from_checkpoint", "last"]) == 0
    assert_same_results(out, reference)


def test_sigterm_without_checkpoints_ends_at_once(glue, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    argv = [*glue[0], "--output_dir", out, "--save_strategy", "no"]
    process = start(script_run, log, "run_glue", argv, ("slow", 0))
    wait_for(at_work(log), process)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143 and not list(out.glob("checkpoint-*"))


def test_the_trainers_own_way_is_refused(tmp_path, glue):
    argv = [*glue[0], "--output_dir", tmp_path / "out", "--enable_jit_checkpoint"]
    assert finish(script_run, tmp_path / "log.txt", "run_glue", argv) == 2
    assert "--enable_jit_checkpoint is not needed" in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "out").exists()


def sleep_in_a_temporary_folder(parent):
    def main():
        with tempfile.TemporaryDirectory(dir=parent):
            time.sleep(60)

    cli(main)


def test_sigterm_leaves_no_temporary_folder(tmp_path):
    """As of sweep.py, whose trials leave nothing but their scores."""
    process = start(sleep_in_a_temporary_folder, tmp_path / "log", tmp_path)
    wait_for(lambda: any(path.is_dir() for path in tmp_path.iterdir()), process)
    process.terminate()
    process.join(30)
    assert process.exitcode == 143 and not any(path.is_dir() for path in tmp_path.iterdir())


@pytest.mark.parametrize("taken_by", ["any thread", "another thread"])
def test_a_run_that_starts_while_the_comparison_ends_is_ended(tmp_path, monkeypatch, taken_by):
    """The signal may come between taking a run from the queue and starting its process.

    One that another thread takes, as one that comes just before the main thread waits, does not end that wait.
    """
    script, original = tmp_path / "script.py", subprocess.Popen
    script.write_text("import time; time.sleep(60)")

    def late(*args, **kwargs):
        if taken_by == "any thread":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        time.sleep(2)  # the main thread ends what is running: nothing yet
        return original(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", late)
    begun = time.monotonic()
    with pytest.raises(SystemExit) as end:
        run_all([Run("task", "arm", 1, str(script), (), tmp_path / "runs")], 1, lambda run: "")
    assert end.value.code == 143 and time.monotonic() - begun < 30


@pytest.mark.slow
def test_processes_agree_on_the_step_they_stop_after(glue, tmp_path):
    """Only one of them gets the signal."""
    argv, out = [str(argument) for argument in glue[0]], tmp_path / "out"
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        f"import sys, os; sys.path[:0] = {sys.path!r}\n"
        "import run_glue\n"
        "from finetuning.run import cli\n"
        "from support import faults\n"
        f"open({str(tmp_path)!r} + '/pid-' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        "faults.plan('slow', 0)\ncli(run_glue.main)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launch += ["--rdzv_endpoint", "127.0.0.1:0", wrapper, *argv, "--output_dir", out, "--save_steps", 100]
    launch += ["--ddp_backend", "gloo"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen([*map(str, launch)], stdout=log, stderr=log, env=env)
    deadline = time.monotonic() + 120
    while "at work" not in (tmp_path / "log.txt").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGTERM)
    assert process.wait(90) != 0
    saved = last_finished(out)
    assert saved is not None and 1 <= int(saved.name[11:]) < 6, (tmp_path / "log.txt").read_text()
    assert {path.name for path in saved.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    resumed = [*map(str, launch), "--resume_from_checkpoint", "last"]
    assert subprocess.run(resumed, env=env, capture_output=True).returncode == 0
    assert step_lines(out / "trainer_state.json")[-1]["step"] == 6


def test_a_thread_cannot_take_signals(tmp_path):
    """Training outside the main thread goes on as without the callback."""
    from hf_rdrop.sigterm import SaveOnSigterm

    def run():
        kwargs = {"callbacks": [SaveOnSigterm()]}
        done.append(train(make_model("single"), trainer_kwargs=kwargs, save_strategy="epoch").state.global_step)

    done = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [2]


# ---- Killed while it pushed ----


class Pushing(CleanPushMixin):
    def __init__(self, folder):
        self._folder = folder

    @property
    def _output_dir(self):
        return self._folder


def push_and_wait(folder):
    (Pushing(folder)._make_staging() / "model.safetensors").touch()
    time.sleep(60)


def test_copies_for_uploads_that_died_are_removed(tmp_path):
    process = start(push_and_wait, tmp_path / "log", tmp_path)
    wait_for(lambda: any(tmp_path.glob("_upload-*/model.safetensors")), process)
    (tmp_path / "_upload-mine").mkdir()  # not known to be ours
    _remove_stale(tmp_path)
    assert len(list(tmp_path.glob("_upload-*"))) == 2  # it lives
    process.kill()
    process.join()
    _remove_stale(tmp_path)
    assert [path.name for path in tmp_path.glob("_upload-*")] == ["_upload-mine"]


def test_the_faults_are_real(tmp_path):
    """A run with none planned ends well: what the others see is the fault's doing."""
    assert finish(plain_run, tmp_path / "log", tmp_path / "out", ragged_rows(), max_steps=1) == 0
    assert faults.finish(faults.kill, tmp_path / "log") == -signal.SIGKILL
