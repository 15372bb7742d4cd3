"""DeepSpeed ZeRO-2 and ZeRO-3 on two processes, launched with our configurations, train as one process does."""

import importlib.util

import pytest
import torch

from support.deepspeed_worker import CASES
from support.distributed_worker import run
from support.processes import launch, launcher
from support.settings import HEADS, TINY


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs `pip install deepspeed`")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_one_process(tmp_path, stage):
    """Logs, and the weights after two steps: DeepSpeed has applied the gradients when the Trainer could show them."""
    how = launcher(f"deepspeed_zero{stage}.yaml", "--mixed_precision", "no")
    found = launch("deepspeed_worker.py", tmp_path / "found.pt", launcher=how, DS_ACCELERATOR="cpu")
    assert [case for case, _ in found] == CASES
    for (head, config, option, _), result in found:
        model = HEADS[head].model(TINY, **config)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        expected = run(head, 16, 1, model, option=option)
        assert result["fused"] == expected["fused"] == ("fused head" in option)
        assert len(result["logs"]) == 2
        for ours, theirs in zip(result["logs"], expected["logs"], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-6)
        after = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert result["weights"].keys() == after.keys()
        moved = max(float((weight - before[name]).abs().max()) for name, weight in after.items())
        assert moved > 1e-4
        for name, weight in after.items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=1e-6, atol=2e-5 * moved)
