"""Two processes (DDP over gloo) give the loss, the logs and the gradients of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_worker import run

TESTS = Path(__file__).parent


def test_two_processes_equal_one(tmp_path):
    output = tmp_path / "logs.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    subprocess.run(
        [*launch, "--rdzv_endpoint", "127.0.0.1:0", TESTS / "distributed_worker.py", output],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
        check=True,
        timeout=300,
    )
    *cases, (_, with_dropout) = json.loads(output.read_text())
    single = {}
    for (head, alpha, size, steps, economies), logs in cases:
        key = head, alpha, *economies
        if key not in single:
            single[key] = run(head, alpha, 16, 1, **economies)
        for ours, expected in zip(logs, single[key], strict=True):
            assert ours == pytest.approx(expected, rel=2e-5, abs=1e-6), (key, size, steps)
    for loss, ce, kl, _ in with_dropout:
        assert kl > 1e-3 and loss == pytest.approx(ce + 2.0 / 2 * kl, rel=1e-5)
