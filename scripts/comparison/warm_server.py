"""Program of the warm process: it imports what runs need, once, and forks for each of them.

It does no work with tensors: a thread pool that was started before a fork is not there after it, and OpenMP would wait
for it for ever. Started by `comparison.warm`, which is told of every end; lines of JSON go both ways.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from typing import Any


def load(names: list[str]) -> None:
    """Import modules; one that cannot be imported is left to the runs, which will say why."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or the first collection of every run would copy the pages of all of this


def become(request: dict[str, Any], ready: int) -> list[str]:
    """Make this forked process what a fresh one would be; returns the command line of the run."""
    os.setsid()
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.write(ready, b"1")
    os.close(ready)
    return request["command"]


def start(request: dict[str, Any], channel: socket.socket, others: tuple[int, ...]) -> tuple[list[str], int | None]:
    """Fork for a run; returns its command line in the new process, and its pid in this one (None: it cannot fork)."""
    heard, ready = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        os.close(heard)
        os.close(ready)
        return [], None
    if pid == 0:
        signal.set_wakeup_fd(-1)
        channel.close()
        for descriptor in (heard, *others):
            os.close(descriptor)
        return become(request, ready), 0
    os.close(ready)
    os.read(heard, 1)  # until it has a session of its own, by which it can be ended
    os.close(heard)
    return [], pid


def serve(channel: socket.socket) -> list[str]:
    """Answer requests until the other side is gone; returns nothing then, and in a forked process its command line."""
    woken, wake = os.pipe()
    for descriptor in (woken, wake):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, int] = {}
    buffer = b""
    while True:
        readable, _, _ = select.select([channel, woken], [], [])
        if woken in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                tell(channel, id=running.pop(pid), status=os.waitstatus_to_exitcode(status))
        if channel not in readable:
            continue
        if not (received := channel.recv(65536)):
            return []  # runs that are left go on, as they would without this process
        *lines, buffer = (buffer + received).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if "load" in request:
                load(request["load"])
                continue
            command, pid = start(request, channel, (woken, wake))
            if pid == 0:
                return command
            if pid is not None:
                running[pid] = request["id"]
            tell(channel, id=request["id"], pid=pid)


def tell(channel: socket.socket, **message: Any) -> None:
    """Send a line; that nobody is there to read it is seen at the next one received."""
    with contextlib.suppress(BrokenPipeError):
        channel.sendall(json.dumps(message).encode() + b"\n")


def main() -> None:
    """Serve, and in a forked process run the script as `python script.py` would."""
    sys.path[0] = sys.argv[2]
    command = serve(socket.socket(fileno=int(sys.argv[1])))
    if command:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
