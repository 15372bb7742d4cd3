"""Data of run_clm.py: texts joined into one stream of tokens and cut into blocks, masks, and scores per token."""

import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, EvalPrediction, TrainerCallback, default_data_collator
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from finetuning.data import DataArguments, check_text, load_splits, require_columns
from finetuning.files import FORMATS, TEXT
from finetuning.unfit import unfit_columns
from hf_rdrop.objective.heads import shifted_labels

logger = logging.getLogger(f"hf_rdrop.scripts.{__name__}")


@dataclass
class ClmArguments(DataArguments):
    """Data: texts, from the Hub or from files."""

    train_file: str | None = field(
        default=None,
        metadata={"help": "Training texts: .txt (one text a line), .csv, .tsv, .json or .jsonl, also .gz."},
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the texts; a dot reaches into a nested one (translation.en). Default: text, or the "
            "only column that holds text."
        },
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens in a row; default 1024, or what the model can take."}
    )
    mlm: bool = field(
        default=False, metadata={"help": "Predict masked tokens (BERT and its like) and not the next token."}
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens to predict with --mlm."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.dataset_name or self.train_file or self.validation_file or self.test_file):
            raise ValueError("no data: give --dataset_name, or --train_file and --validation_file.")
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(
                f"--block_size must be at least 2, got {self.block_size}: the first token of a block is not predicted."
            )
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"--mlm_probability must be between 0 and 1, got {self.mlm_probability}.")


def check_model(config: Any, tokenizer: Any, mlm: bool) -> None:
    """Check that the model can learn what it is asked to.

    Raises:
        ValueError: it sees the tokens that it is to predict, or the tokenizer lacks a token that is needed.
    """
    kind = config.model_type
    if mlm:
        if tokenizer.mask_token is None:
            raise ValueError(
                f"--mlm needs a tokenizer with a mask token, and this one of a {kind} model has none. Choose an "
                "encoder such as BERT, or leave out --mlm to predict the next token."
            )
        return
    if config.is_encoder_decoder:
        raise ValueError(
            f"a {kind} model has an encoder and a decoder, and text alone trains the latter only. Choose a decoder "
            "such as GPT-2, or train on pairs with run_translation.py."
        )
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise ValueError(
            f"a {kind} model sees the whole text, the tokens that it is to predict among it, so the next token would "
            "be copied and not learnt. Give --mlm to predict masked tokens, or choose a decoder such as GPT-2."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, so the model could not tell where a text ends. Add one to it "
            '(tokenizer.add_special_tokens({"eos_token": "</s>"})) and save it, or choose another --tokenizer_name.'
        )


# ---- Texts and blocks ----


def load_texts(data_args: ClmArguments, model_args: Any, wanted: list[str]) -> dict[str, Dataset]:
    """Load the splits of the run, each with the one column `text`.

    Raises:
        ValueError: a split cannot be loaded, it is open which column holds the texts, or a value is no text.
    """
    splits = load_splits(data_args, model_args, wanted, (TEXT, *FORMATS))
    if "." in (data_args.text_column or ""):
        splits = {split: dataset.flatten() for split, dataset in splits.items()}
    first = next(iter(splits))
    columns = [name for name, kind in splits[first].features.items() if getattr(kind, "dtype", "") == "string"]
    columns += unfit_columns(splits[first])
    column = data_args.text_column or ("text" if "text" in columns or len(columns) != 1 else columns[0])
    if data_args.text_column is None and column not in (*splits[first].column_names, *columns):
        raise ValueError(
            f"it is unclear which column of the {first} data holds the texts: give --text_column with one of "
            f"{', '.join(splits[first].column_names):.300}."
        )
    for split, dataset in splits.items():
        require_columns(dataset, [column], split, "text_column")
        check_text(dataset, [column], split)
        dataset = dataset.select_columns([column])
        splits[split] = dataset if column == "text" else dataset.rename_column(column, "text")
    return splits


def tokenize(texts: Dataset, split: str, tokenizer: Any, data_args: ClmArguments) -> np.ndarray:
    """Return the tokens of all texts that are not blank, one after the other.

    A text has the special tokens that the tokenizer puts around it, and, where the next token is predicted, the
    end-of-sequence token after it. Nothing is cut off.

    Raises:
        ValueError: there is nothing but blanks.
    """
    end = None if data_args.mlm else tokenizer.eos_token_id

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        found = tokenizer(rows["text"], verbose=False)["input_ids"]
        return {"tokens": [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in found]}

    texts = texts.filter(lambda row: bool(row["text"].strip()), desc=f"Blank texts of {split}")
    if len(texts) == 0:
        raise ValueError(f"the {split} data hold no text, only blanks. Check the data, and --text_column.")
    encoded = texts.map(
        encode,
        batched=True,
        remove_columns=texts.column_names,
        num_proc=data_args.preprocessing_num_workers,
        desc=f"Tokenizing {split}",
    )
    return np.concatenate([chunk.flatten().to_numpy() for chunk in encoded.data.column("tokens").chunks])


