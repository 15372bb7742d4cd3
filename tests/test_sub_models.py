"""Sources of sub-models on tiny models of many architectures: what they do, and that nothing of them stays."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_rdrop.batch import repeat_batch
from hf_rdrop.dropout import inspect_dropout, is_stochastic, set_dropout
from hf_rdrop.pass_dropout import PassRows
from hf_rdrop.sub_models import SubModels, insert_dropout
from hf_rdrop.trunk import SharedTrunk, find_layer_stacks

VOCAB = 40
SMALL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3}
ENCODER = {
    **SMALL,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
BART = {
    **SMALL,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {**SMALL, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
DEBERTA = {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
GPT2 = {**SMALL, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
VIT = {**{k: v for k, v in ENCODER.items() if k != "vocab_size"}, "image_size": 8, "patch_size": 4}
GQA = {**ENCODER, "num_key_value_heads": 1}

MODELS = {
    "bert": (tf.BertForSequenceClassification, tf.BertConfig, ENCODER),
    "roberta": (tf.RobertaForSequenceClassification, tf.RobertaConfig, ENCODER),
    "deberta-v2": (tf.DebertaV2ForSequenceClassification, tf.DebertaV2Config, DEBERTA),
    "modernbert": (tf.ModernBertForSequenceClassification, tf.ModernBertConfig, ENCODER),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, ENCODER),
    "qwen2": (tf.Qwen2ForSequenceClassification, tf.Qwen2Config, GQA),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, GPT2),
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config, T5),
    "marian": (tf.MarianMTModel, tf.MarianConfig, BART),
    "bart": (tf.BartForConditionalGeneration, tf.BartConfig, BART),
    "vit": (tf.ViTForImageClassification, tf.ViTConfig, VIT),
}
# Norm and residual are within the blocks of their layers.
POST_NORM = {"bert", "roberta", "deberta-v2", "t5"}
SOURCES = {
    "layer_drop": 0.4,
    "insert_dropout": 0.3,
    "drop_connect": 0.3,
    "embedding_noise": 0.5,
    "second_dropout": 0.5,
}


def make(name, dropout=0.0, attention="sdpa", **overrides):
    """A model in training mode whose weights are large enough that every change shows in its logits."""
    torch.manual_seed(0)
    model_class, config_class, values = MODELS[name]
    config = config_class(**{**values, **overrides})
    config._attn_implementation = attention if model_class._supports_sdpa else "eager"
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    set_dropout(model, dropout)
    return model.train()


def make_batch(model, rows=3, length=6):
    generator = torch.Generator().manual_seed(0)
    if "Image" in type(model).__name__:
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator), "labels": torch.arange(rows) % 2}
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    labels = torch.arange(rows) % 2 if "Sequence" in type(model).__name__ else torch.where(mask == 1, ids, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def snapshot(model):
    """Whatever an installed source could leave behind: modules, hooks, replaced methods, state dict, modes."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    return (
        [(name, type(module), module.training, sorted(vars(module))) for name, module in model.named_modules()],
        [len(vars(module)[hook]) for module in model.modules() for hook in hooks],
        list(model.state_dict()),
        inspect_dropout(model),
    )


def install(model, source, **others):
    return SubModels(model, **{source: SOURCES[source]}, **others)


def forward(model, sources, batch, passes=2, seed=0, call=None):
    """Logits and gradients of one forward over a repeated batch, as training runs it."""
    model.zero_grad()
    torch.manual_seed(seed)
    sources.start(passes)
    try:
        outputs = (model if call is None else call)(**repeat_batch(batch, passes))
        outputs.loss.backward()
    finally:
        sources.stop()
    return outputs.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a, b):
    (logits_a, grads_a), (logits_b, grads_b) = a, b
    torch.testing.assert_close(logits_a, logits_b)
    assert grads_a.keys() == grads_b.keys() and grads_a
    for name, grad in grads_a.items():
        torch.testing.assert_close(grad, grads_b[name], msg=lambda text, name=name: f"{name}: {text}")


def assert_share(hits, total, p):
    """That `hits` of `total` independent draws are what probability p gives, within five standard deviations."""
    assert abs(hits - total * p) < 5 * math.sqrt(total * p * (1 - p)), (hits / total, p)


def differ(a, b):
    return not torch.allclose(a, b, rtol=1e-3, atol=1e-4)


