"""Warm process of a comparison: its forks are like fresh processes, and what ends one of them ends no other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from comparison.queue import Run, environment, run_all
from comparison.warm import SCRIPTS, WarmProcess, can_fork, modules_of
from support import ROOT

pytestmark = pytest.mark.skipif(not can_fork(), reason="runs are not forked on this machine")

# Stands in for a training script, and for what such a script imports.
SCRIPT = """
import json, os, pathlib, signal, sys, threading, time
import slow_import
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(args["--output_dir"])
out.mkdir(parents=True)
print("to stdout", flush=True)
print("to stderr", file=sys.stderr)
how = args.get("--end", "")
if how == "signal":
    os.kill(os.getpid(), signal.SIGKILL)  # as when memory runs out
if how == "exception":
    raise RuntimeError("it was to fail")
if how == "message":
    sys.exit("error: no such file")
time.sleep(float(args.get("--sleep", 0)))
result = {
    "name": __name__, "imported_by": slow_import.PID, "session": os.getsid(0) == os.getpid(),
    "path": sys.path[0], "argv": sys.argv[0], "cwd": os.getcwd(), "threads": os.environ["OMP_NUM_THREADS"],
    "main": sys.modules["__main__"].__dict__ is globals(), "stdin": os.fstat(0).st_ino,
    "term": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "open": len(os.listdir("/proc/self/fd")),
}
(out / "all_results.json").write_text(json.dumps(result))
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    (folder / "slow_import.py").write_text("import os\nPID = os.getpid()")
    monkeypatch.setattr(Run, "is_ours", True)
    monkeypatch.setattr("comparison.queue.SCRIPTS", folder)
    monkeypatch.setattr("comparison.queue.modules_of", lambda *_: ["slow_import", "not_there"])
    return folder


def make_runs(tmp_path, *ends):
    return [
        Run("t", "a", seed, "script.py", ("--end", *end.split()), tmp_path / "runs" / f"{seed}")
        for seed, end in enumerate(ends)
    ]


def test_a_fork_is_like_a_fresh_process(scripts, tmp_path):
    (fresh,), (forked,) = make_runs(tmp_path / "1", "no"), make_runs(tmp_path / "2", "no")
    assert run_all([fresh], 2, lambda run: "") == {}
    with WarmProcess(environment(2), scripts) as warm:
        assert run_all([forked], 2, lambda run: "", warm=warm) == {}
        pid = warm.pid
    one, other = fresh.results(), forked.results()
    assert other.pop("imported_by") == pid != one.pop("imported_by")
    assert one == other and other["session"] and other["name"] == "__main__"
    assert (forked.folder / "log.txt").read_text().split("\n") == ["to stdout", "to stderr", ""]
    assert not psutil.pid_exists(pid)


def test_what_ends_one_run_ends_no_other(scripts, tmp_path):
    runs = make_runs(tmp_path, "no", "signal", "exception", "message", "no")
    with WarmProcess(environment(2), scripts) as warm:
        failed = run_all(runs, 2, lambda run: "", warm=warm)
    reasons = {run.seed: reason for run, reason in failed.items()}
    assert sorted(reasons) == [1, 2, 3]
    assert "exit status -9" in reasons[1] and "exit status 1;" in reasons[2] and "it was to fail" in reasons[2]
    assert "exit status 1;" in reasons[3] and reasons[3].endswith("error: no such file")
    assert runs[0].results()["imported_by"] == runs[4].results()["imported_by"]


def test_without_the_warm_process_runs_go_on_and_others_start_afresh(scripts, tmp_path):
    runs = make_runs(tmp_path, "no --sleep 1", "no")
    with WarmProcess(environment(1), scripts) as warm:
        warm.load(["slow_import"])
        runs[0].folder.mkdir(parents=True)
        first = warm.start(runs[0].command[1:], runs[0].folder / "log.txt")
        os.kill(warm.pid, signal.SIGKILL)
        assert first.wait() == 0 and runs[0].results()["imported_by"] == warm.pid
        assert run_all(runs, 1, lambda run: "", warm=warm) == {}
    assert runs[1].results()["imported_by"] != warm.pid


def test_a_comparison_that_was_killed_is_gone_on_with(scripts, tmp_path):
    (run,) = make_runs(tmp_path, "no --sleep 60")
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
from pathlib import Path
from comparison import queue
from comparison.warm import WarmProcess
queue.SCRIPTS = Path({str(scripts)!r})
queue.Run.is_ours, queue.modules_of = True, lambda *_: ["slow_import"]
run = queue.Run("t", "a", 0, "script.py", {run.arguments!r}, Path({str(run.folder)!r}))
with WarmProcess(queue.environment(1), queue.SCRIPTS) as warm:
    queue.run_all([run], 1, lambda run: "", warm=warm)
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    for number, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, env=environ)
        wait_for(run.output.exists)
        pid = json.loads((run.folder / "run.json").read_text())["pid"]
        process.send_signal(number)
        assert process.wait(30) == status
        if number == signal.SIGTERM:
            wait_for(lambda pid=pid: not psutil.pid_exists(pid))
            for path in (run.output, run.folder / "run.json"):
                path.rmdir() if path.is_dir() else path.unlink()
    assert psutil.pid_exists(pid)  # nobody was left to end it
    again = Run("t", "a", 0, "script.py", ("--end", "no"), run.folder)
    assert run_all([again], 1, lambda run: "") == {}
    assert not psutil.pid_exists(pid) and again.results()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def test_the_warm_process_has_started_no_work_with_tensors():
    """Forks of a process in which OpenMP has threads would wait for them for ever."""
    program = f"""
import os, sys
sys.path.insert(0, {str(SCRIPTS)!r})
from comparison import warm_server
warm_server.load(["run_glue"])
import torch
assert "run_glue" in sys.modules and not torch.cuda.is_initialized()
names = [open(f"/proc/self/task/{{task}}/comm").read().strip() for task in os.listdir("/proc/self/task")]
assert len([name for name in names if name != "jemalloc_bg_thd"]) == 1, names  # pyarrow's, which expects forks
torch.set_num_threads(2)
pid = os.fork()
if pid == 0:
    product = torch.ones(512, 512) @ torch.ones(512, 512)  # in two threads
    os._exit(int(product[0, 0]) % 256 + 7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=120)
    assert done.stdout == "7\n", done.stderr


def test_modules_of_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "xlm-roberta"}')
    model = "transformers.models.xlm_roberta.modeling_xlm_roberta"
    assert model in modules_of("run_glue.py", [f"--model_name_or_path={tmp_path}"])
    assert model in modules_of("run_glue.py", ["--do_train", "--model_name_or_path", str(tmp_path)])
    assert modules_of("run_ner.py", ["--model_name_or_path", "bert-base-cased"])[0] == "run_ner"
    assert Path(SCRIPTS, "run_ner.py").is_file()
