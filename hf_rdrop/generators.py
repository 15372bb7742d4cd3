"""Seed, share out and restore the random numbers that models draw: Python's, NumPy's (SpecAugment) and torch's."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


def remember_generators(model: nn.Module) -> Callable[[], None]:
    """Remember the state of every generator that a model may draw from; the function returned puts it back."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore() -> None:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
        for device, state in on_gpus.items():
            torch.cuda.set_rng_state(state, device)

    return restore


@contextmanager
def generators_restored(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Put every generator back to its state at the end of the block; with a seed, begin the block with it."""
    restore = remember_generators(model)
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            if any(parameter.is_cuda for parameter in model.parameters()):
                torch.cuda.manual_seed_all(seed)
        yield
    finally:
        restore()


@contextmanager
def undisturbed(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Put random numbers (`generators_restored`) and the model's buffers, such as running statistics, back."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with generators_restored(model, seed):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def draw_own_masks(rank: int, device: torch.device) -> None:
    """Give process `rank`, of those with different rows, random numbers of its own for dropout and SpecAugment.

    Trainer gives every process the same seed, so that all would drop the same places of their batches. Rank 0 keeps
    its streams. Python's stream stays the same everywhere, and on a GPU the CPU's too: the order of the data and
    LayerDrop, on which all must agree, may come from them.

    Args:
        rank: of the process.
        device: on which the model draws.
    """
    if rank > 0:
        seed = (torch.initial_seed() + rank * 0x9E3779B97F4A7C15) % 2**63  # far from the seed of any other run
        generator: Any = torch.default_generator if device.type == "cpu" else getattr(torch, device.type)
        generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