CASES = [
    (name, source) for name in MODELS for source in SOURCES if source != "insert_dropout" or name not in POST_NORM
]


# ---- For each architecture ----


@pytest.mark.parametrize(("name", "source"), CASES)
def test_the_passes_differ_in_training_only_and_nothing_stays(name, source):
    model = make(name, dropout=0.2 if source == "second_dropout" else 0.0)
    batch, before, modules = make_batch(model), snapshot(model), list(model.modules())
    with torch.no_grad():
        stock = model.eval()(**batch).logits
    model.train()

    sources = install(model, source)
    assert list(model.state_dict()) == before[2]
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, stock)
        sources.start(2)
        assert torch.equal(model(**batch).logits, stock)  # an evaluation in the middle of training
        sources.stop()
    logits, grads = forward(model.train(), sources, batch)
    assert differ(*logits.chunk(2)) and torch.isfinite(logits).all()
    assert any(grad.abs().sum() > 0 for grad in grads.values())
    again, _ = forward(model, sources, batch)
    assert torch.equal(logits, again)  # by its seed
    assert sources.differs == (source != "second_dropout")

    sources.remove()
    sources.remove()
    assert snapshot(model) == before and list(model.modules()) == modules
    sources.start(2)  # and a removed source does no more harm
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, stock)
    sources.stop()


@pytest.mark.parametrize("name", MODELS)
def test_without_repeating_the_batch_they_act_all_the_same(name):
    """So a baseline of one plain pass trains with the same noise."""
    model = make(name)
    batch = make_batch(model)
    stock = model(**batch).logits
    for source in ("layer_drop", "drop_connect", "embedding_noise"):
        sources = install(model, source)
        assert differ(model(**batch).logits, stock), source
        sources.remove()
    assert not differ(model(**batch).logits, stock)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_second_dropout_of_0_is_the_model_without_dropout_in_the_second_pass(name, attention):
    if attention == "sdpa" and not MODELS[name][0]._supports_sdpa:
        pytest.skip("eager attention only")
    model = make(name, dropout=0.3, attention=attention)
    for path, module in model.named_modules():
        if path.endswith("pos_dropout"):  # the passes share the table of positions
            module.p = 0.0
    batch = make_batch(model)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    sources = SubModels(model.train(), second_dropout=0.0)
    for passes in (2, 3):
        first, *others = forward(model, sources, batch, passes)[0].chunk(passes)
        assert differ(first, expected)
        for other in others:
            torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)
    assert all(differ(half, expected) for half in model(**repeat_batch(batch, 2)).logits.chunk(2))  # stopped


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "gpt2"])
def test_gradient_checkpointing_changes_nothing(name, source):
    if source == "insert_dropout" and name in POST_NORM:
        pytest.skip("no place for it")
    calls, results = [], []
    for checkpointing in (False, True):
        model = make(name, dropout=0.2 if source == "second_dropout" else 0.0)
        linear = next(m for layer in next(iter(find_layer_stacks(model).values())) for m in layer.modules())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.config.use_cache = False
        sources = install(model, source)
        inner = next(m for m in linear.modules() if not list(m.children()))
        inner.register_forward_pre_hook(lambda *_: calls.append(1))
        results.append(forward(model, sources, make_batch(model)))
        calls.append(0)
    assert_same(*results)
    ends = [i for i, call in enumerate(calls) if call == 0]
    assert ends[1] - ends[0] - 1 > ends[0]  # it did run the layer again


