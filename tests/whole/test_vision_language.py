"""A vision-language model with packed patches and grid sizes, one or two images a row, fine-tunes end to end."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from hf_rdrop import RDropTrainer, RDropTrainingArguments, measure_consistency
from support.reference import torch_reference

IMAGE, START, END = 190, 191, 192


def make_model(cls="Qwen2_5_VL"):
    torch.manual_seed(0)
    text = {
        "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 1, "num_heads": 2, "in_channels": 3, "patch_size": 4, "temporal_patch_size": 2}
    if cls == "Qwen2_5_VL":
        vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
    else:
        vision |= {"embed_dim": 32, "hidden_size": 32}
    config = getattr(tf, f"{cls}Config")(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=189, vision_start_token_id=START,
        vision_end_token_id=END,
    )  # fmt: skip
    return getattr(tf, f"{cls}ForConditionalGeneration")(config)


def collate(rows):
    """Row n has one or two images of four or eight merged patches, then a text that tells their number."""
    texts, patches, grids = [], [], []
    for n in (row["n"] for row in rows):
        text, draw = [], torch.Generator().manual_seed(n)
        for _ in range(1 + n % 2):
            height, width = 4, 4 if n % 3 else 8
            grids.append([1, height, width])
            patches.append(torch.randn(height * width, 3 * 2 * 4 * 4, generator=draw))
            text += [START, *[IMAGE] * (height * width // 4), END]
        texts.append([*text, *range(10, 15), 20 + n % 2])
    length = max(map(len, texts))
    ids = torch.tensor([text + [1] * (length - len(text)) for text in texts])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 1).long(),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "labels": ids.masked_fill((ids == 1) | (ids > 100), -100),
        "pixel_values": torch.cat(patches),
        "image_grid_thw": torch.tensor(grids),
    }


def make_trainer(tmp_path, model, **args):
    args = RDropTrainingArguments(
        str(tmp_path), learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, rdrop_alpha=2.0, remove_unused_columns=False, max_grad_norm=0,
        **{"rdrop_dropout": 0.2, **args},
    )  # fmt: skip
    rows = [{"n": n} for n in range(8)]
    return RDropTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:4], data_collator=collate)


@pytest.mark.parametrize("cls", ["Qwen2_5_VL", "Qwen2VL"])
def test_a_vision_language_model_fine_tunes_the_same_with_and_without_the_fused_head(tmp_path, cls):
    losses = {}
    for fused_head in ("off", "on"):
        trainer = make_trainer(
            tmp_path, make_model(cls), rdrop_fused_head=fused_head, max_steps=6, per_device_train_batch_size=4
        )
        trainer.train()
        assert (trainer.rdrop_run.fused_head is not None) == (fused_head == "on")
        history = trainer.state.log_history
        losses[fused_head] = [line["loss"] for line in history if "loss" in line]
        assert losses[fused_head][-1] < losses[fused_head][0] - 1 and all(
            line.get("kl_loss", 1) > 0 for line in history
        )
        assert trainer.evaluate()["eval_loss"] < 5
    torch.testing.assert_close(losses["on"], losses["off"], rtol=1e-4, atol=0)
    assert measure_consistency(trainer.model, [collate([{"n": 1}, {"n": 2}])]).between_sub_models > 0


def test_the_first_step_is_the_recomputed_objective(tmp_path):
    model, kept = make_model(), {}
    model.register_forward_hook(
        lambda m, args, kwargs, out: kept.update(kwargs, logits=out.logits) if m.training else None, with_kwargs=True
    )
    options = {"rdrop_fused_head": "off", "max_steps": 1, "per_device_train_batch_size": 4}
    trainer = make_trainer(tmp_path, model, **options)
    trainer.train()
    line = trainer.state.log_history[0]
    assert len(kept["pixel_values"]) == 2 * kept["image_grid_thw"][: len(kept["image_grid_thw"]) // 2].prod(1).sum()
    labels = F.pad(kept["labels"][:4, 1:], (0, 1), value=-100)
    loss, ce, kl = torch_reference(
        kept["logits"].detach().double().unflatten(0, (2, 4)).flatten(1, 2), labels.flatten(), 2.0
    )
    for name, value in (("loss", loss), ("ce_loss", ce), ("kl_loss", kl)):
        assert line[name] == pytest.approx(value.item(), rel=1e-5), name


@pytest.mark.parametrize(("size", "accumulation"), [(2, 2), (1, 4)])
def test_accumulation_changes_nothing(tmp_path, size, accumulation):
    """With a rate at which no element is dropped in practice."""
    found = []
    for rows, steps in ((4, 1), (size, accumulation)):
        options = {"max_steps": 1, "per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        trainer = make_trainer(tmp_path, make_model(), rdrop_dropout=1e-9, **options)
        trainer.train()
        found.append([trainer.state.log_history[0]["loss"], trainer.state.log_history[0]["grad_norm"]])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0)
