"""Run each piece of work in a child process forked from this one: a crash or a hang takes that piece only."""

import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Work = TypeVar("Work")
MEMORY = 8 << 30  # bytes of address space; a model that is not tiny must not take the machine down


@dataclass
class _Child:
    work: Any
    pid: int
    pipe: int
    started: float
    answer: bytes = b""


def run_each(
    works: Sequence[Work], run: Callable[[Work], Any], *, jobs: int = 1, limit: float = 60.0
) -> Iterator[tuple[Work, Any, str | None, float]]:
    """Run `run(work)` for each work, `jobs` at a time.

    What this process has imported is there in every child, so a child takes only the time of its own work.

    Args:
        works: what is to be done.
        run: returns what JSON can hold.
        jobs: how many children at a time.
        limit: seconds after which a child is killed.

    Yields:
        In the order in which they end: the work, its answer, why there is none (or None), and its seconds.
    """
    waiting, running = list(works)[::-1], dict[int, _Child]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                child = _start(waiting.pop(), run)
                running[child.pipe] = child
            ready = select.select(list(running), [], [], 0.2)[0]
            for pipe in ready:
                child = running[pipe]
                if part := os.read(pipe, 1 << 16):
                    child.answer += part
                    continue
                del running[pipe]
                yield (child.work, *_end(child, None), time.monotonic() - child.started)
            for pipe, child in list(running.items()):
                if time.monotonic() - child.started > limit:
                    del running[pipe]
                    os.kill(child.pid, signal.SIGKILL)
                    yield (child.work, *_end(child, f"no end after {limit:g} s"), limit)
    finally:
        for child in running.values():
            os.kill(child.pid, signal.SIGKILL)
            _end(child, "given up")


def _start(work: Any, run: Callable[[Any], Any]) -> _Child:
    out, into = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(into)
        return _Child(work, pid, out, time.monotonic())
    status = 1
    try:
        os.close(out)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        answer = json.dumps(run(work)).encode()
        with os.fdopen(into, "wb") as pipe:
            pipe.write(answer)
        status = 0
    finally:
        os._exit(status)  # nothing of the parent's is to be closed or flushed twice


def _end(child: _Child, why: str | None) -> tuple[Any, str | None]:
    os.close(child.pipe)
    status = os.waitpid(child.pid, 0)[1]
    if why is not None:
        return None, why
    if status or not child.answer:
        code = os.waitstatus_to_exitcode(status)
        return None, f"the process ended with {signal.Signals(-code).name if code < 0 else code}"
    return json.loads(child.answer), None
