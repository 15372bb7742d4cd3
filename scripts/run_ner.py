#!/usr/bin/env python
"""Fine-tune a model for token classification (named entities, part-of-speech tags, chunks) with R-Drop.

    python run_ner.py --train_file train.jsonl --validation_file dev.jsonl --model_name_or_path bert-base-cased \
        --do_train --do_eval --output_dir outputs/ner
    python run_ner.py --dataset_name eriktks/conll2003 --task_name pos --model_name_or_path bert-base-cased \
        --do_train --do_eval --output_dir outputs/pos

Each row holds a list of words (`tokens`) and a list of as many tags (`ner_tags`), strings or integers. Files with a
word and its tag on each line (CoNLL's .txt, .conll, .tsv, ..., or csv with sentence numbers) are read, too.
--rdrop_alpha 0 trains the baseline: the same trainer, data order and arguments, without the second pass.
"""

from collections.abc import Callable
from typing import Any

from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification, EvalPrediction, Trainer

from finetuning.command_line import cli
from finetuning.data import load_splits
from finetuning.model import ModelArguments, fit_length, hub_name, load_config, load_model, load_word_tokenizer
from finetuning.run import parse_arguments, start_run
from finetuning.trainer import ReportArguments, ScriptMixin, padding_multiple
from hf_rdrop import RDropTrainer, RDropTrainingArguments
from tasks.tag_schemes import settle_schemes
from tasks.tagging import (
    NerArguments,
    check_rows,
    choose_labels,
    compute_metrics,
    format_predictions,
    metric_names,
    read_file,
    read_targets,
    tokenize,
)


class NerTrainer(ScriptMixin, RDropTrainer):
    """`RDropTrainer` with what the scripts add around training."""


def main(
    argv: list[str] | None = None, use_trainer: Callable[[Trainer], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Run the script with these arguments; returns the metrics.

    With `use_trainer`, the trainer is handed to it instead of being trained and evaluated here (sweep.py).
    """
    model_args, data_args, report_args, training_args = parse_arguments(
        (ModelArguments, NerArguments, ReportArguments, RDropTrainingArguments), argv, __doc__
    )
    checkpoint = start_run(training_args)

    wanted = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    wanted_splits = [split for split, is_wanted in wanted.items() if is_wanted]
    splits = load_splits(data_args, model_args, wanted_splits, read=lambda path: read_file(path, data_args))
    for name, split in splits.items():
        check_rows(split, name, data_args)
    splits = settle_schemes(splits, data_args.label_column_name)
    config = load_config(model_args)
    labels = choose_labels(data_args, splits, config)
    splits = data_args.choose_rows(splits)
    targets = {name: read_targets(split, name, labels, data_args) for name, split in splits.items()}
    config.update(labels.config_changes())
    config.problem_type = None  # for heads of sequences only
    tokenizer = load_word_tokenizer(model_args, config)
    model = load_model(AutoModelForTokenClassification, "token classification", model_args, config, tokenizer)
    data_args.max_seq_length = fit_length(data_args.max_seq_length, "max_seq_length", tokenizer, config)

    with training_args.main_process_first(desc="tokenization"):
        encoded = {
            name: tokenize(split, name, tokenizer, labels, targets[name], data_args) for name, split in splits.items()
        }
    data = {name: dataset for name, (dataset, _) in encoded.items()}

    card: dict[str, Any] = {
        "finetuned_from": hub_name(model_args),
        "comparison": report_args.card_comparison,
        "tasks": "token-classification",
    }
    if data_args.dataset_name:
        card |= {"dataset_tags": data_args.dataset_name, "dataset": data_args.dataset_name}

    # R-Drop is this line: RDropTrainer in place of Trainer, and the --rdrop_* arguments in training_args.
    trainer = NerTrainer(
        model=model,
        args=training_args,
        card=card,
        consistency_samples=report_args.consistency_samples,
        metric_names=metric_names(labels, data_args),
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

    if use_trainer is not None:
        return use_trainer(trainer)

    results: dict[str, dict[str, Any]] = {}
    files = {}
    if training_args.do_train:
        results["train"] = trainer.run_training(checkpoint)
    if training_args.do_eval:
        results["eval"] = {**trainer.evaluate(), "eval_samples": len(data["validation"])}
        results["eval"] |= trainer.run_consistency(
            data["validation"], lambda *pair: compute_metrics(EvalPrediction(*pair), labels, data_args)
        )
    if training_args.do_predict:
        output = trainer.predict(data["test"], metric_key_prefix="predict")
        results["predict"] = {**output.metrics, "predict_samples": len(data["test"])}
        words = list(splits["test"][data_args.text_column_name])
        files["predictions.txt"] = format_predictions(output.predictions, encoded["test"][1], words, labels)

    return trainer.finish(results, files)


if __name__ == "__main__":
    cli(main)
