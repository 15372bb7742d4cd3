"""Running many training runs, each in a process of its own: several at once, with progress, and never twice."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from comparison.devices import visible_gpus
from comparison.warm import ForkedRun, WarmProcess, modules_of
from finetuning.command_line import STATUS
from finetuning.results import LAST_RESULT_FILE, read_json, write_json

SCRIPTS = Path(__file__).resolve().parents[1]
Started = subprocess.Popen | ForkedRun
RUN_FILE = "run.json"  # beside a run's output folder: what was started there


@dataclass(frozen=True)
class Run:
    """One training run: a script with its arguments, for one task, arm and seed.

    $VARIABLES in the arguments are replaced when the run starts, so that results can be told without local paths.
    """

    task: str
    arm: str
    seed: int
    script: str
    arguments: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.task} / {self.arm} / seed {self.seed}"

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def is_ours(self) -> bool:
        """Whether the script is one of this folder."""
        return (SCRIPTS / self.script).resolve().parent == Path(__file__).resolve().parents[1]

    @property
    def command(self) -> list[str]:
        fixed = ["--seed", str(self.seed), "--output_dir", str(self.output)]
        return [sys.executable, str(SCRIPTS / self.script), *map(os.path.expandvars, self.arguments), *fixed]

    def check(self) -> None:
        """Refuse to mix with another run.

        Raises:
            ValueError: the folder holds a run with other arguments.
        """
        started = read_json(self.folder / RUN_FILE).get("command")
        if started is not None and started[1:] != self.command[2:]:  # without the path of the script
            raise ValueError(
                f"{self.folder} holds a run with other arguments, which would be mixed with this comparison's. Give "
                "the arguments it was started with, or choose another --output_dir."
            )

    def results(self) -> dict[str, Any]:
        """The metrics of the finished run, or nothing while there are none."""
        return read_json(self.output / LAST_RESULT_FILE)

    def history(self) -> list[dict[str, Any]]:
        """The finished run's log lines of training steps."""
        lines = read_json(self.output / "trainer_state.json").get("log_history", [])
        return [line for line in lines if "loss" in line]

    def drop_weights(self) -> None:
        """Delete the finished run's model: the figures are what a comparison is for, and the models many."""
        for pattern in ("*.safetensors", "*.bin", "*.safetensors.index.json"):
            for file in self.output.glob(pattern):
                file.unlink()


def run_all(
    runs: Sequence[Run],
    jobs: int,
    describe: Callable[[Run], str],
    console: Console | None = None,
    keep_models: bool = False,
    warm: WarmProcess | None = None,
) -> dict[Run, str]:
    """Run what has not finished yet; returns the reason of each run that failed.

    A run that was killed is started anew; one that finished with the same arguments is taken as it is.

    Args:
        runs: in the order in which to start them.
        jobs: how many at once; the cores are divided among them, and so are the GPUs when there are several.
        describe: a line about a finished run.
        console: where to show progress.
        keep_models: whether to keep the trained weights of finished runs.
        warm: process to start our own scripts from, made with `environment`; without it each is started afresh.
    """
    failed: dict[Run, str] = {}
    processes: set[Started] = set()
    ending = Event()
    waiting = [run for run in runs if not run.results()]
    if warm is not None:
        warm.load(sorted({name for run in waiting if run.is_ours for name in modules_of(run.script, run.command)}))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("Training", total=len(runs), completed=len(runs) - len(waiting))
        with ThreadPoolExecutor(jobs) as pool:
            slots: SimpleQueue[int] = SimpleQueue()
            for slot in range(jobs):
                slots.put(slot)
            previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(STATUS))  # so that the children are ended too
            try:
                futures = {pool.submit(_run, run, jobs, slots, processes, ending, warm): run for run in waiting}
                for future in _as_completed(futures):
                    run = futures[future]
                    if (reason := future.result()) is not None:
                        failed[run] = reason
                    elif not keep_models:
                        run.drop_weights()
                    progress.console.print(f"{run.name}: {'FAILED' if reason else describe(run)}", highlight=False)
                    progress.advance(bar)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                ending.set()
                for process in tuple(processes):
                    _end(process)
                progress.console.print("Ended. Started again with the same arguments, it goes on with what is left.")
                raise
            finally:
                signal.signal(signal.SIGTERM, previous)
    return failed


def _as_completed(futures: Iterable[Future[Any]]) -> Iterator[Future[Any]]:
    """Do as `concurrent.futures` does, but see a signal that comes just before a wait within a second."""
    left = set(futures)
    while left:
        done, left = wait(left, timeout=1, return_when=FIRST_COMPLETED)
        yield from done


def environment(jobs: int) -> dict[str, str]:
    """The variables of a run's process, when `jobs` of them share the cores."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return env | {"PYTHONUNBUFFERED": "1"}  # the log shows how far the run is


def _end(process: Started) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.killpg(process.pid, signal.SIGTERM)


def _run(
    run: Run,
    jobs: int,
    slots: "SimpleQueue[int]",
    processes: set[Started],
    ending: Event,
    warm: WarmProcess | None,
) -> str | None:
    """Run one process to its end; returns None, or why it failed."""
    _end_orphan(run)
    if run.output.exists():
        shutil.rmtree(run.output)  # what a killed run of ours has left
    run.folder.mkdir(parents=True, exist_ok=True)
    env, slot, gpus = environment(jobs), slots.get(), visible_gpus()
    if len(gpus) > 1:
        env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    log = run.folder / "log.txt"
    started = time.monotonic()
    process = warm.start(run.command[1:], log) if warm is not None and run.is_ours else None
    if process is None:
        with log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(run.command, stdout=stream, stderr=stream, env=env, start_new_session=True)
    processes.add(process)
    if ending.is_set():  # since this run was taken from the queue
        _end(process)
    record = {"command": run.command[1:], "pid": process.pid}
    with suppress(psutil.NoSuchProcess):  # it has just ended
        record["created"] = psutil.Process(process.pid).create_time()
    write_json(run.folder / RUN_FILE, record)
    status = process.wait()
    processes.discard(process)
    slots.put(slot)
    if status == 0 and run.results():
        write_json(run.folder / RUN_FILE, {"command": run.command[1:], "seconds": time.monotonic() - started})
        return None
    last = "\n".join(log.read_text("utf-8", errors="replace").strip().splitlines()[-3:])
    return f"exit status {status}; the end of {log}:\n{last}"


def _end_orphan(run: Run) -> None:
    """End the process of this run that a killed comparison has left behind: both would write into one folder."""
    started = read_json(run.folder / RUN_FILE)
    try:
        orphan = psutil.Process(started["pid"])
        # A fork has the command line of the warm process, so the time of its start tells it.
        if started.get("created") == orphan.create_time() or orphan.cmdline()[1:] == started["command"]:
            orphan.kill()
            orphan.wait(60)
    except (KeyError, psutil.NoSuchProcess, psutil.AccessDenied):
        pass
