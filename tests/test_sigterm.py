"""SIGTERM: a run saves a checkpoint and stops, also one of several processes, and leaves nothing half done."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from comparison.queue import Run, run_all
from hf_rdrop.checkpoints import last_finished
from hf_rdrop.sigterm import SaveOnSigterm
from support.faults import finish, script_run, start, wait_for, wait_in_a_temporary_folder
from support.killed_runs import assert_same_results, step_lines
from support.training import make_model, train


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


def test_sigterm_leaves_no_temporary_folder(tmp_path):
    """As of sweep.py, whose trials leave nothing but their scores."""
    process = start(wait_in_a_temporary_folder, tmp_path / "log", tmp_path)
    wait_for(lambda: any(tmp_path.glob("*/busy")), process)
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
        "from finetuning.command_line import cli\n"
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

    def run():
        kwargs = {"callbacks": [SaveOnSigterm()]}
        done.append(train(make_model("single"), trainer_kwargs=kwargs, save_strategy="epoch").state.global_step)

    done = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [2]
