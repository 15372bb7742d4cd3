"""Make eight rows for a tiny model: lengths and numbers of labels differ, so that a wrong mean shows."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH, TARGETS, CLASSES = 8, 16, 10, 3
FIRST, LAST = 10, 30  # token ids: neither special nor a placeholder in any tiny model
LENGTHS = (16, 9, 12, 16, 8, 14, 11, 13)
SOUND, LONG_SOUND = 4000, 8000

Rows = list[dict[str, Tensor]]


def make_rows(head: str, model: nn.Module) -> Rows:
    """Make the rows that a model of this head is trained on; of text alone where a model takes text and images."""
    draw = torch.Generator().manual_seed(1)
    names = set(inspect.signature(model.forward).parameters)
    config: Any = model.config
    rows = []
    for i in range(ROWS):
        row = _inputs(head, names, config, i, draw)
        row.update(_labels(head, row, config, i, draw, names))
        if config.model_type == "fsmt":  # which takes the source for the target where it is told of none
            row["decoder_input_ids"] = row["labels"].roll(1).clamp(min=1)
        rows.append(row)
    return rows


def with_images(rows: Rows, model: Any) -> Rows | None:
    """Put an image before the text of each row; None for a model whose way of taking images is not known here.

    Either `pixel_values` has an image a row, or it holds the patches of all rows one after another (Qwen2-VL and
    relatives), whose numbers are `image_grid_thw`.
    """
    names, config = set(inspect.signature(model.forward).parameters), model.config
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    vision = getattr(config, "vision_config", None)
    if token is None or vision is None or "pixel_values" not in names or not hasattr(model, "get_image_features"):
        return None
    for shape in ("patches",) if "image_grid_thw" in names else ("one image", "list of images"):
        draw = torch.Generator().manual_seed(2)
        images = [_pixels(shape, names, config, draw) for _ in rows]
        try:
            count = _count_features(model, stack(images[:1]))
        except Exception:
            if shape != "one image":
                raise
        else:
            pairs = zip(rows, images, strict=True)
            return [{**_after_image(row, token, count, names), **image} for row, image in pairs]
    return None


def _pixels(shape: str, names: set[str], config: Any, draw: Any) -> dict[str, Tensor]:
    vision, size = config.vision_config, _size(config)
    if shape == "patches":
        side = 2 * (getattr(vision, "spatial_merge_size", None) or 2)
        channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
        width = channels * (getattr(vision, "temporal_patch_size", None) or 1) * vision.patch_size**2
        patches = torch.randn(side * side, width, generator=draw)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, side, side]])}
    pixels = torch.randn(3, size, size, generator=draw)
    sizes = {"image_sizes": torch.tensor([size, size])} if "image_sizes" in names else {}
    return {"pixel_values": pixels[None] if shape == "list of images" else pixels, **sizes}


def _count_features(model: Any, batch: dict[str, Tensor]) -> int:
    """Count the positions that an image takes among those of the text."""
    with torch.no_grad():
        features = copy.deepcopy(model).eval().get_image_features(**batch)
    features = (
        getattr(features, "pooler_output", None) if not isinstance(features, (Tensor, list, tuple)) else features
    )
    width = model.config.get_text_config().hidden_size
    tensors = [features] if isinstance(features, Tensor) else list(features)
    return sum(t.numel() for t in tensors) // width


def _after_image(row: dict[str, Tensor], token: int, count: int, names: set[str]) -> dict[str, Tensor]:
    image = torch.full((count,), token)
    found = {
        "input_ids": torch.cat((image, row["input_ids"])),
        "attention_mask": torch.cat((torch.ones_like(image), row["attention_mask"])),
        "labels": torch.cat((torch.full_like(image, -100), row["labels"])),
    }
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in names:
            found[name] = (found["input_ids"] == token).long()
    return found


def stack(rows: Rows) -> dict[str, Tensor]:
    """Collate rows of one size; patches are laid one after another."""
    packed = {"pixel_values", "image_grid_thw"} if "image_grid_thw" in rows[0] else set()
    found: dict[str, Any] = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if isinstance(first, dict):  # the objects of an image
            found[name] = values
        else:
            found[name] = torch.cat(values) if name in packed else torch.stack(values)
    return found


# ---- Inputs ----

_VISION = (
    "image classification",
    "video classification",
    "semantic segmentation",
    "masked images",
    "object detection",
)


def _inputs(head: str, names: set[str], config: Any, i: int, draw: Any) -> dict[str, Tensor]:
    if head in _VISION:
        return {_image_name(names): _image(head, config, draw)}
    if head in ("speech seq2seq", "CTC", "audio classification", "audio frame classification", "speaker embeddings"):
        found = _sound(names, config, draw, LONG_SOUND if head == "speaker embeddings" else SOUND)
        if "input_ids" in names and "decoder_input_ids" not in names:
            return _text(config, i, draw)  # a language model that hears: text alone
        return found
    row = _text(config, i, draw)
    if head == "multiple choice":
        other = _text(config, (i + 3) % ROWS, draw)
        row = {name: torch.stack((row[name], other[name])) for name in row}
    if "bbox" in names:
        whole = torch.float if config.model_type == "bros" else torch.long
        row["bbox"] = torch.zeros(*row["input_ids"].shape, 4, dtype=whole)
    if "visual_feats" in names and hasattr(config, "visual_feat_dim"):
        row["visual_feats"] = torch.randn(5, config.visual_feat_dim, generator=draw)
        row["visual_pos"] = torch.rand(5, 4, generator=draw)
    if head in ("question answering", "multiple choice") and config.model_type == "longformer":
        row["input_ids"][..., [5, 6, 8]] = config.sep_token_id  # question and text are parted by these
    if head in ("visual question answering", "document question answering"):
        row.update(_visual(names, config, draw))
    return row


def _text(config: Any, i: int, draw: Any) -> dict[str, Tensor]:
    length = LENGTHS[i]
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    end, pad = getattr(text, "eos_token_id", None), getattr(text, "pad_token_id", None)
    ids = torch.randint(FIRST, LAST, (LENGTH,), generator=draw)
    if isinstance(end, int) and 0 <= end < 256 and getattr(config, "is_encoder_decoder", False):
        ids[length - 1] = end  # BART's classifiers look for it
    ids[length:] = pad if isinstance(pad, int) and pad >= 0 else 0
    return {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < length).long()}


def _image_name(names: set[str]) -> str:
    return next(n for n in ("pixel_values", "pixel_values_videos", "inputs") if n in names)


def _image(head: str, config: Any, draw: Any) -> Tensor:
    size = _size(config)
    channels = getattr(config, "num_channels", None) or 3
    shape = (channels, size, size)
    if head == "video classification":
        frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None) or 4
        shape = (frames, *shape)
    return torch.randn(shape, generator=draw)


def _size(config: Any) -> int:
    for owner in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        size = getattr(owner, "image_size", None) or getattr(owner, "crop_size", None)
        if size:
            return size if isinstance(size, int) else size[0]
    return 64


def _sound(names: set[str], config: Any, draw: Any, samples: int) -> dict[str, Tensor]:
    if "input_features" in names:
        width = getattr(config, "feature_projection_input_dim", None) or getattr(config, "input_dim", None)
        if width:
            return {"input_features": torch.randn(24, width, generator=draw)}
        encoder = getattr(config, "encoder_config", config)
        mel = getattr(encoder, "num_mel_bins", None)
        if getattr(config, "max_source_positions", None) and getattr(config, "model_type", "") == "whisper":
            return {"input_features": torch.randn(mel, 2 * config.max_source_positions, generator=draw)}
        if getattr(config, "input_feat_per_channel", None):
            mel = config.input_feat_per_channel
        found = {"input_features": torch.randn(64, mel or 80, generator=draw)}
        if "parakeet" in config.model_type:  # which asks for it
            found["attention_mask"] = torch.ones(64, dtype=torch.long)
        return found
    if getattr(config, "model_type", "") == "audio-spectrogram-transformer":
        return {"input_values": torch.randn(config.max_length, config.num_mel_bins, generator=draw)}
    return {"input_values": torch.randn(samples, generator=draw)}


def _visual(names: set[str], config: Any, draw: Any) -> dict[str, Tensor]:
    if "pixel_values" not in names:
        return {}
    size = _size(config)
    return {"pixel_values": torch.randn(3, size, size, generator=draw)}


# ---- Labels ----


def _labels(head: str, row: dict[str, Tensor], config: Any, i: int, draw: Any, names: set[str]) -> dict[str, Any]:
    if head in ("question answering", "document question answering"):
        return {"start_positions": torch.tensor(1 + i % 4), "end_positions": torch.tensor(3 + i % 4)}
    if head in ("token classification", "masked LM"):
        labels = torch.full((LENGTH,), -100)
        n = LENGTHS[i]
        if head == "masked LM":
            places = torch.randperm(n - 2, generator=draw)[: 1 + i % 3] + 1
            labels[places] = torch.randint(FIRST, LAST, (len(places),), generator=draw)
        else:
            labels[1 : n - 1] = torch.randint(0, CLASSES, (n - 2,), generator=draw)
        return {"labels": labels}
    if "decoder_input_ids" in names and head in ("seq2seq LM", "speech seq2seq", "image-text-to-text"):
        labels = torch.full((TARGETS,), -100)
        n = 3 + i % 7
        labels[:n] = torch.randint(FIRST, LAST, (n,), generator=draw)
        return {"labels": labels}
    if head in ("causal LM", "image-text-to-text", "seq2seq LM", "speech seq2seq"):
        if "input_ids" not in row:
            labels = torch.full((TARGETS,), -100)
            labels[: 3 + i % 7] = torch.randint(FIRST, LAST, (3 + i % 7,), generator=draw)
            return {"labels": labels}
        labels = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
        labels[: i % 3] = -100
        return {"labels": labels}
    if head == "semantic segmentation":
        size = next(iter(row.values())).shape[-1]
        return {"labels": torch.randint(0, CLASSES, (size, size), generator=draw)}
    if head == "object detection":
        return {"labels": {"class_labels": torch.tensor([i % 2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}}
    if head == "CTC":
        labels = torch.full((4,), -100)
        labels[: 1 + i % 3] = torch.randint(3, 20, (1 + i % 3,), generator=draw)
        return {"labels": labels}
    if head == "audio frame classification":
        return {"labels": torch.randint(0, 2, (12, CLASSES), generator=draw)}
    if head == "visual question answering":
        return {"labels": torch.rand(CLASSES, generator=draw)}
    if head == "masked images":
        side = _size(config) // (getattr(config, "patch_size", None) or 8)
        return {"bool_masked_pos": torch.arange(side * side) % 2 == 0}
    classes = 2 if head in ("multiple choice", "next sentence") else CLASSES
    return {"labels": torch.tensor(i % classes)}
