#!/usr/bin/env python
"""Train a language model with R-Drop: the next token (GPT-2 and its like), or with --mlm masked tokens (BERT).

    python run_clm.py --dataset_name Salesforce/wikitext --dataset_config_name wikitext-103-raw-v1 \
        --model_name_or_path openai-community/gpt2 --block_size 512 --rdrop_alpha 1 \
        --do_train --do_eval --output_dir outputs/wikitext
    python init_model.py --architecture decoder --train_files train.txt --output_dir outputs/tiny-lm
    python run_clm.py --train_file train.txt --validation_file dev.txt --model_name_or_path outputs/tiny-lm \
        --block_size 128 --rdrop_alpha 1 --do_train --do_eval --output_dir outputs/own

The first line fine-tunes; the others train from scratch, as in the paper's language-modelling task, whose alpha is 1.
Texts (rows, or lines of a .txt file) are joined, with the end-of-sequence token after each, and cut into blocks of
--block_size tokens; the last, shorter one is padded, so that every token counts. Scores of held-out text: nll (mean
negative log-likelihood per token, in nats), perplexity (its exponential), and accuracy (of the most probable token).
Perplexities can only be compared between models with the same tokenizer and block size.
--rdrop_alpha 0 trains the baseline: the same trainer, data order and arguments, without the second pass.
"""

from collections.abc import Callable
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, Trainer

from finetuning.command_line import cli
from finetuning.model import ModelArguments, fit_length, hub_name, load_config, load_model, load_tokenizer
from finetuning.run import parse_arguments, start_run
from finetuning.trainer import ReportArguments, ScriptMixin
from hf_rdrop import RDropTrainer, RDropTrainingArguments
from tasks.language_modelling import (
    BlockCollator,
    ClmArguments,
    check_model,
    load_texts,
    make_blocks,
    score_tokens,
    token_sums,
)


class LanguageModelTrainer(ScriptMixin, RDropTrainer):
    """`RDropTrainer` with what the scripts add around training."""


def main(
    argv: list[str] | None = None, use_trainer: Callable[[Trainer], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Run the script with these arguments; returns the metrics.

    With `use_trainer`, the trainer is handed to it instead of being trained and evaluated here (sweep.py).
    """
    model_args, data_args, report_args, training_args = parse_arguments(
        (ModelArguments, ClmArguments, ReportArguments, RDropTrainingArguments), argv, __doc__
    )
    checkpoint = start_run(training_args)

    wanted = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    splits = load_texts(data_args, model_args, [split for split, is_wanted in wanted.items() if is_wanted])
    splits = data_args.choose_rows(splits)
    config = load_config(model_args)
    tokenizer = load_tokenizer(model_args, config)
    check_model(config, tokenizer, data_args.mlm)
    auto_class, head = (
        (AutoModelForMaskedLM, "masked language modelling")
        if data_args.mlm
        else (AutoModelForCausalLM, "causal language modelling")
    )
    model = load_model(auto_class, head, model_args, config, tokenizer)
    data_args.block_size = fit_length(data_args.block_size, "block_size", tokenizer, config, default=1024)

    with training_args.main_process_first(desc="tokenization"):
        data = {name: make_blocks(split, name, tokenizer, data_args, model) for name, split in splits.items()}

    card: dict[str, Any] = {
        "finetuned_from": hub_name(model_args),
        "comparison": report_args.card_comparison,
        "tasks": "fill-mask" if data_args.mlm else "text-generation",
    }
    if data_args.dataset_name:
        card |= {"dataset_tags": data_args.dataset_name, "dataset": data_args.dataset_name}

    collator = BlockCollator(tokenizer, data_args, seed=training_args.seed)
    # R-Drop is this line: RDropTrainer in place of Trainer, and the --rdrop_* arguments in training_args.
    trainer = LanguageModelTrainer(
        model=model,
        args=training_args,
        card=card,
        consistency_samples=report_args.consistency_samples,
        metric_names=("nll", "perplexity", "accuracy"),
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        data_collator=collator,
        callbacks=[collator],
        compute_metrics=score_tokens,
        preprocess_logits_for_metrics=token_sums(shift_labels=not data_args.mlm),
    )

    if use_trainer is not None:
        return use_trainer(trainer)

    results: dict[str, dict[str, Any]] = {}
    if training_args.do_train:
        results["train"] = trainer.run_training(checkpoint)
    if training_args.do_eval:
        results["eval"] = {**trainer.evaluate(), "eval_samples": len(data["validation"])}
        results["eval"] |= trainer.run_consistency(data["validation"])
    if training_args.do_predict:
        output = trainer.predict(data["test"], metric_key_prefix="predict")
        results["predict"] = {**output.metrics, "predict_samples": len(data["test"])}

    return trainer.finish(results)


if __name__ == "__main__":
    cli(main)
