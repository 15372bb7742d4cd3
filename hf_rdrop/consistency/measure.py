"""Compare a model with dropout off with its dropout sub-models and their ensemble.

A network trained with dropout is many sub-models with shared weights. At test time one uses the whole network (weight
averaging) in the hope that it predicts what the sub-models' average would (model averaging).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..batch import get_batch_size, map_tensors
from ..dropout import dropout_off, inspect_dropout, modes_restored
from ..generators import undisturbed
from ..objective.heads import find_labels, find_logits, predicts_next_token, resolve_head, shifted_labels
from .pass_sums import PassSums


@dataclass(frozen=True)
class Score:
    """One score (loss, accuracy, a metric of the caller's) of the model in its three forms.

    Args:
        dropout_off: of the model as one uses it (weight averaging).
        sub_models: of each of the n passes with dropout.
        ensembles: of the mean of the first 1, 2, ..., n passes' probabilities (model averaging).
    """

    dropout_off: float
    sub_models: tuple[float, ...]
    ensembles: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Average over the sub-models."""
        return float(np.mean(self.sub_models))

    @property
    def std(self) -> float:
        """Compute the standard deviation over the sub-models (n - 1 in the denominator)."""
        return float(np.std(self.sub_models, ddof=1))


@dataclass(frozen=True)
class Consistency:
    """Results of [`measure_consistency`].

    Divergences are symmetric KL in nats, ``1/2 sum_c (p_c - q_c)(log p_c - log q_c)``, averaged over the items; for
    multi-label heads of each label's Bernoulli, for regression squared differences of the predictions.

    Args:
        num_samples: n, the number of passes with dropout.
        items: rows, tokens, or labels of multi-label rows that everything is averaged over.
        scores: `"loss"` (mean negative log-likelihood, without label smoothing; for regression the mean squared
            error), `"accuracy"` (share of items; not for regression), and those of `compute_metrics`.
        between_sub_models: mean over all pairs of sub-models.
        to_dropout_off: mean over the sub-models of the divergence from the model with dropout off.
        ensembles_to_dropout_off: divergence of the ensemble of the first 1, 2, ..., n sub-models from it.
    """

    num_samples: int
    items: int
    scores: dict[str, Score]
    between_sub_models: float
    to_dropout_off: float
    ensembles_to_dropout_off: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Convert everything to plain types for a JSON file, the scores with their `mean` and `std`."""
        scores = {name: asdict(score) | {"mean": score.mean, "std": score.std} for name, score in self.scores.items()}
        return asdict(self) | {"scores": scores}

    def metrics(self, prefix: str = "consistency") -> dict[str, float]:
        """Return the single figures, to put among other metrics.

        They are `{prefix}_kl_between`, `_kl_to_off`, `_kl_ensemble` (of all n sub-models to dropout off), and for each
        score `{prefix}_{score}_off`, `_sub` (mean of the sub-models), `_std` and `_ensemble` (of all n).
        """
        found = {
            "kl_between": self.between_sub_models,
            "kl_to_off": self.to_dropout_off,
            "kl_ensemble": self.ensembles_to_dropout_off[-1],
        }
        for name, score in self.scores.items():
            found |= {f"{name}_off": score.dropout_off, f"{name}_sub": score.mean, f"{name}_std": score.std}
            found[f"{name}_ensemble"] = score.ensembles[-1]
        return {f"{prefix}_{name}": value for name, value in found.items()}


def measure_consistency(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    num_samples: int = 8,
    *,
    seed: int = 0,
    compute_metrics: Callable[[np.ndarray, np.ndarray], Mapping[str, float]] | None = None,
) -> Consistency:
    """Compare a model with dropout off with its dropout sub-models and their ensemble, on held-out data.

    Each batch takes 1 + n forwards: dropout off, and n draws of dropout masks (model.train(), but batch norms stay in
    evaluation). Language models are measured per token with the true tokens before it. The logits of a pass are
    dropped before the next one, so memory does not grow with n.

    Modes, buffers and random state (CPU and CUDA) are the caller's again afterwards. For mixed precision call it under
    `torch.autocast`. Probabilities and divergences are in float32 (float64 for a model in float64), sums in float64.

    Args:
        model: any model with one of the supported heads, on the device where it is to run.
        dataloader: batches as the model takes them, with `labels` (or `start_positions` and `end_positions`); on any
            device.
        num_samples: n >= 2.
        seed: of the dropout masks; the same seed gives the same result.
        compute_metrics: further scores, from predictions and labels as NumPy arrays: class indices (0/1 per label for
            multi-label heads, numbers for regression) of shape `[rows]` or `[rows, positions]`, shorter rows filled
            up with -100, labels of causal language models shifted. Called 2 n + 1 times.

    Raises:
        ValueError: num_samples is below 2, nothing in the model is random, or the data hold no labels that count.

    Source: Liang et al. 2021, theoretical analysis (the gap between the sub-models and the whole model).

    Example:
        >>> found = measure_consistency(model, DataLoader(rows, batch_size=32, collate_fn=collator), 16)
        >>> found.scores["accuracy"].dropout_off, found.scores["accuracy"].ensembles[-1], found.between_sub_models
    """
    check_measurable(model, num_samples)
    base: nn.Module = getattr(model, "get_base_model", lambda: model)()  # without PEFT's adapter
    shifts, known = predicts_next_token(base), False
    device = next(base.parameters()).device
    total, items = torch.zeros(0, dtype=torch.float64), 0
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    problem_type = ""
    with torch.no_grad(), undisturbed(model, seed):
        for inputs in dataloader:
            inputs, labels = _with_labels(inputs, device)
            rows = get_batch_size(inputs)
            with dropout_off(model):
                outputs = model(**inputs)
            logits = find_logits(outputs, rows, inputs)
            if not known:
                shifts, known = _shifts_by_loss(outputs, logits, labels.to(logits.device), shifts)
            del outputs
            head = resolve_head(getattr(base, "config", None), logits, labels, 1, shifts)
            problem_type = head.problem_type
            if head.by_pixel and head.problem_type != "single_label_classification":
                raise ValueError(
                    "Consistency is measured over classes of pixels, two or more, and this model has one score for "
                    "each pixel. Measure a model with num_labels=2."
                )
            labels = head.labels_for(logits, labels.to(logits.device))
            batch = PassSums(head, shifted_labels(labels) if shifts else labels, head.classes_last(logits))
            del logits
            with _dropout_on(model):
                for _ in range(num_samples):
                    batch.add(head.classes_last(find_logits(model(**inputs), rows, inputs)))
            sums = batch.sums()
            total = sums if items == 0 else total + sums
            items += len(batch.off)
            if compute_metrics is not None:
                kept.append(batch.predictions())
            del batch, inputs, labels
    if not problem_type:
        raise ValueError("The dataloader gave no batch, so there is nothing to measure on. Check the data set.")
    if items == 0:
        raise ValueError(
            "None of the labels counts: all are -100, or rows of a single token for a head that predicts the next "
            "one. Give labelled, held-out data."
        )
    between, to_off, *curves = (total / items).tolist()
    n = num_samples
    losses, right, from_off = curves[: 2 * n + 1], curves[2 * n + 1 : 4 * n + 2], curves[4 * n + 2 :]
    scores = {"loss": _score(losses)}
    if problem_type != "regression":
        scores["accuracy"] = _score(right)
    if compute_metrics is not None:
        predictions, (references,) = (_join(side) for side in zip(*kept, strict=True))
        computed = [compute_metrics(each, references) for each in predictions]
        scores |= {name: _score([float(metrics[name]) for metrics in computed]) for name in computed[0]}
    return Consistency(n, items, scores, between, to_off, tuple(from_off))


def check_measurable(model: nn.Module, num_samples: int) -> None:
    """Raise `ValueError` unless `num_samples` is an integer >= 2 and something in the model is random."""
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 2:
        raise ValueError(
            f"num_samples is {num_samples!r}, but at least two sub-models are needed to say how far they are apart: "
            "give a whole number from 2, such as 8."
        )
    if not any(0 < source.rate < 1 for source in inspect_dropout(model)):
        raise ValueError(
            f"{type(model).__name__} has no dropout (or only with rate 0), so its sub-models would all be the model "
            "itself. Measure a model that was trained with dropout, or set the rate that it was trained with: "
            "hf_rdrop.set_dropout(model, 0.1), on a command line --rdrop_dropout 0.1."
        )


def _shifts_by_loss(outputs: Any, logits: Tensor, labels: Tensor, guess: bool) -> tuple[bool, bool]:
    """Tell by a language model's own loss whether it shifts the labels, and whether this batch was enough to tell.

    (Its class only suggests it: vision-language models shift them, decoders of encoder-decoders do not.)
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if labels.dim() != 2 or labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        return guess, True
    if not isinstance(loss, Tensor) or loss.dim():
        return guess, True
    readings = (labels, shifted_labels(labels))
    ces = torch.stack([F.cross_entropy(logits.float().flatten(0, 1), reading.flatten()) for reading in readings])
    near = torch.isclose(ces, loss.float(), rtol=1e-2)
    return (bool(near[1]) if near.sum() == 1 else guess), bool(near.sum() == 1)


def _score(values: list[float]) -> Score:
    """Take apart the values of dropout off, of n passes, of n ensembles."""
    n = len(values) // 2
    return Score(values[0], tuple(values[1 : n + 1]), tuple(values[n + 1 :]))


def _join(batches: tuple[np.ndarray, ...]) -> np.ndarray:
    """Join `[k, rows, ...]` of all batches, positions filled up with -100."""
    longest, same = max(batch.shape[-1] for batch in batches), [(0, 0)] * (batches[0].ndim - 1)
    if same[1:]:
        batches = tuple(np.pad(b, [*same, (0, longest - b.shape[-1])], constant_values=-100) for b in batches)
    return np.concatenate(batches, axis=1)


def _with_labels(inputs: Mapping[str, Any], device: torch.device) -> tuple[dict[str, Any], Tensor]:
    labels = find_labels(inputs) if isinstance(inputs, Mapping) else None
    if labels is None:
        found = ", ".join(inputs) if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
        raise ValueError(
            f"Each batch must be a dict with `labels`, to tell which items count and whether they are right; got "
            f"{found}. Use labelled, held-out data and a collator that returns dicts."
        )
    moved = {name: map_tensors(lambda tensor: tensor.to(device), value) for name, value in inputs.items()}
    return moved, labels.to(device)


@contextmanager
def _dropout_on(model: nn.Module) -> Iterator[None]:
    """Train within the block, except batch norms, whose statistics have nothing to do with dropout."""
    with modes_restored(model):
        model.train()  # all, because a rate may be applied by the module around its own (BERT's attention)
        for module in model.modules():
            if isinstance(module, _NormBase):
                module.eval()
        yield
