"""Images as a model takes them: its image processor, and data sets that prepare each image when it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

# Not from `transformers` itself, where the oldest releases ask for torchvision for Pillow's processors too.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from finetuning.model import ModelArguments, load_part

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names, by the number of channels
KEPT_BYTES = 2**28  # of prepared images in memory; what is beyond is prepared again each time
DEEP = ("I", "F")  # 16 bits a channel and more: Pillow would cut these down to white


@dataclass
class ImageModelArguments(ModelArguments):
    """Model to train or evaluate, and how it takes its images."""

    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor, if not the model's own."}
    )
    tokenizer_name: None = field(default=None, init=False)


def load_image_processor(model_args: ImageModelArguments) -> Any:
    """Load the model's image processor, in its form for Pillow, so that results do not depend on what is installed."""
    name = model_args.image_processor_name or model_args.model_name_or_path
    argument = "image_processor_name" if model_args.image_processor_name else "model_name_or_path"
    return load_part(AutoImageProcessor, name, argument, model_args, backend="pil")


class PreparedImages(torch.utils.data.Dataset):
    """Rows with `pixel_values` `[C, H, W]` and, where there are targets, `labels`.

    Preparation is the same every time, so what fits into `KEPT_BYTES` is prepared once: not in the worker processes of
    a data loader, where it would be kept several times over.

    Args:
        dataset: with the images.
        column: of the images.
        targets: class index of each row, or None.
        processor: the model's image processor.
        channels: that the model takes; images are converted to grey, RGB or RGBA.
    """

    def __init__(
        self, dataset: datasets.Dataset, column: str, targets: Sequence[int] | None, processor: Any, channels: int
    ) -> None:
        if channels not in MODES:
            raise ValueError(
                f"the model takes images of {channels} channels, and files hold 1 (grey), 3 (RGB) or 4 (RGBA): choose "
                "another --model_name_or_path."
            )
        self.images = dataset.select_columns([column])
        self.column, self.targets, self.processor, self.mode = column, targets, processor, MODES[channels]
        self._kept: dict[int, Tensor] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self._kept.get(index)
        row = {"pixel_values": self.keep(index, self.prepare(self.open(index))) if pixels is None else pixels}
        return row if self.targets is None else {**row, "labels": self.targets[index]}

    def open(self, index: int) -> Image.Image:
        """Open the image of a row; any error if it is none."""
        image = self.images[index][self.column]
        if image is None:
            raise ValueError("there is no image")
        if image.mode.startswith(DEEP):
            raise ValueError(f"it has more than 8 bits a channel (Pillow's mode {image.mode})")
        return image.convert(self.mode)

    def prepare(self, image: Image.Image) -> Tensor:
        """Return what the model takes, `[C, H, W]`."""
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    def keep(self, index: int, pixels: Tensor) -> Tensor:
        """Return the prepared image, kept if there is room."""
        room = self._kept_bytes + pixels.nbytes <= KEPT_BYTES
        if index not in self._kept and room and torch.utils.data.get_worker_info() is None:
            self._kept[index] = pixels
            self._kept_bytes += pixels.nbytes
        return pixels

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}, "_kept_bytes": 0}  # it goes to a worker


class _Trial(torch.utils.data.Dataset):
    """Same rows, as the shape of each image or why it cannot be prepared."""

    def __init__(self, images: PreparedImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[tuple[int, ...], str]:
        try:
            image = self.images.open(index)
        except Exception as error:  # of many kinds, from Pillow and its plugins
            advice = "Replace it by one of 8 bits a channel that can be opened, or remove it."
            return (), f"cannot be used: {_text(error)}. {advice}"
        try:
            return tuple(self.images.keep(index, self.images.prepare(image)).shape), ""
        except Exception as error:
            advice = "Correct its preprocessor_config.json, or give another --image_processor_name."
            return (), f"cannot be prepared by the model's image processor: {_text(error)}. {advice}"


def _text(error: Exception) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"


def check_images(images: PreparedImages, split: str, workers: int = 0) -> None:
    """Prepare every image once, so that a broken one is found before the first step.

    Raises:
        ValueError: one cannot be read, or they would not fit into one batch.
    """
    rows = DataLoader(_Trial(images), batch_size=None, num_workers=workers)
    first = None
    for row, (shape, reason) in enumerate(datasets.utils.tqdm(rows, desc=f"Checking {split} images"), 1):
        if reason:
            stored = images.images.cast_column(images.column, datasets.Image(decode=False))[row - 1][images.column]
            file = f" ({stored['path']})" if stored and stored["path"] else ""
            raise ValueError(f"row {row} of the {split} data, column {images.column!r}: the image{file} {reason}")
        first = first or shape
        if tuple(shape) != tuple(first):
            raise ValueError(
                f"row {row} of the {split} data: its image has the shape {tuple(shape)} where row 1 has "
                f"{tuple(first)}, so they do not fit into one batch. Give images of one size, or an image processor "
                "that makes them so (do_resize with height and width, or do_center_crop, in its configuration)."
            )
