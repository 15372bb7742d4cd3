"""Refuse set-ups that cannot work before the first step: what is wrong, why it matters, what to change.

Every check raises a ValueError (`check_bases` a TypeError). `run` says when each is made. Shared layers are refused in
`trunk/check`, the fused head in `fused/head`, damaged checkpoints in `checkpoints/integrity`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ..alpha import check_alpha
from ..dropout import describe_sources, inspect_dropout, is_dropout, is_stochastic
from ..objective.batch_layout import BatchLayout
from ..objective.heads import ANSWER, SUPPORTED_HEADS
from ..sub_models.places import embeds_with_noise
from .knobs import ways_to_differ

#: Keys that collators of packed (padding-free) or sharded sequences add: their rows are not examples.
PACKED_INPUTS = frozenset(
    {"cu_seq_lens_q", "cu_seq_lens_k", "cu_seq_lens", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "max_length_q"}
    | {"max_length_k", "seq_idx", "packed_seq_lens", "shift_labels"}
)


def check_bases(cls: type, mixin: type) -> None:
    """Raise a TypeError for a class derived from the mixin that changes no `Trainer`, or comes after it."""
    order = cls.__mro__
    if Trainer not in order and any("train" in vars(base) for base in order if base not in mixin.__mro__):
        raise TypeError(
            f"{cls.__name__} is no transformers.Trainer: R-Drop changes the compute_loss of one. (setfit's Trainer "
            "holds one that trains embeddings on a contrastive loss, which has no logits to compare.)"
        )
    if Trainer in order and order.index(Trainer) < order.index(mixin):
        raise TypeError(
            f"{cls.__name__} names {mixin.__name__} after its Trainer, whose methods would hide those of R-Drop: "
            f"training would be plain. Write class {cls.__name__}({mixin.__name__}, ...), the mixin first."
        )


def check_parallelism(alpha: float, args: TrainingArguments, accelerator: Any) -> None:
    """Refuse an alpha out of range, and devices over which losses cannot be averaged or passes not be told apart."""
    check_alpha(alpha)  # once more: a hyper-parameter search sets it on the arguments
    check_processes(args)
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (torch.nn.DataParallel) would divide a repeated batch across "
            "devices and average losses without their item counts. Start one process per GPU with `accelerate "
            "launch` or `torchrun`, or show one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    parallelism = getattr(accelerator, "parallelism_config", None)
    if alpha and any(getattr(parallelism, f"{kind}_enabled", False) for kind in ("cp", "sp")):
        raise ValueError(
            "R-Drop cannot be used with context or sequence parallelism: each rank holds a slice of every sequence, "
            "so neither the passes nor the valid items can be told apart there. Use data parallelism (DDP, FSDP, "
            "DeepSpeed ZeRO), or set rdrop_alpha to 0."
        )


def check_processes(args: TrainingArguments) -> None:
    """Refuse several processes that would each train alone, and one that was started in place of several."""
    if args.world_size > 1:
        return
    started = os.environ.get("WORLD_SIZE", "")
    if started.isdigit() and int(started) > 1:
        raise ValueError(
            f"{started} processes were started, but each would train a model of its own, with the same output folder: "
            "on a machine without a GPU they only join with use_cpu=True (--use_cpu on a command line). Set it."
        )
    # What `accelerate launch` leaves for the single process it starts for several on a CPU.
    if not started and "MASTER_PORT" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        raise ValueError(
            "`accelerate launch` was asked for several processes on the CPU, but has started one, which would train "
            "alone: it needs an mpirun for more (distributed_type: MULTI_CPU, --cpu). Use `torchrun --nproc_per_node "
            "2 ... --use_cpu`, or a configuration of distributed_type MULTI_GPU with use_cpu: true and --use_cpu "
            "(scripts/accelerate/cpu.yaml); for one process unset MASTER_PORT."
        )


def check_per_sample_gradients(model: nn.Module, optimizer: Any) -> None:
    """Refuse gradients that are clipped row by row (differential privacy): a repeated row would count twice.

    (Opacus' optimizer or its hooks on the model, and what works as they do.)
    """
    while optimizer is not None and not hasattr(optimizer, "noise_multiplier"):
        optimizer = getattr(optimizer, "optimizer", None)  # Accelerate's and others' wrappers
    hooked = any(hasattr(module, "autograd_grad_sample_hooks") for module in model.modules())
    if optimizer is not None or hooked or any(hasattr(p, "grad_sample") for p in model.parameters()):
        raise ValueError(
            "R-Drop cannot be used with per-sample gradients (differential privacy, as Opacus'): it repeats each row, "
            "so each would be clipped twice, and the noise would no longer fit the privacy that is reported. Train "
            "without them, or set rdrop_alpha to 0."
        )


def check_head(model: nn.Module, label_names: Sequence[str]) -> None:
    """Refuse a model trained on other labels than those whose predictions can be compared.

    Args:
        model: the model itself; a module without a configuration is left to its first batch.
        label_names: the names of its labels, as the Trainer has found them.
    """
    if label_names and {"labels", "label", *ANSWER}.isdisjoint(label_names) and hasattr(model, "config"):
        raise ValueError(
            f"R-Drop does not support the head of {type(model).__name__}: it is trained on "
            f"{', '.join(label_names)}, not on `labels`. Supported heads: {SUPPORTED_HEADS}. "
            "Use one of these, or set rdrop_alpha to 0."
        )


def check_stochastic(model: nn.Module, with_sub_models: bool = False, with_noise: bool = False) -> None:
    """Refuse a model in which nothing random differs between the passes.

    Args:
        model: the model itself.
        with_sub_models: whether `SubModels` makes the passes differ.
        with_noise: whether Trainer's NEFTune adds noise to the embeddings.
    """
    if with_sub_models or (with_noise and embeds_with_noise(model)):
        return
    sources = inspect_dropout(model)
    if not is_stochastic(sources):
        raise ValueError(
            "Nothing in this model is stochastic in a way that differs between the passes, so they would be "
            f"identical, the KL term always 0, and the second pass wasted. Found: {describe_sources(sources)}. "
            f"What makes the passes of this model differ: {ways_to_differ(model)} (--rdrop_dropout 0.1 on a command "
            "line). Or set rdrop_alpha to 0 (--rdrop_alpha 0)."
        )


def check_passes_differ(model: nn.Module, divergence: Tensor, items: Tensor | None) -> None:
    """Refuse a model whose passes are equal on the first batch though its dropout rates should have made them differ.

    (At low rates, with parts in evaluation mode, and with an adapter or a gate that begins as zeros, equal passes are
    what one expects.)
    """
    # (A few rows may keep all their branches by chance, but not all their elements.)
    sources = [source for source in inspect_dropout(model) if source.rate >= 1e-2 and is_dropout(source)]
    if not sources or divergence != 0 or (items is not None and items == 0):
        return
    zeros = any(p.requires_grad and "bias" not in name and not p.any() for name, p in model.named_parameters())
    if not zeros and all(module.training for module in model.modules()):
        raise ValueError(
            "The passes of the first batch are equal to the last digit, so R-Drop would do nothing for the price of a "
            f"second pass: {type(model).__name__} does not use the dropout that it declares "
            f"({describe_sources(sources)}), whether it is its own or was set by rdrop_dropout. Leave rdrop_dropout "
            f"out. What this model has besides: {ways_to_differ(model, without='rdrop_dropout')}. Or set rdrop_alpha "
            "to 0."
        )


def check_batch_is_mapping(alpha: float, inputs: Any) -> None:
    """Refuse a batch whose parts have no names."""
    if alpha:
        raise ValueError(
            f"R-Drop needs batches that are mappings (input names to tensors) to know what to repeat; this one is a "
            f"{type(inputs).__name__}. Have the collator return a dict, or set rdrop_alpha to 0."
        )


def check_batch(
    layout: BatchLayout, inputs: Mapping[str, Any], labels: Tensor | None, *, own_logits: bool, label_smoothing: float
) -> None:
    """Refuse a training batch that cannot be repeated or compared; looks at shapes only.

    Args:
        layout: how batches are read.
        inputs: the batch, not repeated.
        labels: its labels; None only with `own_logits`.
        own_logits: whether `logits_for_agreement` says what the passes are compared by.
        label_smoothing: as Trainer's `label_smoothing_factor`.
    """
    other = next((name for name in ("labels", "label", *layout.label_names) if inputs.get(name) is not None), None)
    if labels is None and not own_logits and other is not None:
        raise ValueError(
            f"R-Drop knows no way to compare predictions for such `{other}`: no tensor, but a "
            f"{type(inputs[other]).__name__} (object detection, segments). Supported heads: {SUPPORTED_HEADS}. Or set "
            "rdrop_alpha to 0."
        )
    if labels is None and not own_logits:
        raise ValueError(
            f"R-Drop needs `labels` in the batch to know which items count; it has: {', '.join(inputs)}. Check the "
            "data set's columns and `label_names`, or set rdrop_alpha to 0."
        )
    several = [name for name in layout.label_names if isinstance(inputs.get(name), Tensor)]
    if len(several) > 1 and set(several) != set(ANSWER) and not own_logits:
        raise ValueError(
            f"The batch has several columns of labels ({', '.join(several)}), so the model has several heads, and "
            "R-Drop would compare the first of them alone. Say what to compare with logits_for_agreement (the scores "
            "of one head, or of several joined), or set rdrop_alpha to 0."
        )
    packed = PACKED_INPUTS.intersection(inputs)
    if packed or (layout.size(inputs) == 1 and "position_ids" in inputs and "attention_mask" not in inputs):
        raise ValueError(
            "R-Drop cannot repeat packed (padding-free) batches: their single row holds many examples "
            f"({', '.join(sorted(packed)) or 'position_ids without attention_mask'}). Use a padding collator such as "
            "DataCollatorWithPadding, or set rdrop_alpha to 0. (A single row that is one example needs its "
            "attention_mask.)"
        )
    if label_smoothing and labels is not None and labels.is_floating_point():
        raise ValueError(
            "label_smoothing_factor needs class indices, but the labels are real numbers (regression or "
            "multi-label). Set label_smoothing_factor to 0."
        )
    is_pair = getattr(layout.config, "is_encoder_decoder", False)
    if label_smoothing and is_pair and "decoder_input_ids" not in inputs:
        raise ValueError(
            "With label smoothing the labels are withheld from the model, which then cannot make its decoder "
            "inputs from them. Use DataCollatorForSeq2Seq(tokenizer, model=model), which adds decoder_input_ids, "
            "or set label_smoothing_factor to 0."
        )


def check_loss_of_labelled_rows(reader: str | None) -> None:
    """Refuse user code (`reader`, by name) that computes a loss of real numbers of which `rdrop_unlabeled` leaves
    rows out."""
    if reader is not None:
        raise ValueError(
            "rdrop_unlabeled with real-valued labels (regression or multi-label) computes the loss of the labelled "
            f"rows itself, but {reader}. Use the model's own loss, or leave rdrop_unlabeled out."
        )


def check_scale(trainer_class: type, ours: Tensor, returned: Tensor, accumulation: int) -> None:
    """Refuse a `training_step` that divides the loss by the accumulation steps once more; waits for the device."""
    if accumulation > 1 and torch.isclose(returned.float() * accumulation, ours.float(), rtol=1e-4) and ours != 0:
        raise ValueError(
            f"{trainer_class.__name__} divides the loss by its {accumulation} accumulation steps, and R-Drop's "
            "compute_loss has divided it already, so the gradients would be as many times too small. Leave the "
            "division out of training_step, and leave model_accepts_loss_kwargs and loss_is_scaled_for_ga as R-Drop "
            "sets them."
        )


def check_was_called(trainer_class: type, calls: Sequence[Tensor]) -> None:
    """Refuse, before the optimizer's step, a subclass whose `compute_loss` has replaced R-Drop's."""
    if not calls:
        raise ValueError(
            f"{trainer_class.__name__} trains without R-Drop: a `compute_loss` of its own does not call "
            "super().compute_loss. Put your loss into a Trainer class below the mixin: class WithLoss(Trainer) with "
            "compute_loss, then class MyTrainer(RDropMixin, WithLoss)."
        )
