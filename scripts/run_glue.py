#!/usr/bin/env python
"""Fine-tune a model for text classification or regression with R-Drop: GLUE, or any data set of that form.

    python run_glue.py --task_name mrpc --model_name_or_path bert-base-cased --rdrop_alpha 1.0 \
        --do_train --do_eval --output_dir outputs/mrpc
    python run_glue.py --train_file train.csv --validation_file dev.csv --model_name_or_path outputs/tiny \
        --do_train --do_eval --output_dir outputs/own

Rows without labels (--unlabeled_file) take part in the agreement: a few beside each labelled row of a batch.
--rdrop_alpha 0 trains the baseline: the same trainer, data order and arguments, without the second pass.
"""

from collections.abc import Callable
from typing import Any

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer

from finetuning.command_line import cli
from finetuning.labels import SINGLE
from finetuning.model import ModelArguments, fit_length, hub_name, load_config, load_model, load_tokenizer
from finetuning.reading import keep_reading, tell_reading
from finetuning.run import parse_arguments, start_run
from finetuning.trainer import ReportArguments, ScriptMixin, padding_multiple
from finetuning.unlabeled import UnlabeledArguments, load_unlabeled, no_targets
from finetuning.unlabeled_batches import UnlabeledMixin
from hf_rdrop import RDropTrainer, RDropTrainingArguments
from tasks.classification import flip_labels, metric_names, predict_labels, read_targets, score
from tasks.glue import (
    GlueArguments,
    build_metric,
    choose_labels,
    choose_text_columns,
    format_predictions,
    load_data,
    settle_labels,
    tokenize,
)


class GlueTrainer(ScriptMixin, UnlabeledMixin, RDropTrainer):
    """`RDropTrainer` with what the scripts add around training."""


def main(
    argv: list[str] | None = None, use_trainer: Callable[[Trainer], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Run the script with these arguments; returns the metrics.

    With `use_trainer`, the trainer is handed to it instead of being trained and evaluated here (sweep.py).
    """
    model_args, data_args, unlabeled_args, report_args, training_args = parse_arguments(
        (ModelArguments, GlueArguments, UnlabeledArguments, ReportArguments, RDropTrainingArguments), argv, __doc__
    )
    checkpoint = start_run(training_args)

    splits = load_data(
        data_args,
        model_args,
        train=training_args.do_train,
        validation=training_args.do_eval,
        test=training_args.do_predict,
    )
    config = load_config(model_args)
    splits = settle_labels(data_args, splits, config)
    columns = choose_text_columns(data_args, splits)
    labels = choose_labels(data_args, splits, config)
    unlabeled = load_unlabeled(unlabeled_args, data_args, training_args, splits.get("train"), columns)
    splits = data_args.choose_rows(splits)
    targets = read_targets(splits, labels, data_args.label_column)
    if data_args.label_noise and training_args.do_train:
        targets["train"] = flip_labels(targets["train"], labels, data_args.label_noise, training_args.seed)
    if training_args.label_smoothing_factor and labels.problem_type != SINGLE:
        raise ValueError(f"--label_smoothing_factor has no meaning for {labels.problem_type}: leave it out.")
    compute = build_metric(data_args, labels)
    tell_reading(columns, data_args.label_columns or [data_args.label_column], labels, targets)
    config.update(labels.config_changes())
    keep_reading(config, columns, data_args, labels)
    tokenizer = load_tokenizer(model_args, config)
    model = load_model(AutoModelForSequenceClassification, "sequence classification", model_args, config, tokenizer)
    data_args.max_seq_length = fit_length(data_args.max_seq_length, "max_seq_length", tokenizer, config)

    with training_args.main_process_first(desc="tokenization"):
        data = {
            name: tokenize(split, name, tokenizer, columns, targets[name], data_args) for name, split in splits.items()
        }
        if unlabeled is not None:
            none = no_targets(labels, len(unlabeled))
            unlabeled = tokenize(unlabeled, "unlabelled", tokenizer, columns, none, data_args)
    validation = {name: split for name, split in data.items() if name.startswith("validation")}
    test = {name: split for name, split in data.items() if name.startswith("test")}

    card: dict[str, Any] = {
        "finetuned_from": hub_name(model_args),
        "comparison": report_args.card_comparison,
        "tasks": "text-classification",
    }
    if data_args.task_name:
        card |= {"language": "en", "dataset_tags": "glue", "dataset_args": data_args.task_name}
        card["dataset"] = f"GLUE {data_args.task_name.upper()}"
    elif data_args.dataset_name:
        card |= {"dataset_tags": data_args.dataset_name, "dataset": data_args.dataset_name}

    # R-Drop is this line: RDropTrainer in place of Trainer, and the --rdrop_* arguments in training_args.
    trainer = GlueTrainer(
        model=model,
        args=training_args,
        card=card,
        consistency_samples=report_args.consistency_samples,
        metric_names=metric_names(labels, compute),
        train_dataset=data.get("train"),
        unlabeled=unlabeled,
        unlabeled_ratio=unlabeled_args.ratio,
        eval_dataset=next(iter(validation.values()), None),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=padding_multiple(training_args)),
        compute_metrics=lambda p: score(p, labels, compute),
        preprocess_logits_for_metrics=lambda logits, _: logits[0] if isinstance(logits, tuple) else logits,
    )

    if use_trainer is not None:
        return use_trainer(trainer)

    results: dict[str, dict[str, Any]] = {}
    files = {}
    if training_args.do_train:
        results["train"] = trainer.run_training(checkpoint)
        if unlabeled is not None:
            results["train"]["unlabeled_samples"] = len(unlabeled)
    if training_args.do_eval:
        results["eval"] = {}
        for name, dataset in validation.items():
            metrics = {**trainer.evaluate(dataset), "eval_samples": len(dataset)}
            metrics |= trainer.run_consistency(dataset, compute, name)
            suffix = "_mm" if name.endswith("mismatched") else ""
            results["eval"] |= {f"{key}{suffix}": value for key, value in metrics.items()}
    if training_args.do_predict:
        results["predict"] = {}
        task = f"_{data_args.task_name}" if data_args.task_name else ""
        for name, dataset in test.items():
            output = trainer.predict(dataset, metric_key_prefix="predict")
            suffix = "mm" if name.endswith("mismatched") else ""
            metrics = {**output.metrics, "predict_samples": len(dataset)}
            results["predict"] |= {f"{key}_{suffix}" if suffix else key: value for key, value in metrics.items()}
            predictions = predict_labels(output.predictions, labels)
            files[f"predict_results{task}{f'-{suffix}' if suffix else ''}.txt"] = format_predictions(
                predictions, labels
            )

    return trainer.finish(results, files)


if __name__ == "__main__":
    cli(main)
