"""Measure the fused loss beside its floor, the three matrix products alone; prints a table of ratios.

    python scripts/benchmarking/floor.py --repeats 9

Loss and gradients of two passes of `--rows` rows each, from hidden states and the weight of the head, on a CPU.
Processor seconds of this process, interleaved, medians. `--before` names another checkout, whose `linear_rdrop_loss`
is measured in the same turns.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_rdrop.fused import linear_rdrop_loss
from hf_rdrop.fused.linear import default_chunk_bytes


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="of one pass")
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--before", type=Path, help="an earlier checkout")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    losses = {"now": linear_rdrop_loss} | ({"before": _loss_of(args.before)} if args.before else {})
    print("| precision | " + " | ".join(f"{name} / floor" for name in losses) + " |")
    print("| --- " * (len(losses) + 1) + "|")
    for dtype in (torch.float32, torch.bfloat16):
        found = measure(losses, dtype, args)
        print(f"| {str(dtype).removeprefix('torch.')} | " + " | ".join(f"{ratio:.2f}" for ratio in found) + " |")


def measure(losses: dict[str, Callable[..., Any]], dtype: torch.dtype, args: argparse.Namespace) -> list[float]:
    """Return for each loss its processor seconds over those of the matrix products."""
    torch.manual_seed(0)
    hidden = torch.randn(2 * args.rows, args.width).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(args.vocab_size, args.width)).to(dtype).requires_grad_()
    labels = torch.randint(args.vocab_size, (args.rows,))

    def fused(loss: Callable[..., Any]) -> None:
        torch.autograd.grad(loss(hidden, weight, labels, alpha=5.0).loss, (hidden, weight))

    ways = [lambda: products(hidden.detach(), weight.detach()), *(lambda f=f: fused(f) for f in losses.values())]
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(args.repeats + 1):
        for way, kept in zip(ways, seconds, strict=True):
            start = time.process_time()
            way()
            if turn:  # the first one warms up
                kept.append(time.process_time() - start)
    floor, *rest = map(statistics.median, seconds)
    return [value / floor for value in rest]


def products(hidden: Tensor, weight: Tensor) -> None:
    """Multiply as the loss does: logits, gradient of the hidden states, gradient of the weight, in its chunks."""
    rows = max(1, default_chunk_bytes(weight.numel()) // (len(weight) * weight.itemsize))
    for h in hidden.split(rows):
        logits = h @ weight.T
        logits @ weight
        logits.T @ h


def _loss_of(checkout: Path) -> Callable[..., Any]:
    """Load the fused loss of another checkout, under another name."""
    spec = importlib.util.spec_from_file_location("before", checkout / "hf_rdrop" / "__init__.py")
    assert spec is not None and spec.loader is not None
    spec.submodule_search_locations = [str(checkout / "hf_rdrop")]
    sys.modules["before"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["before"])
    return importlib.import_module("before.fused").linear_rdrop_loss


if __name__ == "__main__":
    main()