# ---- LayerDrop ----


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
def test_layer_drop_skips_layers_for_single_rows_at_its_rate(name):
    p, rows = 0.3, 256
    model = make(name)
    batch = repeat_batch(make_batch(model, rows, length=2 if name != "vit" else 0), 2)
    SubModels(model, layer_drop=p)
    seen = []

    def record(layer, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append((layer, hidden, args, kwargs, output if torch.is_tensor(output) else output[0]))

    layers = [layer for stack in find_layer_stacks(model).values() for layer in stack]
    for layer in layers:
        layer.register_forward_hook(record, with_kwargs=True)
    if name != "vit":
        batch["use_cache"] = False  # a layer that is called once more would add to it
    with torch.no_grad():
        model(**batch)
        skipped = []
        for layer, hidden, args, kwargs, output in seen:
            full = type(layer).forward(layer, *args, **kwargs)  # the layer's own code, without hooks
            full = full if torch.is_tensor(full) else full[0]
            skip = (hidden == output).flatten(1).all(1)
            torch.testing.assert_close(output[~skip], full[~skip], rtol=1e-4, atol=1e-4)  # without rescaling
            skipped.append(skip)
    assert len(skipped) == len(layers)
    table = torch.stack(skipped)
    assert_share(int(table.sum()), table.numel(), p)
    a, b = table[:, :rows], table[:, rows:]
    assert_share(int((a & b).sum()), a.numel(), p * p)  # the passes independent of one another
    assert_share(int((table[0] & table[1]).sum()), 2 * rows, p * p)  # and so the layers


def test_layer_drop_gives_a_skipped_layer_no_gradient():
    model = make("llama")
    SubModels(model, layer_drop=0.5)
    batch = make_batch(model, rows=1)
    found = set()
    for seed in range(12):
        _, grads = forward(model, SubModels(model), batch, passes=1, seed=seed)
        found.add(tuple(bool(grads[f"model.layers.{i}.mlp.up_proj.weight"].abs().sum() > 0) for i in range(2)))
    assert found == {(False, False), (False, True), (True, False), (True, True)}


class Layer(GradientCheckpointingLayer):
    def __init__(self, size_in=4, size_out=4):
        super().__init__()
        self.norm, self.mlp = nn.Identity(), nn.Linear(size_in, size_out, bias=False)

    def forward(self, hidden_states):
        return self.mlp(hidden_states)


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(hidden_states=x)
        return x


def test_layer_drop_refuses_a_layer_whose_output_has_another_shape():
    model = Stack(Layer(4, 6))
    SubModels(model, layer_drop=0.5)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) into \(2, 3, 6\).*Set layer_drop to 0"):
        model(torch.ones(2, 3, 4))


# ---- Inserted dropout ----


def test_inserted_dropout_drops_from_the_outputs_of_attention_and_mlp_at_its_rate():
    p = 0.3
    model = make("llama")
    inserted = insert_dropout(model, p)
    blocks = [block for layer in model.model.layers for block in (layer.self_attn, layer.mlp)]
    seen = []
    for block in blocks:
        block.register_forward_hook(lambda *call: seen.append(call), with_kwargs=True)
    with torch.no_grad():
        model(**make_batch(model, rows=64), use_cache=False)
        assert [call[0] for call in seen] == blocks
        for block, args, kwargs, output in seen:
            full, output = type(block).forward(block, *args, **kwargs), output
            full, output = (full[0], output[0]) if isinstance(full, tuple) else (full, output)
            dropped = output == 0
            assert_share(int(dropped.sum()), output.numel(), p)
            torch.testing.assert_close(output[~dropped], full[~dropped] / (1 - p))
    inserted.remove()
    assert not inspect_dropout(model) or not is_stochastic(inspect_dropout(model))


@pytest.mark.parametrize("name", ["qwen2", "modernbert", "gpt2"])
def test_inserted_dropout_is_at_every_attention_and_mlp(name):
    model = make(name)
    SubModels(model, insert_dropout=0.1)
    places = [s.name for s in inspect_dropout(model) if s.name.endswith(".rdrop_dropout")]
    assert len(places) == 4 and sum("att" in place for place in places) == 2, places


MOE = {**ENCODER, "num_local_experts": 2, "num_experts_per_tok": 1}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (tf.MixtralForCausalLM, tf.MixtralConfig(**{**MOE, "num_key_value_heads": 2})),
        (tf.Qwen3ForCausalLM, tf.Qwen3Config(**{**GQA, "head_dim": 8})),
        (tf.MistralForCausalLM, tf.MistralConfig(**GQA)),
        (tf.Gemma2ForCausalLM, tf.Gemma2Config(**{**GQA, "head_dim": 8})),
        (tf.PhiForCausalLM, tf.PhiConfig(**ENCODER)),
        (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**ENCODER)),
    ],
)
def test_inserted_dropout_finds_the_blocks_of_other_decoders(model_class, config):
    model = model_class(config)
    SubModels(model, insert_dropout=0.1)
    places = [s.name for s in inspect_dropout(model) if s.name.endswith(".rdrop_dropout")]
    assert len(places) == 4, places
    logits = model.train()(torch.arange(3, 9).repeat(2, 1)).logits
    assert differ(*logits)


