"""What is random in models of many families: found, named, and set to another rate."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers.models.sew_d.modeling_sew_d import StableDropout

from hf_rdrop.dropout import inspect_dropout, is_stochastic, set_dropout, settings_beside_dropout
from hf_rdrop.training.knobs import ways_to_differ

RATE = 0.37
SMALL = {"vocab_size": 40, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {
    **SMALL,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
BART = {
    **SMALL,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 24,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
DISTILBERT = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 24}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}
VIT = {**ENCODER, "image_size": 8, "patch_size": 4}
DROP_PATH = {**VIT, "drop_path_rate": 0.5, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

FAMILIES = {
    "bert": (tf.BertForSequenceClassification, tf.BertConfig, ENCODER),
    "roberta": (tf.RobertaForSequenceClassification, tf.RobertaConfig, ENCODER),
    "distilbert": (tf.DistilBertForSequenceClassification, tf.DistilBertConfig, {**SMALL, **DISTILBERT}),
    "deberta-v2": (tf.DebertaV2ForSequenceClassification, tf.DebertaV2Config, {**ENCODER, **DEBERTA}),
    "electra": (tf.ElectraForSequenceClassification, tf.ElectraConfig, {**ENCODER, "embedding_size": 16}),
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config, {**SMALL, **T5}),
    "marian": (tf.MarianMTModel, tf.MarianConfig, BART),
    "bart": (tf.BartForConditionalGeneration, tf.BartConfig, BART),
    "modernbert": (tf.ModernBertForSequenceClassification, tf.ModernBertConfig, ENCODER),
    "vit": (tf.ViTForImageClassification, tf.ViTConfig, VIT),
    "llama": (tf.LlamaForSequenceClassification, tf.LlamaConfig, ENCODER),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, {**SMALL, **GPT2}),
}
CASES = [  # DeBERTa has no SDPA, T5 has it in newer versions of Transformers
    (family, attention)
    for family, (model_class, _, _) in FAMILIES.items()
    for attention in ("eager", "sdpa")
    if attention == "eager" or model_class._supports_sdpa
]


def build(model_class, config, attention="eager"):
    """A randomly initialised model whose weights are large enough that a dropped element shows in the logits."""
    torch.manual_seed(0)
    config._attn_implementation = attention
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def make(family, attention="eager", **overrides):
    model_class, config_class, values = FAMILIES[family]
    return build(model_class, config_class(**{**values, **overrides}), attention)


def doubled_batch(model):
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(2, 3, 8, 8, generator=generator)
        return {"pixel_values": pixels.repeat(2, 1, 1, 1)}
    ids = torch.randint(3, 40, (2, 9), generator=generator).repeat(2, 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**batch, "decoder_input_ids": ids} if model.config.is_encoder_decoder else batch


def logits(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(**doubled_batch(model)).logits


def halves_differ(model, seed=0):
    """Clear "yes" or "no": a difference in between (rounding) fails."""
    first, second = logits(model.train(), seed).chunk(2)
    difference = (first - second).abs().max().item()
    assert difference < 1e-5 or difference > 1e-3, difference
    return difference > 1e-3


def of_kind(model, *kinds):
    return [source for source in inspect_dropout(model) if source.kind in kinds]


def set_rate(model, name, rate):
    """Sets one source by its name, independently of the code under test."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, rate)


# What the whole library rests on


