"""What is saved is what was trained: rates after `set_dropout`, saving and loading; what a model is told it has."""

import pytest
import torch
import transformers as tf

from hf_rdrop import RDropTrainer, RDropTrainingArguments, inspect_dropout, set_dropout
from hf_rdrop.dropout import is_stochastic, settings_beside_dropout
from support.trunk_models import BERT_LIKE

SMALL = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
LLAMA = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def levit(**config):
    sizes = {"image_size": 64, "hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "key_dim": [4, 4, 4]}
    return tf.LevitForImageClassification(tf.LevitConfig(**sizes, depths=[1, 1, 1], **config))


FAMILIES = {
    # stochastic depth by nn.Dropout, at rates that rise from block to block
    "efficientnet": lambda: tf.EfficientNetForImageClassification(
        tf.EfficientNetConfig(image_size=32, width_coefficient=0.2, depth_coefficient=0.1, hidden_dim=32)
    ),
    # a first dropout of the summary only where the config has an entry, which it does not have by default
    "xlnet": lambda: tf.XLNetForSequenceClassification(
        tf.XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=32)
    ),
    "electra": lambda: tf.ElectraForMultipleChoice(tf.ElectraConfig(**BERT_LIKE, embedding_size=16)),
    "gpt2": lambda: tf.GPT2DoubleHeadsModel(tf.GPT2Config(**SMALL, num_labels=1)),
    "swiftformer": lambda: tf.SwiftFormerForImageClassification(
        tf.SwiftFormerConfig(depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16], image_size=64)
    ),
    # its convolutional blocks drop elements, at the rate of an entry of their own, by a module called drop_path
    "swiftformer, deeper": lambda: tf.SwiftFormerForImageClassification(
        tf.SwiftFormerConfig(depths=[2, 1, 1, 2], embed_dims=[8, 8, 16, 16], image_size=64)
    ),
    # a rate of their heads that the config has no entry for, with 0.1 in the code
    "llama, tokens": lambda: tf.LlamaForTokenClassification(tf.LlamaConfig(**LLAMA)),
    "gpt2, tokens": lambda: tf.GPT2ForTokenClassification(tf.GPT2Config(**SMALL)),
    # None where the rate is 0, and a dropout where it is not
    "cpmant": lambda: tf.CpmAntForCausalLM(
        tf.CpmAntConfig(
            vocab_size=40, hidden_size=16, num_attention_heads=2, dim_head=8, dim_ff=32, num_hidden_layers=1
        )
    ),
}


