"""Data of run_translation.py: pairs of texts, their tokens, and scores of generated texts."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, EvalPrediction

from finetuning.data import DataArguments, require_columns
from finetuning.unfit import check_fit
from hf_rdrop.metrics import Rouge, SacreBleu

logger = logging.getLogger(f"hf_rdrop.scripts.{__name__}")

# BLEU counts words; these languages write none, so sacreBLEU is told to cut the text otherwise.
BLEU_TOKENIZERS = {"zh": "zh", "ja": "char", "th": "char", "lo": "char", "km": "char", "my": "char"}

_TEXT = ("bleu", "chrf", "gen_len")
METRICS = {False: _TEXT, True: (*_TEXT, "rouge1", "rouge2", "rougeL", "rougeLsum")}  # of summaries as well


@dataclass
class TranslationArguments(DataArguments):
    """Data: pairs of texts, from the Hub or from files."""

    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Training data: one file (.csv, .tsv, .json, .jsonl, also .gz; .parquet, .arrow; .tmx), or two "
            "text files, source and target, of a sentence a line: pair.en pair.de, or PREFIX for PREFIX.en and "
            "PREFIX.de."
        },
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "Validation data, in the same formats."})
    test_file: list[str] | None = field(default=None, metadata={"help": "Data to predict; targets may be missing."})
    source_lang: str | None = field(default=None, metadata={"help": "Language to translate from: a key of each row."})
    target_lang: str | None = field(default=None, metadata={"help": "Language to translate to: a key of each row."})
    text_column: str | None = field(default=None, metadata={"help": "Summarisation: column of the full texts."})
    summary_column: str | None = field(default=None, metadata={"help": "Summarisation: column of the summaries."})
    source_prefix: str = field(default="", metadata={"help": "Text put before every source (T5 models need one)."})
    max_source_length: int | None = field(
        default=None, metadata={"help": "Longest source in tokens; default 1024, or what the model can take."}
    )
    max_target_length: int = field(default=128, metadata={"help": "Longest target in tokens for training."})
    val_max_target_length: int | None = field(
        default=None, metadata={"help": "Longest generated text in tokens. Default: --max_target_length."}
    )
    num_beams: int | None = field(
        default=None, metadata={"help": "Beams for evaluation and prediction. Default: the model's own."}
    )
    ignore_pad_token_for_loss: bool = field(
        default=True, metadata={"help": "Leave the padding of the targets out of the loss (and of the agreement)."}
    )
    forced_bos_token: str | None = field(
        default=None,
        metadata={"help": "First token to generate. Default for multilingual tokenizers: the target language's."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.dataset_name or self.train_file or self.validation_file or self.test_file):
            raise ValueError("no data: give --dataset_name, or --train_file and --validation_file.")
        pairs = (self.source_lang, self.target_lang), (self.text_column, self.summary_column)
        if [all(pair) for pair in pairs].count(True) != 1 or [any(pair) for pair in pairs].count(True) != 1:
            raise ValueError(
                "it is unclear what to learn: for translation give --source_lang and --target_lang, for "
                "summarisation --text_column and --summary_column."
            )
        for name in ("max_source_length", "max_target_length", "val_max_target_length", "num_beams"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")


# ---- Data ----


def read_pairs(dataset: Dataset, split: str, data_args: TranslationArguments) -> Dataset:
    """Return the rows as plain text in `source` and `target`; a test set may have no targets.

    Raises:
        ValueError: a column, a language or a text is missing; names the row.
    """
    names = (data_args.source_lang, data_args.target_lang)
    if data_args.text_column is not None:
        names = (data_args.text_column, data_args.summary_column)
        arguments = ("text_column", "summary_column")
        for name, argument in zip(names, arguments, strict=True):
            if name == names[0] or split != "test":
                require_columns(dataset, [name], split, argument)
    check_fit(dataset, *names)
    flat = data_args.text_column is not None or set(names) <= set(dataset.column_names)
    if not flat:
        require_columns(dataset, ["translation"], split)
    rows = dataset if flat else dataset["translation"]
    pairs: tuple[list[str], list[str]] = ([], [])
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of the {split} data: 'translation' holds {row!r:.60}, no languages.")
        present = [key for key, value in row.items() if value is not None]
        for side, name in zip(pairs, names, strict=True):
            # Multilingual models call languages en_XX or eng_Latn where the data may say en or eng.
            key = next((key for key in (name, name.split("_")[0]) if key in row), name)
            value = row.get(key)
            if value is None and split == "test" and side is pairs[1]:
                continue
            if not isinstance(value, str):
                found = "is missing" if value is None else f"holds {value!r:.60}, which is no text"
                raise ValueError(
                    f"row {number} of the {split} data: {key!r} {found}. The row has: "
                    f"{', '.join(present):.300}. Correct the row, or choose other languages or columns."
                )
            side.append(value)
    sources, targets = pairs
    if targets and len(targets) < len(sources):
        logger.warning("%s: only %d of %d rows have a target: no metrics.", split, len(targets), len(sources))
    complete = len(targets) == len(sources)
    return Dataset.from_dict({"source": sources, "target": targets} if complete else {"source": sources})


def tokenize(pairs: Dataset, split: str, tokenizer: Any, data_args: TranslationArguments) -> Dataset:
    """Model inputs and `labels`, cut to their longest lengths and not padded."""
    max_target = data_args.max_target_length if split == "train" else data_args.val_max_target_length
    padding = "max_length" if data_args.pad_to_max_length else False

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        sources = [data_args.source_prefix + text for text in rows["source"]]
        batch = tokenizer(sources, max_length=data_args.max_source_length, padding=padding, truncation=True)
        if "target" in rows:
            targets = tokenizer(text_target=rows["target"], max_length=max_target, padding=padding, truncation=True)
            batch["labels"] = targets["input_ids"]
            if padding and data_args.ignore_pad_token_for_loss:
                masks = targets["attention_mask"]
                batch["labels"] = [
                    [token if is_text else -100 for token, is_text in zip(row, mask, strict=True)]
                    for row, mask in zip(batch["labels"], masks, strict=True)
                ]
        return batch

    encoded = pairs.map(
        encode,
        batched=True,
        remove_columns=pairs.column_names,
        num_proc=data_args.preprocessing_num_workers,
        desc=f"Tokenizing {split}",
    )
    for column, longest in (("input_ids", data_args.max_source_length), ("labels", max_target)):
        full = sum(len(row) >= longest for row in encoded[column]) if column in encoded.column_names else 0
        if full and not padding:
            logger.warning(
                "%s: %d of %d %s fill %d tokens, and were cut there.", split, full, len(encoded), column, longest
            )
    return encoded


class PairCollator(DataCollatorForSeq2Seq):
    """Leaves out labels that are not there: the base class makes them None, which the Trainer takes for labels."""

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        return {key: value for key, value in super().__call__(features, return_tensors).items() if value is not None}


# ---- Metrics ----


def decode(predictions: np.ndarray, tokenizer: Any, keep_lines: bool = False) -> list[str]:
    """Generated token ids, padded with -100, as texts, of one line each unless `keep_lines`."""
    ids = np.where(predictions < 0, tokenizer.pad_token_id, predictions)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts if keep_lines else [" ".join(text.split()) for text in texts]


def sentence_lines(text: str) -> str:
    """Put each sentence of the text on a line of its own: cut at line breaks, and at blanks after . ! or ?"""
    return "\n".join(line for line in re.split(r"\s*\n\s*|(?<=[.!?])\s+", text.strip()) if line)


def score_against(references: list[str], tokenizer: Any, data_args: TranslationArguments) -> Callable[..., dict]:
    """`compute_metrics` for these reference texts: the texts as they are, not what the tokenizer makes of them.

    BLEU and chrF, for summaries also ROUGE F1 with stems, all from 0 to 100.
    """
    language = (data_args.target_lang or "").split("_")[0].split("-")[0]
    options = {"tokenize": BLEU_TOKENIZERS.get(language)}
    summaries = data_args.summary_column is not None
    if summaries and not any(re.search("[a-z0-9]", text.lower()) for text in references):
        logger.warning("ROUGE counts words of the letters a to z, and the summaries have none: see BLEU and chrF.")

    def compute(p: EvalPrediction) -> dict[str, float]:
        predictions = p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions
        lengths = ((predictions >= 0) & (predictions != tokenizer.pad_token_id)).sum(axis=1)
        scores = SacreBleu().compute(predictions=decode(predictions, tokenizer), references=references, **options)
        found = {"bleu": scores["score"], "chrf": scores["chrf"], "gen_len": float(lengths.mean())}
        if summaries:
            texts = map(sentence_lines, decode(predictions, tokenizer, keep_lines=True))
            expected = map(sentence_lines, references)
            rouge = Rouge().compute(predictions=list(texts), references=list(expected), use_stemmer=True)
            found |= {name: 100 * value for name, value in rouge.items()}
        return found

    return compute
