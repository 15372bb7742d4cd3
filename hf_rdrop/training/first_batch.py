"""Look at the first batch for `TrainingRun.try_out`: are its labels right, and what will a step cost."""

import inspect
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainingArguments

from ..batch import has_items_in_order
from ..cost.model_shape import describe_model
from ..cost.predict import predict_cost
from ..fused.head import find_output_embeddings
from ..objective.batch_layout import BatchLayout
from ..objective.repeated_loss import unrepeatable
from .settings import RunFacts

logger = logging.getLogger(__name__)

# The heads of Transformers whose labels are classes below `config.num_labels`.
_CLASSIFIER = re.compile(r"For((Sequence|Token|Image|Video|Audio)Classification|SemanticSegmentation)$")


@contextmanager
def labels_explained(model: nn.Module, layout: BatchLayout, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Turn the index error of a loss into a refusal of its labels, where they are out of the head's range."""
    try:
        yield
    except (IndexError, RuntimeError):
        if (labels := layout.labels(inputs)) is not None:
            check_labels_of_head(model, labels, "a batch", layout.ignored)
        raise


@contextmanager
def inputs_explained(model: nn.Module, layout: BatchLayout, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Turn the error of a model on a repeated batch into a refusal of the inputs that are not one per row.

    (Errors of this package say themselves what to do.)
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        ours = where is not None and where.tb_frame.f_globals.get("__name__", "").startswith("hf_rdrop.")
        if ours or not (unlike := layout.unlike_rows(inputs)):
            raise
        if (labels := layout.labels(inputs)) is not None and isinstance(error, (IndexError, RuntimeError)):
            check_labels_of_head(model, labels, "a batch", layout.ignored)
        raise unrepeatable(unlike, f"{type(error).__name__}: {error}") from error


def no_evaluation(model: nn.Module) -> str | None:
    """Say why a model must not run in evaluation mode before it trains; None for most.

    (bitsandbytes 0.50 repacks 4-bit weights on a CPU for inference then, and no gradient arrives any more. The plain
    Trainer has the same fault with `eval_on_start`.)
    """
    if getattr(model, "is_quantized", False) and next(model.parameters()).device.type == "cpu":
        return "a quantised model on a CPU cannot be tried out, since evaluation repacks its weights for inference"
    return None


def takes_items(model: nn.Module) -> bool:
    """Tell whether a model takes images or audio beside texts, so that its inputs may be not one per row.

    (By its signature, so that all processes decide alike, whatever their batches hold.)
    """
    names = inspect.signature(model.forward).parameters
    return "input_ids" in names and has_items_in_order(names)


def check_labels_of_head(
    model: nn.Module, labels: Tensor, where: str = "the first batch", ignored: int = -100
) -> None:
    """Refuse a label that is neither a class of the model's head nor the one to ignore; it waits for the device.

    (Out of range, the loss fails with an index error from its depths, or on a GPU with an assertion that ends the
    process's use of it. Heads whose number of classes is not known are left alone.)
    """
    config, head = getattr(model, "config", None), find_output_embeddings(model)
    if isinstance(head, nn.Linear):
        classes, kind, remedy = head.out_features, "tokens", "encode the data with the model's own tokenizer"
    elif _CLASSIFIER.search(type(model).__name__) and getattr(config, "problem_type", None) in (
        None,
        "single_label_classification",
    ):
        classes, kind, remedy = config.num_labels, "classes", "load the model with num_labels=..."  # type: ignore
    else:
        return
    valid = labels[labels != ignored]
    if labels.is_floating_point() or classes < 2 or not valid.numel():
        return
    low, high = valid.min().item(), valid.max().item()
    if low < 0 or high >= classes:
        raise ValueError(
            f"The labels of {where} are from {low} to {high}, but {type(model).__name__} has {classes} "
            f"{kind}: a label is from 0 to {classes - 1}, or {ignored} where nothing is to be learned. Check the "
            f"labels, or {remedy}."
        )


def describe_cost(facts: RunFacts, inputs: Mapping[str, Any], args: TrainingArguments) -> str:
    """Say in a sentence what the cost model predicts for a step on this batch (not repeated)."""
    model, settings = facts.model, facts.settings
    try:
        shape = describe_model(model, inputs, itemsize=2 if args.bf16 or args.fp16 else None)
    except Exception as error:  # a model of an unforeseen kind must train all the same
        logger.debug("The sizes of the model cannot be read.", exc_info=error)
        shape = None
    if shape is None:
        return "R-Drop: no prediction of the cost, because the sizes of this model's layers are unknown."
    cost = predict_cost(
        shape,
        passes=settings.passes,
        shared_layers=facts.shared_layers,
        interval=settings.interval,
        fused_head=facts.fused_head,
        gradient_checkpointing=any(getattr(m, "gradient_checkpointing", False) for m in model.modules()),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )
    return (
        f"R-Drop: about {cost.time:.2f}x the time and {cost.memory:.2f}x the memory for activations and gradients "
        "of plain fine-tuning (predicted from the sizes of model and batch)."
    )


def show(message: str, args: TrainingArguments) -> None:
    """Show a message where the Trainer shows its log lines, also to a program that has not set up logging.

    (Python hands messages of the level INFO to nobody by default. `log_level="error"` silences this one too.)
    """
    if logger.isEnabledFor(logging.INFO):
        logger.info(message)
    elif args.get_process_log_level() <= logging.WARNING:
        tqdm.write(message, file=sys.stderr)