def test_tools_for_dropout_see_what_is_inserted():
    model = make("llama")
    assert not is_stochastic(inspect_dropout(model))
    dropped = SubModels(model, layer_drop=0.1)
    assert [s.kind for s in inspect_dropout(model) if s.rate > 0] == ["drop_path"] * 2
    assert is_stochastic(inspect_dropout(model))
    SubModels(model, insert_dropout=0.1)
    set_dropout(model, 0.4)
    rates = {(s.name.rpartition(".")[2], s.rate) for s in inspect_dropout(model)}
    assert rates == {("rdrop_dropout", 0.4), ("rdrop_layer_drop", 0.1), ("attention_dropout", 0.4)}
    dropped.remove()
    SubModels(model, drop_connect=0.2)
    assert {s.rate for s in inspect_dropout(model) if s.kind == "drop_path"} == {0.2}


@pytest.mark.parametrize("name", ["llama", "bart", "vit"])
def test_what_is_saved_in_the_middle_of_training_is_a_stock_model(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "stock")
    SubModels(model, layer_drop=0.2, insert_dropout=0.1, drop_connect=0.1, embedding_noise=0.1).start(2)
    model.save_pretrained(tmp_path / "during")
    stock, during = (tmp_path / folder / "config.json" for folder in ("stock", "during"))
    assert stock.read_text() == during.read_text()
    loaded, info = type(model).from_pretrained(tmp_path / "during", output_loading_info=True)
    assert not any(info.values()), info
    assert [n for n, _ in loaded.named_modules()] == [n for n, _ in make(name).named_modules()]
    batch = make_batch(model)
    torch.testing.assert_close(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


# ---- DropConnect ----


def test_drop_connect_has_one_mask_of_the_weights_for_each_pass():
    """Rows of the identity matrix read the weights that a pass sees off the output."""
    p, passes, size, rows = 0.3, 3, 96, 2
    layer = Layer(size, size)
    weight = layer.mlp.weight.detach()
    sources = SubModels(Stack(layer), drop_connect=p)
    eye = torch.eye(size).expand(passes * rows, size, size)
    sources.start(passes)
    seen = layer(eye).detach().transpose(1, 2).unflatten(0, (passes, rows))
    sources.stop()
    assert torch.equal(seen[:, 0], seen[:, 1])  # all rows of a pass
    masks = seen[:, 0] != 0
    for i in range(passes):
        torch.testing.assert_close(seen[i, 0][masks[i]], weight[masks[i]] / (1 - p))
        assert_share(int((~masks[i]).sum()), masks[i].numel(), p)
        others = masks[(i + 1) % passes]
        assert_share(int((~masks[i] & ~others).sum()), others.numel(), p * p)  # independent of the next pass's
    once = layer(eye).detach()
    assert torch.equal(once[0], once[-1])  # one mask when nothing is repeated


def test_drop_connect_drops_no_bias_and_its_gradient_is_that_of_the_weights_left():
    linear = nn.Linear(5, 4)
    layer = Layer()
    layer.mlp = linear
    sources = SubModels(Stack(layer), drop_connect=0.5)
    x = torch.randn(6, 5)
    sources.start(2)
    output = layer(x)
    sources.stop()
    output.square().sum().backward()
    # The masks, found by the same draws.
    found = linear.weight.grad.clone(), linear.bias.grad.clone()
    torch.manual_seed(0)
    linear.weight.grad = linear.bias.grad = None
    sources.start(2)
    output = layer(x)
    output.square().sum().backward()
    sources.stop()
    torch.manual_seed(0)
    weight, bias = linear.weight.detach().clone().requires_grad_(), linear.bias.detach().clone().requires_grad_()
    masks = [(F.dropout(torch.ones(4, 5), 0.5) > 0).float() for _ in range(2)]
    expected = torch.cat([x[3 * i : 3 * i + 3] @ (weight * masks[i] * 2).T + bias for i in range(2)])
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(linear.weight.grad, weight.grad)
    torch.testing.assert_close(linear.bias.grad, bias.grad)
    assert all(torch.isfinite(grad).all() for grad in found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_drop_connect_is_on_average_the_model(name):
    """First order: with a small rate the mean of the logits over many masks is near those of the model."""
    model = make(name)
    batch = {k: v for k, v in make_batch(model).items() if k != "labels"}
    if name == "t5":
        batch["decoder_input_ids"] = batch["input_ids"]
    linears = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    SubModels(model, drop_connect=0.5)
    dropped = [m for m in linears if hasattr(m, "rdrop_drop_connect")]
    inside = [m for stack in find_layer_stacks(model).values() for m in stack.modules()]
    assert dropped == [m for m in linears if m in inside] and dropped
    assert not hasattr(model.get_output_embeddings(), "rdrop_drop_connect")
    linear = dropped[0]
    x = torch.randn(1, 2, 16)
    with torch.no_grad():
        draws = torch.stack([linear(x) for _ in range(2000)])
        expected = type(linear).forward(linear, x)
    error = (draws.mean(0) - expected) / (draws.std(0) / math.sqrt(len(draws)))
    assert error.abs().max() < 5 and draws.std(0).min() > 0


def test_drop_connect_on_the_base_layers_of_an_adapter():
    model = make("llama")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    batch, sources = make_batch(model), SubModels(model, drop_connect=0.3)
    assert hasattr(model.model.layers[0].self_attn.q_proj.base_layer, "rdrop_drop_connect")
    logits, grads = forward(adapted, sources, batch)
    assert differ(*logits.chunk(2)) and all("lora" in name for name in grads)
    sources.remove()
    assert "forward" not in vars(model.model.layers[0].self_attn.q_proj.base_layer)


def test_drop_connect_refuses_rows_that_cannot_be_divided():
    model = Stack(Layer())
    sources = SubModels(model, drop_connect=0.3)
    sources.start(2)
    with pytest.raises(ValueError, match=r"drop_connect: a tensor of 5 rows cannot be divided by pass"):
        model(torch.ones(5, 4))
    sources.stop()
    assert model(torch.ones(5, 4)).shape == (5, 4)


# ---- Noise on the embeddings ----


@pytest.mark.parametrize("name", ["bert", "llama", "bart", "t5", "vit"])
def test_embedding_noise_is_normal_and_on_all_input_embeddings(name):
    std, rows = 0.5, 64
    model = make(name)
    batch = repeat_batch(make_batch(model, rows), 2)
    noisy = []
    SubModels(model, embedding_noise=std)
    for module in model.modules():
        if hasattr(module, "rdrop_embedding_noise"):
            module.register_forward_hook(lambda m, args, output: noisy.append((m, args, output)))
    with torch.no_grad():
        model(**batch)
        assert len(noisy) == (2 if name in ("bart", "t5") else 1)  # encoder and decoder
        for module, args, output in noisy:
            noise = output - type(module).forward(module, *args)
            count = noise.numel()
            assert abs(noise.mean()) < 5 * std / math.sqrt(count)
            assert noise.std() == pytest.approx(std, abs=5 * std / math.sqrt(2 * count))
            a, b = noise.chunk(2)
            assert abs((a * b).mean()) < 5 * std**2 / math.sqrt(count / 2)  # the passes are independent
            assert abs((noise[:, 0] * noise[:, 1]).mean()) < 5 * std**2 / math.sqrt(noise[:, 0].numel())


# ---- Another dropout rate for the other passes ----


@pytest.mark.parametrize("passes", [2, 3])
def test_second_dropout_has_its_rate_and_the_first_pass_keeps_its_own(passes):
    p, q, size = 0.1, 0.6, 20_000
    model = nn.Sequential(nn.Dropout(p))
    sources = SubModels(model, second_dropout=q)
    x = torch.ones(2 * passes, size)
    sources.start(passes)
    sources.start(passes)
    halves = model(x).chunk(passes)
    functional = F.dropout(x, p).chunk(passes)
    untouched = model.eval()(x)
    sources.stop()
    for parts in (halves, functional):
        for part, rate in zip(parts, [p] + [q] * (passes - 1), strict=True):
            assert_share(int((part == 0).sum()), part.numel(), rate)
            torch.testing.assert_close(part[part != 0], torch.full_like(part[part != 0], 1 / (1 - rate)))
    assert torch.equal(untouched, x)
    for part in model.train()(x).chunk(passes):  # stopped: all passes have the model's rate
        assert_share(int((part == 0).sum()), part.numel(), p)


@pytest.mark.parametrize("mask", [None, "per row", "for all"])
def test_second_dropout_in_scaled_dot_product_attention(mask):
    """With equal scores and the identity as values, the output shows which attention weights were dropped."""
    p, q, rows, length = 0.2, 0.5, 8, 24
    sources = SubModels(nn.Sequential(nn.Dropout(p)), second_dropout=q)
    query = torch.zeros(2 * rows, 2, length, 4)
    value = torch.eye(length).expand(2 * rows, 2, length, length)
    attended = length
    masks = {}
    if mask is not None:
        attended = length // 2
        keep = torch.arange(length) < attended
        size = 2 * rows if mask == "per row" else 1
        masks["attn_mask"] = torch.where(keep, 0.0, -torch.inf).expand(size, 1, length, length)
    sources.start(2)
    weights = F.scaled_dot_product_attention(query, query, value, dropout_p=p, **masks)
    plain = F.scaled_dot_product_attention(query, query, value, **masks)
    sources.stop()
    torch.testing.assert_close(plain, F.scaled_dot_product_attention(query, query, value, **masks))
    for part, rate in zip(weights[..., :attended].chunk(2), (p, q), strict=True):
        assert_share(int((part == 0).sum()), part.numel(), rate)
        kept = part[part != 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / attended / (1 - rate)))


def test_a_table_of_positions_keeps_the_rate_of_the_model():
    """DeBERTa's has as many rows as a position range, which may well be divisible by the batch's rows."""
    model = make("deberta-v2", dropout=0.3)
    batch, seen = make_batch(model, rows=4), []
    sources = SubModels(model, second_dropout=0.0)
    tables = [m for name, m in model.named_modules() if name.endswith("pos_dropout")]
    for table in tables:
        table.register_forward_hook(lambda m, args, output: seen.append(((output == 0) & (args[0] != 0)).chunk(2)))
    forward(model, sources, batch)
    assert len(seen) == len(tables) == 2 and len(seen[0][0]) % 4 == 0
    for halves in seen:
        for half in halves:
            assert_share(int(half.sum()), half.numel(), 0.3)


def test_second_dropout_changes_what_is_inserted_too():
    model = make("llama")
    batch = make_batch(model)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    sources = SubModels(model.train(), insert_dropout=0.3, second_dropout=0.0)
    first, second = forward(model, sources, batch)[0].chunk(2)
    assert differ(first, expected)
    torch.testing.assert_close(second, expected)


@pytest.mark.parametrize("source", ["second_dropout", "drop_connect"])
def test_a_row_for_each_choice(source):
    """A multiple-choice model flattens its choices: several rows of the layers for each row of the batch."""
    torch.manual_seed(0)
    model = tf.BertForMultipleChoice(tf.BertConfig(**ENCODER, initializer_range=0.3)).train()
    ids = torch.randint(3, VOCAB, (3, 5, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 4, 2])}
    expected = model.eval()(**batch).logits
    sources = SubModels(model.train(), **{source: 0.0 if source == "second_dropout" else 0.5})
    first, second = forward(model, sources, batch)[0].chunk(2)
    assert differ(first, expected)
    assert torch.allclose(second, expected, atol=1e-5) == (source == "second_dropout")


