"""Short R-Drop runs that are checked as they are made, and refusals before the first step."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_rdrop import RDropSeq2SeqTrainer, RDropTrainer
from support.training import step_logs, train

ALPHA = 2.0
TINY = 1e-9  # a dropout rate that never drops anything


def run(model, head="single", trainer_class=None, **args):
    """A short R-Drop run; in all its log lines the terms add up, and the passes differ."""
    trainer_class = trainer_class or (RDropSeq2SeqTrainer if head == "seq2seq" else RDropTrainer)
    trainer = train(model, head, trainer_class, **{"rdrop_alpha": ALPHA, "learning_rate": 1e-3, **args})
    assert step_logs(trainer)
    for entry in step_logs(trainer):
        assert entry["kl_loss"] > 0
        assert entry["loss"] == pytest.approx(entry["ce_loss"] + ALPHA / 2 * entry["kl_loss"], rel=1e-5)
    return trainer


def values(trainer):
    return [entry[key] for entry in step_logs(trainer) for key in ("loss", "ce_loss", "kl_loss", "grad_norm")]


def refuse(model, message, head="single", error=ValueError, **args):
    """Nothing is trained: the weights are those of before."""
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(error, match=message):
        train(model, head, **{"rdrop_alpha": ALPHA, **args})
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def make_llama(**config):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=40, attention_dropout=0.2, **{**sizes, **config})
    return AutoModelForCausalLM.from_config(config)
