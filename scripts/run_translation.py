#!/usr/bin/env python
"""Fine-tune an encoder-decoder for translation (or summarisation) with R-Drop.

    python run_translation.py --train_file train.jsonl --validation_file dev.jsonl --source_lang en --target_lang de \
        --model_name_or_path Helsinki-NLP/opus-mt-en-de --rdrop_alpha 5 --predict_with_generate \
        --do_train --do_eval --output_dir outputs/en-de
    python run_translation.py --dataset_name abisee/cnn_dailymail --dataset_config_name 3.0.0 --text_column article \
        --summary_column highlights --source_prefix "summarize: " --model_name_or_path google-t5/t5-small \
        --rdrop_alpha 0.7 --predict_with_generate --do_train --do_eval --output_dir outputs/summaries

Rows hold `translation`: {"en": "...", "de": "..."}, or a column for each side; or --train_file pair.en pair.de, TMX.
Metrics are sacreBLEU and chrF against
the plain reference texts, for summaries ROUGE too (F1 in points, words by their stems; for rougeLsum sentences end at
line breaks and after . ! or ?).
--rdrop_alpha 0 trains the baseline: the same trainer, data order and arguments, without the second pass.
"""

import logging
from collections.abc import Callable
from typing import Any

from transformers import AutoModelForSeq2SeqLM, Trainer

from finetuning.command_line import cli
from finetuning.data import load_splits
from finetuning.model import (
    ModelArguments,
    fit_length,
    hub_name,
    load_config,
    load_model,
    load_tokenizer,
    set_languages,
)
from finetuning.run import parse_arguments, start_run
from finetuning.trainer import ReportArguments, ScriptMixin, padding_multiple
from hf_rdrop import RDropSeq2SeqTrainer, RDropSeq2SeqTrainingArguments
from tasks.parallel_texts import read_translations
from tasks.translation import METRICS, PairCollator, TranslationArguments, decode, read_pairs, score_against, tokenize

logger = logging.getLogger(f"hf_rdrop.scripts.{__name__}")


class TranslationTrainer(ScriptMixin, RDropSeq2SeqTrainer):
    """`RDropSeq2SeqTrainer` with what the scripts add around training."""


def main(
    argv: list[str] | None = None, use_trainer: Callable[[Trainer], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Run the script with these arguments; returns the metrics.

    With `use_trainer`, the trainer is handed to it instead of being trained and evaluated here (sweep.py).
    """
    model_args, data_args, report_args, training_args = parse_arguments(
        (ModelArguments, TranslationArguments, ReportArguments, RDropSeq2SeqTrainingArguments), argv, __doc__
    )
    checkpoint = start_run(training_args)
    if training_args.do_predict and not training_args.predict_with_generate:
        raise ValueError("--do_predict writes generated texts: give --predict_with_generate too.")

    wanted = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    languages = data_args.source_lang, data_args.target_lang
    splits = load_splits(
        data_args,
        model_args,
        [split for split, is_wanted in wanted.items() if is_wanted],
        read=lambda paths: read_translations(
            [paths] if isinstance(paths, str) else paths, languages, data_args.delimiter
        ),
    )
    splits = data_args.choose_rows(splits)
    pairs = {name: read_pairs(split, name, data_args) for name, split in splits.items()}
    config = load_config(model_args)
    tokenizer = load_tokenizer(model_args, config)
    model = load_model(AutoModelForSeq2SeqLM, "sequence-to-sequence", model_args, config, tokenizer)
    set_languages(tokenizer, model, data_args.source_lang, data_args.target_lang, data_args.forced_bos_token)
    if config.model_type == "t5" and not data_args.source_prefix:
        logger.warning('T5 was trained with prefixes: give --source_prefix, such as "translate English to German: ".')

    data_args.max_source_length = fit_length(
        data_args.max_source_length, "max_source_length", tokenizer, config, default=1024
    )
    data_args.max_target_length = fit_length(data_args.max_target_length, "max_target_length", tokenizer, config)
    data_args.val_max_target_length = fit_length(
        data_args.val_max_target_length or training_args.generation_max_length,
        "val_max_target_length",
        tokenizer,
        config,
        default=data_args.max_target_length,
    )
    training_args.generation_max_length = data_args.val_max_target_length  # in evaluations during training too
    training_args.generation_num_beams = data_args.num_beams or training_args.generation_num_beams

    with training_args.main_process_first(desc="tokenization"):
        data = {name: tokenize(split, name, tokenizer, data_args) for name, split in pairs.items()}
    scorers = {
        name: score_against(list(split["target"]), tokenizer, data_args)
        for name, split in pairs.items()
        if "target" in split.column_names and training_args.predict_with_generate
    }

    card: dict[str, Any] = {
        "finetuned_from": hub_name(model_args),
        "comparison": report_args.card_comparison,
        "tasks": "translation" if data_args.source_lang else "summarization",
    }
    if data_args.source_lang:
        card["language"] = [data_args.source_lang, data_args.target_lang]
    if data_args.dataset_name:
        card |= {"dataset_tags": data_args.dataset_name, "dataset": data_args.dataset_name}

    # R-Drop is this line: RDropSeq2SeqTrainer in place of Seq2SeqTrainer, and the --rdrop_* in training_args.
    trainer = TranslationTrainer(
        model=model,
        args=training_args,
        card=card,
        consistency_samples=report_args.consistency_samples,
        metric_names=METRICS[data_args.summary_column is not None] if training_args.predict_with_generate else (),
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        data_collator=PairCollator(
            tokenizer,
            model=model,
            label_pad_token_id=-100 if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id,
            pad_to_multiple_of=padding_multiple(training_args),
        ),
        compute_metrics=scorers.get("validation"),
    )

    if use_trainer is not None:
        return use_trainer(trainer)

    results: dict[str, dict[str, Any]] = {}
    files = {}
    if training_args.do_train:
        results["train"] = trainer.run_training(checkpoint)
    if training_args.do_eval:
        results["eval"] = {**trainer.evaluate(), "eval_samples": len(data["validation"])}
        results["eval"] |= trainer.run_consistency(data["validation"])
    if training_args.do_predict:
        trainer.compute_metrics = scorers.get("test")
        output = trainer.predict(data["test"], metric_key_prefix="predict")
        results["predict"] = {**output.metrics, "predict_samples": len(data["test"])}
        files["generated_predictions.txt"] = "".join(f"{text}\n" for text in decode(output.predictions, tokenizer))

    return trainer.finish(results, files)


if __name__ == "__main__":
    cli(main)