def test_embeddings_given_instead_of_ids():
    model = make("bert", dropout=0.3)
    batch = make_batch(model)
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    expected = model.eval()(**batch).logits
    sources = SubModels(model.train(), second_dropout=0.0)
    first, second = forward(model, sources, batch)[0].chunk(2)
    assert differ(first, expected) and torch.allclose(second, expected, atol=1e-5)


def test_rows_of_the_passes():
    rows = PassRows()
    assert rows.parts(7, "x") == 1
    rows.start(3)
    assert rows.parts(6, "x") == 3 and rows.parts(1, "x") == 1
    with pytest.raises(ValueError, match=r"x: a tensor of 7 rows.*repeated 3 times, has another number of rows"):
        rows.parts(7, "x")
    rows.after_embeddings(nn.Identity(), (), torch.ones(12, 2, 2))
    assert rows.parts(12, "x") == 3 and rows.parts(24, "x") == 3  # one for each head, say
    assert rows.parts(4, "x") == 1  # of a layer that the passes share
    with pytest.raises(ValueError, match=r"tensor of 6 rows.*has 12 rows.*unpadded"):
        rows.parts(6, "x")


def test_an_error_in_a_forward_leaves_nothing_behind():
    model, stock = make("bert", dropout=0.3), (F.dropout, F.scaled_dot_product_attention)
    sources = SubModels(model, second_dropout=0.9)
    with pytest.raises(IndexError):
        forward(model, sources, {**make_batch(model), "input_ids": torch.full((3, 6), VOCAB)})
    assert (F.dropout, F.scaled_dot_product_attention) == stock
    zeros = (F.dropout(torch.ones(2, 20_000), 0.1) == 0).sum()
    assert_share(int(zeros), 40_000, 0.1)
    sources.start(2)
    assert F.dropout != stock[0]
    sources.remove()
    assert (F.dropout, F.scaled_dot_product_attention) == stock
    assert_share(int((F.dropout(torch.ones(2, 20_000), 0.1) == 0).sum()), 40_000, 0.1)


