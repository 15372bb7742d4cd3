#!/usr/bin/env python
"""Fine-tune a model for token classification (named entities, part-of-speech tags, chunks) with R-Drop.

    python run_ner.py --train_file train.jsonl --validation_file dev.jsonl --model_name_or_path bert-base-cased \
        --do_train --do_eval --output_dir outputs/ner
    python run_ner.py --dataset_name eriktks/conll2003 --task_name pos --model_name_or_path bert-base-cased \
        --do_train --do_eval --output_dir outputs/pos

Each row holds a list of words (`tokens`) and a list of as many tags (`ner_tags`), strings or integers.
--rdrop_alpha 0 trains the baseline: the same trainer, data order and arguments, without the second pass.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from common import ScriptMixin, cli, padding_multiple, parse_arguments, start_run
from data_files import DataArguments, load_splits, require_columns
from datasets import Dataset
from labels import SINGLE, Labels, collect_names, feature_names, follow_model, labels_of_model, sort_names
from model_loading import ModelArguments, fit_length, hub_name, load_config, load_model, load_tokenizer
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification, EvalPrediction

from hf_rdrop import RDropTrainer, RDropTrainingArguments
from hf_rdrop.metrics import Seqeval

logger = logging.getLogger(__name__)


@dataclass
class NerArguments(DataArguments):
    """The data: rows of words and tags, from the Hub or from json files."""

    task_name: str = field(
        default="ner", metadata={"help": "ner, pos or chunk: the column of the tags is `<task_name>_tags`."}
    )
    text_column_name: str = field(default="tokens", metadata={"help": "Column of the lists of words."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of the tags, if of another name."})
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Longest input in tokens; words beyond it are lost. Default: what the model can take."},
    )
    label_all_tokens: bool = field(
        default=False,
        metadata={"help": "Train on every sub-token of a word (B- becomes I- inside it), not on the first alone."},
    )
    return_entity_level_metrics: bool = field(
        default=False, metadata={"help": "Report precision, recall and F1 of each entity type too."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.dataset_name or self.train_file or self.validation_file or self.test_file):
            raise ValueError("no data: give --dataset_name, or --train_file and --validation_file.")
        if self.max_seq_length is not None and self.max_seq_length < 3:
            raise ValueError(f"--max_seq_length must be at least 3, got {self.max_seq_length}.")
        self.label_column_name = self.label_column_name or f"{self.task_name.lower()}_tags"


# ---- Data ----


def check_rows(dataset: Dataset, split: str, data_args: NerArguments) -> None:
    """Check that each row is a list of words and, where there are tags, as many of them."""
    words_column, tags_column = data_args.text_column_name, data_args.label_column_name
    require_columns(dataset, [words_column], split, "text_column_name")
    if split != "test":
        require_columns(dataset, [tags_column], split, "label_column_name")
    tags = list(dataset[tags_column]) if tags_column in dataset.column_names else [None] * len(dataset)
    for row, (words, row_tags) in enumerate(zip(dataset[words_column], tags, strict=True), 1):
        place = f"row {row} of the {split} data"
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{place}: column {words_column!r} holds {words!r:.60}; it must be a list of words.")
        if row_tags is None and split == "test":
            continue
        if not isinstance(row_tags, list):
            raise ValueError(f"{place}: column {tags_column!r} holds {row_tags!r:.60}; it must be a list of tags.")
        if len(words) != len(row_tags):
            raise ValueError(
                f"{place}: {len(words)} words in {words_column!r} but {len(row_tags)} tags in {tags_column!r}, so it "
                "is unclear which tag belongs to which word. Correct or remove the row."
            )


def choose_labels(data_args: NerArguments, splits: dict[str, Dataset], config: Any) -> Labels:
    """The tags of the training data, or of the model when the run does not train."""
    column = data_args.label_column_name
    names = feature_names(next(iter(splits.values())).features.get(column))
    if "train" not in splits:
        return labels_of_model(config, names)
    seen = collect_names(splits["train"][column], column, "train", names)
    if len(seen) < 2:
        raise ValueError(
            f"the train data hold no other tag in column {column!r} than {', '.join(seen) or 'none'}: there is "
            "nothing to tell apart. Choose another column, or check how the file was made."
        )
    if names is None and has_chunks(seen) and any(name[:2] == "I-" for name in seen):
        # A type that only ever had one word in training may have more elsewhere.
        seen = sort_names({*seen, *(f"I-{name[2:]}" for name in seen if name[:2] == "B-")})
    return follow_model(Labels(SINGLE, names or seen, names), config, training=True)


def has_chunks(names: Sequence[str]) -> bool:
    """Whether the tags mark spans (B-person, I-person, O) rather than single words (NOUN, VERB)."""
    return all(re.fullmatch(r"O|[BIESLU]-.+", name) for name in names)


def tokenize(
    dataset: Dataset, split: str, tokenizer: Any, labels: Labels, data_args: NerArguments
) -> tuple[Dataset, list[list[int]]]:
    """Model inputs with `labels`, and for each row which word each first sub-token belongs to (elsewhere -1).

    A word is labelled on its first sub-token (with --label_all_tokens and for training, on all), the rest is -100.
    """
    dataset = data_args.truncate(dataset, split)
    words_column, tags_column = data_args.text_column_name, data_args.label_column_name
    tags = list(dataset[tags_column]) if tags_column in dataset.column_names else [None]
    targets = None
    if split != "test" or not any(row is None or labels.withheld(row) for row in tags):
        targets = []
        for row, row_tags in enumerate(tags, 1):
            try:
                targets.append([labels.encode(tag) for tag in row_tags])
            except ValueError as error:
                raise ValueError(f"row {row} of the {split} data, column {tags_column!r}: label {error}") from error
    inside = [
        labels.names.index(f"I-{name[2:]}") if name[:2] == "B-" and f"I-{name[2:]}" in labels.names else index
        for index, name in enumerate(labels.names)
    ]
    label_all = data_args.label_all_tokens and split == "train"

    def encode(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
        batch = tokenizer(
            rows[words_column],
            is_split_into_words=True,
            truncation=True,
            max_length=data_args.max_seq_length,
            padding="max_length" if data_args.pad_to_max_length else False,
        )
        batch["first"], batch["labels"] = [], []
        for position, row in enumerate(indices):
            words = batch.word_ids(position)
            first = [-1 if word is None or word in words[:at] else word for at, word in enumerate(words)]
            batch["first"].append(first)
            if targets is not None:
                target = [targets[row][word] if word >= 0 else -100 for word in first]
                if label_all:
                    rest = [word is not None and word != start for word, start in zip(words, first, strict=True)]
                    target = [
                        inside[targets[row][word]] if is_rest else label
                        for word, is_rest, label in zip(words, rest, target, strict=True)
                    ]
                batch["labels"].append(target)
        if targets is None:
            del batch["labels"]
        return batch

    encoded = dataset.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=not data_args.overwrite_cache,
        desc=f"Tokenizing {split}",
    )
    first = list(encoded["first"])
    lost = [len(words) - sum(w >= 0 for w in row) for words, row in zip(dataset[words_column], first, strict=True)]
    if any(lost):
        logger.warning(
            "%s: %d words in %d of %d rows are lost to the model: they lie beyond --max_seq_length (%d tokens), or "
            "the tokenizer has no token for them. They are neither trained on nor scored, and are predicted as O.",
            *(split, sum(lost), sum(map(bool, lost)), len(lost), data_args.max_seq_length),
        )
    return encoded.remove_columns("first"), first


# ---- Metrics and predictions ----


def compute_metrics(p: EvalPrediction, labels: Labels, data_args: NerArguments) -> dict[str, float]:
    """seqeval's entity scores over the words' first sub-tokens; accuracy alone where the tags mark no spans."""
    pairs = [(row[gold != -100], gold[gold != -100]) for row, gold in zip(p.predictions, p.label_ids, strict=True)]
    predictions, references = ([[labels.names[i] for i in row] for row in side] for side in zip(*pairs, strict=True))
    if not has_chunks(labels.names):
        words = [
            a == b for row, gold in zip(predictions, references, strict=True) for a, b in zip(row, gold, strict=True)
        ]
        return {"accuracy": float(np.mean(words))}
    scores = Seqeval().compute(predictions=predictions, references=references)
    metrics = {name: scores[f"overall_{name}"] for name in ("precision", "recall", "f1", "accuracy")}
    if data_args.return_entity_level_metrics:
        types = {name: score for name, score in scores.items() if isinstance(score, dict)}
        metrics |= {f"{name}_{key}": value for name, score in types.items() for key, value in score.items()}
    return metrics


def format_predictions(predictions: np.ndarray, first: list[list[int]], words: list[list[str]], labels: Labels) -> str:
    """One line a row with one tag a word; words that were lost to the model get O, or _ where there is no O."""
    lines = []
    for row, row_first, row_words in zip(predictions, first, words, strict=True):
        tags = ["O" if "O" in labels.names else "_"] * len(row_words)
        for index, word in zip(row, row_first, strict=False):  # the predictions are padded
            if word >= 0:
                tags[word] = labels.names[index]
        lines.append(" ".join(tags) + "\n")
    return "".join(lines)


# ---- The run ----


class NerTrainer(ScriptMixin, RDropTrainer):
    """`RDropTrainer` with what the scripts add around training."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the script with these arguments; returns the metrics."""
    model_args, data_args, training_args = parse_arguments(
        (ModelArguments, NerArguments, RDropTrainingArguments), argv, __doc__
    )
    checkpoint = start_run(training_args)

    wanted = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    splits = load_splits(data_args, model_args, [split for split, is_wanted in wanted.items() if is_wanted])
    for name, split in splits.items():
        check_rows(split, name, data_args)
    config = load_config(model_args)
    labels = choose_labels(data_args, splits, config)
    config.update(labels.config_changes())
    config.problem_type = None  # for heads of sequences only
    tokenizer = load_word_tokenizer(model_args, config)
    model = load_model(AutoModelForTokenClassification, "token classification", model_args, config, tokenizer)
    data_args.max_seq_length = fit_length(data_args.max_seq_length, "max_seq_length", tokenizer, config)

    with training_args.main_process_first(desc="tokenization"):
        encoded = {name: tokenize(split, name, tokenizer, labels, data_args) for name, split in splits.items()}
    data = {name: dataset for name, (dataset, _) in encoded.items()}

    # R-Drop is this line: RDropTrainer in place of Trainer, and the --rdrop_* arguments in training_args.
    trainer = NerTrainer(
        model=model,
        args=training_args,
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(
            tokenizer, pad_to_multiple_of=padding_multiple(training_args)
        ),
        compute_metrics=lambda p: compute_metrics(p, labels, data_args),
        preprocess_logits_for_metrics=lambda logits, _: (logits[0] if isinstance(logits, tuple) else logits).argmax(
            -1
        ),  # [rows, tokens] instead of [rows, tokens, tags] to keep
    )

    results: dict[str, dict[str, Any]] = {}
    files = {}
    if training_args.do_train:
        results["train"] = trainer.run_training(checkpoint)
    if training_args.do_eval:
        results["eval"] = {**trainer.evaluate(), "eval_samples": len(data["validation"])}
    if training_args.do_predict:
        output = trainer.predict(data["test"], metric_key_prefix="predict")
        results["predict"] = {**output.metrics, "predict_samples": len(data["test"])}
        words = list(data_args.truncate(splits["test"], "test")[data_args.text_column_name])
        files["predictions.txt"] = format_predictions(output.predictions, encoded["test"][1], words, labels)

    card: dict[str, Any] = {"finetuned_from": hub_name(model_args), "tasks": "token-classification"}
    if data_args.dataset_name:
        card |= {"dataset_tags": data_args.dataset_name, "dataset": data_args.dataset_name}
    return trainer.finish(results, files, **card)


def load_word_tokenizer(model_args: ModelArguments, config: Any) -> Any:
    """A tokenizer that takes lists of words and says which word each token is from."""
    tokenizer = load_tokenizer(model_args, config)
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {model_args.tokenizer_name or model_args.model_name_or_path} does not tell which word "
            "a token belongs to. Choose a model with a fast tokenizer (a tokenizer.json)."
        )
    if "ByteLevel" in repr(tokenizer.backend_tokenizer.pre_tokenizer):  # words would lack the blank before them
        tokenizer = load_tokenizer(model_args, config, add_prefix_space=True)
    return tokenizer


if __name__ == "__main__":
    cli(main)
