"""Sources of sub-models on tiny models of many architectures: what they do, and that nothing of them stays."""

import copy
import math

import pytest
import torch
import transformers as tf
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_rdrop.batch import repeat_batch
from hf_rdrop.dropout import inspect_dropout, is_stochastic, set_dropout
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
SOURCES = {"layer_drop": 0.4, "insert_dropout": 0.3}


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


def forward(model, batch, passes=2, seed=0, call=None):
    """Logits and gradients of one forward over a repeated batch, as training runs it."""
    model.zero_grad()
    torch.manual_seed(seed)
    outputs = (model if call is None else call)(**repeat_batch(batch, passes))
    outputs.loss.backward()
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
    model = make(name)
    batch, before, modules = make_batch(model), snapshot(model), list(model.modules())
    with torch.no_grad():
        stock = model.eval()(**batch).logits
    model.train()

    sources = install(model, source)
    assert list(model.state_dict()) == before[2]
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, stock)  # an evaluation in the middle of training
    logits, grads = forward(model.train(), batch)
    assert differ(*logits.chunk(2)) and torch.isfinite(logits).all()
    assert any(grad.abs().sum() > 0 for grad in grads.values())
    again, _ = forward(model, batch)
    assert torch.equal(logits, again)  # by its seed
    assert sources.differs

    sources.remove()
    sources.remove()
    assert snapshot(model) == before and list(model.modules()) == modules
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, stock)


@pytest.mark.parametrize("name", MODELS)
def test_without_repeating_the_batch_they_act_all_the_same(name):
    """So a baseline of one plain pass trains with the same noise."""
    model = make(name)
    batch = make_batch(model)
    stock = model(**batch).logits
    sources = install(model, "layer_drop")
    assert differ(model(**batch).logits, stock)
    sources.remove()
    assert not differ(model(**batch).logits, stock)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "gpt2"])
def test_gradient_checkpointing_changes_nothing(name, source):
    if source == "insert_dropout" and name in POST_NORM:
        pytest.skip("no place for it")
    calls, results = [], []
    for checkpointing in (False, True):
        model = make(name)
        linear = next(m for layer in next(iter(find_layer_stacks(model).values())) for m in layer.modules())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.config.use_cache = False
        install(model, source)
        inner = next(m for m in linear.modules() if not list(m.children()))
        inner.register_forward_pre_hook(lambda *_: calls.append(1))
        results.append(forward(model, make_batch(model)))
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
        _, grads = forward(model, batch, passes=1, seed=seed)
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
    assert not [s for s in inspect_dropout(model) if s.kind == "drop_path"]


@pytest.mark.parametrize("name", ["llama", "bart", "vit"])
def test_what_is_saved_in_the_middle_of_training_is_a_stock_model(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "stock")
    SubModels(model, layer_drop=0.2, insert_dropout=0.1)
    model.save_pretrained(tmp_path / "during")
    stock, during = (tmp_path / folder / "config.json" for folder in ("stock", "during"))
    assert stock.read_text() == during.read_text()
    loaded, info = type(model).from_pretrained(tmp_path / "during", output_loading_info=True)
    assert not any(info.values()), info
    assert [n for n, _ in loaded.named_modules()] == [n for n, _ in make(name).named_modules()]
    batch = make_batch(model)
    torch.testing.assert_close(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


# ---- Together with other things ----


@pytest.mark.parametrize("order", ["sources first", "trunk first"])
@pytest.mark.parametrize("source", SOURCES)
def test_with_a_shared_trunk_the_passes_differ_above_it_only(source, order):
    model = make("llama", num_hidden_layers=3)
    batch = make_batch(model, rows=3)  # odd: the rows of one pass cannot be divided by two
    made = [lambda: install(model, source), lambda: SharedTrunk(model, 2)]
    if order == "sources first":
        _, trunk = made[0](), made[1]()
    else:
        trunk, _ = made[1](), made[0]()
    outputs = []
    for layer in model.model.layers[1:]:
        layer.register_forward_hook(lambda m, args, output: outputs.append(output))
    for seed in range(8):  # by chance, no row may skip the last layer
        outputs.clear()
        trunk.start(2)
        forward(model, batch, seed=seed)
        trunk.stop()
        assert torch.equal(*outputs[0].chunk(2)) and len(outputs[1]) == 6
        if differ(*outputs[1].chunk(2)):
            return
    pytest.fail("the passes never differ")


@pytest.mark.parametrize("source", SOURCES)
def test_bfloat16_autocast(source):
    model = make("llama")
    install(model, source)
    with torch.autocast("cpu", torch.bfloat16):
        logits, grads = forward(model, make_batch(model))
    assert differ(*logits.float().chunk(2)) and all(torch.isfinite(grad).all() for grad in grads.values())


ONE_BY_ONE = [pytest.param({source: value}, marks=pytest.mark.slow, id=source) for source, value in SOURCES.items()]


@pytest.mark.parametrize("asked", [pytest.param(SOURCES, id="all"), *ONE_BY_ONE])
def test_a_compiled_model_draws_the_same(asked):
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, backend = make("llama", dropout=0.2), CompileCounterWithBackend("eager")
        SubModels(model, **asked)
        call = torch.compile(model, backend=backend) if compiled else None
        steps, counts = [], []
        for seed in range(3):
            steps.append(forward(model, make_batch(model), seed=seed, call=call))
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
    logits, grads = forward(model, batch)
    assert differ(*logits.chunk(2)) and all(torch.isfinite(grad).all() for grad in grads.values())
    sources.remove()
    assert snapshot(model) == before


def test_frozen_layers_in_evaluation_mode_stay_stock():
    model = make("llama")
    sources = SubModels(model, layer_drop=0.9, insert_dropout=0.5)
    model.model.layers.eval()
    batch = make_batch(model)
    logits, _ = forward(model, batch)
    assert torch.equal(*logits.chunk(2))
    sources.remove()
    assert torch.equal(model(**batch).logits, logits[:3])
    sources = SubModels(model, layer_drop=0.9)  # put on while they are
    assert torch.equal(model(**batch).logits, logits[:3])
    assert sources.differs


# ---- What is refused ----


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), True, "0.1"])
@pytest.mark.parametrize("source", SOURCES)
def test_rates_out_of_range(source, value):
    model = make("llama", dropout=0.1)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{source} is .*at least 0 and less than 1"):
        SubModels(model, **{source: value})
    assert snapshot(model) == before


@pytest.mark.parametrize("source", SOURCES)
def test_a_model_without_a_place(source):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    with pytest.raises(ValueError, match=f"{source}: .*Sequential.*Set {source} to 0"):
        install(model, source)


@pytest.mark.parametrize("name", sorted(POST_NORM))
def test_inserted_dropout_has_no_place_in_blocks_that_end_in_a_norm(name):
    model = make(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"insert_dropout: no attention or feed-forward block.*set_dropout"):
        SubModels(model, layer_drop=0.1, insert_dropout=0.1)
    assert snapshot(model) == before  # the other has not stayed


def test_inserted_dropout_has_no_place_where_the_block_adds_the_residual():
    model = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="insert_dropout: no attention"):
        SubModels(model, insert_dropout=0.1)


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_that_is_there_already(source):
    model = make("llama")
    sources = install(model, source)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"has a source of sub-models of this kind already.*remove\(\)"):
        install(model, source)
    assert snapshot(model) == before
    sources.remove()
    install(model, source)


def test_nothing_asked_for_is_nothing_done():
    model = make("llama")
    before = snapshot(model)
    sources = SubModels(model)
    assert snapshot(model) == before and not sources.differs
    sources.remove()
