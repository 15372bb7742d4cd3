"""Predict what a training step with R-Drop costs beside a plain one, from the sizes of model and batch alone."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..functional import block_elements
from ..fused.linear import default_chunk_bytes
from .model_shape import LayerStack, ModelShape


class StepCost(NamedTuple):
    """Mean `time` and peak `memory` of a step as ratios to a plain step on the same batch; the peak in bytes."""

    time: float
    memory: float
    peak_bytes: float


class Machine(NamedTuple):
    """Costs of the work beside matrix products, in FLOPs of matrix products that take as long."""

    kept_byte: float  # made and read forward, read backward; its gradient made and read
    logit: float  # plain cross-entropy
    rdrop_logit: float  # cross-entropy and divergence on full logits
    fused_logit: float  # both in the fused head
    parameter: float  # a trained one: clipping of its gradient, AdamW


# CPU: fitted to a benchmark on two cores in float32 (scripts/fit_cost_model.py); most of `kept_byte` is dropout.
# GPU ("cuda" and every other device): not fitted, but the bytes that each moves (5, 40, 170, 14, 40) times 120, the
# bfloat16 FLOPs that GPUs do in practice while moving one byte.
MACHINES = {
    "cpu": Machine(kept_byte=120, logit=450, rdrop_logit=1700, fused_logit=300, parameter=700),
    "cuda": Machine(kept_byte=600, logit=4800, rdrop_logit=20_400, fused_logit=1680, parameter=4800),
}

_BLOCK_COPIES = 4  # temporaries of a block in the fused head on a CPU


class Step(NamedTuple):
    """A kind of training step, described as for `predict_cost`."""

    passes: int = 1
    shared_layers: int = 0
    fused_head: bool = False
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1


def predict_cost(
    shape: ModelShape,
    *,
    passes: int = 2,
    shared_layers: int = 0,
    interval: int = 1,
    fused_head: bool = False,
    gradient_checkpointing: bool = False,
    gradient_accumulation_steps: int = 1,
    fixed_share: float = 0.0,
    machine: Machine | None = None,
) -> StepCost:
    r"""Predict time and memory of a step with R-Drop as ratios to plain training on the same batch.

    With m passes, k of L layers shared, and the letters of `LayerStack` and `ModelShape`:

        time(m)   = (k + m (L - k)) B T (6 W + 12 A + kept_byte * kept) + m B N V (6 D + logit) + parameter P
        memory(m) = max((k + m (L - k)) B T kept + 4 m B T D itemsize + logits(m), gradients)
        kept      = (K + 3 R) itemsize, the bytes of one token in one layer
        logits(m) = 12 B N V for m = 1, 16 m B N V for R-Drop; fused head: 4 (2 D V + m B N D) or a little more

    6 = 2 forward, 2 for the gradient of the input and 2, for trained weights, for theirs. `kept_byte`, `logit` (plain,
    R-Drop or fused) and `parameter` are constants of the machine. Checkpointed layers run once more and keep their
    inputs. With an interval of n, ``time = ((n - 1) time(1) + time(m)) / n`` with the peak of the repeated batch.

    Args:
        shape: sizes of model and batch.
        passes, shared_layers, interval: m >= 1; k, counted from the first stack on; n >= 1.
        fused_head: whether full logits are avoided, in the plain steps of the interval too.
        gradient_checkpointing: whether layers keep their inputs only.
        gradient_accumulation_steps: batches to one update.
        fixed_share: share of a plain step's time, in [0, 1), that R-Drop leaves as it is: waiting for data or for the
            all-reduce of gradients.
        machine: its constants; by default those of `MACHINES` for the shape's device.

    Returns:
        `StepCost(time, memory, peak_bytes)`: activations, logits, gradients, but not weights and optimizer state. Not
        foreseen: models too small to keep a GPU busy (a second pass costs less), mixtures of experts.

    Example:
        >>> from hf_rdrop.cost import decoder_shape
        >>> llama_7b = decoder_shape(32, 4096, 11008, vocab_size=32_000, length=2048)
        >>> round(predict_cost(llama_7b, shared_layers=24, fused_head=True).time, 1)
        1.2
    """
    plain = Step(1, 0, False, gradient_checkpointing, gradient_accumulation_steps)
    repeated = plain._replace(passes=passes, shared_layers=shared_layers, fused_head=fused_head)
    machine = machine or MACHINES.get(shape.device_type, MACHINES["cuda"])
    between = (interval - 1) * step_time(shape, plain._replace(fused_head=fused_head), machine)
    ratio = (between + step_time(shape, repeated, machine)) / interval / step_time(shape, plain, machine)
    peak = peak_memory(shape, repeated)
    return StepCost(fixed_share + (1 - fixed_share) * ratio, peak / peak_memory(shape, plain), peak)


def step_flops(shape: ModelShape, step: Step) -> float:
    """Count the FLOPs of a step's matrix products: 2 for a multiplication with its addition."""
    per_weight, again = 4 + 2 * shape.trained_share, 2 * step.gradient_checkpointing
    layers = sum(
        tokens * ((per_weight + again) * stack.weights + (12 + 2 * again) * stack.attention)
        for stack, tokens in _layer_tokens(shape, step)
    )
    items = step.passes * shape.batch_size * shape.items * (shape.labelled if step.fused_head else 1)
    return layers + per_weight * items * shape.width * shape.classes