# ---- Together with other things ----


@pytest.mark.parametrize("order", ["sources first", "trunk first"])
@pytest.mark.parametrize("source", ["layer_drop", "drop_connect", "second_dropout", "insert_dropout"])
def test_with_a_shared_trunk_the_passes_differ_above_it_only(source, order):
    model = make("llama", dropout=0.3 if source == "second_dropout" else 0.0, num_hidden_layers=3)
    batch = make_batch(model, rows=3)  # odd: the rows of one pass cannot be divided by two
    made = [lambda: install(model, source), lambda: SharedTrunk(model, 2)]
    if order == "sources first":
        sources, trunk = made[0](), made[1]()
    else:
        trunk, sources = made[1](), made[0]()
    outputs = []
    for layer in model.model.layers[1:]:
        layer.register_forward_hook(lambda m, args, output: outputs.append(output))
    for _ in range(8):  # by chance, no row may skip the last layer
        outputs.clear()
        trunk.start(2)
        forward(model, sources, batch, seed=_)
        trunk.stop()
        assert torch.equal(*outputs[0].chunk(2)) and len(outputs[1]) == 6
        if differ(*outputs[1].chunk(2)):
            return
    pytest.fail("the passes never differ")


@pytest.mark.parametrize("source", SOURCES)
def test_bfloat16_autocast(source):
    model = make("llama", dropout=0.2 if source == "second_dropout" else 0.0)
    sources, batch = install(model, source), make_batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits, grads = forward(model, sources, batch)
    assert differ(*logits.float().chunk(2)) and all(torch.isfinite(grad).all() for grad in grads.values())


