"""Shared layers of models whose layers are of a kind of their own: plain lists, other axes, rows of heads, audio."""

import pytest
import torch
import transformers as tf

from hf_rdrop.batch import repeat_batch
from hf_rdrop.dropout import set_dropout
from hf_rdrop.trunk import SharedTrunk
from hf_rdrop.trunk.check import check_shared_trunk
from support.trunk_models import BERT_LIKE, VOCAB

XLNET = {"vocab_size": VOCAB, "d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 32, "initializer_range": 0.3}
BLOOM = {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": 3, "n_head": 2, "pad_token_id": 0}
AUDIO = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_kernel": (4, 4),
    "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "initializer_range": 0.3,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}
KINDS = {
    "mpnet": (tf.MPNetForSequenceClassification, tf.MPNetConfig, BERT_LIKE),
    "mpnet tokens": (tf.MPNetForTokenClassification, tf.MPNetConfig, BERT_LIKE),
    "xlnet": (tf.XLNetForSequenceClassification, tf.XLNetConfig, XLNET),
    "xlnet tokens": (tf.XLNetForTokenClassification, tf.XLNetConfig, XLNET),
    "bloom": (tf.BloomForCausalLM, tf.BloomConfig, {**BLOOM, "initializer_range": 0.3}),
    "wav2vec2": (tf.Wav2Vec2ForSequenceClassification, tf.Wav2Vec2Config, AUDIO),
    "wavlm": (tf.WavLMForSequenceClassification, tf.WavLMConfig, AUDIO),
}


def make(name, dropout):
    head, config, sizes = KINDS[name]
    tf.set_seed(0)
    model = head(config(**sizes)).train()
    set_dropout(model, dropout)
    return model


def make_batch(name, rows, length, pad=2):
    generator = torch.Generator().manual_seed(length)
    labels = torch.arange(rows) % 2
    if "wav" in name:
        return {"input_values": torch.randn(rows, 4 * length + 40, generator=generator), "labels": labels}
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length - pad :] = 0
    ids = ids * mask
    labels = ids if name == "bloom" else ids % 2 if "tokens" in name else labels
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def result(model, batch, trunk=None):
    model.zero_grad()
    if trunk is not None:
        trunk.start(2)
    outputs = model(**batch)
    outputs.loss.backward()
    if trunk is not None:
        trunk.stop()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs.loss.detach(), outputs.logits.detach(), grads


@pytest.mark.parametrize("k", (1, 2))
@pytest.mark.parametrize("name", KINDS)
def test_sharing_changes_nothing_without_dropout(name, k):
    model = make(name, 0.2)
    trunk = SharedTrunk(model, k)
    check_shared_trunk(trunk, model, repeat_batch(make_batch(name, 3, 7), 2), 2)
    set_dropout(model, 0.0)
    model.double()
    # Batches after the one that was tried out: as long as they have rows, or as twice as many; without padding.
    for rows, length, pad in ((3, 7, 2), (3, 6, 2), (3, 3, 1), (1, 2, 0), (4, 8, 0)):
        batch = repeat_batch(make_batch(name, rows, length, pad), 2)
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        torch.testing.assert_close(result(model, batch, trunk), result(model, batch), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_halves_differ_only_above_the_shared_layers(name):
    model, k, axis = make(name, 0.2), 2, 1 if "xlnet" in name else 0
    trunk = SharedTrunk(model, k)
    batch = repeat_batch(make_batch(name, 3, 7), 2)
    check_shared_trunk(trunk, model, batch, 2)
    outputs = []
    for layer in [*trunk.layers, upper_layer(model, trunk)]:
        layer.register_forward_hook(lambda m, a, out: outputs.append(out if torch.is_tensor(out) else out[0]))
    trunk.start(2)
    logits = model(**batch).logits
    assert [out.shape[axis] for out in outputs] == [3, 6, 6]
    assert torch.equal(*outputs[1].chunk(2, axis)) and not torch.equal(*outputs[2].chunk(2, axis))
    assert not torch.equal(*logits.chunk(2))


def upper_layer(model, trunk):
    return next(list(m)[2] for m in model.modules() if isinstance(m, torch.nn.ModuleList) and trunk.layers[0] in m)


@pytest.mark.parametrize(
    ("model", "reason"),
    (
        (tf.AlbertForSequenceClassification, "One layer that is called many times"),
        (tf.SqueezeBertForSequenceClassification, "does not call its layers as modules"),
        (tf.FunnelForSequenceClassification, "2 lists of transformer layers"),
    ),
)
def test_what_cannot_be_shared_says_why(model, reason):
    funnel = {"vocab_size": VOCAB, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "block_sizes": [2, 2]}
    groups = {f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate", "output")}
    sizes = funnel if "Funnel" in model.__name__ else {**BERT_LIKE, **groups, "embedding_size": 16}
    model = model(model.config_class(**sizes))
    with pytest.raises(ValueError, match=f"rdrop_shared_layers: .*{reason}.*Set rdrop_shared_layers to 0"):
        check_shared_trunk(SharedTrunk(model, 1), model, repeat_batch(make_batch("mpnet", 3, 7), 2), 2)