def peak_memory(shape: ModelShape, step: Step) -> float:
    """Count the bytes at a step's peak, as its backward pass begins or ends, without weights and optimizer state."""
    rows, token = step.passes * shape.batch_size, shape.width * shape.itemsize
    kept: float = 4 * token * rows * sum(stack.length for stack in shape.stacks)  # embedded: sum, norm, mask, product
    for stack, tokens in _layer_tokens(shape, step):
        kept += tokens * (token if step.gradient_checkpointing else shape.kept_bytes(stack))
        if shape.itemsize < shape.gradient_itemsize:  # the weights in low precision
            kept += stack.layers * stack.weights * shape.itemsize
    if step.gradient_checkpointing:  # the layer whose turn it is
        kept += max(rows * stack.length * shape.kept_bytes(stack) for stack in shape.stacks)
    items = rows * shape.items * (shape.labelled if step.fused_head else 1)
    weight, logits = shape.width * shape.classes, items * shape.classes
    block = block_elements(torch.device(shape.device_type))
    if step.fused_head:  # the gradients of hidden states and weight, and a chunk or the weight's scaled gradient
        chunk = min(default_chunk_bytes(weight) // 4, logits)
        blocks = min(chunk, _BLOCK_COPIES * block) if shape.device_type == "cpu" else 0
        if logits <= chunk:  # a single one: the gradient of the weight is made after the blocks
            elements = items * shape.width + max(chunk + max(blocks, weight), 2 * weight)
        else:
            elements = items * shape.width + weight + max(chunk + blocks, weight)
    else:
        # Log-probabilities, their gradient and the logits'; the divergence's, or the blocks in which it is computed.
        divergence = max(logits, min(4 * logits, 5.5 * block)) if step.passes > 1 else 0
        elements = max(3 * logits + divergence, logits + weight)
    start = kept + 4 * elements  # in float32, whatever the precision of the model
    gradients = (shape.trainable + 2 * weight * shape.tied) * shape.gradient_itemsize / shape.shards
    return start + gradients if step.gradient_accumulation_steps > 1 else max(start, gradients)


def step_time(shape: ModelShape, step: Step, machine: Machine) -> float:
    """Predict the time of a step on one batch, in FLOPs of matrix products that take as long."""
    kept = sum(tokens * shape.kept_bytes(stack) for stack, tokens in _layer_tokens(shape, step))
    logits = step.passes * shape.batch_size * shape.items * shape.classes
    per_logit = machine.logit if step.passes == 1 else machine.rdrop_logit
    loss = logits * (machine.fused_logit * shape.labelled if step.fused_head else per_logit)
    update = machine.parameter * shape.trainable / shape.shards / step.gradient_accumulation_steps
    return step_flops(shape, step) + machine.kept_byte * kept + loss + update


def _layer_tokens(shape: ModelShape, step: Step) -> Iterator[tuple[LayerStack, int]]:
    """Count the tokens through each stack, added up over its layers: B rows in shared layers, m * B in others."""
    left = step.shared_layers if step.passes > 1 else 0
    for stack in shape.stacks:
        shared = min(left, stack.layers)
        left -= shared
        yield stack, (shared + step.passes * (stack.layers - shared)) * shape.batch_size * stack.length