ONE_BY_ONE = [pytest.param({source: value}, marks=pytest.mark.slow, id=source) for source, value in SOURCES.items()]


@pytest.mark.parametrize("asked", [pytest.param(SOURCES, id="all"), *ONE_BY_ONE])
def test_a_compiled_model_draws_the_same(asked):
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = make("llama", dropout=0.2 if "second_dropout" in asked else 0.0)
        sources, backend = SubModels(model, **asked), CompileCounterWithBackend("eager")
        call = torch.compile(model, backend=backend) if compiled else None
        steps, counts = [], []
        for seed in range(3):
            steps.append(forward(model, sources, make_batch(model), seed=seed, call=call))
            counts.append(backend.frame_count)
        results.append(steps)
        assert not compiled or 0 < counts[0] == counts[2], counts  # compiled once
    for plain, fast in zip(*results, strict=True):
        assert_same(plain, fast)


def test_a_copy_of_the_model_goes_on_by_itself():
    model = make("llama", dropout=0.1)
    sources = SubModels(model, **SOURCES)
    copied, batch = copy.deepcopy(model), make_batch(model)
    sources.remove()
    stock = make("llama", dropout=0.1).eval()(**batch).logits
    assert torch.equal(copied.eval()(**batch).logits, stock)
    assert differ(copied.train()(**batch).logits, stock)
    copied.loss = copied(**batch).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in copied.parameters())


def test_all_sources_at_once():
    model = make("llama", dropout=0.1)
    before, batch = snapshot(model), make_batch(model)
    sources = SubModels(model, **SOURCES)
    logits, grads = forward(model, sources, batch)
    assert differ(*logits.chunk(2)) and all(torch.isfinite(grad).all() for grad in grads.values())
    sources.remove()
    assert snapshot(model) == before


