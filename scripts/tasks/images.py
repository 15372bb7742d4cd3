"""Images of run_image_classification.py: a data set of the Hub, folders of images, or scikit-learn's digits."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits

from finetuning.data import DataArguments, load_splits, require_columns, splits_to_load
from finetuning.label_kinds import infer_labels
from finetuning.labels import SINGLE, Labels, feature_names, follow_model, labels_of_model
from finetuning.model import ModelArguments

logger = logging.getLogger(f"hf_rdrop.scripts.{__name__}")

FOLDER_ARGUMENTS = {"train": "train_dir", "validation": "validation_dir", "test": "test_dir"}


@dataclass
class ImageArguments(DataArguments):
    """Data: a data set of the Hub, folders that hold a folder of images for each class, or the bundled digits."""

    train_dir: str | None = field(
        default=None, metadata={"help": "Training images: a folder with one folder of images a class, named as it."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Validation images, in the same layout."})
    test_dir: str | None = field(
        default=None, metadata={"help": "Images to predict, in the same layout or, without labels, in one folder."}
    )
    digits: bool = field(
        default=False,
        metadata={
            "help": "Use the 1,797 handwritten digits (8 x 8) that come with scikit-learn; no network. Of each class "
            "the first two thirds are for training, the rest for validation."
        },
    )
    image_column_name: str = field(default="image", metadata={"help": "Column of the images in --dataset_name."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the classes in --dataset_name."})
    label_noise: float = field(
        default=0.0,
        metadata={
            "help": "Give this share of the training rows, drawn with --seed, a wrong class: to see how much a method "
            "suffers from wrong labels. Validation and test keep theirs."
        },
    )
    # Not for images, which lie in folders, are all of one size and are prepared when they are needed.
    train_file: None = field(default=None, init=False)
    validation_file: None = field(default=None, init=False)
    test_file: None = field(default=None, init=False)
    preprocessing_num_workers: None = field(default=None, init=False)
    overwrite_cache: bool = field(default=False, init=False)
    pad_to_max_length: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        folders = any(getattr(self, name) for name in FOLDER_ARGUMENTS.values())
        sources = (self.dataset_name, folders, self.digits)
        if not any(sources):
            raise ValueError("no data: give --dataset_name, --train_dir and --validation_dir, or --digits.")
        if sum(map(bool, sources)) > 1:
            raise ValueError(
                "more than one of --dataset_name, folders of images and --digits was given: it is unclear which to "
                "use. Give one of them."
            )
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"--label_noise is a share of the rows, from 0 to 1; got {self.label_noise}.")


# ---- Where images come from ----


def load_images(data_args: ImageArguments, model_args: ModelArguments, splits: Iterable[str]) -> dict[str, Dataset]:
    """Load the splits that the run needs; their images are decoded when they are asked for.

    Raises:
        ValueError: a split has no source, a folder is not as it should be, or a column holds no images.
    """
    if not data_args.dataset_name:
        return {split: _load_local(data_args, split) for split in splits_to_load(data_args, splits)}
    image, loaded = data_args.image_column_name, load_splits(data_args, model_args, splits)
    for split, dataset in loaded.items():
        require_columns(dataset, [image], split, "image_column_name")
        if split != "test":
            require_columns(dataset, [data_args.label_column_name], split, "label_column_name")
        if not isinstance(dataset.features[image], datasets.Image):
            raise ValueError(
                f"column {image!r} of the {split} data holds no images but {dataset.features[image]!s:.60}. Choose "
                f"another --image_column_name; the columns are {', '.join(dataset.column_names):.300}."
            )
    return loaded


def _load_local(data_args: ImageArguments, split: str) -> Dataset:
    image, label = data_args.image_column_name, data_args.label_column_name
    if data_args.digits:
        if split == "test":
            raise ValueError("--digits has training and validation images only: leave --do_predict out.")
        images, classes, kind = read_digits(split)
    else:
        path = getattr(data_args, FOLDER_ARGUMENTS[split])
        if path is None:
            task = {"train": "--do_train", "validation": "--do_eval", "test": "--do_predict"}[split]
            raise ValueError(f"{task} needs images: give --{FOLDER_ARGUMENTS[split]} (or --dataset_name).")
        images, classes = read_folder(path, needs_classes=split != "test")
        kind = datasets.Value("string")
    columns, features = {image: images}, {image: datasets.Image()}
    if classes is not None:
        columns[label], features[label] = classes, kind
    try:
        return Dataset.from_dict(columns, features=datasets.Features(features))
    except UnicodeEncodeError as error:
        raise ValueError(f"the file name {error.object!r} is no valid Unicode text. Rename the file.") from error


def read_digits(split: str) -> tuple[list[Image.Image], list[int], datasets.ClassLabel]:
    """Return images, classes and class names of the `train` or `validation` part of scikit-learn's digits.

    They are in the order of their collection, in which those of one writer follow each other. The validation part is
    the last third of each class, so most of it is by writers whom training has not seen.
    """
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # from 17 levels of grey
    chosen = np.zeros(len(pixels), dtype=bool)
    for digit in range(10):
        rows = np.flatnonzero(digits.target == digit)
        border = len(rows) * 2 // 3
        chosen[rows[:border] if split == "train" else rows[border:]] = True
    images = [Image.fromarray(image) for image in pixels[chosen]]
    return images, digits.target[chosen].tolist(), datasets.ClassLabel(names=[str(n) for n in digits.target_names])


def read_folder(path: str, needs_classes: bool) -> tuple[list[str], list[str] | None]:
    """List the image files of a folder by name, each with the name of its own folder as its class.

    Without classes (None) where the images lie in the folder itself.

    Raises:
        ValueError: there is no such folder, it holds no image, or it is unclear which class an image has.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{path} {'is a file' if folder.exists() else 'does not exist'}: give a folder of images.")
    classes = sorted(item for item in _visible(folder) if item.is_dir())
    loose = _images_in(folder)
    if loose and (classes or needs_classes):
        raise ValueError(
            f"{loose[0]} lies in no class's folder, so its class is not known. Put the images of each class into a "
            f"folder with its name: {folder / 'NAME' / loose[0].name}."
        )
    if not classes and not loose:
        raise ValueError(f"{path} holds no image, and no folder of images. Check that it was copied completely.")
    files = {item.name: _images_in(item) for item in classes}
    for item in classes:
        if inner := next((inner for inner in sorted(_visible(item)) if inner.is_dir()), None):
            raise ValueError(
                f"{inner} is a folder inside the folder of class {item.name!r}: it is unclear which of the two names "
                "the class. Put the images into one folder a class."
            )
        if not files[item.name]:
            raise ValueError(f"the folder {item} holds no image. Fill it, or remove it.")
    if not classes:
        return [str(file) for file in loose], None
    pairs = [(str(file), name) for name, images in files.items() for file in images]
    return [file for file, _ in pairs], [name for _, name in pairs]


