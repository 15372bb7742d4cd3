"""Arguments of init_model.py, and what makes no model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass
class InitModelArguments:
    """Text that the tokenizer is trained on, and the size of the model."""

    output_dir: str = field(metadata={"help": "Folder to write; must be new or empty unless --overwrite is given."})
    train_files: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files with text: .txt (one text a line), .csv, .tsv, .json or .jsonl, also .gz. For vision none."
        },
    )
    text_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns that hold the text, for csv and json files. A dot reaches into a nested column "
            "(translation.en); a column of word lists (tokens) is joined by blanks."
        },
    )
    architecture: Literal["encoder", "decoder", "encoder-decoder", "vision"] = field(
        default="encoder",
        metadata={
            "help": "encoder for classification, tagging and masked language modelling, decoder for causal language "
            "modelling, encoder-decoder for translation and summarisation, vision for images."
        },
    )
    vocab_size: int = field(
        default=8000, metadata={"help": "Largest size of the vocabulary, special tokens and 256 bytes included."}
    )
    hidden_size: int = field(default=256, metadata={"help": "Width of the model; a multiple of --num_heads."})
    num_layers: int = field(default=4, metadata={"help": "Layers (of the encoder and of the decoder)."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads per layer."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of the feed-forward layers; 4 x hidden_size when not given."}
    )
    max_length: int = field(default=128, metadata={"help": "Longest input in tokens; longer ones get truncated."})
    image_size: int = field(default=224, metadata={"help": "vision: width and height that images are scaled to."})
    patch_size: int = field(default=16, metadata={"help": "vision: width and height of the patches of an image."})
    num_channels: int = field(default=3, metadata={"help": "vision: 1 for grey, 3 for RGB, 4 for RGBA."})
    dropout: float | None = field(
        default=None,
        metadata={
            "help": "Dropout rate, from 0 up to below 1: 0.3 for the encoder-decoder and 0.1 for the others when not "
            "given. The encoder-decoder has none on attention weights, as is usual for small translation models."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of the initial weights."})
    overwrite: bool = field(default=False, metadata={"help": "Replace --output_dir when it is not empty."})


def check_arguments(args: InitModelArguments) -> None:
    """Raise `ValueError` for sizes that make no model, and for an output folder that is in use."""
    sizes = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_length", "vocab_size")
    for name in (*sizes, "image_size", "patch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    if args.max_length < 4:
        raise ValueError(f"--max_length must be at least 4 (special tokens included), got {args.max_length}.")
    if args.hidden_size % args.num_heads:
        raise ValueError(f"--hidden_size {args.hidden_size} is not a multiple of --num_heads {args.num_heads}.")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout must be from 0 up to below 1, got {args.dropout}.")
    if args.architecture == "vision":
        _check_vision(args)
    elif not args.train_files:
        raise ValueError(f"--architecture {args.architecture} needs text for its tokenizer: give --train_files.")
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output_dir {output} is a file; choose another name.")
    if output.exists() and any(output.iterdir()):
        if not args.overwrite:
            raise ValueError(f"--output_dir {output} is not empty; choose another folder, or give --overwrite.")
        if not (output / "config.json").is_file():
            raise ValueError(
                f"--output_dir {output} holds something else than a model (no config.json), and --overwrite would "
                "delete it; choose another folder."
            )


def _check_vision(args: InitModelArguments) -> None:
    """Raise `ValueError` for images that cannot be cut into patches, and for text."""
    if args.train_files or args.text_columns:
        raise ValueError("--architecture vision has no tokenizer: leave --train_files and --text_columns out.")
    if args.image_size % args.patch_size:
        raise ValueError(
            f"--image_size {args.image_size} is not a multiple of --patch_size {args.patch_size}, so the images "
            "cannot be cut into patches."
        )
    if args.num_channels not in (1, 3, 4):
        raise ValueError(f"--num_channels must be 1 (grey), 3 (RGB) or 4 (RGBA), got {args.num_channels}.")
