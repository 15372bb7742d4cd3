"""Classification of images and of audio: the objective is the formula, however the batch is divided up."""

import numpy as np
import pytest
import torch
import transformers as tf

from hf_rdrop import RDropTrainer, RDropTrainingArguments, measure_consistency
from support.reference import torch_reference
from support.short_runs import TINY
from support.training import step_logs

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {**SIZES, "image_size": 8, "patch_size": 4, "num_channels": 1}
SWIN = {"image_size": 8, "patch_size": 2, "num_channels": 1, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
WAV2VEC2 = {**SIZES, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4}
WAV2VEC2 |= {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "classifier_proj_size": 8}
AST = {**SIZES, "max_length": 24, "num_mel_bins": 8, "patch_size": 4, "frequency_stride": 4, "time_stride": 4}
CONV = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
# Class and configuration; what the model's input is called, and the shape of a row of it.
MODELS = {
    "vit": (tf.ViTForImageClassification, tf.ViTConfig, VIT, "pixel_values", (1, 8, 8)),
    "swin": (tf.SwinForImageClassification, tf.SwinConfig, {**SWIN, "window_size": 2}, "pixel_values", (1, 8, 8)),
    "ast": (tf.ASTForAudioClassification, tf.ASTConfig, AST, "input_values", (24, 8)),
    "wav2vec2": (tf.Wav2Vec2ForSequenceClassification, tf.Wav2Vec2Config, WAV2VEC2, "input_values", (400,)),
}
RATES = {
    "swin": ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"),
    "wav2vec2": ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"),
}
CLASSES = 3


@pytest.fixture(params=list(MODELS))
def name(request):
    return request.param


def make(name, dropout=0.3, **changes):
    model_class, config_class, sizes, *_ = MODELS[name]
    rates = dict.fromkeys(RATES.get(name, ("hidden_dropout_prob", "attention_probs_dropout_prob")), dropout)
    if name == "wav2vec2":  # what it draws beside dropout: masks over time, layers left out
        rates |= {"mask_time_length": 2, "mask_time_prob": 0.2 if dropout > TINY else 0.0, "layerdrop": 0.0}
    config = config_class(**{**sizes, "num_labels": CLASSES, **rates, **changes})
    tf.set_seed(0)
    model = model_class(config)
    with torch.no_grad():  # a usual initialisation leaves a tiny model's logits close to zero
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(30 if key.startswith(("classifier", "projector")) else 3)
    return model


def rows_for(name, count, seed=0):
    *_, key, shape = MODELS[name]
    draw = torch.Generator().manual_seed(seed)
    return [
        {key: torch.randn(shape, generator=draw), "labels": int(torch.randint(CLASSES, (), generator=draw))}
        for _ in range(count)
    ]


def make_trainer(model, folder, **args):
    defaults = {"rdrop_alpha": 2.0, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    defaults |= {"logging_steps": 1, "max_steps": 2, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    args = RDropTrainingArguments(str(folder), **{**defaults, **args})
    return RDropTrainer(model=model, args=args, train_dataset=[])


@pytest.mark.parametrize("problem", ["single", "multi"])
def test_loss_and_gradients_are_the_formulas_on_the_models_own_logits(name, problem, tmp_path):
    problem_type = {"single": "single_label_classification", "multi": "multi_label_classification"}[problem]
    if problem == "multi" and name == "wav2vec2":
        pytest.skip("its own loss is for one label a row")
    model = make(name, problem_type=problem_type).train()
    trainer = make_trainer(model, tmp_path)
    batch = tf.default_data_collator(rows_for(name, 5))
    if problem == "multi":
        batch["labels"] = torch.nn.functional.one_hot(batch["labels"], CLASSES).double().float()
    tf.set_seed(1)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    loss.backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    tf.set_seed(1)  # the same masks, of which some are drawn by NumPy
    logits = model(**{key: torch.cat([value] * 2) for key, value in batch.items()}).logits
    expected, _, kl = torch_reference(logits.double().unflatten(0, (2, 5)), batch["labels"], 2.0, problem_type)
    expected.backward()
    assert kl.item() > 1e-3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert outputs["logits"].shape == (5, CLASSES)
    assert grads.keys() == {key for key, p in model.named_parameters() if p.grad is not None}
    for key, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[key], p.grad, rtol=1e-3, atol=1e-5, msg=lambda t, key=key: f"{key}: {t}")


def test_accumulation_gives_the_same_steps(name, tmp_path):
    logs = []
    for size, steps in ((8, 1), (2, 4)):
        accumulated = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make_trainer(make(name, dropout=TINY), tmp_path, **accumulated)
        trainer.train_dataset = rows_for(name, 16)
        trainer.train()
        logs.append(step_logs(trainer))
    for whole, divided in zip(*logs, strict=True):
        for key in ("loss", "ce_loss", "grad_norm"):
            assert divided[key] == pytest.approx(whole[key], rel=2e-4), key


def test_a_run_trains_evaluates_and_predicts(name, tmp_path):
    model = make(name)
    trainer = make_trainer(model, tmp_path, max_steps=20, per_device_train_batch_size=8, learning_rate=3e-3)
    rows = rows_for(name, 8)
    trainer.train_dataset = rows
    trainer.train()
    logs = step_logs(trainer)
    for entry in logs:
        assert entry["kl_loss"] > 0
        assert entry["loss"] == pytest.approx(entry["ce_loss"] + entry["kl_loss"], rel=1e-5)
    assert logs[-1]["ce_loss"] < 0.8 * logs[0]["ce_loss"]

    found = trainer.predict(rows)
    with torch.no_grad():
        batch = tf.default_data_collator(rows)
        outputs = model.eval()(**batch)
    assert found.predictions.shape == (8, CLASSES)
    np.testing.assert_allclose(found.predictions, outputs.logits.numpy(), rtol=1e-4, atol=1e-5)
    assert found.metrics["test_loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    consistency = measure_consistency(model, trainer.get_eval_dataloader(rows), num_samples=2)
    assert consistency.between_sub_models > 0


def test_a_shared_layer_changes_nothing_but_the_masks(name, tmp_path):
    """With dropout that drops nothing, a layer that runs once gives the loss of one that runs twice."""
    losses = []
    for layers in (0, 1):
        trainer = make_trainer(make(name, dropout=TINY), tmp_path, rdrop_shared_layers=layers)
        trainer.train_dataset = rows_for(name, 16)
        trainer.train()
        losses.append([entry["loss"] for entry in step_logs(trainer)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_network_without_dropout_is_refused(tmp_path):
    """Convolutional networks have none: the passes would be equal."""
    model = tf.ResNetForImageClassification(tf.ResNetConfig(**CONV, num_labels=CLASSES))
    trainer = make_trainer(model, tmp_path)
    trainer.train_dataset = rows_for("vit", 8)
    with pytest.raises(ValueError, match="dropout"):
        trainer.train()