def _visible(folder: Path) -> list[Path]:
    return [item for item in folder.iterdir() if not item.name.startswith(".")]


def _images_in(folder: Path) -> list[Path]:
    """List the images, which their names' endings tell; how much else there is gets logged."""
    files = sorted(item for item in _visible(folder) if not item.is_dir())
    others = [file for file in files if file.suffix.lower() not in _endings()]
    if others:
        logger.warning(
            "%s: %d files are left out, as their names are not those of images (%s).",
            *(folder, len(others), others[0].name),
        )
    return [file for file in files if file.suffix.lower() in _endings()]


@cache
def _endings() -> set[str]:
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


# ---- Classes ----


def choose_labels(data_args: ImageArguments, splits: dict[str, Dataset], config: Any) -> Labels:
    """Return the classes of the training data, or of the model when the run does not train."""
    column = data_args.label_column_name
    names = feature_names(next(iter(splits.values())).features.get(column))
    if "train" not in splits:
        return labels_of_model(config, names)
    found = infer_labels(list(splits["train"][column]), column, "train", names, SINGLE)
    return follow_model(found, config, training=True)


def format_predictions(files: Sequence[str] | None, predictions: np.ndarray, labels: Labels) -> str:
    """Write the text of a prediction file: a header, then each image's file (or number, without files) and class."""
    rows = zip(files or range(len(predictions)), predictions, strict=True)
    return "".join([f"{'image' if files else 'index'}\tprediction\n", *(f"{x}\t{labels.names[i]}\n" for x, i in rows)])


def file_names(dataset: Dataset, data_args: ImageArguments) -> list[str] | None:
    """Return the images' files inside --test_dir; None for another source."""
    if data_args.test_dir is None:
        return None
    stored = dataset.cast_column(data_args.image_column_name, datasets.Image(decode=False))
    folder = Path(data_args.test_dir).expanduser()
    return [Path(item["path"]).relative_to(folder).as_posix() for item in stored[data_args.image_column_name]]
