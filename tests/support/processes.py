"""Runs of several processes: starting them, and comparing what they gave."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from support import ROOT

CONFIGS = ROOT / "scripts" / "accelerate"
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def launch(worker, output, *arguments, launcher=TORCHRUN, **environment):
    """Run a worker on two processes; what they saved."""
    command = [sys.executable, "-m", *launcher, ROOT / "tests" / "support" / worker, output, *arguments]
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment, "PYTHONPATH": path}
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    return torch.load(output, weights_only=False)


def assert_same(found, expected, rel=2e-5):
    """Logs and whole gradients of every step."""
    assert len(found["logs"]) == len(expected["logs"]) >= 1
    for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=rel, abs=1e-6)
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert ours.keys() == theirs.keys()
        limit = rel * max(gradient.abs().max() for gradient in theirs.values())
        for name, gradient in theirs.items():
            torch.testing.assert_close(
                ours[name], gradient, rtol=0, atol=float(limit), msg=lambda m, n=name: f"{n}: {m}"
            )


def launcher(config, *more):
    """`accelerate launch` with one of our configurations, as arguments of `python -m`."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # a port that is free (accelerate 1.3 takes no 0 for it)
        port = str(server.getsockname()[1])
    return "accelerate.commands.launch", "--config_file", str(CONFIGS / config), "--main_process_port", port, *more
