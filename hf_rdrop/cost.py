"""What a training step with R-Drop costs beside a plain one, from the sizes of the model and of the batch alone."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from .functional import _BLOCK_ELEMENTS
from .fused_head import find_head
from .trunk import find_layer_stacks


class LayerStack(NamedTuple):
    """Transformer layers of one size.

    Args:
        layers: their number L.
        length: tokens T of an example.
        weights: parameters W in the matrices of one layer; each is multiplied with every token.
        kept: features K that one layer keeps of a token for its backward pass, without R. About twice what its
            matrices put out, which is kept by what comes next and again behind that (normalised, activated, masked).
        attention: A, width (heads x their size) times tokens attended to, added up over the attentions of one layer.
        probabilities: R, heads x tokens attended to, whose probabilities are kept as such, as a mask and multiplied
            with it; 0 with kernels that keep none.
    """

    layers: int
    length: int
    weights: int
    kept: int
    attention: int
    probabilities: int = 0


class ModelShape(NamedTuple):
    """The sizes that decide the cost of a step: read off a model by `describe_model`, or written down by hand.

    Args:
        stacks: in the order in which they run, so that the shared layers come first.
        batch_size: examples B of a plain batch on one device.
        items: places N of an example that are scored: its tokens, or 1.
        width: features D that go into the last matrix.
        classes: size V of the vocabulary, or number of classes.
        trainable, trained_share: parameters P that are trained, and the share of the matrices' weights that is.
        labelled: share of the items that the fused head computes: on a CPU those with a label, elsewhere all.
        itemsize, gradient_itemsize: bytes of an activation and of a gradient; different in mixed precision.
        shards: processes among which gradients and optimizer are divided (FSDP, ZeRO).
        device_type: `"cpu"`; everything else counts as a GPU.
        tied: whether the head's weight is the embeddings' (two more gradients of it while they are added up).
    """

    stacks: tuple[LayerStack, ...]
    batch_size: int
    items: int
    width: int
    classes: int
    trainable: int
    trained_share: float = 1.0
    labelled: float = 1.0
    itemsize: int = 4
    gradient_itemsize: int = 4
    shards: int = 1
    device_type: str = "cpu"
    tied: bool = False

    def kept_bytes(self, stack: LayerStack) -> float:
        """Bytes that a layer keeps of a token: norms and residuals are float32 in mixed precision too."""
        return (
            (1.4 if self.itemsize < self.gradient_itemsize else 1)
            * self.itemsize
            * (stack.kept + 3 * stack.probabilities)
        )


class StepCost(NamedTuple):
    """Mean `time` and peak `memory` of a step over those of a plain step on the same batch; that peak in bytes."""

    time: float
    memory: float
    peak_bytes: float


class _Machine(NamedTuple):
    """What the work beside matrix products costs, in FLOPs of matrix products that take as long."""

    kept_byte: float  # made and read forward, read backward; its gradient made and read
    logit: float  # plain cross-entropy
    rdrop_logit: float  # cross-entropy and agreement on full logits
    fused_logit: float  # both in the fused head
    parameter: float  # a trained one: clipping of its gradient, AdamW


# Fitted on two cores in float32, with dropout the most of `kept_byte`; how to fit them again: tests/test_cost.py.
_CPU = _Machine(kept_byte=120, logit=450, rdrop_logit=1700, fused_logit=300, parameter=700)
# Not fitted: the bytes that each moves (5, 40, 170, 14, 40) times 120, the FLOPs that GPUs do in bfloat16 in the time
# of moving one byte, at the speeds of both that are reached in practice.
_GPU = _Machine(kept_byte=600, logit=4800, rdrop_logit=20_400, fused_logit=1680, parameter=4800)

# Float32 elements in the fused head (see `linear_rdrop_loss`), on a CPU with four temporaries of a block.
_MIN_CHUNK, _MAX_CHUNK, _BLOCKS_PER_CORE = 2**22, 2**28, 2**21
# How configurations name the dropout of attention probabilities, with which no kernel of the CPU avoids keeping them.
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")


class Step(NamedTuple):
    """A kind of training step: see `predict_cost`."""

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
) -> StepCost:
    r"""Predict time and memory of a step with R-Drop as ratios to plain training on the same batch.

    With m passes, k of L layers shared, and the letters of `LayerStack` and `ModelShape`:

        time(m)   = (k + m (L - k)) B T (6 W + 12 A + kept_byte * kept) + m B N V (6 D + logit) + parameter P
        memory(m) = max((k + m (L - k)) B T kept + 4 m B T D itemsize + logits(m), gradients)
        kept      = (K + 3 R) itemsize, the bytes of one token in one layer
        logits(m) = 12 B N V for m = 1, 16 m B N V for R-Drop; fused head: 4 (2 D V + m B N D) or a little more

    6 = 2 forward, 2 for the gradient of the input and 2, for trained weights, for theirs. `kept_byte`, `logit` (plain,
    R-Drop or fused) and `parameter` are constants of the machine: FLOPs that take as long. Checkpointed layers run
    once more and keep their inputs. With an interval of n, ``time = ((n - 1) time(1) + time(m)) / n``, and the peak is
    that of the repeated batch.

    Args:
        shape: sizes of model and batch.
        passes, shared_layers, interval: m >= 1; k, counted from the first stack on; n >= 1.
        fused_head: whether full logits are avoided, in the plain steps of the interval too.
        gradient_checkpointing: whether layers keep their inputs only.
        gradient_accumulation_steps: batches to one update.
        fixed_share: share of a plain step's time, in [0, 1), that is not counted above and the same in both: waiting
            for data, or for the all-reduce of gradients, which is per parameter.

    Returns:
        `StepCost(time, memory, peak_bytes)`: activations, logits, gradients, but not weights and optimizer state. Not
        foreseen: models too small to keep a GPU busy (a second pass costs less), mixtures of experts.

    Example:
        >>> llama_7b = decoder_shape(32, 4096, 11008, vocab_size=32_000, length=2048)
        >>> round(predict_cost(llama_7b, shared_layers=24, fused_head=True).time, 1)
        1.2
    """
    plain = Step(1, 0, False, gradient_checkpointing, gradient_accumulation_steps)
    repeated = plain._replace(passes=passes, shared_layers=shared_layers, fused_head=fused_head)
    between = (interval - 1) * _time(shape, plain._replace(fused_head=fused_head))
    ratio = (between + _time(shape, repeated)) / interval / _time(shape, plain)
    peak = peak_memory(shape, repeated)
    return StepCost(fixed_share + (1 - fixed_share) * ratio, peak / peak_memory(shape, plain), peak)


def step_flops(shape: ModelShape, step: Step) -> float:
    """FLOPs of the matrix products of a step: 2 for a multiplication with its addition."""
    per_weight, again = 4 + 2 * shape.trained_share, 2 * step.gradient_checkpointing
    layers = sum(
        tokens * ((per_weight + again) * stack.weights + (12 + 2 * again) * stack.attention)
        for stack, tokens in _layer_tokens(shape, step)
    )
    items = step.passes * shape.batch_size * shape.items * (shape.labelled if step.fused_head else 1)
    return layers + per_weight * items * shape.width * shape.classes


def peak_memory(shape: ModelShape, step: Step) -> float:
    """Bytes that a step takes at its peak, as its backward pass begins or ends, beyond weights and optimizer state."""
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
    if step.fused_head:  # the gradients of hidden states and weight, and a chunk or the weight's scaled gradient
        chunk = min(max(weight, _MIN_CHUNK), _MAX_CHUNK, logits)
        blocks = min(chunk, _BLOCKS_PER_CORE * torch.get_num_threads()) if shape.device_type == "cpu" else 0
        elements = items * shape.width + weight + max(chunk + blocks, weight)
    else:
        # Log-probabilities, their gradient and the logits'; the agreement's, or the blocks in which it is computed.
        agreement = max(logits, min(4 * logits, 5.5 * _BLOCK_ELEMENTS)) if step.passes > 1 else 0
        elements = max(3 * logits + agreement, logits + weight)
    start = kept + 4 * elements  # in float32, whatever the precision of the model
    gradients = (shape.trainable + 2 * weight * shape.tied) * shape.gradient_itemsize / shape.shards
    return start + gradients if step.gradient_accumulation_steps > 1 else max(start, gradients)


def _time(shape: ModelShape, step: Step) -> float:
    """Time of a step on one batch, in FLOPs."""
    machine = _CPU if shape.device_type == "cpu" else _GPU
    kept = sum(tokens * shape.kept_bytes(stack) for stack, tokens in _layer_tokens(shape, step))
    logits = step.passes * shape.batch_size * shape.items * shape.classes
    per_logit = machine.logit if step.passes == 1 else machine.rdrop_logit
    loss = logits * (machine.fused_logit * shape.labelled if step.fused_head else per_logit)
    update = machine.parameter * shape.trainable / shape.shards / step.gradient_accumulation_steps
    return step_flops(shape, step) + machine.kept_byte * kept + loss + update


def _layer_tokens(shape: ModelShape, step: Step) -> Iterator[tuple[LayerStack, int]]:
    """Tokens that go through each stack, added up over its layers: B rows in shared layers, m * B in others."""
    left = step.shared_layers if step.passes > 1 else 0
    for stack in shape.stacks:
        shared = min(left, stack.layers)
        left -= shared
        yield stack, (shared + step.passes * (stack.layers - shared)) * shape.batch_size * stack.length


def decoder_shape(
    layers: int, width: int, inner: int, *, vocab_size: int, length: int, batch_size: int = 1, **others: Any
) -> ModelShape:
    """The shape of a decoder as Llama's, trained in bfloat16 on a GPU, for predictions on paper.

    Args:
        layers, width, inner, vocab_size, length, batch_size: L, D, features in its gated feed-forward layers, V, T, B.
        others: `key_value_width` with grouped queries, and fields of `ModelShape`, such as `shards`.
    """
    outputs = 3 * width + 2 * others.pop("key_value_width", width) + 2 * inner
    weights = width * (outputs - width) + inner * width
    trainable = layers * weights + 2 * vocab_size * width
    stack = LayerStack(layers, length, weights, 2 * outputs, width * length)
    fields = {"trainable": trainable, "itemsize": 2, "gradient_itemsize": 2, "device_type": "cuda"} | others
    return ModelShape((stack,), batch_size, length, width, vocab_size, **fields)


def describe_model(model: nn.Module, inputs: Mapping[str, Any], *, itemsize: int | None = None) -> ModelShape | None:
    """Read the sizes that decide the cost off a model and one of its training batches (not repeated).

    Args:
        model: the model itself, without wrappers for parallelism.
        inputs: a batch with its labels.
        itemsize: bytes of an activation: 2 in mixed precision; by default those of a parameter.

    Returns:
        The shape; None where it cannot be read: no stack of Transformers' layers, no labels, no tokens.
    """
    config: Any = getattr(model, "config", None)
    batch: list[Any] = [inputs.get(name) for name in ("labels", "input_ids")]
    sizes: list[Any] = [getattr(config, name, None) for name in ("num_attention_heads", "hidden_size")]
    (labels, tokens), (heads, width) = batch, sizes
    stacks, matrices, is_lm = find_layer_stacks(model), _matrices(model), find_head(model) is not None
    readable = [isinstance(x, Tensor) for x in batch] + [isinstance(x, int) for x in sizes]
    if not (stacks and matrices and all(readable)):
        return None
    attention_width = heads * (getattr(config, "head_dim", None) or width // heads)
    on_cpu, length = labels.device.type == "cpu", tokens.shape[-1]
    keeps_probabilities = getattr(config, "_attn_implementation", None) == "eager" or (
        on_cpu and any(getattr(config, rate, 0) for rate in _ATTENTION_DROPOUT)
    )
    found: list[LayerStack] = []
    for stack in stacks.values():
        own, attended = length, length
        if found and getattr(config, "is_encoder_decoder", False):
            own = inputs.get("decoder_input_ids", labels).shape[-1]
            attended = own + length  # itself and the encoder
        one_layer = _matrices(stack[0])
        kept = 2 * sum(put_out for _, put_out, _ in one_layer)
        # GPT-2's activation is written out in single operations, which keep three features more for each.
        written_out = sum(isinstance(m, NewGELUActivation) for m in stack[0].modules())
        kept += 3 * written_out * max((taken_in for taken_in, _, _ in one_layer), default=0)
        weights, probabilities = sum(a * b for a, b, _ in one_layer), heads * attended * keeps_probabilities
        found.append(LayerStack(len(stack), own, weights, kept, attention_width * attended, probabilities))
    parameters, by_token = list(model.parameters()), labels.dim() > 1 and not labels.is_floating_point()
    return ModelShape(
        tuple(found),
        batch_size=tokens.numel() // length,  # of multiple choices, each is a row
        items=labels.shape[-1] if by_token else 1,
        width=width,
        classes=config.vocab_size if is_lm else config.num_labels,
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        trained_share=sum(a * b * is_trained for a, b, is_trained in matrices) / sum(a * b for a, b, _ in matrices),
        labelled=float((labels != -100).float().mean()) if by_token and on_cpu else 1.0,
        itemsize=itemsize or parameters[0].element_size(),
        gradient_itemsize=parameters[0].element_size(),
        device_type=labels.device.type,
        tied=is_lm and bool(config.tie_word_embeddings),
    )


def _matrices(module: nn.Module) -> list[tuple[int, int, bool]]:
    """Features in, features out and whether it is trained, of every matrix (also of 4 bits, or on other processes)."""
    linear: list[Any] = [m for m in module.modules() if isinstance(m, (nn.Linear, Conv1D))]
    sizes = ((m.nx, m.nf) if isinstance(m, Conv1D) else (m.in_features, m.out_features) for m in linear)
    return [(*size, m.weight.requires_grad) for size, m in zip(sizes, linear, strict=True)]
