"""Set-ups that cannot work are refused before the first step: what is wrong, why it matters, what to change."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .dropout import inspect_dropout, is_stochastic
from .heads import SUPPORTED_HEADS
from .loss import check_alpha

if TYPE_CHECKING:
    from .trainer import RDropMixin

#: Keys that collators of packed (padding-free) or sharded sequences add: their rows are not examples.
PACKED_INPUTS = frozenset(
    {"cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "packed_seq_lens", "shift_labels"}
)


def check_training_setup(trainer: "RDropMixin") -> None:
    """Check model, arguments and parallelism when training begins.

    Raises:
        ValueError: when training with R-Drop would fail, be wrong or do nothing.
    """
    alpha = trainer.rdrop_argument("alpha")
    check_alpha(alpha)  # once more: a hyper-parameter search sets it on the arguments
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{trainer.args.n_gpu} GPUs in one process (torch.nn.DataParallel) would divide a repeated batch across "
            "devices and average losses without their item counts. Start one process per GPU with `accelerate "
            "launch` or `torchrun`, or show one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    if alpha == 0:
        return
    if "labels" not in trainer.label_names and hasattr(trainer.base_model, "config"):
        raise ValueError(
            f"R-Drop does not support the head of {type(trainer.base_model).__name__}: it is trained on "
            f"{', '.join(trainer.label_names) or 'no labels'}, not on `labels`. Supported heads: {SUPPORTED_HEADS}. "
            "Use one of these, or set rdrop_alpha to 0."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if any(getattr(parallelism, f"{kind}_enabled", False) for kind in ("cp", "sp")):
        raise ValueError(
            "R-Drop cannot be used with context or sequence parallelism: each rank holds a slice of every sequence, "
            "so neither the passes nor the valid items can be told apart there. Use data parallelism (DDP, FSDP, "
            "DeepSpeed ZeRO), or set rdrop_alpha to 0."
        )
    if not trainer.args.neftune_noise_alpha:  # that noise differs between the passes too
        check_stochastic(trainer.base_model)


def check_stochastic(model: nn.Module) -> None:
    """Check that something random in the model differs between the passes.

    Raises:
        ValueError: when nothing does.
    """
    sources = inspect_dropout(model)
    if not is_stochastic(sources):
        found = ", ".join(sorted({f"{s.name.rpartition('.')[2]} ({s.kind}) = {s.rate:g}" for s in sources}))
        raise ValueError(
            "Nothing in this model is stochastic in a way that differs between the passes, so they would be "
            f"identical, the KL term always 0, and the second pass wasted. Found: {found or 'no dropout at all'}. "
            "Set a dropout rate with rdrop_dropout=0.1 (--rdrop_dropout 0.1 on a command line, or "
            "hf_rdrop.set_dropout(model, 0.1)), or set rdrop_alpha to 0 (--rdrop_alpha 0)."
        )


def check_batch(trainer: "RDropMixin", inputs: Mapping[str, Any]) -> Tensor:
    """Check that a training batch can be repeated and compared; returns its labels. Looks at shapes only.

    Raises:
        ValueError: when it cannot.
    """
    labels = trainer.find_labels(inputs)
    if labels is None:
        raise ValueError(
            f"R-Drop needs `labels` in the batch to know which items count; it has: {', '.join(inputs)}. Check the "
            "data set's columns and `label_names`, or set rdrop_alpha to 0."
        )
    packed = PACKED_INPUTS.intersection(inputs)
    if packed or (len(labels) == 1 and "position_ids" in inputs and "attention_mask" not in inputs):
        raise ValueError(
            "R-Drop cannot repeat packed (padding-free) batches: their single row holds many examples "
            f"({', '.join(sorted(packed)) or 'position_ids without attention_mask'}). Use a padding collator such as "
            "DataCollatorWithPadding, or set rdrop_alpha to 0."
        )
    if trainer.label_smoother is not None:
        if labels.is_floating_point():
            raise ValueError(
                "label_smoothing_factor needs class indices, but the labels are real numbers (regression or "
                "multi-label). Set label_smoothing_factor to 0."
            )
        config = getattr(trainer.base_model, "config", None)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
            raise ValueError(
                "With label smoothing the labels are withheld from the model, which then cannot make its decoder "
                "inputs from them. Use DataCollatorForSeq2Seq(tokenizer, model=model), which adds decoder_input_ids, "
                "or set label_smoothing_factor to 0."
            )
    return labels
