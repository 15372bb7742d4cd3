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

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from common import cli, parse_arguments
from data_files import read_table, read_text
from init_vision import build_vision, check_vision
from model_configs import decoder_config, encoder_config, encoder_decoder_config
from train_tokenizer import train_tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


@dataclass
class InitModelArguments:
    """What to train the tokenizer on, and the size of the model."""

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
        check_vision(args)
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


def read_texts(path: str, columns: Sequence[str] | None) -> Iterator[str]:
    """Yield the texts of a file that are not empty.

    Raises:
        ValueError: The file cannot be read, a column is missing, or a value is no text; tells the line or row.
    """
    if path.endswith((".txt", ".txt.gz")):
        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist.")
        yield from (line.strip() for line in read_text(Path(path)).split("\n") if line.strip())
        return
    dataset = read_table(path)
    if not columns:
        raise ValueError(
            f"{path}: --text_columns is missing; name the columns with text among {', '.join(dataset.column_names)}."
        )
    for number, row in enumerate(dataset, start=1):
        for column in columns:
            if text := _text(f"{path}, row {number}", row, column):
                yield text


def _text(where: str, row: dict[str, Any], column: str) -> str:
    value: Any = row
    for key in column.split("."):
        if not isinstance(value, dict) or key not in value:
            known = ", ".join(value) if isinstance(value, dict) else "none (it is not nested)"
            raise ValueError(f"{where}: --text_columns {column}: there is no {key!r} here, only {known}.")
        value = value[key]
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        value = " ".join(value)
    if isinstance(value, dict):
        raise ValueError(
            f"{where}: column {column!r} is nested; name its parts, such as {column}.{next(iter(value))}."
        )
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {column!r} holds {value!r:.60}, which is no text.")
    return value.strip()


def build_model(tokenizer: PreTrainedTokenizerFast, args: InitModelArguments) -> PreTrainedModel:
    """Return the randomly initialised model; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        if args.architecture == "encoder":
            return AutoModel.from_config(encoder_config(tokenizer, args))
        if args.architecture == "decoder":
            return AutoModelForCausalLM.from_config(decoder_config(tokenizer, args))
        model = AutoModelForSeq2SeqLM.from_config(encoder_decoder_config(tokenizer, args))
    model.generation_config = GenerationConfig(
        max_length=args.max_length,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
    )
    return model


def build_text(args: InitModelArguments) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    """The tokenizer, trained on the files, and the model."""
    texts = [text for path in args.train_files for text in read_texts(path, args.text_columns)]
    if not texts:
        raise ValueError(f"{', '.join(args.train_files)}: no text to train a tokenizer on, only empty values.")
    tokenizer = train_tokenizer(texts, args.architecture, args.vocab_size, args.max_length)
    print(f"Vocabulary of {len(tokenizer)} from {len(texts)} texts.")
    return tokenizer, build_model(tokenizer, args)


def init_model(args: InitModelArguments) -> Path:
    """Train the tokenizer (for images: set up their processor), draw the weights, write both, and return the folder.

    Raises:
        ValueError: An argument or a file is wrong; nothing on disk has been changed then.
    """
    check_arguments(args)
    processor, model = build_vision(args) if args.architecture == "vision" else build_text(args)

    output = Path(args.output_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: a folder with this name is always a whole model.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        folder = Path(temporary, output.name)
        processor.save_pretrained(folder)
        model.save_pretrained(folder)
        if output.exists():
            shutil.rmtree(output)
        folder.rename(output)
    print(f"{output}: {type(model).__name__}, {model.num_parameters():,} parameters")
    return output


def main(argv: Sequence[str] | None = None) -> Path:
    """Command line; returns the folder that was written."""
    (args,) = parse_arguments([InitModelArguments], None if argv is None else list(argv), __doc__.splitlines()[0])
    return init_model(args)


if __name__ == "__main__":
    cli(main)