def test_torch_dropout_zeroes_scales_and_draws_each_half_anew():
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0)) + 1
    dropout = nn.Dropout(0.25)
    torch.manual_seed(0)
    out = dropout(torch.stack([x, x]))
    kept = out != 0
    torch.testing.assert_close(out[kept], (torch.stack([x, x]) / 0.75)[kept])
    assert abs(kept.double().mean().item() - 0.75) < 4 * math.sqrt(0.25 * 0.75 / 8000)
    assert 0.3 < (kept[0] != kept[1]).double().mean().item() < 0.45  # independent halves: 2 * 0.25 * 0.75 = 0.375
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dropout_of_a_model_zeroes_and_scales_in_training_and_is_the_identity_in_evaluation(family, monkeypatch):
    original, seen = F.dropout, []

    def recorded(input, p=0.5, training=True, inplace=False):
        before = input.detach().clone()
        out = original(input, p, training, inplace)
        seen.append((before, p, training, out.detach().clone()))
        return out

    model = make(family)  # eager attention: SDPA does its dropout inside the kernel
    set_dropout(model, RATE)
    monkeypatch.setattr(F, "dropout", recorded)
    logits(model.train())
    # ReLUs leave zeros that say nothing about what was dropped.
    inputs, outputs = (torch.cat([entry[i][entry[0] != 0].flatten() for entry in seen]) for i in (0, 3))
    kept = outputs != 0
    assert seen and all((p, training) == (RATE, True) for _, p, training, _ in seen)
    torch.testing.assert_close(outputs[kept], inputs[kept] / (1 - RATE))
    assert abs(1 - kept.double().mean().item() - RATE) < 4 * math.sqrt(RATE * (1 - RATE) / len(kept))

    seen.clear()
    logits(model.eval())
    assert all(torch.equal(before, out) for before, _, _, out in seen)


