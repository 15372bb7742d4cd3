#!/usr/bin/env python
"""Fine-tune a model for image classification with R-Drop.

    python run_image_classification.py --train_dir photos/train --validation_dir photos/dev \
        --model_name_or_path google/vit-base-patch16-224-in21k --rdrop_alpha 0.6 --do_train --do_eval \
        --output_dir outputs/photos
    python run_image_classification.py --digits --model_name_or_path outputs/tiny-vit --do_train --do_eval \
        --output_dir outputs/digits

A folder holds one folder of images for each class. Every image is read once before the first step, by
--dataloader_num_workers processes, so that a broken file is known then. Images are prepared by the model's image
processor and nothing else: there is no random cropping or flipping. Pillow is enough, torchvision is not needed.
--rdrop_alpha 0 trains the baseline: the same trainer, data order and arguments, without the second pass.
"""

from collections.abc import Callable
from typing import Any

from transformers import AutoModelForImageClassification, Trainer

from finetuning.command_line import cli
from finetuning.model import hub_name, load_config, load_model
from finetuning.run import parse_arguments, start_run
from finetuning.trainer import ReportArguments, ScriptMixin
from hf_rdrop import RDropTrainer, RDropTrainingArguments
from hf_rdrop.metrics import SequenceClassification
from tasks.classification import flip_labels, metric_names, predict_labels, read_targets, score
from tasks.image_processing import ImageModelArguments, PreparedImages, check_images, load_image_processor
from tasks.images import ImageArguments, choose_labels, file_names, format_predictions, load_images


class ImageTrainer(ScriptMixin, RDropTrainer):
    """`RDropTrainer` with what the scripts add around training."""


def compute_metrics(predictions: Any, references: Any) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews' correlation of class indices."""
    return SequenceClassification().compute(predictions=predictions, references=references)


def main(
    argv: list[str] | None = None, use_trainer: Callable[[Trainer], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Run the script with these arguments; returns the metrics.

    With `use_trainer`, the trainer is handed to it instead of being trained and evaluated here (sweep.py).
    """
    model_args, data_args, report_args, training_args = parse_arguments(
        (ImageModelArguments, ImageArguments, ReportArguments, RDropTrainingArguments), argv, __doc__
    )
    checkpoint = start_run(training_args)

    wanted = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    splits = load_images(data_args, model_args, [split for split, is_wanted in wanted.items() if is_wanted])
    config = load_config(model_args)
    labels = choose_labels(data_args, splits, config)
    splits = data_args.choose_rows(splits)
    targets = read_targets(splits, labels, data_args.label_column_name)
    if data_args.label_noise and training_args.do_train:
        targets["train"] = flip_labels(targets["train"], labels, data_args.label_noise, training_args.seed)
    config.update(labels.config_changes())
    processor = load_image_processor(model_args)
    model = load_model(AutoModelForImageClassification, "image classification", model_args, config)

    data = {}
    for name, split in splits.items():
        channels = getattr(config, "num_channels", 3)
        data[name] = PreparedImages(split, data_args.image_column_name, targets[name], processor, channels)
        check_images(data[name], name, training_args.dataloader_num_workers)

    card: dict[str, Any] = {
        "finetuned_from": hub_name(model_args),
        "comparison": report_args.card_comparison,
        "tasks": "image-classification",
    }
    if data_args.dataset_name:
        card |= {"dataset_tags": data_args.dataset_name, "dataset": data_args.dataset_name}
    elif data_args.digits:
        card["dataset"] = "scikit-learn's handwritten digits"

    # R-Drop is this line: RDropTrainer in place of Trainer, and the --rdrop_* arguments in training_args.
    trainer = ImageTrainer(
        model=model,
        args=training_args,
        card=card,
        consistency_samples=report_args.consistency_samples,
        metric_names=metric_names(labels, compute_metrics),
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        processing_class=processor,
        compute_metrics=lambda p: score(p, labels, compute_metrics),
        preprocess_logits_for_metrics=lambda logits, _: logits[0] if isinstance(logits, tuple) else logits,
    )

    if use_trainer is not None:
        return use_trainer(trainer)

    results: dict[str, dict[str, Any]] = {}
    files = {}
    if training_args.do_train:
        results["train"] = trainer.run_training(checkpoint)
    if training_args.do_eval:
        results["eval"] = {**trainer.evaluate(), "eval_samples": len(data["validation"])}
        results["eval"] |= trainer.run_consistency(data["validation"], compute_metrics)
    if training_args.do_predict:
        output = trainer.predict(data["test"], metric_key_prefix="predict")
        results["predict"] = {**output.metrics, "predict_samples": len(data["test"])}
        names, predictions = file_names(splits["test"], data_args), predict_labels(output.predictions, labels)
        files["predict_results.txt"] = format_predictions(names, predictions, labels)

    return trainer.finish(results, files)


if __name__ == "__main__":
    cli(main)
