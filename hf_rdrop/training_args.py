"""Every `rdrop_*` argument, as a mixin for any TrainingArguments class."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .agreements import TERMS, parse_agreement
from .alpha import check_alpha

FUSED_HEAD = ("auto", "on", "off")
SCHEDULES = ("constant", "linear", "sigmoid")
#: Arguments that are gone: why, and what to use instead.
REMOVED = {
    "rdrop_deterministic_target": "a pass without dropout and gradient as the target had 15.3 BLEU in translation, "
    "where plain training had 22.3. Leave it out, and both passes learn; for cheaper steps use rdrop_interval or "
    "rdrop_shared_layers",
    "rdrop_second_dropout": "another rate in the second pass was less accurate than equal rates on all four tasks, as "
    "in the paper. Set the rate of both passes with rdrop_dropout",
    "rdrop_drop_connect": "dropped weights were less accurate than R-Drop with dropout on all three text tasks, for "
    "2.4 times the time of plain training. Use rdrop_dropout, or rdrop_insert_dropout for a model without dropout",
    "rdrop_embedding_noise": "noise on the embeddings hardly made the passes differ. Use rdrop_dropout, or "
    "neftune_noise_alpha of TrainingArguments for such noise",
}


def check_removed(names: Iterable[str]) -> None:
    """Check that no argument is one that is gone.

    Args:
        names: the arguments that were given, with their prefix.

    Raises:
        ValueError: for the first of `REMOVED`, with the reason and what to use instead.
    """
    for name in names:
        if name in REMOVED:
            raise ValueError(f"{name} was removed: {REMOVED[name]}.")


def _argument(default: Any, text: str, choices: Iterable[str] | None = None) -> Any:
    return field(default=default, metadata={"help": text} | ({"choices": list(choices)} if choices else {}))


@dataclass
class RDropArguments:
    """Arguments that turn a `Trainer`'s objective into R-Drop's; mix in before a `TrainingArguments` class.

    `training/settings.py` reads them: `Settings` has a field for each.

    ``loss = mean_j CE_j + rdrop_alpha / 2 * mean_{i<j} sKL(P_i, P_j)`` over `rdrop_passes` stochastic passes.

    Raises:
        ValueError: when an argument is out of its range, before anything is created on disk.
    """

    # The paper's value for language modelling and one of its three for GLUE (Liang et al. 2021).
    rdrop_alpha: float = _argument(
        1.0,
        "Weight of the divergence between the passes, >= 0: loss = CE + alpha/2 * KL, where CE is the "
        "mean cross-entropy of the passes and KL the mean symmetric Kullback-Leibler divergence, "
        "sKL(P, Q) = 1/2 KL(P||Q) + 1/2 KL(Q||P), of all pairs of passes; with two passes that is "
        "(CE1 + CE2 + alpha * sKL) / 2, the paper's alpha. 0 is plain fine-tuning (the baseline). "
        "The paper: 0.1, 0.5 or 1 for GLUE, 5 for translation, 0.7 for summarisation.",
    )
    # Two, as in the paper: a third pass added 0.05 BLEU there.
    rdrop_passes: int = _argument(
        2,
        "Number m of stochastic passes each example makes, >= 2: CE is averaged over the m passes and KL "
        "over the m * (m - 1) / 2 pairs. All passes run in one forward over m * batch_size rows.",
    )
    rdrop_dropout: float | None = _argument(
        None,
        "Set every dropout of the model (modules and configuration alike) to this rate p, 0 <= p < 1: "
        "each element is zeroed with probability p and the rest divided by 1 - p. Default: leave the model's own "
        "rates. R-Drop needs dropout > 0 somewhere; models such as Llama or ModernBERT come with 0.",
    )

    # Exact, so it is on where it pays; the other three change the objective or its noise and are off.
    rdrop_fused_head: str = _argument(
        "auto",
        "Language-model heads (translation, causal, masked): compute CE, KL and their gradients from the "
        "hidden states chunk by chunk, so that the logits of the whole vocabulary never exist. The objective is "
        "the same, in less time and memory. 'auto': where the vocabulary is large enough to gain by it and the "
        "model does nothing else with its head's output; 'on': an error where that is not so; 'off': never.",
        FUSED_HEAD,
    )
    rdrop_shared_layers: float = _argument(
        0,
        "Economy: the passes share the first k transformer layers, which run once, so that only the "
        "layers above them see different dropout masks; a step of L layers costs (k + m * (L - k)) / L of a plain "
        "one. A whole number k >= 1, or a fraction of the layers in (0, 1). Of an encoder-decoder the encoder's "
        "layers come first. 0 shares nothing: the paper.",
    )
    rdrop_interval: int = _argument(
        1,
        "Economy: R-Drop at every n-th optimizer step only, n >= 1, plain steps on the plain batch "
        "between them. 1 is the paper, which found larger intervals faster and less good.",
    )

    # Beyond the paper; the defaults are R-Drop as published.
    rdrop_agreement: str = _argument(
        "symmetric_kl",
        "Divergence between the passes, or a weighted sum of several with factors > 0, such as "
        f"symmetric_kl or 'symmetric_kl + 0.1 * hidden_states'. Terms: {', '.join(TERMS)}. kl_loss in the "
        "logs is this sum.",
    )
    rdrop_alpha_schedule: str = _argument(
        "constant",
        "Growth of alpha to rdrop_alpha in the first part of training (rdrop_alpha_warmup), with t from 0 "
        "to 1 in it: 'constant': none, 'linear': t, 'sigmoid': exp(-5 (1 - t)^2).",
        SCHEDULES,
    )
    rdrop_alpha_warmup: float = _argument(
        0.1,
        "Warm-up of alpha: a fraction of all optimizer steps in (0, 1], or a number of steps above 1. "
        "Used by the schedules linear and sigmoid.",
    )
    rdrop_unlabeled: bool = _argument(
        False,
        "Compare the passes on rows whose labels are all -100 too (semi-supervised R-Drop): the "
        "divergence is then a mean over the items of all rows, and CE one over the labelled items.",
    )
    rdrop_layer_drop: float = _argument(
        0.0,
        "Probability that a row skips a hidden layer, 0 <= p < 1: sub-models by whole layers. Needs no dropout.",
    )
    rdrop_insert_dropout: float = _argument(
        0.0,
        "Dropout of this rate, 0 <= p < 1, on the outputs of the attention and MLP blocks, for models "
        "that come without any (Llama, Qwen, ModernBERT). Only while training: the saved model is a stock model.",
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        check_removed(kwargs)  # before the generated __init__, which would only say that they are unexpected
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_alpha(self.rdrop_alpha)
        parse_agreement(self.rdrop_agreement)
        if self.rdrop_fused_head not in FUSED_HEAD:
            raise ValueError(f"rdrop_fused_head must be 'auto', 'on' or 'off', got {self.rdrop_fused_head!r}.")
        if self.rdrop_alpha_schedule not in SCHEDULES:
            raise ValueError(
                f"rdrop_alpha_schedule must be one of {', '.join(SCHEDULES)}, got {self.rdrop_alpha_schedule!r}."
            )
        shared, warmup = self.rdrop_shared_layers, self.rdrop_alpha_warmup
        if not _is_number(shared) or not (0 <= shared < 1 or (shared >= 1 and float(shared).is_integer())):
            raise ValueError(
                f"rdrop_shared_layers must be a number of layers (0, 1, 2, ...) or a fraction of them in (0, 1), got "
                f"{shared!r}: the passes share so many of the model's lower layers."
            )
        if not _is_count(self.rdrop_interval, least=1):
            raise ValueError(
                f"rdrop_interval must be an integer >= 1, got {self.rdrop_interval!r}: R-Drop at every n-th optimizer "
                "step. For plain fine-tuning set rdrop_alpha to 0 instead."
            )
        if not _is_count(self.rdrop_passes, least=2):
            raise ValueError(
                f"rdrop_passes must be an integer >= 2, got {self.rdrop_passes!r}: agreement needs two passes to "
                "compare. For plain fine-tuning set rdrop_alpha to 0 instead."
            )
        if not _is_number(warmup) or not 0 < warmup < math.inf:
            raise ValueError(
                f"rdrop_alpha_warmup must be a share of the training in (0, 1] or a number of steps, got {warmup!r}. "
                "For an alpha that does not change leave rdrop_alpha_schedule out."
            )
        p = self.rdrop_dropout
        if p is not None and not _is_rate(p):
            raise ValueError(
                f"rdrop_dropout must be in [0, 1), got {p!r}: it is the probability that an element is zeroed. "
                "Leave it out to keep the model's own rates."
            )
        for name in ("rdrop_layer_drop", "rdrop_insert_dropout"):
            if not _is_rate(p := getattr(self, name)):
                raise ValueError(f"{name} must be in [0, 1), got {p!r}: it is a probability of being dropped.")
        parent_post_init = getattr(super(), "__post_init__", None)
        if parent_post_init is not None:
            parent_post_init()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_rate(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


@dataclass
class RDropTrainingArguments(RDropArguments, TrainingArguments):
    """`TrainingArguments` with R-Drop's arguments; for `RDropTrainer` and `HfArgumentParser`."""


@dataclass
class RDropSeq2SeqTrainingArguments(RDropArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with R-Drop's arguments; for `RDropSeq2SeqTrainer` and `HfArgumentParser`."""
