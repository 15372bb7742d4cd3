"""The random numbers that models draw: restored, seeded, and each process's own."""

import random

import numpy as np
import pytest
import torch
import transformers as tf

from hf_rdrop import inspect_dropout, measure_consistency
from hf_rdrop.dropout import is_stochastic
from hf_rdrop.generators import draw_own_masks, generators_restored

SPEECH = {
    "vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0,
    "final_dropout": 0.0, "layerdrop": 0.0, "num_labels": 3, "classifier_proj_size": 8,
    "conformer_conv_dropout": 0.0, "mask_time_prob": 0.4, "mask_time_length": 2, "mask_feature_prob": 0.2,
    "mask_feature_length": 2, "mask_feature_min_masks": 0,
}  # fmt: skip
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (4, 4), "num_conv_pos_embeddings": 4}


def speech(name="Wav2Vec2", **changed):
    torch.manual_seed(0)
    options = {**SPEECH, **changed}
    if name == "Wav2Vec2Bert":
        config = tf.Wav2Vec2BertConfig(**options, feature_projection_input_dim=8, position_embeddings_type=None)
    else:
        groups = {} if name == "Data2VecAudio" else {"num_conv_pos_embedding_groups": 2}
        config = getattr(tf, f"{name}Config")(**options, **CONVOLUTIONS, **groups)
    return getattr(tf, f"{name}ForSequenceClassification")(config)


def sound(name, rows=2):
    if name == "Wav2Vec2Bert":
        return {"input_features": torch.randn(1, 24, 8).repeat(rows, 1, 1)}
    return {"input_values": torch.randn(1, 400).repeat(rows, 1)}


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_every_generator_is_restored_and_begins_with_the_seed():
    model = torch.nn.Linear(2, 2)
    with generators_restored(model):
        expected = draw()
    with generators_restored(model, 3):
        seeded = draw()
    with generators_restored(model, 3):
        assert draw() == seeded
    assert draw() == expected != seeded


def test_each_process_masks_frames_of_its_own():
    found = []
    for rank in (0, 1, 2):
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        draw_own_masks(rank, torch.device("cpu"))
        found.append(draw())
    own = random.Random(5).random(), np.random.RandomState(5).rand()
    assert found[0][:2] == own and len({row[1] for row in found}) == 3 and len({row[2] for row in found}) == 3
    assert {row[0] for row in found} == {own[0]}  # from which the order of data may come


@pytest.mark.parametrize("name", ["Wav2Vec2", "WavLM", "Hubert", "Wav2Vec2Bert", "Data2VecAudio"])
def test_masked_frames_are_listed_and_make_the_passes_differ(name):
    model, inputs = speech(name), sound(name)
    kinds = {s.name.rpartition(".")[2]: s.rate for s in inspect_dropout(model) if s.kind == "spec_augment"}
    assert kinds == {"mask_time_prob": 0.4, "mask_feature_prob": 0.2} and is_stochastic(inspect_dropout(model))
    with generators_restored(model, 0):
        logits = model.train()(**inputs).logits
    assert not torch.equal(logits[0], logits[1])
    model.config.apply_spec_augment = False
    assert not is_stochastic(inspect_dropout(model))
    logits = model(**inputs).logits
    torch.testing.assert_close(logits[0], logits[1])


def test_one_seed_measures_one_consistency_and_moves_nobodys_numbers():
    model, batches = speech(), [{**sound("Wav2Vec2", 3), "labels": torch.tensor([0, 1, 2])}]
    np.random.seed(1)
    with generators_restored(model):
        expected = draw()
    found = [measure_consistency(model, batches, num_samples=3, seed=seed) for seed in (7, 7, 8)]
    assert draw() == expected
    assert found[0].scores == found[1].scores and found[0].between_sub_models == found[1].between_sub_models > 0
    assert found[0].scores != found[2].scores
