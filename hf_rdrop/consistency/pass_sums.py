"""Sum up the passes over one batch, without keeping them, to measure consistency."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import compute_dtype
from ..objective.heads import Head


class PassSums:
    """The passes over one batch: with dropout off first, then those with dropout, added one by one.

    Held are a fixed number of tensors `[N, C]`, for N items that count and C classes (2 per label of a multi-label
    head, 1 for regression), and of each pass a loss and a choice per item. The mean of ``sKL(P_i, P_j)`` over all
    pairs has, with ``P`` the model with dropout off, ``d_i = p_i - p`` and ``u_i = log p_i - log p``, the closed form

        [n sum_i d_i · u_i - (sum_i d_i) · (sum_i u_i)] / (n (n - 1))

    and ``sKL(P_i, P) = 1/2 d_i · u_i``. It is written in differences from P, because the probabilities of similar
    sub-models would cancel to rounding. For regression p is the prediction and "log p" twice it, so that 1/2 d · u is
    the squared difference. Labels `[B, ...]` are shifted for heads that predict the next token.
    """

    def __init__(self, head: Head, labels: Tensor, logits: Tensor) -> None:
        self.problem_type, self.mask, self.labels = head.problem_type, head.mask, labels
        self.off, self.log_off = self._probabilities(logits)  # [N, C]
        # loss = -sum_k weights * log p[columns]: one column for a class, both of a Bernoulli (its target from 0 to 1)
        if head.mask is not None:
            self.targets = labels[head.mask]
            self.columns, self.weights = self.targets[:, None], torch.ones_like(self.off[:, :1])
        else:
            self.targets = labels.reshape(-1).to(self.off)
            self.columns = torch.arange(self.off.shape[1], device=self.off.device).expand_as(self.off)
            self.weights = torch.stack((1 - self.targets, self.targets), 1)
        self.sum_p, self.sum_u = torch.zeros_like(self.off), torch.zeros_like(self.off)  # of p_i, of u_i
        self.sum_divergence = torch.zeros_like(self.off[:, 0])
        self.log_sum_target = torch.full_like(self.columns, -torch.inf, dtype=self.off.dtype)
        self.choices = [self._choose(self.off)]  # [N] each, as all in these lists
        self.losses = [self._loss(self.off, self.log_off.gather(1, self.columns))]
        self.ensemble_choices: list[Tensor] = []
        self.ensemble_losses: list[Tensor] = []
        self.ensemble_divergences: list[Tensor] = []

    def _probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return p and log p, `[N, C]`."""
        dtype = compute_dtype(logits)
        if self.mask is not None:
            log_p = torch.log_softmax(logits[self.mask], -1, dtype=dtype)
            return log_p.exp(), log_p
        values = logits.reshape(-1).to(dtype)
        if self.problem_type == "regression":
            return values[:, None], 2 * values[:, None]
        log_p = torch.stack((F.logsigmoid(-values), F.logsigmoid(values)), 1)
        return log_p.exp(), log_p

    def _loss(self, p: Tensor, log_target: Tensor) -> Tensor:
        if self.problem_type == "regression":
            return (p[:, 0] - self.targets).square()
        return -torch.where(self.weights == 0, 0, self.weights * log_target).sum(1)

    def _choose(self, p: Tensor) -> Tensor:
        return p[:, 0] if self.problem_type == "regression" else p.argmax(1)

    def add(self, logits: Tensor) -> None:
        """Add a pass with dropout."""
        p, log_p = self._probabilities(logits)
        log_target = log_p.gather(1, self.columns)
        self.choices.append(self._choose(p))
        self.losses.append(self._loss(p, log_target))
        self.sum_p += p
        u = log_p.sub_(self.log_off)
        self.sum_u += u
        self.sum_divergence += _product(p - self.off, u)
        del p, log_p, u

        n = len(self.losses) - 1
        mean = self.sum_p / n
        self.ensemble_choices.append(self._choose(mean))
        # In logarithms, because the mean probability of the right class may be below the smallest float.
        self.log_sum_target = torch.logaddexp(self.log_sum_target, log_target)
        self.ensemble_losses.append(self._loss(mean, self.log_sum_target - math.log(n)))
        u = 2 * (mean - self.off) if self.problem_type == "regression" else mean.log().sub_(self.log_off)
        self.ensemble_divergences.append(_product(mean - self.off, u) / 2)

    def sums(self) -> Tensor:
        """Return `[5 n + 4]` sums over the items, in float64.

        In this order: divergence between the passes, and from dropout off; losses, then hits, of dropout off, the n
        passes and the n ensembles; divergences of the n ensembles.
        """
        n = len(self.losses) - 1
        shift = _product(self.sum_p - n * self.off, self.sum_u)
        between = (n * self.sum_divergence - shift) / (n * (n - 1))
        between = torch.where(self.sum_divergence.isinf(), self.sum_divergence, between)
        rows = [between, self.sum_divergence / (2 * n), *self.losses, *self.ensemble_losses]
        right = self.targets > 0.5 if self.problem_type == "multi_label_classification" else self.targets
        rows += [(choice == right).to(between) for choice in (*self.choices, *self.ensemble_choices)]
        return torch.stack([*rows, *self.ensemble_divergences]).cpu().double().sum(1)

    def predictions(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the predictions of dropout off, passes and ensembles, `[2 n + 1, *labels.shape]`, and the labels."""
        chosen = torch.stack((*self.choices, *self.ensemble_choices))
        if self.mask is None:
            chosen = chosen.reshape(len(chosen), *self.labels.shape)
        else:
            chosen = chosen.new_full((len(chosen), *self.labels.shape), -100).masked_scatter_(self.mask, chosen)
        return chosen.cpu().numpy(), self.labels[None].cpu().numpy()


def _product(d: Tensor, u: Tensor) -> Tensor:
    """Compute d · u per item, 0 for a class whose probabilities are both 0 (masked with -inf) or underflow."""
    return torch.where(d.abs() < torch.finfo(d.dtype).tiny, 0, d * u).sum(1)
