"""R-Drop's arguments, as a mixin for any TrainingArguments class."""

from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .loss import check_alpha
from .variant_args import VariantArguments


@dataclass
class RDropArguments(VariantArguments):
    """Arguments that turn a `Trainer`'s objective into R-Drop's; mix in before a `TrainingArguments` class.

    ``loss = mean_j CE_j + rdrop_alpha / 2 * mean_{i<j} sKL(P_i, P_j)`` over `rdrop_passes` stochastic passes.

    Raises:
        ValueError: when an argument is out of its range, before anything is created on disk.
    """

    # The paper's value for language modelling and one of its three for GLUE (Liang et al. 2021).
    rdrop_alpha: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the agreement between the passes, >= 0: loss = CE + alpha/2 * KL, where CE is the mean "
            "cross-entropy of the passes and KL the mean symmetric Kullback-Leibler divergence, "
            "sKL(P, Q) = 1/2 KL(P||Q) + 1/2 KL(Q||P), of all pairs of passes; with two passes that is "
            "(CE1 + CE2 + alpha * sKL) / 2, the paper's alpha. 0 is plain fine-tuning (the baseline). "
            "The paper: 0.1, 0.5 or 1 for GLUE, 5 for translation, 0.7 for summarisation."
        },
    )
    # Two, as in the paper: a third pass added 0.05 BLEU there.
    rdrop_passes: int = field(
        default=2,
        metadata={
            "help": "Number m of stochastic passes each example makes, >= 2: CE is averaged over the m passes and KL "
            "over the m * (m - 1) / 2 pairs. All passes run in one forward over m * batch_size rows."
        },
    )
    rdrop_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Set every dropout of the model (modules and configuration alike) to this rate p, 0 <= p < 1: "
            "each element is zeroed with probability p and the rest divided by 1 - p. Default: leave the model's own "
            "rates. R-Drop needs dropout > 0 somewhere; models such as Llama or ModernBERT come with 0."
        },
    )

    # Exact, so it is on where it pays; the other three change the objective or its noise and are off.
    rdrop_fused_head: str = field(
        default="auto",
        metadata={
            "help": "Language-model heads (translation, causal, masked): compute CE, KL and their gradients from the "
            "hidden states chunk by chunk, so that the logits of the whole vocabulary never exist. The objective is "
            "the same, in less time and memory. 'auto': where the vocabulary is large enough to gain by it and the "
            "model does nothing else with its head's output; 'on': an error where that is not so; 'off': never.",
            "choices": ["auto", "on", "off"],
        },
    )
    rdrop_shared_layers: float = field(
        default=0,
        metadata={
            "help": "Economy: the passes share the first k transformer layers, which run once, so that only the "
            "layers above them see different dropout masks; a step of L layers costs (k + m * (L - k)) / L of a plain "
            "one. A whole number k >= 1, or a fraction of the layers in (0, 1). Of an encoder-decoder the encoder's "
            "layers come first. 0 shares nothing: the paper."
        },
    )
    rdrop_interval: int = field(
        default=1,
        metadata={
            "help": "Economy: R-Drop at every n-th optimizer step only, n >= 1, plain steps on the plain batch "
            "between them. 1 is the paper, which found larger intervals faster and less good."
        },
    )

    def __post_init__(self) -> None:
        check_alpha(self.rdrop_alpha)
        if self.rdrop_fused_head not in ("auto", "on", "off"):
            raise ValueError(f"rdrop_fused_head must be 'auto', 'on' or 'off', got {self.rdrop_fused_head!r}.")
        shared = self.rdrop_shared_layers
        number = isinstance(shared, (int, float)) and not isinstance(shared, bool)
        if not number or not (0 <= shared < 1 or (shared >= 1 and float(shared).is_integer())):
            raise ValueError(
                f"rdrop_shared_layers must be a number of layers (0, 1, 2, ...) or a fraction of them in (0, 1), got "
                f"{shared!r}: the passes share so many of the model's lower layers."
            )
        interval = self.rdrop_interval
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(
                f"rdrop_interval must be an integer >= 1, got {interval!r}: R-Drop at every n-th optimizer step. For "
                "plain fine-tuning set rdrop_alpha to 0 instead."
            )
        if isinstance(self.rdrop_passes, bool) or not isinstance(self.rdrop_passes, int) or self.rdrop_passes < 2:
            raise ValueError(
                f"rdrop_passes must be an integer >= 2, got {self.rdrop_passes!r}: agreement needs two passes to "
                "compare. For plain fine-tuning set rdrop_alpha to 0 instead."
            )
        p = self.rdrop_dropout
        if p is not None and (isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1):
            raise ValueError(
                f"rdrop_dropout must be in [0, 1), got {p!r}: it is the probability that an element is zeroed. "
                "Leave it out to keep the model's own rates."
            )
        super().__post_init__()


@dataclass
class RDropTrainingArguments(RDropArguments, TrainingArguments):
    """`TrainingArguments` with R-Drop's arguments; for `RDropTrainer` and `HfArgumentParser`."""


@dataclass
class RDropSeq2SeqTrainingArguments(RDropArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with R-Drop's arguments; for `RDropSeq2SeqTrainer` and `HfArgumentParser`."""
