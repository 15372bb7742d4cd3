#!/usr/bin/env python
"""Train sentence embeddings without labels (unsupervised SimCSE): two dropout passes of a sentence are each other's
positive, the rest of the batch negatives.

    python run_contrastive.py --train_file sentences.txt --validation_file sts-dev.csv \
        --model_name_or_path bert-base-uncased --do_train --do_eval --max_seq_length 32 --mlp_head \
        --per_device_train_batch_size 64 --learning_rate 3e-5 --num_train_epochs 1 --output_dir outputs/simcse

The validation data are pairs of sentences with a score. Reported is how the cosine similarity of the embeddings
correlates with it, dropout off, before training (eval_spearmanr_before) and after (eval_spearmanr).
"""

from typing import Any

from transformers import AutoModel

from finetuning.command_line import cli
from finetuning.model import ModelArguments, fit_length, hub_name, load_config, load_model, load_tokenizer
from finetuning.run import parse_arguments, start_run
from finetuning.trainer import padding_multiple
from hf_rdrop import set_dropout
from hf_rdrop.metrics import Glue
from tasks.embeddings import ContrastiveArguments, SentenceCollator, load_pairs, load_sentences, tokenize
from tasks.embeddings_trainer import ContrastiveTrainer, ContrastiveTrainingArguments, add_head


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the script with these arguments; returns the metrics."""
    model_args, data_args, training_args = parse_arguments(
        (ModelArguments, ContrastiveArguments, ContrastiveTrainingArguments), argv, __doc__
    )
    if training_args.do_predict:
        raise ValueError("--do_predict: this script has nothing to predict. Leave it out.")
    checkpoint = start_run(training_args)

    splits = {}
    if training_args.do_train:
        splits["train"] = load_sentences(data_args, model_args)
    if training_args.do_eval:
        splits["validation"] = load_pairs(data_args, model_args)
    config = load_config(model_args)
    if config.is_encoder_decoder:
        raise ValueError(
            f"{model_args.model_name_or_path} is an encoder-decoder, and only encoders (or causal models, with "
            "--pooling last) are trained here. Choose another --model_name_or_path."
        )
    tokenizer = load_tokenizer(model_args, config)
    model = load_model(AutoModel, "sentence embedding", model_args, config, tokenizer)
    if training_args.dropout is not None:
        set_dropout(model, training_args.dropout)
    data_args.max_seq_length = fit_length(data_args.max_seq_length, "max_seq_length", tokenizer, config)

    with training_args.main_process_first(desc="tokenization"):
        data = {name: tokenize(split, name, tokenizer, data_args) for name, split in splits.items()}
    if training_args.do_train and training_args.mlp_head:
        add_head(model)

    metric = Glue("stsb")  # Pearson's and Spearman's correlation
    trainer = ContrastiveTrainer(
        model=model,
        args=training_args,
        card={"finetuned_from": hub_name(model_args), "dataset": data_args.dataset_name},
        metric_names=metric.compute(predictions=[0.0, 1.0, 2.0], references=[0.0, 1.0, 2.0]),
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        data_collator=SentenceCollator(tokenizer, pad_to_multiple_of=padding_multiple(training_args)),
        compute_metrics=lambda p: metric.compute(predictions=p.predictions, references=p.label_ids),
    )

    results: dict[str, dict[str, Any]] = {}
    if training_args.do_eval:
        results["eval"] = trainer.evaluate_before() if training_args.do_train else {}
    if training_args.do_train:
        results["train"] = trainer.run_training(checkpoint)
    if training_args.do_eval:
        results["eval"] |= {**trainer.evaluate(), "eval_samples": len(data["validation"])}
    return trainer.finish(results)


if __name__ == "__main__":
    cli(main)
