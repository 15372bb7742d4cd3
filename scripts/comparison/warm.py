"""Warm process for the runs of a comparison: imports are done once, each run is a fork of it."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil

from comparison.devices import may_have_one

SCRIPTS = Path(__file__).resolve().parents[1]
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # runs have logs of their own
# Not as a file: the folder of this one would come first in sys.path, and hide the standard library's `queue`.
SERVER = f"import sys; sys.path[0] = {str(SCRIPTS)!r}; from comparison.warm_server import main; main()"


def can_fork() -> bool:
    """Tell whether runs can be forks: on Linux without an accelerator, which no process may touch before a fork."""
    return sys.platform == "linux" and not may_have_one()


class ForkedRun:
    """A run that the warm process has started, with the parts of `subprocess.Popen` that the queue needs."""

    def __init__(self, pid: int, told: "SimpleQueue[Any]") -> None:
        self.pid, self._told = pid, told

    def wait(self) -> int:
        """Wait for its end; returns the exit status, that of a signal negative.

        When the warm process has been killed, nobody knows the status: 0 then, so that the results decide.
        """
        status = self._told.get().get("status")
        if status is None:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(self.pid).wait()
            return 0
        return status


class WarmProcess:
    """Process that has imported what runs need, and forks for each of them. A context manager.

    When it has been killed, `start` returns None, and the runs that it has started go on.

    Args:
        env: of the process and so of all runs.
        folder: where modules are looked for, instead of the folder of the program.
    """

    def __init__(self, env: Mapping[str, str], folder: Path = SCRIPTS) -> None:
        self._channel, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", SERVER, str(theirs.fileno()), str(folder)]
            self._process = subprocess.Popen(
                command, env=env, pass_fds=[theirs.fileno()], start_new_session=True, **QUIET
            )
        self.pid = self._process.pid
        self._lock, self._waiting, self._count = threading.Lock(), {}, 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "WarmProcess":
        return self

    def __exit__(self, *_: Any) -> None:
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:  # in the middle of its imports
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._channel.close()

    def load(self, modules: Iterable[str]) -> None:
        """Have modules imported before the next run starts."""
        with suppress(OSError):
            self._send({"load": list(modules)})

    def start(self, command: Sequence[str], log: Path) -> ForkedRun | None:
        """Start a script with its arguments, its output in `log`; returns None when this cannot be done."""
        told: SimpleQueue[Any] = SimpleQueue()
        with self._lock:
            self._count += 1
            number = self._count
            self._waiting[number] = told
        try:
            self._send({"id": number, "command": [str(word) for word in command], "log": str(log)})
        except OSError:
            return None
        if not self._reader.is_alive():
            return None
        pid = told.get().get("pid")
        return None if pid is None else ForkedRun(pid, told)

    def _send(self, request: Mapping[str, Any]) -> None:
        with self._lock:
            self._channel.sendall(json.dumps(request).encode() + b"\n")

    def _read(self) -> None:
        with suppress(OSError), self._channel.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                self._waiting[message["id"]].put(message)
        with self._lock:
            for told in self._waiting.values():
                told.put({})  # nothing more will come
                told.put({})


def modules_of(script: str, arguments: Sequence[str]) -> list[str]:
    """Name the modules that a run of ours imports: its script, its model's, and what draws the model card's curves."""
    found = [script.removesuffix(".py"), "matplotlib.figure", "matplotlib.backends.backend_agg"]
    for before, argument in zip(("", *arguments), arguments, strict=False):
        name, _, value = argument.partition("=")
        folder = value if name == "--model_name_or_path" else argument if before == "--model_name_or_path" else None
        if folder:
            with suppress(OSError, ValueError, KeyError, TypeError):
                kind = json.loads(Path(os.path.expandvars(folder), "config.json").read_text("utf-8"))["model_type"]
                kind = kind.replace("-", "_")
                found.append(f"transformers.models.{kind}.modeling_{kind}")
    return found
