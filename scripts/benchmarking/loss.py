"""Loss stage of the benchmark: from hidden states to R-Drop's loss and its gradients, in three ways."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarking.measure import Arm
from hf_rdrop.functional import softmax_agreement
from hf_rdrop.fused import linear_rdrop_loss

OFFICIAL, CLOSED_FORM, FUSED = "official", "closed form", "fused"
# Peak of the official formula, in fp32 copies of the logits of both passes: to know beforehand what fits.
OFFICIAL_COPIES = 7
# Largest relative difference between the arms that rounding explains, by dtype.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}


def official_kl(first: Tensor, second: Tensor, ignored: Tensor | None = None) -> Tensor:
    """Compute the agreement as R-Drop's authors publish it: two `kl_div` calls on full logits, mean over items."""
    there = F.kl_div(F.log_softmax(first, dim=-1), F.softmax(second, dim=-1), reduction="none")
    back = F.kl_div(F.log_softmax(second, dim=-1), F.softmax(first, dim=-1), reduction="none")
    items = there[..., 0].numel()
    if ignored is not None:
        there.masked_fill_(ignored.unsqueeze(-1), 0.0)
        back.masked_fill_(ignored.unsqueeze(-1), 0.0)
        items = (~ignored).sum().clamp(min=1)
    return (there.sum() + back.sum()) / 2 / items


def loss_arms(
    rows: int, vocab: int, width: int, alpha: float, device: torch.device, dtype: torch.dtype, seed: int
) -> list[Arm]:
    """From hidden states `[2N, D]` and a head's weight `[V, D]` to the loss and both gradients.

    The second pass is the first with a tenth of noise, as dropout makes it. No label is ignored, which would be to the
    advantage of the fused head (it leaves such rows out, the other arms do not).
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(rows, width, generator=generator)
    second = first + 0.1 * torch.randn(rows, width, generator=generator)
    hidden = torch.cat((first, second)).to(device, dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).mul_(width**-0.5).to(device, dtype).requires_grad_()
    labels = torch.randint(vocab, (rows,), generator=generator).to(device)
    twice = labels.repeat(2)

    def official() -> Tensor:
        logits = F.linear(hidden, weight).float()
        return F.cross_entropy(logits, twice) + alpha / 2 * official_kl(*logits.chunk(2))

    def closed_form() -> Tensor:
        logits = F.linear(hidden, weight)
        return F.cross_entropy(logits.float(), twice) + alpha / 2 * softmax_agreement(logits.unflatten(0, (2, -1)))

    def fused() -> Tensor:
        return linear_rdrop_loss(hidden, weight, labels, alpha=alpha).loss

    def step(formula: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            loss = formula()
            return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

        return run

    formulas = {OFFICIAL: official, CLOSED_FORM: closed_form, FUSED: fused}
    return [Arm(name, step(formula)) for name, formula in formulas.items()]


def loss_differences(arms: Sequence[Arm]) -> dict[str, float]:
    """Largest relative difference of an arm's loss and gradients (by norm) from those of the official formula."""
    reference, *others = [[result.float() for result in arm.run()] for arm in arms]
    names = ("loss", "hidden gradient", "weight gradient")
    return {
        name: max(float((other[i] - reference[i]).norm() / reference[i].norm()) for other in others)
        for i, name in enumerate(names)
    }
