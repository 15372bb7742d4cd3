"""How many cases the fuzz tests draw, and drawing tensors.

The same cases in each run. HF_RDROP_FUZZ=40 draws forty times as many: thousands.
"""

import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FACTOR = int(os.environ.get("HF_RDROP_FUZZ", "1"))

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Shapes of the items that are compared: one, none, a few, [batch, positions].
ITEMS = ((), (0,), (1,), (2,), (5,), (2, 3), (3, 1), (2, 0))


def cases(count: int):
    """Settings of a test that draws `count` cases (times HF_RDROP_FUZZ)."""
    return settings(
        max_examples=count * FACTOR,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def normal(draw, *shape, scale: float = 1.0, dtype=torch.float64):
    """Normal numbers from a drawn seed, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def subset(draw, *shape):
    """A random mask: everything, nothing, or some."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    share = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    return torch.rand(shape, generator=generator) < share
