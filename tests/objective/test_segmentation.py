"""Semantic segmentation: pixels are compared at the logits' resolution, those that the loss ignores are left out."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from hf_rdrop import RDropTrainer, RDropTrainingArguments, measure_consistency
from hf_rdrop.functional import symmetric_kl
from hf_rdrop.objective.heads import nearest_pixels
from support.reference import naive_bernoulli_kl, naive_cross_entropy, naive_symmetric_kl
from support.training import step_logs, train

IGNORED = 255
CLASSES = 3
VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
VIT |= {"image_size": 32, "patch_size": 8}


def make(name, p=0.3, classes=CLASSES):
    tf.set_seed(0)
    rates = {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}
    match name:
        case "segformer":  # logits of a quarter of the images' size, batch normalisation in the head
            sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
            sizes |= {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
            rest = {"decoder_hidden_size": 16, "classifier_dropout_prob": p, "drop_path_rate": 0.0}
            config = tf.SegformerConfig(**sizes, **rest, **rates, num_labels=classes)
            model = tf.SegformerForSemanticSegmentation(config)
        case "beit":  # half of their size, and a second head with a loss of its own
            taken = {"out_indices": [1, 2, 3, 4], "reshape_hidden_states": False, "pool_scales": [1, 2]}
            model = tf.BeitForSemanticSegmentation(tf.BeitConfig(**VIT, **rates, **taken, num_labels=classes))
        case "dpt":  # larger than the images; normalised by row, not by batch
            taken = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
            taken |= {"is_hybrid": False, "semantic_classifier_dropout": p}
            model = tf.DPTForSemanticSegmentation(tf.DPTConfig(**VIT, **rates, **taken, num_labels=classes))
            model.head.head[1] = torch.nn.GroupNorm(1, 8)
            model.auxiliary_head.head[1] = torch.nn.GroupNorm(1, 8)
            model.auxiliary_head.head[3].p = p
        case "upernet":  # as large as the images, and the label to ignore has another name
            stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "layer_scale_init_value": 1.0}
            backbone = tf.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, drop_path_rate=p, **stages)
            sizes = {"hidden_size": 16, "pool_scales": [1, 2], "auxiliary_in_channels": 8, "auxiliary_channels": 8}
            config = tf.UperNetConfig(backbone_config=backbone, **sizes, num_labels=classes)
            model = tf.UperNetForSemanticSegmentation(config)
    with torch.no_grad():  # a usual initialisation leaves a tiny model's logits close to zero
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def rows_for(count=4, classes=CLASSES, ignored=True):
    draw = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        labels = torch.randint(classes, (32, 32), generator=draw)
        if ignored:
            labels[: 8 * (i % 3)] = IGNORED
            labels[9, 3:20] = IGNORED
        rows.append({"pixel_values": torch.randn(3, 32, 32, generator=draw), "labels": labels})
    return rows


def run(model, rows, size=4, steps=1, **args):
    """A run of one step; what the model was given and returned in training."""
    seen = []

    def keep(module, args, kwargs, outputs):
        if module.training:
            seen.append((outputs.logits.detach().double(), kwargs["labels"], outputs.loss.detach()))

    model.register_forward_hook(keep, with_kwargs=True)
    defaults = {"max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    trainer = train(model, rows=rows, **{**defaults, "rdrop_alpha": 2.0, "max_grad_norm": 0, **args})
    return trainer, seen


@pytest.mark.parametrize("name", ["segformer", "beit", "dpt", "upernet"])
def test_loss_is_the_models_own_and_the_divergence_that_of_the_pixels_that_count(name):
    trainer, [(logits, labels, loss)] = run(make(name), rows_for())
    log, size, (height, width) = step_logs(trainer)[0], len(labels) // 2, logits.shape[2:]
    values = []
    for row in range(size):
        for i in range(height):
            for j in range(width):
                if labels[row, i * 32 // height, j * 32 // width] != IGNORED:
                    a, b = logits[row, :, i, j].tolist(), logits[size + row, :, i, j].tolist()
                    values.append(naive_symmetric_kl(a, b))
    assert torch.equal(labels[:size], labels[size:]) and 0 < len(values) < size * height * width
    assert log["kl_loss"] == pytest.approx(sum(values) / len(values), rel=1e-4) and log["kl_loss"] > 1e-5
    assert log["ce_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert log["loss"] == pytest.approx(log["ce_loss"] + log["kl_loss"], rel=1e-6)
    if name == "segformer":
        large = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False).movedim(1, -1)
        kept = labels != IGNORED
        pixels = zip(large[kept].tolist(), labels[kept].tolist(), strict=True)
        assert loss.item() == pytest.approx(sum(naive_cross_entropy(*pixel) for pixel in pixels) / int(kept.sum()))


def test_object_or_background():
    """One score for each pixel: the model's own loss is a binary cross-entropy."""
    trainer, [(logits, labels, loss)] = run(make("segformer", classes=1), rows_for(classes=2))
    log, size = step_logs(trainer)[0], len(labels) // 2
    kept = labels[:size, ::4, ::4] != IGNORED
    pairs = zip(logits[:size, 0][kept].tolist(), logits[size:, 0][kept].tolist(), strict=True)
    assert log["kl_loss"] == pytest.approx(
        sum(naive_bernoulli_kl(*pair) for pair in pairs) / int(kept.sum()), rel=1e-4
    )
    assert log["ce_loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_gradient_is_that_of_the_formula():
    model, batch = make("dpt").train(), tf.default_data_collator(rows_for())
    args = RDropTrainingArguments("unused", rdrop_alpha=3.0, use_cpu=True, report_to=[])
    trainer = RDropTrainer(model=model, args=args, train_dataset=[])
    tf.set_seed(1)
    trainer.compute_loss(model, batch).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    tf.set_seed(1)
    twice = {name: torch.cat((value, value)) for name, value in batch.items()}
    outputs = model(**twice)
    a, b = outputs.logits.movedim(1, -1).chunk(2)
    mask = F.interpolate(batch["labels"][:, None].double(), size=a.shape[1:3], mode="nearest")[:, 0] != IGNORED
    (outputs.loss + 1.5 * symmetric_kl(a, b, mask)).backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def drop_by_pass(model):
    """Put a fixed mask for each pass before the last layer, in place of dropout."""
    masks = (torch.rand(2, 8, generator=torch.Generator().manual_seed(3)) > 0.3).float()
    last = [module for module in model.head.modules() if isinstance(module, torch.nn.Conv2d)][-1]

    def drop(module, args):
        return args[0] * masks.repeat_interleave(len(args[0]) // 2, 0)[:, :, None, None] if module.training else None

    last.register_forward_pre_hook(drop)
    return model


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(("size", "steps"), [(2, 2), (1, 4)])
def test_accumulation_changes_nothing(size, steps, ignored):
    """CE counts by pixels of the labels. So does the divergence, whose own pixels are as many but for rounding."""
    logs = []
    for split in ((4, 1), (size, steps)):
        trainer, _ = run(drop_by_pass(make("dpt", 1e-9)), rows_for(ignored=ignored), *split)
        logs.append(step_logs(trainer)[0])
    one, other = logs
    assert one["kl_loss"] > 1e-5
    assert other["ce_loss"] == pytest.approx(one["ce_loss"], rel=1e-5)
    assert other["kl_loss"] == pytest.approx(one["kl_loss"], rel=5e-3 if ignored else 1e-5)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=5e-3 if ignored else 1e-4)


def test_rows_without_a_label_are_compared_when_asked():
    rows = rows_for()
    rows[1]["labels"] = torch.full((32, 32), IGNORED)
    trainer, [(logits, labels, _)] = run(make("segformer"), rows, rdrop_unlabeled=True)
    size = len(labels) // 2
    kept = labels[:size, ::4, ::4] != IGNORED
    bare = [row for row in range(size) if not kept[row].any()]
    kept[bare] = True
    value = symmetric_kl(*logits.movedim(1, -1).chunk(2), kept)
    assert len(bare) == 1 and step_logs(trainer)[0]["kl_loss"] == pytest.approx(value.item(), rel=1e-4)


def test_nearest_pixels_are_those_of_torch():
    labels = torch.randint(9, (2, 30, 17), generator=torch.Generator().manual_seed(0))
    for size in ((7, 5), (30, 17), (64, 20), (1, 1)):
        expected = F.interpolate(labels[:, None].double(), size=size, mode="nearest")[:, 0]
        assert torch.equal(nearest_pixels(labels, torch.zeros(2, 3, *size)).double(), expected)


def test_a_label_outside_the_classes_is_named():
    rows = rows_for()
    rows[0]["labels"][20, 20] = 7
    with pytest.raises(ValueError, match=r"from 0 to 7, but SegformerForSemanticSegmentation has 3 classes.* or 255"):
        run(make("segformer"), rows)


def test_evaluation_and_consistency(tmp_path):
    model = make("segformer")
    trainer, _ = run(model, rows_for())
    loss = trainer.evaluate(rows_for())["eval_loss"]
    batch = tf.default_data_collator(rows_for())
    found = measure_consistency(model, [batch], 2)
    model.eval()
    with torch.no_grad():
        outputs = model(**batch)
    assert loss == pytest.approx(outputs.loss.item(), rel=1e-5)
    small = batch["labels"][:, ::4, ::4]
    ce = F.cross_entropy(outputs.logits, small, ignore_index=IGNORED).item()
    assert found.scores["loss"].dropout_off == pytest.approx(ce, rel=1e-5)
    assert found.items == int((small != IGNORED).sum()) and found.between_sub_models > 0
    with pytest.raises(ValueError, match="one score for each pixel"):
        measure_consistency(make("segformer", classes=1), [batch], 2)
