"""Put a model into evaluation for a moment."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Put every module back into training or evaluation mode afterwards, as it was (a frozen one may be in eval)."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Evaluate within the block; afterwards every module has its own mode back."""
    with modes_restored(model):
        model.eval()
        yield
