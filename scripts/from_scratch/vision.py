"""Image model of init_model.py: a vision transformer (ViT) and its image processor."""

from typing import Any

import torch
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from from_scratch.arguments import InitModelArguments


def build_vision(args: InitModelArguments) -> tuple[Any, ViTModel]:
    """Return the image processor and the randomly initialised model; the caller's random state is left as it was."""
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
