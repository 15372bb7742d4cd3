"""Exactness of the agreement and its gradient for logits in half precision, as the passes come to agree.

`p - q` cancels then: what is left of a difference that was rounded before is mostly rounding.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarking.loss import official_kl
from hf_rdrop.functional import symmetric_kl

LOW, FLOAT32, OURS = "official, the logits' precision", "official, float32", "ours"
DTYPES = ("bfloat16", "float16")
CLASSES = (3, 1000)
TARGETS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # sKL in nats, before the logits are rounded
ROWS = 1024
LOSS_SCALE = 2.0**15  # the largest that float16 holds; without one its gradients underflow, whoever computes them


def make_logits(dtype: str, classes: int, target: float, seed: int) -> tuple[Tensor, Tensor]:
    """Logits `[ROWS, classes]` of two passes whose symmetric KL is `target` before they are rounded to the dtype."""
    generator = torch.Generator().manual_seed(seed)
    first, difference = torch.randn(2, ROWS, classes, generator=generator, dtype=torch.float64)
    scale = target**0.5
    for _ in range(50):  # the KL is nearly quadratic in the scale
        scale *= (target / official_kl(first, first + scale * difference).item()) ** 0.5
    return first.to(getattr(torch, dtype)), (first + scale * difference).to(getattr(torch, dtype))


def precision_errors(dtype: str, classes: int, target: float, seed: int = 0) -> dict[str, dict[str, float]]:
    """Relative errors of value and gradient (by norm) beside float64's for the same logits; and that KL.

    The gradient arrives in the logits' own precision, whose rounding alone is 0.17% in bfloat16 and 0.02% in float16.
    """
    first, second = make_logits(dtype, classes, target, seed)
    exact, exact_gradient = _with_gradient(lambda a, b: official_kl(a.double(), b.double()), first.double(), second)
    formulas = {
        LOW: official_kl,
        FLOAT32: lambda a, b: official_kl(a.float(), b.float()),
        OURS: symmetric_kl,
    }
    found: dict[str, dict[str, float]] = {"kl": {"exact": exact}}
    for name, formula in formulas.items():
        value, gradient = _with_gradient(formula, first, second)
        error = (gradient - exact_gradient).norm() / exact_gradient.norm()
        found[name] = {"value": abs(value - exact) / exact, "gradient": error.item()}
    return found


def _with_gradient(formula: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> tuple[float, Tensor]:
    leaf = first.detach().clone().requires_grad_()
    value = formula(leaf, second)
    (value.double() * LOSS_SCALE).backward()
    return value.item(), leaf.grad.double() / LOSS_SCALE