def rates(model):
    return {source.name: source.rate for source in inspect_dropout(model)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rates_of_training_are_those_after_loading(family, tmp_path):
    model = FAMILIES[family]()
    before = rates(model)
    set_dropout(model, 0.15)
    trained = rates(model)
    assert trained != before and 0.15 in trained.values()
    model.save_pretrained(tmp_path)
    assert rates(type(model).from_pretrained(tmp_path)) == trained


def test_stochastic_depth_by_nn_dropout_keeps_its_rates():
    model = FAMILIES["efficientnet"]()
    depth = {name: rate for name, rate in rates(model).items() if name.startswith("efficientnet.encoder.blocks")}
    assert len(set(depth.values())) > 2
    set_dropout(model, 0.15)
    assert {name: rates(model)[name] for name in depth} == depth and model.dropout.p == 0.15


def test_an_advice_is_one_that_the_config_takes(caplog):
    """LeViT's drop_path_rate is a whole number: of use is only what is set on the model, and that is not saved."""
    model = levit()
    assert not is_stochastic(inspect_dropout(model)) and settings_beside_dropout(model) == []
    assert settings_beside_dropout(convnext()) == ["drop_path_rate=0.1"]
    set_dropout(model, 0.15)
    assert is_stochastic(inspect_dropout(model)) and "*.drop_rate" in caplog.text


def test_a_dropout_called_drop_path_gets_the_rate():
    model = FAMILIES["swiftformer, deeper"]()
    set_dropout(model, 0.15)
    block = model.swiftformer.encoder.network[0].blocks[0]
    assert block.drop_path.p == model.config.drop_conv_encoder_rate == 0.15


def test_a_rate_that_cannot_be_saved_is_named(tmp_path, caplog):
    """SigLIP's pooling head has `nn.MultiheadAttention`, with no word of dropout."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.SiglipConfig(vision_config={**sizes, "image_size": 32, "patch_size": 16})
    model = tf.SiglipForImageClassification(config)
    if "vision_model.head.attention.dropout" not in rates(model):
        pytest.skip("this version has no pooling head in the classifier")
    set_dropout(model, 0.15)
    assert "loses the dropout rate 0.15 of vision_model.head.attention.dropout" in caplog.text
    model.save_pretrained(tmp_path)
    loaded, trained = rates(type(model).from_pretrained(tmp_path)), rates(model)
    assert {n for n in trained if loaded[n] != trained[n]} == {"vision_model.head.attention.dropout"}


def test_nothing_is_said_where_all_is_saved(caplog):
    set_dropout(FAMILIES["llama, tokens"](), 0.15)
    assert not caplog.records


def test_a_refused_rate_leaves_the_model_and_its_files_as_they_were(tmp_path):
    """As DiffLlama of Transformers 5.23, which takes no dropout of its attention."""

    class Strict(tf.LlamaForCausalLM):
        def __init__(self, config):
            if config.attention_dropout:
                raise ValueError("no dropout of the attention here.")
            super().__init__(config)

    model = Strict(tf.LlamaConfig(**LLAMA))
    before, config = rates(model), model.config.to_dict()
    with pytest.raises(ValueError, match=r"could not be loaded again"):
        set_dropout(model, 0.15)
    assert rates(model) == before and model.config.to_dict() == config
    model.save_pretrained(tmp_path)
    assert rates(Strict.from_pretrained(tmp_path)) == before


def test_a_rate_that_only_the_code_knows_is_set_all_the_same():
    class Fixed(tf.BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.dropout = torch.nn.Dropout(0.5)

    model = Fixed(tf.BertConfig(**BERT_LIKE))
    set_dropout(model, 0.15)
    assert model.dropout.p == 0.15


def image_trainer(tmp_path, model, **args):
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": n % 2} for n in range(4)]
    args = RDropTrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **args
    )
    return RDropTrainer(model=model, args=args, train_dataset=rows)


def convnext(**config):
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_scale_init_value": 1.0}
    return tf.ConvNextForImageClassification(tf.ConvNextConfig(**sizes, num_labels=2, **config))


@pytest.mark.parametrize("asked", [{}, {"rdrop_dropout": 0.1}, {"rdrop_insert_dropout": 0.1}])
def test_what_a_refusal_advises_leads_out(asked, tmp_path):
    """ConvNext has no dropout, no list of transformer layers, and stochastic depth at rate 0."""
    with pytest.raises(ValueError, match=r"drop_path_rate=0\.1") as refusal:
        image_trainer(tmp_path, convnext(), **asked).train()
    others = {"rdrop_dropout=0.1", "rdrop_insert_dropout=0.1", "rdrop_layer_drop=0.1"}
    assert not any(f"{other};" in str(refusal.value) for other in others)
    trainer = image_trainer(tmp_path, convnext(drop_path_rate=0.5))
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_a_row_that_keeps_all_its_branches_by_chance_is_not_held_against_the_model(tmp_path):
    """At a rate of 0.02 the first batch of one row most often does, in both passes."""
    trainer = image_trainer(tmp_path, convnext(drop_path_rate=0.02), per_device_train_batch_size=1)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_every_knob_of_a_llama_is_named(tmp_path):
    small = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**small, num_attention_heads=2, num_key_value_heads=2))
    args = RDropTrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    trainer = RDropTrainer(model=model, args=args, train_dataset=[{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}] * 4)
    ways = r"rdrop_dropout=0\.1; rdrop_insert_dropout=0\.1; rdrop_layer_drop=0\.1; neftune_noise_alpha=5"
    with pytest.raises(ValueError, match=ways):
        trainer.train()


def test_a_sampling_router_is_named_by_its_own_setting(tmp_path):
    small = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = tf.MixtralForCausalLM(
        tf.MixtralConfig(**small, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    )
    args = RDropTrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    trainer = RDropTrainer(model=model, args=args, train_dataset=[{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}] * 4)
    with pytest.raises(ValueError, match=r"router_jitter_noise=0\.01"):
        trainer.train()
