#!/usr/bin/env python
"""run_glue.py's comparison in a plain Accelerate loop: R-Drop is `repeat_batch`, one forward, and `RDropLoss`.

    accelerate launch run_glue_no_trainer.py --task_name mrpc --model_name_or_path bert-base-cased \
        --rdrop_alpha 1.0 --output_dir outputs/mrpc

It trains, and evaluates after each epoch. Mixed precision is `accelerate launch`'s to choose. --rdrop_alpha 0 trains
the baseline: the same loop, data order and arguments, without the second pass.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, SchedulerType, get_scheduler

from accelerate import Accelerator, DataLoaderConfiguration
from finetuning.command_line import cli
from finetuning.labels import Labels
from finetuning.model import ModelArguments, fit_length, load_config, load_model, load_tokenizer
from finetuning.reading import keep_reading, tell_reading
from finetuning.results import LAST_RESULT_FILE, read_json, remove_results, write_json
from finetuning.run import RESUME_OPTION, find_checkpoint, parse_arguments
from hf_rdrop import RDropArguments, RDropLoss, set_dropout
from hf_rdrop.batch import repeat_batch, split_passes
from hf_rdrop.checkpoints import saving
from hf_rdrop.training.checks import check_stochastic
from tasks.classification import flip_labels, predict_labels, read_targets
from tasks.glue import (
    GlueArguments,
    build_metric,
    choose_labels,
    choose_text_columns,
    load_data,
    settle_labels,
    tokenize,
)

logger = logging.getLogger(f"hf_rdrop.scripts.{__name__}")


@dataclass
class LoopArguments(RDropArguments):
    """Arguments of the loop, with the names and defaults of the Transformers scripts."""

    output_dir: str = field(default="trainer_output", metadata={"help": "Folder for the model and the results."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Examples per process and forward."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Examples per process in evaluation."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of AdamW after the warm-up."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay, for weight matrices only."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Longest gradient; longer ones are scaled down."})
    label_smoothing_factor: float = field(default=0.0, metadata={"help": "Label smoothing, in [0, 1)."})
    num_train_epochs: int = field(default=3, metadata={"help": "Passes over the training data."})
    max_train_steps: int | None = field(default=None, metadata={"help": "Optimizer steps, instead of epochs."})
    lr_scheduler_type: SchedulerType = field(default="linear", metadata={"help": "Course of the learning rate."})
    num_warmup_steps: int = field(default=0, metadata={"help": "Steps in which the learning rate rises from 0."})
    logging_steps: int = field(default=50, metadata={"help": "Log loss, ce_loss and kl_loss every N steps."})
    checkpointing_steps: int | None = field(default=None, metadata={"help": "Save a checkpoint every N steps."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Folder of a checkpoint; `last` for the newest one in --output_dir."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU even where there is an accelerator."})
    seed: int = field(default=42, metadata={"help": "Seed of the head's weights, the data order and the dropout."})

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for name in (*counts, "num_train_epochs", "max_train_steps", "logging_steps", "checkpointing_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the script with these arguments; returns the metrics."""
    model_args, data_args, args = parse_arguments((ModelArguments, GlueArguments, LoopArguments), argv, __doc__)
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run in this process may have used bf16
    accelerator = Accelerator(cpu=args.use_cpu, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.WARNING)
    logging.getLogger("hf_rdrop").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if not accelerator.is_main_process:
        datasets.disable_progress_bars()
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    set_seed(args.seed)

    # Data and model, as in run_glue.py.
    splits = load_data(data_args, model_args, train=True, validation=True)
    config = load_config(model_args)
    splits = settle_labels(data_args, splits, config)
    columns = choose_text_columns(data_args, splits)
    labels = choose_labels(data_args, splits, config)
    splits = data_args.choose_rows(splits)
    targets = read_targets(splits, labels, data_args.label_column)
    if data_args.label_noise:
        targets["train"] = flip_labels(targets["train"], labels, data_args.label_noise, args.seed)
    loss_fn = RDropLoss(args.rdrop_alpha, labels.problem_type, args.label_smoothing_factor)
    passes = args.rdrop_passes if args.rdrop_alpha else 1
    compute = build_metric(data_args, labels)
    tell_reading(columns, data_args.label_columns or [data_args.label_column], labels, targets)
    config.update(labels.config_changes())
    keep_reading(config, columns, data_args, labels)
    tokenizer = load_tokenizer(model_args, config)
    model = load_model(AutoModelForSequenceClassification, "sequence classification", model_args, config, tokenizer)
    if args.rdrop_dropout is not None:
        set_dropout(model, args.rdrop_dropout)
    if args.rdrop_alpha:
        check_stochastic(model)
    data_args.max_seq_length = fit_length(data_args.max_seq_length, "max_seq_length", tokenizer, config)
    with accelerator.main_process_first():
        data = {
            name: tokenize(split, name, tokenizer, columns, targets[name], data_args) for name, split in splits.items()
        }

    multiple = 8 if accelerator.mixed_precision != "no" and accelerator.device.type == "cuda" else None
    collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate,
    )
    train_loader = DataLoader(
        data["train"], shuffle=True, batch_size=args.per_device_train_batch_size, collate_fn=collate
    )
    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    validation = {
        name: accelerator.prepare(DataLoader(d, batch_size=args.per_device_eval_batch_size, collate_fn=collate))
        for name, d in data.items()
        if name != "train"
    }

    steps_per_epoch = math.ceil(len(train_loader) / args.gradient_accumulation_steps)
    last_step = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, last_step)
    accelerator.register_for_checkpointing(scheduler)
    step, loss_sum = 0, 0.0
    if checkpoint is not None:
        accelerator.load_state(checkpoint)
        state = read_json(Path(checkpoint, "trainer_state.json"))
        step, loss_sum = state["global_step"], state["loss_sum"]
    folder = Path(args.output_dir)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        remove_results(folder)

    started, logged, results = time.time(), step, {"train": {}, "eval": {}}
    sums = torch.zeros(3, device=accelerator.device)  # loss, ce and kl since the last log line
    for epoch in range(step // steps_per_epoch, math.ceil(last_step / steps_per_epoch)):
        train_loader.set_epoch(epoch)  # the order of the data depends on seed and epoch only, whatever alpha is
        done = (step - epoch * steps_per_epoch) * args.gradient_accumulation_steps
        loader = accelerator.skip_first_batches(train_loader, done)
        loader.set_epoch(epoch)
        model.train()
        for window in windows(loader, args.gradient_accumulation_steps):
            # Dropout depends on seed, step and process only, so a resumed run goes on as if it had not stopped.
            torch.manual_seed((args.seed * 1_000_003 + step) * accelerator.num_processes + accelerator.process_index)
            rows = torch.tensor(sum(len(batch["labels"]) for batch in window), device=accelerator.device)
            rows_of_step = accelerator.gather(rows).sum()
            for index, batch in enumerate(window):
                with nullcontext() if index == len(window) - 1 else accelerator.no_sync(model):
                    answers = batch.pop("labels")
                    # R-Drop: [x; x] through the model once, its logits taken apart again, one loss for all passes.
                    logits = split_passes(model(**repeat_batch(batch, passes)).logits, passes)
                    loss = loss_fn(logits[0], logits[-1], answers, *logits[1:-1])
                    # Its weight in the mean over all examples of the step, however they lie in batches and processes.
                    share = len(answers) / rows_of_step
                    accelerator.backward(loss.loss * share * accelerator.num_processes)
                    sums += torch.stack(loss).detach() * share
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:
                scheduler.step()
            optimizer.zero_grad()
            step += 1

            save = bool(args.checkpointing_steps) and step % args.checkpointing_steps == 0
            if save or step % args.logging_steps == 0 or step == last_step:
                values = accelerator.reduce(sums, "sum").tolist()
                means = [value / (step - logged) for value in values]
                logger.info("step %d of %d: loss %.4f, ce_loss %.4f, kl_loss %.4g", step, last_step, *means)
                loss_sum, logged = loss_sum + values[0], step
                sums.zero_()
            if save:
                target = folder / f"checkpoint-{step}"
                with saving(target, RESUME_OPTION, writer=accelerator.is_main_process):
                    accelerator.save_state(str(target))
                    if accelerator.is_main_process:  # written last: the mark of a complete checkpoint
                        write_json(target / "trainer_state.json", {"global_step": step, "loss_sum": loss_sum})
            if step == last_step:
                break
        results["eval"] = evaluate(model, validation, accelerator, labels, compute)
        logger.info("epoch %d: %s", epoch + 1, results["eval"])

    results["train"] = {
        "train_loss": loss_sum / step,
        "train_runtime": time.time() - started,
        "train_samples": len(data["train"]),
        "train_steps": step,
    }
    accelerator.wait_for_everyone()
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        for split, metrics in results.items():
            write_json(folder / f"{split}_results.json", metrics)
        write_json(folder / LAST_RESULT_FILE, {**results["train"], **results["eval"]})
    accelerator.end_training()
    return {**results["train"], **results["eval"]}


def windows(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield the batches of each optimizer step; the last step of an epoch may have fewer."""
    batches = iter(batches)
    while window := list(islice(batches, size)):
        yield window


def evaluate(
    model: Any, loaders: dict[str, Any], accelerator: Accelerator, labels: Labels, compute: Any
) -> dict[str, float]:
    """Metrics of one plain pass over each validation set; MNLI's second one gets the suffix _mm."""
    model.eval()
    metrics = {}
    for name, loader in loaders.items():
        predictions, references = [], []
        for batch in loader:
            targets = batch.pop("labels")
            with torch.no_grad():
                logits = model(**batch).logits
            logits, targets = accelerator.gather_for_metrics((logits.float(), targets))
            predictions.append(logits.cpu())
            references.append(targets.cpu())
        scores = compute(predict_labels(torch.cat(predictions).numpy(), labels), torch.cat(references).numpy())
        suffix = "_mm" if name.endswith("mismatched") else ""
        metrics |= {f"eval_{key}{suffix}": value for key, value in scores.items()}
        metrics[f"eval_samples{suffix}"] = len(torch.cat(references))
    return metrics


if __name__ == "__main__":
    cli(main)
