"""A tiny vision-language model, with patches packed over the images of a batch, and rows of 0 to 2 images each."""

import inspect

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, set_seed

IMAGE, START, END, VOCAB, LENGTH = 36, 37, 38, 40, 24
GRIDS = ((4, 4), (4, 8), (8, 4))  # patches; each square of 2 x 2 is one token


def make_qwen(p=0.1, vocab=VOCAB, **text):
    set_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {"vocab_size": vocab, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, **text}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "attention_dropout": p, "initializer_range": 0.3}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 16}
    vision |= {"patch_size": 2, "window_size": 8, "fullatt_block_indexes": [0], "initializer_range": 0.3}
    ids = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 39}
    text |= {"rope_parameters": rope, "pad_token_id": 0}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))


def image_rows(rows=16, seed=0):
    """Bright and dark images; to be learned is how many there are, and how many of them are bright."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(rows):
        ids, patches, grids, bright = [], [], [], 0
        for k in range(i % 3):
            height, width = GRIDS[(i + k) % 3]
            light = int(torch.randint(2, (), generator=draw))
            patches.append(torch.randn(height * width, 3 * 2 * 2 * 2, generator=draw) * 0.1 + 2 * light - 1)
            grids.append([1, height, width])
            ids += [START, *[IMAGE] * (height * width // 4), END]
            bright += light
        answer = [10 + len(grids), 20 + bright]
        ids += [5] * (1 + i % 2)
        row = {"input_ids": ids + answer, "labels": [-100] * len(ids) + answer}
        found.append({**row, "pixel_values": patches, "image_grid_thw": grids})
    return found


def collate_images(rows):
    """Pad the texts, pack the patches of all images one after the other: `[patches, ...]` and `[images, 3]`."""

    def pad(name, filler):
        return torch.tensor([row[name] + [filler] * (LENGTH - len(row[name])) for row in rows])

    ids = pad("input_ids", 0)
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": pad("labels", -100)}
    if "mm_token_type_ids" in inspect.signature(Qwen2_5_VLForConditionalGeneration.forward).parameters:
        batch["mm_token_type_ids"] = (ids == IMAGE).long()
    if patches := [patch for row in rows for patch in row["pixel_values"]]:
        batch["pixel_values"] = torch.cat(patches)
        batch["image_grid_thw"] = torch.tensor([grid for row in rows for grid in row["image_grid_thw"]])
    return batch
