#!/usr/bin/env python
"""Train a tokenizer on local text and write a small, randomly initialised model with it, to train from scratch.

The folder it writes is what `--model_name_or_path` of the other scripts takes:

    python scripts/init_model.py --train_files train.jsonl.gz --text_columns sentence --output_dir outputs/tiny
    python scripts/init_model.py --architecture decoder --train_files train.txt --output_dir outputs/tiny-lm
    python scripts/init_model.py --architecture encoder-decoder --train_files train.jsonl.gz \
        --text_columns translation.en translation.de --output_dir outputs/tiny-translation
    python scripts/init_model.py --architecture vision --image_size 32 --patch_size 4 --output_dir outputs/tiny-vit

encoder: BERT (post-norm, learned positions).
decoder: GPT-2 (pre-norm, learned positions, embeddings tied to the head).
encoder-decoder: Pegasus (pre-norm, sinusoidal positions, embeddings tied, one vocabulary for both sides). Pre-norm,
because it learns faster in few steps from scratch than post-norm (Marian, BART).
vision: ViT (pre-norm, learned positions), for images; no tokenizer, but an image processor.
The others get a byte-pair encoding that keeps case and spells characters it has never seen in bytes.
Weights are drawn with standard deviation hidden_size ** -0.5 (Glorot's for a square matrix): BERT's fixed 0.02 is that
of a wide model, and leaves a narrow one close to zero.
"""

from collections.abc import Sequence
from pathlib import Path

from finetuning.command_line import cli
from finetuning.run import parse_arguments
from from_scratch.arguments import InitModelArguments
from from_scratch.model import init_model


def main(argv: Sequence[str] | None = None) -> Path:
    """Command line; returns the folder that was written."""
    (args,) = parse_arguments([InitModelArguments], None if argv is None else list(argv), __doc__.splitlines()[0])
    return init_model(args)


if __name__ == "__main__":
    cli(main)
