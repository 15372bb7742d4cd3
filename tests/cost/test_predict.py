"""The cost model against counted FLOPs and measured allocations of real models."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
)

from benchmarking.measure import peak_bytes
from benchmarking.steps import FUSED, PLAIN, RDROP, Sizes, make_batch, step_arms
from fit_cost_model import Measured, errors, fit
from hf_rdrop.batch import repeat_batch
from hf_rdrop.cost import Machine, Step, peak_memory, predict_cost, step_flops
from hf_rdrop.cost.model_shape import decoder_shape, describe_model
from hf_rdrop.trunk import SharedTrunk

WIDTH, VOCAB, BATCH, LENGTH = 32, 1000, 3, 16


def _bert(model_class, layers=3):
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=96
    )
    return model_class(config)


def _marian():
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in SIDE.items()}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": 1, "decoder_start_token_id": 0}
    # With dropout in attention, as everywhere here: the counter does not see the CPU's kernel without it.
    return MarianMTModel(MarianConfig(vocab_size=VOCAB, d_model=WIDTH, attention_dropout=0.1, **sides, **tokens))


SIDE = {"layers": 2, "attention_heads": 2, "ffn_dim": 64}
LLAMA = {"hidden_size": WIDTH, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
MODELS = {
    "classification": lambda: _bert(BertForSequenceClassification),
    "masked": lambda: _bert(BertForMaskedLM),
    "translation": _marian,
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=3, n_head=2)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, attention_dropout=0.1, **LLAMA)
    ),
}


def _batch(name, length=LENGTH):
    ids = torch.randint(2, VOCAB, (BATCH, length))
    labels = torch.randint(2, (BATCH,)) if name == "classification" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _count_flops(model, inputs):
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_the_matrix_products(name):
    model, inputs = MODELS[name]().train(), _batch(name)
    shape = describe_model(model, inputs)
    plain = _count_flops(model, inputs)
    assert step_flops(shape, Step()) == pytest.approx(plain, rel=0.02)
    repeated = repeat_batch(inputs, 3)
    assert step_flops(shape, Step(passes=3)) == pytest.approx(_count_flops(model, repeated), rel=0.02)
    for k in (1, 2):
        trunk = SharedTrunk(model, k)
        trunk.start(3)
        shared = _count_flops(model, repeated)
        trunk.remove()
        assert shared < 2.95 * plain
        assert step_flops(shape, Step(passes=3, shared_layers=k)) == pytest.approx(shared, rel=0.02)


def test_sharing_goes_on_into_the_decoder():
    model, inputs = MODELS["translation"]().train(), _batch("translation")
    shape = describe_model(model, inputs)
    trunk = SharedTrunk(model, 3)
    trunk.start(2)
    shared = _count_flops(model, repeat_batch(inputs, 2))
    assert step_flops(shape, Step(passes=2, shared_layers=3)) == pytest.approx(shared, rel=0.02)


def test_checkpointed_layers_run_once_more():
    model, inputs = MODELS["llama"]().train(), _batch("llama")
    shape = describe_model(model, inputs)
    model.gradient_checkpointing_enable()
    flops = _count_flops(model, inputs)
    # Not quite: what nothing keeps, the last matrix's product, is left out.
    assert step_flops(shape, Step(gradient_checkpointing=True)) == pytest.approx(flops, rel=0.05)
    assert step_flops(shape, Step()) < 0.9 * flops


def test_frozen_weights_need_no_gradient():
    model, inputs = MODELS["classification"]().train(), _batch("classification")
    model.bert.encoder.requires_grad_(False)
    shape = describe_model(model, inputs)
    assert 0 < shape.trained_share < 0.2  # pooler and classifier
    assert step_flops(shape, Step()) == pytest.approx(_count_flops(model, inputs), rel=0.02)


# Large enough that a step needs its memory for the tensors that the formula counts; and how the layers are shared.
STEPS = {
    "sequence-classification": (Sizes(6, 64, 8, 64, 500), "trunk 3L/4"),
    "masked-lm": (Sizes(2, 64, 8, 64, 8000), "trunk L/2"),
    "causal-lm": (Sizes(3, 64, 8, 64, 4000), "trunk 3L/4"),
    "translation": (Sizes(4, 64, 16, 32, 8000), "trunk L"),
}
HOW = {"alpha": 1.0, "device": torch.device("cpu"), "dtype": torch.float32, "seed": 0}


@pytest.mark.parametrize("head", STEPS)
def test_memory_within_a_tenth_of_real_training_steps(head, tmp_path):
    sizes, trunk = STEPS[head]
    plain, *arms = step_arms(head, sizes, (PLAIN, RDROP, FUSED, trunk), folder=str(tmp_path), **HOW)
    shape = describe_model(plain.run.trainer.model, make_batch(head, sizes, 0))
    before = peak_bytes(plain.run, HOW["device"])
    assert peak_memory(shape, Step()) == pytest.approx(before, rel=0.1)
    assert len(arms) == (2 if head == "sequence-classification" else 3)
    for arm in arms:
        peak, predicted = peak_bytes(arm.run, HOW["device"]), predict_cost(shape, **_settings(arm))
        assert predicted.peak_bytes == pytest.approx(peak, rel=0.1), arm.name
        assert predicted.memory == pytest.approx(peak / before, rel=0.1), arm.name


def _settings(arm):
    given = arm.settings
    return {"shared_layers": given.get("rdrop_shared_layers", 0), "fused_head": given.get("rdrop_fused_head") == "on"}


LLAMA_7B = decoder_shape(32, 4096, 11008, vocab_size=32_000, length=2048)
LLAMA_8B = decoder_shape(32, 4096, 14336, vocab_size=128_256, length=2048, key_value_width=1024)
LLAMA_70B = decoder_shape(80, 8192, 28672, vocab_size=128_256, length=2048, key_value_width=1024, shards=64)


@pytest.mark.parametrize(("shape", "billions"), [(LLAMA_7B, 6.74), (LLAMA_8B, 8.03), (LLAMA_70B, 70.6)])
def test_shapes_by_hand(shape, billions):
    assert shape.trainable / 1e9 == pytest.approx(billions, rel=0.01)
    # Six FLOPs a parameter and token (but for the embeddings), attention apart.
    tokens = shape.batch_size * shape.stacks[0].length
    matrices = shape.trainable - shape.width * shape.classes
    assert step_flops(shape, Step()) == pytest.approx(6 * matrices * tokens, rel=0.15)
    costs = [predict_cost(shape, shared_layers=k, fused_head=True) for k in range(shape.stacks[0].layers)]
    assert 1.7 < costs[0].time <= 2 and 1 < costs[-1].time < 1.1
    assert all(less.time < more.time and less.memory <= more.memory for more, less in pairwise(costs))


def test_a_shape_by_hand_is_that_of_the_model():
    model, inputs = MODELS["llama"](), _batch("llama")
    read = describe_model(model, inputs)
    written = decoder_shape(
        3, WIDTH, 80, vocab_size=VOCAB, length=LENGTH, batch_size=BATCH, key_value_width=16, device_type="cpu"
    )
    (stack,) = read.stacks
    assert written.stacks[0] == stack._replace(probabilities=0)
    assert step_flops(written, Step(passes=2)) == step_flops(read, Step(passes=2))


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_limits(device_type):
    shape = LLAMA_7B._replace(device_type=device_type, batch_size=8)
    layers = shape.stacks[0].layers
    deep = shape._replace(stacks=(shape.stacks[0]._replace(layers=10_000),), trainable=0)
    for passes in (2, 3):
        assert predict_cost(deep, passes=passes).time == pytest.approx(passes, rel=0.01)
        assert predict_cost(deep, passes=passes).memory == pytest.approx(passes, rel=0.01)
    assert predict_cost(deep, shared_layers=10_000) == pytest.approx((1, 1, peak_memory(deep, Step())), rel=0.01)
    assert predict_cost(shape, passes=1)[:2] == (1, 1)
    assert predict_cost(shape, shared_layers=layers, fused_head=True).time < 1.05

    once, half = predict_cost(shape), predict_cost(shape, shared_layers=layers // 2)
    assert 1.4 < half.time < 1.6 and half.memory < once.memory
    every_4th = predict_cost(shape, interval=4)
    assert every_4th.time - 1 == pytest.approx((once.time - 1) / 4)
    assert every_4th.memory == once.memory
    fused = predict_cost(shape, fused_head=True)
    assert fused.time < once.time and fused.memory < once.memory
    # What does not grow with the rows brings the ratio nearer to 1: optimizer, communication, loading of data.
    small = predict_cost(shape._replace(batch_size=1))
    assert small.time < once.time < predict_cost(shape, gradient_accumulation_steps=8).time
    assert predict_cost(shape, fixed_share=0.25).time - 1 == pytest.approx(0.75 * (once.time - 1))
    checkpointed = predict_cost(shape, gradient_checkpointing=True)
    assert checkpointed.peak_bytes < once.peak_bytes / 2


def test_what_cannot_be_read_gives_no_prediction():
    model = MODELS["classification"]()
    inputs = _batch("classification")
    assert describe_model(nn.Linear(2, 2), {"x": torch.ones(3, 2), "labels": torch.zeros(3)}) is None
    assert describe_model(model, {"input_ids": inputs["input_ids"]}) is None
    assert describe_model(model, {"labels": inputs["labels"]}) is None
    no_sizes = MODELS["classification"]()
    no_sizes.config = None
    assert describe_model(no_sizes, inputs) is None


def test_the_fit_finds_the_constants_that_made_the_ratios():
    truth = Machine(100, 500, 1500, 250, 600)
    shapes = [describe_model(MODELS[name](), _batch(name)) for name in ("classification", "translation", "gpt2")]
    kinds = [{}, {"fused_head": True}, {"shared_layers": 1}, {"interval": 2}]
    arms = [Measured(s, kind, predict_cost(s, machine=truth, **kind).time) for s in shapes for kind in kinds]
    start = Machine(*(1.5 * value for value in truth))
    found = fit(arms, start._replace(parameter=300))
    assert np.abs(errors(arms, found)).max() < 0.02 < np.abs(errors(arms, start._replace(parameter=300))).max()
    with pytest.raises(ValueError, match="too few"):
        fit(arms[:4], start)