# set_dropout on every family


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_set_dropout_switches_the_randomness_on_and_off(family, attention):
    model = make(family, attention)
    assert set_dropout(model, RATE) is None
    sources = of_kind(model, "dropout", "functional")
    assert {source.rate for source in sources} == {RATE}
    assert is_stochastic(sources) and halves_differ(model)

    set_dropout(model, 0.0)
    assert {source.rate for source in inspect_dropout(model)} == {0.0}
    assert not is_stochastic(inspect_dropout(model)) and not halves_differ(model)
    torch.testing.assert_close(logits(model.train()), logits(model.eval()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_only_the_new_rate_reaches_torch(family, attention, monkeypatch):
    model = make(family, attention)
    set_dropout(model, RATE)
    seen = []
    plain_dropout, plain_attention = F.dropout, F.scaled_dot_product_attention

    def spy_dropout(input, p=0.5, training=True, inplace=False):
        seen.append(p)
        return plain_dropout(input, p, training, inplace)

    def spy_attention(*args, dropout_p=0.0, **kwargs):
        seen.append(dropout_p)
        return plain_attention(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(F, "dropout", spy_dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy_attention)
    logits(model.train())
    assert len(seen) >= 2 and set(seen) == {RATE}


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_every_functional_rate_changes_what_the_model_does(family, attention):
    model = make(family, attention)
    set_dropout(model, 0.0)
    names = [source.name for source in of_kind(model, "functional")]
    assert names or family in ("bert", "roberta", "distilbert", "deberta-v2", "electra", "gpt2")
    for name in names:
        set_rate(model, name, 0.5)
        assert halves_differ(model), f"{name} is listed, but does nothing"
        assert is_stochastic(inspect_dropout(model))
        set_rate(model, name, 0.0)


def test_llama_attention_dropout_is_found_by_name():
    names = [tuple(source) for source in inspect_dropout(make("llama", attention_dropout=0.2))]
    assert names == [(f"model.layers.{i}.self_attn.attention_dropout", "functional", 0.2) for i in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_rates_survive_saving_and_loading(family, tmp_path):
    model = make(family)
    set_dropout(model, RATE)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert inspect_dropout(reloaded) == inspect_dropout(model)
    assert halves_differ(reloaded)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_random_numbers_and_modes_are_left_alone(family):
    model = make(family).train()
    model.requires_grad_(False)
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    set_dropout(model, RATE)
    sources, config = inspect_dropout(model), model.config.to_dict()
    set_dropout(model, RATE)
    assert (inspect_dropout(model), model.config.to_dict()) == (sources, config)  # idempotent
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


# Configs


def test_a_config_entry_of_none_stays_none_and_layerdrop_keeps_its_rate():
    model = make("bert")
    set_dropout(model, RATE)
    assert model.config.classifier_dropout is None
    assert (model.config.hidden_dropout_prob, model.config.attention_probs_dropout_prob) == (RATE, RATE)
    model = make("bart", encoder_layerdrop=0.25)
    set_dropout(model, RATE)
    assert [source.rate for source in of_kind(model, "layerdrop")] == [0.25, 0.0]
    assert (model.config.encoder_layerdrop, model.config.classifier_dropout) == (0.25, RATE)


def clip_config():
    return tf.CLIPConfig(text_config=ENCODER, vision_config=VIT, projection_dim=8)


def test_sub_configs_are_set_and_survive_saving(tmp_path):
    model = tf.CLIPModel(clip_config())
    set_dropout(model, RATE)
    model.save_pretrained(tmp_path)
    reloaded = tf.CLIPModel.from_pretrained(tmp_path)
    assert reloaded.config.text_config.attention_dropout == reloaded.config.vision_config.attention_dropout == RATE
    assert inspect_dropout(reloaded) == inspect_dropout(model)


def test_a_sub_config_that_no_module_holds_is_set():
    model = nn.Sequential(nn.Dropout(0.1))
    model.config = clip_config()
    set_dropout(model, RATE)
    assert model.config.text_config.attention_dropout == model.config.vision_config.attention_dropout == RATE


def test_modernbert_identity_becomes_a_dropout():
    model = make("modernbert", attention_dropout=0.0)
    assert isinstance(model.model.layers[0].attn.out_drop, nn.Identity)
    assert ("model.layers.0.attn.out_drop", "dropout", 0.0) in inspect_dropout(model)
    set_dropout(model.eval(), RATE)
    out_drop = model.model.layers[0].attn.out_drop
    assert isinstance(out_drop, nn.Dropout) and out_drop.p == RATE and not out_drop.training


def test_rates_in_force_are_read_from_the_modules():
    model = make("bert")
    model.bert.embeddings.dropout.p = 0.8
    rates = {source.name: source.rate for source in inspect_dropout(model)}
    assert rates["bert.embeddings.dropout"] == 0.8 and rates["dropout"] == 0.1


def test_a_rate_that_the_forward_reads_from_the_config_is_found_and_set():
    config = tf.FalconConfig(**ENCODER, hidden_dropout=0.0, attention_dropout=0.0)
    model = build(tf.FalconForSequenceClassification, config)
    assert ("transformer.h.0.config.hidden_dropout", "functional", 0.0) in inspect_dropout(model)
    assert not halves_differ(model)
    model.config.hidden_dropout = 0.2  # no module changes, the behaviour does
    assert ("transformer.h.0.config.hidden_dropout", "functional", 0.2) in inspect_dropout(model)
    assert is_stochastic(inspect_dropout(model)) and halves_differ(model)
    set_dropout(model, 0.0)
    assert not is_stochastic(inspect_dropout(model)) and not halves_differ(model)


# Layerdrop and drop path


def test_layerdrop_alone_is_not_stochastic_because_both_halves_skip_the_same_layers():
    model = make("bart", dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, encoder_layerdrop=0.5)
    sources = inspect_dropout(model)
    assert ("model.encoder.layerdrop", "layerdrop", 0.5) in sources
    assert not is_stochastic(sources)
    seeds = range(8)
    assert not any(halves_differ(model, seed) for seed in seeds)
    # The layers really are dropped: with four equally likely subsets, eight calls do not all agree.
    assert any(not torch.allclose(logits(model, seed), logits(model, 0)) for seed in seeds)


def test_drop_path_is_stochastic_and_keeps_its_rate():
    model = build(tf.Dinov2ForImageClassification, tf.Dinov2Config(**DROP_PATH))
    sources = of_kind(model, "drop_path")
    assert {source.rate for source in sources} == {0.5}
    assert is_stochastic(sources) and any(halves_differ(model, seed) for seed in range(4))
    set_dropout(model, RATE)
    assert of_kind(model, "drop_path") == sources and model.config.drop_path_rate == 0.5
    set_dropout(model, 0.0)
    assert is_stochastic(inspect_dropout(model))


# PEFT


@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
def test_lora_dropout_is_set_with_its_config(lora_dropout, tmp_path):
    adapter = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=lora_dropout, task_type="SEQ_CLS")
    model = get_peft_model(make("llama"), adapter)
    before = {source.name: source.rate for source in inspect_dropout(model)}
    assert before["base_model.model.model.layers.0.self_attn.q_proj.lora_dropout.default"] == lora_dropout
    set_dropout(model, RATE)
    after = {source.name: source.rate for source in inspect_dropout(model)}
    assert after.keys() == before.keys() and set(after.values()) == {RATE}
    assert halves_differ(model)
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).lora_dropout == RATE


# Plain torch modules, and names that only look like dropout


def test_torch_modules_of_every_kind_are_listed_and_set():
    model = nn.ModuleDict(
        {
            "one": nn.Dropout1d(0.1),
            "two": nn.Dropout2d(0.1),
            "three": nn.Dropout3d(0.1),
            "alpha": nn.AlphaDropout(0.1),
            "feature": nn.FeatureAlphaDropout(0.1),
            "stable": StableDropout(0.1),
            "attention": nn.MultiheadAttention(4, 2, dropout=0.1),
            "deep": nn.LSTM(4, 4, num_layers=2, dropout=0.1),
            "shallow": nn.LSTM(4, 4),  # drops nothing: torch applies it between layers
        }
    )
    modules = {("one", "dropout"), ("two", "dropout"), ("three", "dropout"), ("alpha", "dropout")}
    modules |= {("feature", "dropout"), ("stable", "dropout")}
    modules |= {("attention.dropout", "functional"), ("deep.dropout", "functional")}
    assert {(source.name, source.kind) for source in inspect_dropout(model)} == modules
    set_dropout(model, RATE)
    assert {source.rate for source in inspect_dropout(model)} == {RATE}
    assert model["stable"].drop_prob == RATE and model["shallow"].dropout == 0.0


def test_names_that_only_look_like_dropout_are_ignored():
    module = nn.Linear(2, 2)
    module.token_dropout = True  # a switch (ESM)
    module.dropout_seed = 1234  # not a probability
    module.droplet_weight, module.backdrop = 0.5, 0.5
    module.classifier_dropout = None
    assert inspect_dropout(module) == []


# Errors


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, math.nan, math.inf, True, "0.1", None])
def test_a_bad_rate_is_refused_before_anything_changes(p):
    model = make("bert")
    sources = inspect_dropout(model)
    with pytest.raises(ValueError, match="at least 0 and less than 1"):
        set_dropout(model, p)
    assert inspect_dropout(model) == sources


def test_a_model_without_dropout_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no dropout .* add `nn.Dropout` modules"):
        set_dropout(nn.Linear(2, 2), 0.1)


class LayersDiffer(tf.LlamaConfig):
    """A config that raises an error for what its layers have each for themselves, as Gemma 4's."""

    def __getattribute__(self, name):
        if name in ("head_dim", "router_jitter_noise") and self.__dict__.get("strict"):
            raise RuntimeError(f"{name} is a per-layer attribute")
        return super().__getattribute__(name)


@pytest.mark.parametrize("noise", [{}, {"router_jitter_noise": 0.0}])
def test_a_config_whose_layers_differ_is_read_all_the_same(noise):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    model = tf.LlamaForCausalLM(LayersDiffer(**sizes, num_attention_heads=2, **noise))
    model.config.strict = True
    with pytest.raises(RuntimeError, match="per-layer"):
        _ = model.config.head_dim
    assert settings_beside_dropout(model) == ["router_jitter_noise=0.01"] * len(noise)
    assert "rdrop_dropout=0.1" in ways_to_differ(model)
