"""Vision-language and audio models, whose images are not one per row, fine-tune with R-Drop from end to end."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from hf_rdrop import RDropTrainer, RDropTrainingArguments, measure_consistency
from hf_rdrop.batch import repeat_batch
from support.reference import torch_reference
from support.training import step_logs
from support.vision_language import VOCAB, collate_images, image_rows, make_qwen

TEXT = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 1}
TEXT |= {"num_key_value_heads": 2, "intermediate_size": 64}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = 190


def make_trainer(model, folder, rows=None, collate=collate_images, trainer_class=RDropTrainer, **args):
    defaults = {"rdrop_alpha": 2.0, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    defaults |= {"logging_steps": 1, "max_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 5e-3}
    defaults |= {"per_device_train_batch_size": 16, "max_grad_norm": 0, "remove_unused_columns": False}
    rows = image_rows() if rows is None else rows
    args = RDropTrainingArguments(str(folder), **{**defaults, **args})
    return trainer_class(model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate)


def gemma(rows=4):
    """Two images in each row: `[2 B, 3, H, W]`."""
    vision = {**VISION, "image_size": 32, "patch_size": 8}
    text = {**TEXT, "head_dim": 8, "num_hidden_layers": 2}
    ids = {"image_token_id": IMAGE, "boi_token_index": 191, "eoi_token_index": 192, "mm_tokens_per_image": 4}
    model = tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(text_config=text, vision_config=vision, **ids))
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros, at first
    row = [191, *[IMAGE] * 4, 192] * 2
    tokens = torch.tensor([[*row, *range(10 + i, 16 + i)] for i in range(rows)])
    batch = {"token_type_ids": (tokens == IMAGE).long(), "pixel_values": torch.randn(2 * rows, 3, 32, 32)}
    return model, tokens, batch


def smolvlm():
    """Room for two images in each row, of which some are empty: `[B, 2, 3, H, W]`."""
    vision = {**VISION, "image_size": 16, "patch_size": 4}
    ids = {"image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": 1}
    text = {"model_type": "llama", **TEXT}
    model = tf.SmolVLMForConditionalGeneration(tf.SmolVLMConfig(vision_config=vision, text_config=text, **ids))
    tokens = torch.tensor([[IMAGE] * 8 + [10, 11, 12, 13], [IMAGE] * 4 + [*range(10, 18)], [*range(3, 15)]])
    images = torch.randn(3, 2, 3, 16, 16)
    images[1, 1] = images[2] = 0
    return model, tokens, {"pixel_values": images}


def llava_next():
    """Three images of several tiles with their sizes, in two rows."""
    vision = {**VISION, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "num_hidden_layers": 2}
    ids = {"image_token_index": IMAGE, "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
    config = tf.LlavaNextConfig(vision_config=vision, text_config={"model_type": "llama", **TEXT}, **ids)
    # 2 x 2 patches of the whole image, 2 x 4 and a newline for each line of its two tiles
    tokens = torch.tensor([[IMAGE] * 28 + [3, 4, 5, 6], [IMAGE] * 14 + [*range(10, 28)]])
    batch = {"pixel_values": torch.randn(3, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 32]] * 3)}
    return tf.LlavaNextForConditionalGeneration(config), tokens, batch


def qwen2_audio():
    """Three recordings in two rows."""
    audio = {"model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2}
    audio |= {"encoder_ffn_dim": 64, "num_mel_bins": 8, "max_source_positions": 20}
    text = {"model_type": "qwen2", **TEXT}
    config = tf.Qwen2AudioConfig(text_config=text, audio_config=audio, audio_token_index=IMAGE)
    tokens = torch.tensor([[IMAGE] * 20 + [3, 4, 5, 6], [IMAGE] * 10 + [*range(10, 24)]])
    batch = {"input_features": torch.randn(3, 8, 40), "feature_attention_mask": torch.ones(3, 40).long()}
    return tf.Qwen2AudioForConditionalGeneration(config), tokens, batch


def positions_of_three_axes():
    """As many rows as axes, and the batch in the second dimension."""
    rows = collate_images(image_rows(3))
    axes = torch.stack([torch.arange(24), torch.arange(24) // 2, torch.arange(24) % 5])
    shifts = torch.tensor([0, 3, 7])[None, :, None]
    tokens = rows.pop("input_ids")
    return make_qwen(), tokens, {**rows, "position_ids": axes[:, None] + shifts}


FAMILIES = [gemma, smolvlm, llava_next, qwen2_audio, positions_of_three_axes]


def build(family):
    tf.set_seed(0)
    model, tokens, batch = family()
    labels = batch.get("labels", tokens.masked_fill(tokens >= IMAGE, -100))
    return model, {"attention_mask": torch.ones_like(tokens), **batch, "input_ids": tokens, "labels": labels}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("passes", [2, 3])
def test_a_repeated_batch_is_the_batch_so_many_times(family, passes):
    model, batch = build(family)
    model.eval()
    with torch.no_grad():
        once, repeated = model(**batch), model(**repeat_batch(batch, passes))
        media = next(name for name in ("pixel_values", "input_features") if name in batch)
        moved = model(**{**batch, media: batch[media].flip(0)})
    torch.testing.assert_close(repeated.logits, torch.cat([once.logits] * passes), rtol=1e-5, atol=1e-6)
    assert repeated.loss.item() == pytest.approx(once.loss.item(), rel=1e-5)
    assert (moved.logits - once.logits).abs().max() > 1e-5  # images that came to other rows would show


def shifted_reference(logits, labels, alpha):
    """R-Drop's loss of `[2 B, T, V]` by loops over the tokens."""
    size = len(labels)
    passes = logits.detach().double().unflatten(0, (2, size))[:, :, :-1].flatten(1, 2)
    return [value.item() for value in torch_reference(passes, labels[:, 1:].flatten(), alpha)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_step_is_the_formula_on_the_models_own_logits(family, tmp_path):
    found = {}
    for head in ("on", "off"):
        model, batch = build(family)
        kept = []
        model.register_forward_hook(lambda m, i, o, kept=kept: kept.append(o.logits) if m.training else None)
        args = {"rdrop_dropout": 0.2, "rdrop_fused_head": head, "per_device_train_batch_size": len(batch["labels"])}
        rows = [{"row": i} for i in range(len(batch["labels"]))]
        trainer = make_trainer(model, tmp_path, rows, lambda rows, batch=batch: dict(batch), **args)
        trainer.train()
        assert (trainer.rdrop_run.fused_head is not None) == (head == "on")
        found[head] = [step_logs(trainer)[0][name] for name in ("loss", "ce_loss", "kl_loss", "grad_norm")]
        logits = kept[-1]
    expected = shifted_reference(logits, batch["labels"], 2.0)
    assert found["off"][:3] == pytest.approx(expected, rel=1e-4) and found["off"][2] > 0
    assert found["on"] == pytest.approx(found["off"], rel=1e-4)


@pytest.mark.parametrize("head", ["on", "off"])
def test_packed_images_are_learned(head, tmp_path):
    """Train, evaluate, predict, save, load: what is to be read off the images is learned."""
    trainer = make_trainer(make_qwen(), tmp_path, max_steps=30, rdrop_fused_head=head)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    logs = step_logs(trainer)
    assert all(log["loss"] == pytest.approx(log["ce_loss"] + log["kl_loss"], rel=1e-5) for log in logs)
    assert logs[-1]["ce_loss"] < 0.5 * logs[0]["ce_loss"] and all(log["kl_loss"] > 0 for log in logs)
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.5 * before
    predicted = trainer.predict(image_rows())
    logits = predicted.predictions  # earlier releases of Transformers return the offsets of the positions too
    logits = logits[0] if isinstance(logits, tuple) else logits
    assert logits.shape == (16, 24, VOCAB) and predicted.metrics["test_loss"] == pytest.approx(after)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = tf.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        again = loaded(**collate_images(image_rows(8))).logits
    torch.testing.assert_close(again, torch.from_numpy(logits[:8]), rtol=1e-4, atol=1e-4)


def test_consistency_is_measured_at_the_positions_of_the_loss():
    model, batch = make_qwen(), collate_images(image_rows(8))
    found = measure_consistency(model, [batch], 2)
    model.eval()
    with torch.no_grad():
        outputs = model(**batch)
    assert found.scores["loss"].dropout_off == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert found.items == int((batch["labels"][:, 1:] != -100).sum()) and found.between_sub_models > 0


class Normalising(tf.Qwen2_5_VLForConditionalGeneration):
    """Takes a tensor that its name makes look like an image of each row, though it is the same for all."""

    def forward(self, *args, image_mean=None, pixel_values=None, **kwargs):
        if pixel_values is not None:
            pixel_values = pixel_values - image_mean.repeat(pixel_values.shape[1] // 3)
        return super().forward(*args, pixel_values=pixel_values, **kwargs)


class Named(RDropTrainer):
    non_batch_inputs = RDropTrainer.non_batch_inputs | {"image_mean"}


def test_an_input_that_is_read_otherwise_is_named(tmp_path):
    def collate(rows):
        return {**collate_images(rows), "image_mean": torch.ones(3)}

    tf.set_seed(0)
    model = Normalising(make_qwen().config)
    with pytest.raises(ValueError, match=r"image_mean \[3\]: repeated as a whole.*non_batch_inputs"):
        make_trainer(model, tmp_path, collate=collate).train()
    trainer = make_trainer(model, tmp_path, collate=collate, trainer_class=Named)
    trainer.train()
    assert step_logs(trainer)[0]["kl_loss"] > 0


class Unnamed(tf.Qwen2_5_VLForConditionalGeneration):
    """Takes its images under a name that says nothing."""

    def forward(self, *args, stuff=None, **kwargs):
        return super().forward(*args, pixel_values=stuff, **kwargs)


def test_images_under_another_name_are_refused_in_any_batch(tmp_path):
    seen = []

    def collate(rows):
        batch = collate_images(rows)
        images = batch.pop("pixel_values", None)
        seen.append(images)
        return batch if images is None else {**batch, "stuff": images}

    tf.set_seed(0)
    rows = image_rows(12)
    for order in (rows[1:3] + rows[:1], [rows[0], rows[3], rows[6], rows[1], rows[2], rows[4]]):  # images later on
        trainer = make_trainer(
            Unnamed(make_qwen().config), tmp_path, order, collate, per_device_train_batch_size=3, max_steps=2
        )
        trainer._get_train_sampler = lambda *args, order=order: range(len(order))
        with pytest.raises(ValueError, match=r"stuff \[\d+, 24\]: not repeated, as what is the same for all rows"):
            trainer.train()


def test_gradients_with_packed_images_are_those_of_the_formula(tmp_path):
    model, batch = make_qwen().train(), collate_images(image_rows(6))
    trainer = make_trainer(model, tmp_path, rdrop_fused_head="off")
    trainer.compute_loss(model, batch)  # the checks of a first batch
    tf.set_seed(1)
    trainer.compute_loss(model, batch).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    tf.set_seed(1)
    twice = {name: torch.cat((value, value)) for name, value in batch.items()}
    logits, labels = model(**twice).logits[:, :-1], twice["labels"][:, 1:]
    a, b = logits[labels != -100].log_softmax(-1).chunk(2)
    kl = (0.5 * ((a.exp() - b.exp()) * (a - b)).sum(-1)).mean()
    (F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + kl).backward()
    assert any("visual" in name and gradient.any() for name, gradient in found.items())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-5)
