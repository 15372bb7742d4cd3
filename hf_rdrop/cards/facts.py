"""Describe how a model was trained: its head, objective, dropout rates, settings and versions."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from torch import nn
from transformers import Trainer
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.models.auto import modeling_auto

from ..dropout import inspect_dropout
from ..objective.heads import predicts_next_token
from ..training.loss_log import INERT_SHARE
from ..training.settings import RunFacts
from ..version import __version__
from .markdown import inline, number, public
from .objective import objective_facts

_PLACES = {
    "dropout": "dropout modules",
    "functional": "rates used by functions",
    "drop_path": "stochastic depth",
    "layerdrop": "LayerDrop, drawn once for all passes",
    "spec_augment": "SpecAugment",
}


# ---- The head ----


class HeadFacts(NamedTuple):
    """A head in words.

    Attributes:
        kind: "sequence", "token", "seq2seq", "causal", "masked", "question", "choice", "image" or "audio"; None for
            another one.
        auto_class: the class of transformers that loads it.
        task: the Hub's name of the task.
        problem: Transformers' `problem_type`.
        agreement: `rdrop_agreement`, or another text where the divergence is not known.
    """

    kind: str | None
    auto_class: str | None
    task: str | None
    problem: str
    agreement: str = "symmetric_kl"

    @property
    def loss(self) -> str:
        """Name `ce_loss`."""
        return {"regression": "MSE", "multi_label_classification": "BCE"}.get(self.problem, "CE")

    @property
    def divergence(self) -> str:
        """Name `kl_loss`."""
        if self.agreement != "symmetric_kl":
            return "disagreement"
        return "squared difference" if self.problem == "regression" else "KL"

    @property
    def items(self) -> str:
        """Name the items that the terms are means over."""
        if self.problem == "multi_label_classification":
            return "rows and labels"
        kinds = dict.fromkeys(("token", "seq2seq", "causal", "masked"), "tokens")
        return (kinds | {"question": "answers (start and end)"}).get(str(self.kind), "rows")

    @property
    def outcomes(self) -> str:
        """Name the outcomes that the probabilities are of."""
        kinds = dict.fromkeys(("seq2seq", "causal", "masked"), "vocabulary at every token")
        kinds |= {"token": "classes at every token", "choice": "choices"}
        return (kinds | {"question": "positions for start and end"}).get(str(self.kind), "classes")


_KINDS = (
    ("seq2seq", "SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM", "text2text-generation"),
    ("masked", "MASKED_LM", "AutoModelForMaskedLM", "fill-mask"),
    ("sequence", "SEQUENCE_CLASSIFICATION", "AutoModelForSequenceClassification", "text-classification"),
    ("token", "TOKEN_CLASSIFICATION", "AutoModelForTokenClassification", "token-classification"),
    ("question", "QUESTION_ANSWERING", "AutoModelForQuestionAnswering", "question-answering"),
    ("choice", "MULTIPLE_CHOICE", "AutoModelForMultipleChoice", "multiple-choice"),
    ("image", "IMAGE_CLASSIFICATION", "AutoModelForImageClassification", "image-classification"),
    ("audio", "AUDIO_CLASSIFICATION", "AutoModelForAudioClassification", "audio-classification"),
)
#: The kinds with classes of a name each, in one of Transformers' three problem types.
CLASSIFIERS = ("sequence", "image", "audio")


def describe_head(model: nn.Module) -> HeadFacts:
    """Describe the head of a model (without adapter) by its class and configuration."""
    if predicts_next_token(model):
        return HeadFacts("causal", "AutoModelForCausalLM", "text-generation", "single_label_classification")
    config, name = getattr(model, "config", None), type(model).__name__
    problem = "single_label_classification"
    for kind, mapping, auto_class, task in _KINDS:
        known = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()
        if any(name == names or (isinstance(names, tuple) and name in names) for names in known):
            if kind in CLASSIFIERS:
                by_number = "regression" if getattr(config, "num_labels", None) == 1 else problem
                problem = getattr(config, "problem_type", None) or by_number
            return HeadFacts(kind, auto_class, task, problem)
    return HeadFacts(None, None, None, getattr(config, "problem_type", None) or problem)


def trained_head(facts: RunFacts) -> HeadFacts:
    """Describe the head of a trained model, with the divergence of its passes."""
    agreement = "logits_for_agreement" if facts.own_logits else facts.settings.agreement
    return describe_head(facts.model)._replace(agreement=agreement)


# ---- How it was trained ----


def training_lines(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """List the log lines that hold CE and KL."""
    return [line for line in history if "ce_loss" in line and "epoch" in line]


def rdrop_part(
    facts: RunFacts, head: HeadFacts, history: Sequence[Mapping[str, Any]], *, trained: bool, label_smoothing: float
) -> dict[str, Any]:
    """Describe the objective in force, its economies, the model's dropout and the divergence's last logged share."""
    settings = facts.settings
    logged = [line for line in training_lines(history) if "kl_share" in line]
    share = logged[-1]["kl_share"] if logged and settings.alpha else None
    return {
        **objective_facts(settings, head.problem == "regression", facts.own_logits),
        "alpha": f"{settings.alpha:g}",
        "half": f"{settings.alpha / 2:g}",
        "passes": settings.passes,
        "interval": settings.interval,
        "trunk": {"shared": facts.shared_layers, "layers": facts.num_layers} if facts.shared_layers else None,
        "fused_head": facts.fused_head,
        "head": head,
        "dropout": dropout_rates(facts.model),
        "smoothing": 0 if head.kind == "question" else label_smoothing,  # that has no `labels`
        "trained": trained,
        "share": share if share is not None and math.isfinite(share) else None,
        "inert_share": INERT_SHARE,
        "share_step": logged[-1].get("step") if logged else None,
    }


def dropout_rates(model: nn.Module) -> str:
    """List a model's rates with the number of places, such as `0.1 (dropout modules: 9)`; "" if it has none."""
    rates: dict[float, Counter[str]] = {}
    for source in inspect_dropout(model):
        rates.setdefault(source.rate, Counter())[_PLACES[source.kind]] += 1
    told = {rate: ", ".join(f"{place}: {count}" for place, count in places.items()) for rate, places in rates.items()}
    return "; ".join(f"{rate:g} ({told[rate]})" for rate in sorted(told, reverse=True))


