"""FSDP2 on two processes gives the loss and the gradients of one process; launched with the configuration we ship."""

import inspect
from functools import cache

import pytest
from accelerate.utils import FullyShardedDataParallelPlugin

from support.distributed_worker import run
from support.fsdp_worker import PARTS
from support.processes import assert_same, launch, launcher
from support.settings import HEADS, TINY

pytestmark = pytest.mark.skipif(
    "fsdp_version" not in inspect.signature(FullyShardedDataParallelPlugin).parameters,
    reason="this version of accelerate has no FSDP2",
)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    @cache
    def run_part(part):
        output = tmp_path_factory.mktemp("fsdp") / "found.pt"
        return launch("fsdp_worker.py", output, part, launcher=launcher("fsdp2.yaml", "--mixed_precision", "no"))

    return run_part


def name_of(case):
    head, config, option, split, checkpointing = case
    names = [head, *(f"{name}={value}" for name, value in config.items()), option, "x".join(map(str, split))]
    return "-".join([*names, *["checkpointing"] * checkpointing])


@pytest.mark.parametrize(
    ("part", "case"),
    [
        pytest.param(part, case, id=name_of(case), marks=[pytest.mark.slow] if part == "slow" else [])
        for part, cases in PARTS.items()
        for case in cases
    ],
)
def test_sharded_equals_one_process(sharded, part, case):
    head, config, option, *_ = case
    expected = run(head, 16, 1, HEADS[head].model(TINY, **config), option=option)
    (found,) = [result for ran, result in sharded(part) if ran == case]
    assert_same(found, expected)
    assert found["fused"] == expected["fused"] == ("fused head" in option)


@pytest.mark.slow
def test_bfloat16_of_the_configuration(tmp_path):
    """As it is shipped: within the rounding of bfloat16 of float32 on one process."""
    found = launch("fsdp_worker.py", tmp_path / "found.pt", "quick", launcher=launcher("fsdp2.yaml"))
    for (head, config, option, *_), result in found:
        expected = run(head, 16, 1, HEADS[head].model(TINY, **config), option=option)
        assert result["fused"] == expected["fused"]
        for ours, theirs in zip(result["logs"], expected["logs"], strict=True):
            assert ours != theirs
            assert ours == pytest.approx(theirs, rel=0.03, abs=2e-3)
