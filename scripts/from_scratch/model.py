"""A randomly initialised model with its tokenizer or image processor, and the folder of both."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from finetuning.files import read_table, read_text
from finetuning.unfit import check_fit
from from_scratch.arguments import InitModelArguments, check_arguments
from from_scratch.configs import decoder_config, encoder_config, encoder_decoder_config
from from_scratch.tokenizer import train_tokenizer
from from_scratch.vision import build_vision


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
    check_fit(dataset, *(column.partition(".")[0] for column in columns))
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
    """Train the tokenizer on the files, and make the model."""
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
