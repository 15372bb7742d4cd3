"""Measuring arms beside each other: interleaved times, and the peak of the memory that a call adds."""

import gc
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import DeviceType, ProfilerActivity, profile

import accelerate
import hf_rdrop

# A sample shorter than this is repeated inside one reading of the clock: single calls of microseconds are noise.
SAMPLE_SECONDS = 0.05
MATRIX_PRODUCT_KERNELS = ("gemm", "cutlass", "nvjet", "cublas", "xmma", "matmul", "splitk")
MATRIX_PRODUCT_OPERATORS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul")


@dataclass(frozen=True)
class Arm:
    """One way to do the work that is compared.

    Args:
        name: as it stands in the tables.
        run: does the work once.
        steps: training steps in one run (a cycle of rdrop_interval); times are per step.
        settings: what sets this arm apart, for the report.
        prediction: the cost model's `time` and `memory` over the plain arm's, where it has one.
    """

    name: str
    run: Callable[[], Any]
    steps: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    prediction: dict[str, float] = field(default_factory=dict)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Wall-clock seconds of one call, averaged over `calls` calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Largest number of bytes that one call holds at a time, over what was allocated before it.

    On CUDA from the allocator's own counters; on CPU the running sum of every allocation and release, as the profiler
    reports them. What libraries take outside PyTorch's allocator is not seen.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # The events with their order are only in the raw results: `events()` adds them up by operator.
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        live += change.nbytes()
        peak = max(peak, live)
    return peak


def measure(
    arms: Sequence[Arm], repeats: int, device: torch.device, advance: Callable[[str], None] = lambda name: None
) -> dict[str, dict[str, Any]]:
    """Time and memory of every arm.

    Each arm runs once to warm up and once for its memory. Then every repeat times each arm once, in an order that is
    rotated, and turned round every other time, from repeat to repeat: what slows the machine down for a while meets
    all arms, and none always runs behind the same other.

    Args:
        arms: at least one.
        repeats: samples of each arm.
        device: where the arms run.
        advance: called before each sample with the arm's name.

    Returns:
        By arm: `seconds` per step (one value a repeat), `peak_bytes`, `calls` a sample, and the arm's own facts.
    """
    calls = {}
    results: dict[str, dict[str, Any]] = {}
    for arm in arms:
        advance(arm.name)
        once = seconds(arm.run, 1, device)
        calls[arm.name] = min(1000, max(1, math.ceil(SAMPLE_SECONDS / once)))
        facts = {"steps": arm.steps, "settings": arm.settings, "prediction": arm.prediction, "calls": calls[arm.name]}
        results[arm.name] = {"seconds": [], "peak_bytes": peak_bytes(arm.run, device), **facts}
    for repeat in range(repeats):
        shift = repeat % len(arms)
        order = [*arms[shift:], *arms[:shift]][:: -1 if repeat % 2 else 1]
        for arm in order:
            advance(arm.name)
            gc.collect()
            results[arm.name]["seconds"].append(seconds(arm.run, calls[arm.name], device) / arm.steps)
    return results


def elementwise_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time of one call outside its matrix products: of the other kernels on CUDA, of the other operators on CPU."""
    cuda = device.type == "cuda"
    run()  # compiled kernels are there before the profiler starts
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        run()
        synchronize(device)
    total = 0.0
    for event in profiler.key_averages():
        if cuda and event.device_type == DeviceType.CUDA:
            if not any(word in event.key.lower() for word in MATRIX_PRODUCT_KERNELS):
                total += event.self_device_time_total
        elif not cuda and event.key not in MATRIX_PRODUCT_OPERATORS:
            total += event.self_cpu_time_total
    return total / 1e6


def copy_bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Bytes a second that a plain copy of `size` bytes reads and writes: what memory can do at best (of five)."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * size / min(seconds(lambda: target.copy_(source), 1, device) for _ in range(5))


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a measurement depends on besides its arguments."""
    modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "hf_rdrop": hf_rdrop}
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(names, platform.processor() or platform.machine())
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "versions": {"python": platform.python_version(), **{n: m.__version__ for n, m in modules.items()}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "device_type": device.type,
        "cpu_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
    }