def test_frozen_layers_in_evaluation_mode_stay_stock():
    model = make("llama")
    sources = SubModels(model, layer_drop=0.9, insert_dropout=0.5, drop_connect=0.5)
    model.model.layers.eval()
    batch = make_batch(model)
    logits, _ = forward(model, sources, batch)
    assert torch.equal(*logits.chunk(2))
    sources.remove()
    assert torch.equal(model(**batch).logits, logits[:3])
    sources = SubModels(model, layer_drop=0.9)  # put on while they are
    assert torch.equal(model(**batch).logits, logits[:3])
    assert sources.differs


# ---- What is refused ----


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), True, "0.1"])
@pytest.mark.parametrize("source", [s for s in SOURCES if s != "embedding_noise"])
def test_rates_out_of_range(source, value):
    model = make("llama", dropout=0.1)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{source} is .*at least 0 and less than 1"):
        SubModels(model, **{source: value})
    assert snapshot(model) == before


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), True, "1e-5", None])
def test_noise_out_of_range(value):
    with pytest.raises(ValueError, match=r"embedding_noise is .*at least 0"):
        SubModels(make("llama"), embedding_noise=value)


@pytest.mark.parametrize("source", ["layer_drop", "insert_dropout", "drop_connect", "embedding_noise"])
def test_a_model_without_a_place(source):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    with pytest.raises(ValueError, match=f"{source}: .*Sequential.*Set {source} to 0"):
        install(model, source)


@pytest.mark.parametrize("name", sorted(POST_NORM))
def test_inserted_dropout_has_no_place_in_blocks_that_end_in_a_norm(name):
    model = make(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"insert_dropout: no attention or feed-forward block.*set_dropout"):
        SubModels(model, layer_drop=0.1, embedding_noise=0.1, insert_dropout=0.1)
    assert snapshot(model) == before  # the others have not stayed


def test_inserted_dropout_has_no_place_where_the_block_adds_the_residual():
    model = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="insert_dropout: no attention"):
        SubModels(model, insert_dropout=0.1)


def test_drop_connect_refuses_layers_whose_linear_maps_are_not_plain():
    model = Stack(Layer())
    model.layers[0].mlp.forward = lambda x: x  # as accelerate does to move weights about
    with pytest.raises(ValueError, match=r"drop_connect: .*no plain torch.nn.Linear.*replaced forward"):
        SubModels(model, drop_connect=0.1)
    assert "rdrop_drop_connect" not in dict(model.named_modules())


@pytest.mark.parametrize("source", ["layer_drop", "insert_dropout", "drop_connect", "embedding_noise"])
def test_a_source_that_is_there_already(source):
    model = make("llama")
    sources = install(model, source)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"has a source of sub-models of this kind already.*remove\(\)"):
        install(model, source)
    assert snapshot(model) == before
    sources.remove()
    install(model, source)


class StrangeDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop_prob = 0.1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "has no dropout with a rate above 0"),
        (nn.Sequential(nn.Dropout(0.0)), "has no dropout with a rate above 0"),
        (nn.Sequential(nn.MultiheadAttention(4, 2, dropout=0.1)), "0.dropout of Sequential.*MultiheadAttention"),
        (nn.Sequential(nn.LSTM(2, 2, num_layers=2, dropout=0.1)), "0.dropout of Sequential.*LSTM"),
        (nn.Sequential(StrangeDropout()), "StrangeDropout, which cannot have a rate for each pass"),
        (nn.Sequential(nn.Dropout2d(0.1)), "Dropout2d, which cannot have a rate for each pass"),
    ],
)
def test_second_dropout_refuses_what_it_cannot_change(model, message):
    with pytest.raises(ValueError, match=f"second_dropout: .*{message}"):
        SubModels(model, second_dropout=0.2)


def test_second_dropout_refuses_attention_kernels_of_their_own():
    model = make("llama", dropout=0.1)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"attn_implementation='flash_attention_2'.*'sdpa' or 'eager'"):
        SubModels(model, second_dropout=0.2)
    set_dropout(model, 0.0)
    SubModels(model, insert_dropout=0.1, second_dropout=0.2)  # its attention drops nothing


def test_nothing_asked_for_is_nothing_done():
    model = make("llama")
    before = snapshot(model)
    sources = SubModels(model)
    assert snapshot(model) == before and not sources.differs
    sources.start(2)
    sources.stop()
    sources.remove()
