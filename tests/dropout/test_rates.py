"""What is saved is what was trained: rates after `set_dropout`, saving and loading; what a model is told it has."""

import pytest
import torch
import transformers as tf

from hf_rdrop import RDropTrainer, RDropTrainingArguments, inspect_dropout, set_dropout
from support.trunk_models import BERT_LIKE

SMALL = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
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
