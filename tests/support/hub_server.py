"""A loopback Hub for the tests: serves `hub_api.py` on 127.0.0.1, with a record of requests and faults on demand.

    with Hub() as hub:
        HfApi(endpoint=hub.url, token=hub.token).create_repo("tester/model")

The client reads its settings from the environment when it is imported. A process that is yet to start gets
`environment(hub, home)`; where `huggingface_hub` is imported already, `use_hub` sets the same values in the place that
the client looks them up at every call.

There is no Xet here, and the client does not ask whether there is: with `hf_xet` installed it uploads over Xet only.
Both therefore set HF_HUB_DISABLE_XET, which leaves the client's plain LFS path.
"""

import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import huggingface_hub
import pytest
import transformers

from support.hub_api import HubApi, Refusal, Reply


@dataclass
class Fault:
    """What goes wrong at the next `times` requests whose "METHOD /path" the pattern is found in."""

    pattern: str
    times: int
    status: int | None
    retry_after: int | None
    cut_after: int | None


class Request(NamedTuple):
    """One request; status 0: the connection was cut."""

    method: str
    path: str
    status: int


class Hub(HubApi):
    """The server, from the start of the `with` block to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault(
        self,
        pattern: str,
        times: int = 1,
        status: int | None = None,
        retry_after: int | None = None,
        cut_after: int | None = None,
    ) -> None:
        """Answer with `status` (and Retry-After in seconds), or cut the connection after `cut_after` bytes.

        The bytes are those of the request's body if it has one, otherwise of the answer's.
        """
        with self.lock:
            self.faults.append(Fault(pattern, times, status, retry_after, cut_after))

    def next_fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None

    def count(self, pattern: str) -> int:
        """How many requests "METHOD /path status" the pattern is found in."""
        return sum(bool(re.search(pattern, " ".join(map(str, request)))) for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    """Reads a request, asks the Hub, writes the reply."""

    protocol_version = "HTTP/1.1"
    timeout = 30
    disable_nagle_algorithm = True  # the head and the body are two writes
    hub: Hub

    def do_GET(self) -> None:
        fault = self.hub.next_fault(f"{self.command} {self.path}")
        sent = fault.cut_after if fault else None
        body = self.read_body(cut_after=sent)
        if body is None:
            return self.cut()
        try:
            if fault and fault.status:
                wait = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                raise Refusal(fault.status, "A fault of the test", **wait)
            reply = self.hub.answer(self.command, self.path, self.headers, body)
        except Refusal as refusal:
            reply = Reply({"error": str(refusal)}, refusal.headers, refusal.status)
        data = reply.data()
        self.record(reply.status if sent is None else 0)
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])
        if sent is not None:
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def read_body(self, cut_after: int | None) -> bytes | None:
        """The request's body, or None where a fault ends the reading first."""
        parts, left = [], cut_after
        for size in self.chunk_sizes():
            part = self.rfile.read(size if left is None else min(size, left))
            if left is not None and len(part) >= left:
                return None
            left = left if left is None else left - len(part)
            parts.append(part)
        return b"".join(parts)

    def chunk_sizes(self) -> Iterator[int]:
        """The lengths of the body's pieces, each to be read before the next is asked for."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield int(self.headers.get("Content-Length") or 0)
            return
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield size
            self.rfile.readline()
        self.rfile.readline()

    def cut(self) -> None:
        """End the connection as a broken line does: a reset, not an orderly close."""
        self.record(0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def record(self, status: int) -> None:
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, status))

    def log_message(self, *_: object) -> None:
        pass


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a process that is to use the server, with the client's files in `home`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {
        **inherited,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": hub.token,
    }


def run_program(hub: Hub, folder: Path, program: str) -> None:
    """Run a Python program in a new process, and in a folder, that uses the server; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(hub, folder / "home"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def use_hub(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Point the client of this process to the server; returns the seconds it would have waited between its retries."""
    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": str(home / "token"),
    }
    for name, value in values.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    # The only places that keep an end point from before: the instances behind `huggingface_hub.create_repo` and its
    # like, and behind the Trainer's uploads (newer transformers).
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # PEFT asks the environment
    waits: list[float] = []
    clock = SimpleNamespace(sleep=waits.append, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", clock)
    return waits
