"""The image model of init_model.py: a vision transformer (ViT) and its image processor."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

if TYPE_CHECKING:
    from init_model import InitModelArguments


def check_vision(args: "InitModelArguments") -> None:
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


def build_vision(args: "InitModelArguments") -> tuple[Any, ViTModel]:
    """The image processor and the randomly initialised model; the caller's random state is left as it was."""
    dropout = 0.1 if args.dropout is None else args.dropout
    config = ViTConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        intermediate_size=args.intermediate_size or 4 * args.hidden_size,
        image_size=args.image_size,
        patch_size=args.patch_size,
        num_channels=args.num_channels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=args.hidden_size**-0.5,
    )
    processor = ViTImageProcessorPil(
        size={"height": args.image_size, "width": args.image_size},
        image_mean=[0.5] * args.num_channels,
        image_std=[0.5] * args.num_channels,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        return processor, ViTModel(config, add_pooling_layer=False)  # a classifier has no use for the pooling layer