def hyperparameters(trainer: Trainer) -> list[tuple[str, str]]:
    """List names and values as Trainer's own cards do, and a few more."""
    args = trainer.args
    found = extract_hyperparameters_from_trainer(trainer)
    if args.optim:  # as an enumeration's member, there
        found["optimizer"] = str(found["optimizer"]).replace(str(args.optim), getattr(args.optim, "value", args.optim))
    found |= {name: value for name in ("weight_decay", "max_grad_norm") if (value := getattr(args, name))}
    found |= {"mixed_precision_training": "bfloat16"} if args.bf16 else {}
    found |= {"neftune_noise_alpha": args.neftune_noise_alpha} if args.neftune_noise_alpha else {}
    shown = {k: number(value) if isinstance(value, float) else inline(public(value)) for k, value in found.items()}
    return [(inline(name), text) for name, text in shown.items()]


def versions(with_peft: bool) -> list[tuple[str, str]]:
    """List names and versions of the packages that trained; PEFT itself looks for the line about PEFT."""
    names = {"PEFT": "peft"} if with_peft else {}
    names |= {"Transformers": "transformers", "PyTorch": "torch", "Accelerate": "accelerate"}
    found = [("hf_rdrop", __version__)]
    for name, package in (names | {"Datasets": "datasets", "Tokenizers": "tokenizers"}).items():
        try:
            found.append((name, version(package)))
        except PackageNotFoundError:
            continue
    return found