def cut(tokens: np.ndarray, block_size: int, pad: int) -> Dataset:
    """Rows of `block_size` tokens, as they follow each other; the last row is filled up with `pad`, without labels.

    Every token of the text is in exactly one row. The first one of a row has nothing before it and is not predicted.
    """
    rows = -(-len(tokens) // block_size)
    ids = np.pad(tokens, (0, rows * block_size - len(tokens)), constant_values=pad).reshape(rows, block_size)
    is_text = (np.arange(ids.size) < len(tokens)).reshape(ids.shape)
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": is_text.astype(np.int64), "labels": np.where(is_text, ids, -100)}
    )


def make_blocks(texts: Dataset, split: str, tokenizer: Any, data_args: ClmArguments, model: Any) -> Dataset:
    """Make the rows of a split: `input_ids`, `attention_mask`, and `labels` (without them for training with --mlm).

    Raises:
        ValueError: the model has no embedding for a token, or no token is left to predict.
    """
    assert data_args.block_size is not None
    tokens = tokenize(texts, split, tokenizer, data_args)
    known = model.get_input_embeddings().weight.shape[0]
    if tokens.max() >= known:
        raise ValueError(
            f"the tokenizer numbers {tokenizer.convert_ids_to_tokens(int(tokens.max()))!r} {tokens.max()}, but the "
            f"model has only {known} embeddings: they do not belong together. Choose another --tokenizer_name."
        )
    blocks = cut(tokens, data_args.block_size, tokenizer.pad_token_id)
    logger.info("%s: %d blocks of %d tokens from %d texts.", split, len(blocks), data_args.block_size, len(texts))
    if data_args.mlm:
        unmasked = blocks.remove_columns("labels")
        if split == "train":
            return unmasked
        collator = BlockCollator(tokenizer, data_args, seed=0)  # the same masks for models of all seeds
        blocks = Dataset.from_list([collator.mask(row) for row in unmasked])
    first = 0 if data_args.mlm else 1
    if all(label == -100 for row in blocks["labels"] for label in row[first:]):
        raise ValueError(
            f"the {split} data leave no token to predict: they are {len(tokens)} tokens. Give more text"
            f"{', or a higher --mlm_probability' if data_args.mlm else ''}."
        )
    return blocks


class BlockCollator(TrainerCallback):
    """Batches of blocks; masks tokens of those without labels, which are the training rows with --mlm.

    80% of the chosen tokens become the mask token, 10% a random one, 10% stay (Devlin et al. 2019). Seed, epoch and
    the block's own tokens decide which: other ones in each epoch (it must be among the trainer's callbacks), and the
    same ones whatever alpha is, in a run that is resumed, and on any number of processes.
    """

    def __init__(self, tokenizer: Any, data_args: ClmArguments, seed: int) -> None:
        self.collator = DataCollatorForLanguageModeling(
            tokenizer, mlm=data_args.mlm, mlm_probability=data_args.mlm_probability
        )
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # processes that load the data see it too

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch.fill_(int(state.epoch or 0))

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return default_data_collator([row if "labels" in row else self.mask(row) for row in rows])

    def mask(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row with masked `input_ids`, and `labels` where something is to be predicted."""
        ids = torch.tensor([row["input_ids"]])
        key = np.array([self.seed, int(self.epoch), *row["input_ids"]], dtype=np.int64)
        self.collator.generator = torch.Generator().manual_seed(zlib.crc32(key.tobytes()))
        masked, labels = self.collator.torch_mask_tokens(ids)
        return {**row, "input_ids": masked[0].tolist(), "labels": labels[0].tolist()}


# ---- Metrics ----


def token_sums(shift_labels: bool) -> Callable[[Any, Tensor], Tensor]:
    """`preprocess_logits_for_metrics`: what a row adds to the scores, `[rows, 3]`, in place of its logits.

    The three are sums over the row's labels that are not -100: the negative log-likelihood, the hits (the label has
    the highest logit), and the number of labels.

    Args:
        shift_labels: whether position t predicts label t + 1.
    """

    def sums(logits: Any, labels: Tensor) -> Tensor:
        logits = logits[0] if isinstance(logits, tuple) else logits
        labels = shifted_labels(labels) if shift_labels else labels
        counts = labels != -100
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)
        hits = (logits.argmax(-1) == labels) & counts
        return torch.stack([losses.sum(1), hits.sum(1), counts.sum(1)], 1)

    return sums


def score_tokens(p: EvalPrediction) -> dict[str, float]:
    """Scores from the sums of `token_sums`, over all tokens alike, however they lie in rows and batches.

    `nll` is the mean negative log-likelihood per token in nats, `perplexity` its exponential, `accuracy` the share of
    tokens that are the most probable one.
    """
    nll, hits, count = np.asarray(p.predictions, dtype=np.float64).sum(0)
    with np.errstate(over="ignore"):
        return {"nll": nll / count, "perplexity": float(np.exp(nll / count)), "accuracy": hits / count}
