"""What a training step with R-Drop costs beside a plain one, from the sizes of the model and of the batch alone."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

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
        kept: features K that one layer keeps of a token for its backward pass, attention probabilities apart. About
            twice what its matrices put out: that is kept by what comes next, and again behind it (normalised,
            activated, as a dropout mask, as the result of attention).
        attention: A, width of an attention (heads x their size) times the tokens it attends to, added up over the
            attentions of one layer.
        probabilities: R, attention probabilities of one layer for one token (heads x tokens attended to), which are
            kept as such, as a mask and multiplied with it; 0 with kernels that keep none.
    """

    layers: int
    length: int
    weights: int
    kept: int
    attention: int
    probabilities: int = 0

    def kept_bytes(self, itemsize: int) -> int:
        return (self.kept + 3 * self.probabilities) * itemsize


class ModelShape(NamedTuple):
    """The sizes that decide the cost of a step: read off a model by `describe_model`, or written down by hand.

    Args:
        stacks: in the order in which they run, so that the shared layers come first.
        batch_size: examples B of a plain batch on one device.
        items: places N of an example that are scored: its tokens, or 1.
        width: features D that go into the last matrix.
        classes: size V of the vocabulary, or number of classes.
        trainable: parameters P that are trained.
        trained_share: share of the matrices' weights that are trained.
        labelled: share of the items that the fused head computes: on a CPU those with a label, elsewhere 1.
        itemsize, gradient_itemsize: bytes of an activation (2 in mixed precision) and of a gradient.
        shards: processes among which gradients and optimizer are divided (FSDP, ZeRO).
        device_type: `"cpu"`; everything else counts as a GPU.
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


# Fitted on two cores in float32, where dropout (one thread draws its masks) is most of `kept_byte`; how to fit them
# again: tests/test_cost.py.
_CPU = _Machine(kept_byte=130, logit=650, rdrop_logit=1800, fused_logit=400, parameter=500)
# Not fitted: the bytes that each moves (5, 40, 170, 14, 40) times 120, the FLOPs that GPUs do in bfloat16 in the time
# of moving one byte, at the speeds of both that are reached in practice.
_GPU = _Machine(kept_byte=600, logit=4800, rdrop_logit=20_400, fused_logit=1680, parameter=4800)

_PLAIN_COPIES, _RDROP_COPIES = 3, 4  # of the logits: log-probabilities, both their gradients, and the agreement's
_EMBEDDING_COPIES = 4  # of an embedded token below the layers: sum, normalised, dropout mask, output
# Of the fused head, in float32 elements: see `linear_rdrop_loss`. Four temporaries of a block on a CPU.
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

    6 = 2 forward, 2 for the gradient of the input and 2, for trained weights, for theirs. `kept_byte`, `logit` (three
    values: plain, R-Drop, fused) and `parameter` are constants of the machine: FLOPs that take as
    long. Checkpointed layers run once more and keep their inputs. With an interval of n,
    ``time = ((n - 1) time(1) + time(m)) / n``, and the peak is that of the repeated batch.

    Args:
        shape: sizes of model and batch.
        passes: m >= 1.
        shared_layers: k, counted from the first stack on.
        interval: n >= 1.
        fused_head: whether full logits are avoided, in the plain steps of the interval too.
        gradient_checkpointing: whether layers keep their inputs only.
        gradient_accumulation_steps: batches to one update of the parameters.
        fixed_share: share of a plain step's time, in [0, 1), spent on what is not counted above and the same in both:
            waiting for data, or for the all-reduce of gradients, which is per parameter.

    Returns:
        `StepCost(time, memory, peak_bytes)`; memory beyond weights and optimizer state: activations, logits and
        gradients. Not foreseen are models too small to keep a GPU busy (a second pass costs less there) and mixtures
        of experts (counted as if every expert saw every token).

    Example:
        >>> shape = decoder_shape(32, 4096, 11008, vocab_size=32_000, length=2048)  # Llama-2 7B
        >>> round(predict_cost(shape, shared_layers=24, fused_head=True).time, 1)
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
    items = step.passes * shape.batch_size * shape.items
    scored = items * shape.labelled if step.fused_head else items
    return layers + per_weight * scored * shape.width * shape.classes


def peak_memory(shape: ModelShape, step: Step) -> float:
    """Bytes that a step takes at its peak, as its backward pass begins or ends, beyond weights and optimizer state."""
    rows = step.passes * shape.batch_size
    token = shape.width * shape.itemsize
    kept = _EMBEDDING_COPIES * token * rows * sum(stack.length for stack in shape.stacks)
    for stack, tokens in _layer_tokens(shape, step):
        kept += tokens * (token if step.gradient_checkpointing else stack.kept_bytes(shape.itemsize))
    if step.gradient_checkpointing:  # the layer whose turn it is
        kept += max(rows * stack.length * stack.kept_bytes(shape.itemsize) for stack in shape.stacks)
    items = rows * shape.items * (shape.labelled if step.fused_head else 1)
    weight, logits = shape.width * shape.classes, items * shape.classes
    if step.fused_head:  # the gradients of hidden states and weight, and a chunk or the weight's scaled gradient
        chunk = min(max(weight, _MIN_CHUNK), _MAX_CHUNK, logits)
        blocks = _BLOCKS_PER_CORE * torch.get_num_threads() if shape.device_type == "cpu" else 0
        elements = items * shape.width + weight + max(chunk + min(chunk, blocks), weight)
    else:
        elements = max(_PLAIN_COPIES * logits, logits + weight)
        if step.passes > 1:  # the forward pass has one copy less and the blocks in which the agreement is computed
            elements = max(elements, _RDROP_COPIES * logits, 3 * logits + 5 * min(logits, _BLOCK_ELEMENTS))
    start = kept + 4 * elements  # in float32, whatever the precision of the model
    gradients = shape.trainable * shape.gradient_itemsize / shape.shards
    return start + gradients if step.gradient_accumulation_steps > 1 else max(start, gradients)


def _time(shape: ModelShape, step: Step) -> float:
    """Time of a step on one batch, in FLOPs."""
    machine = _CPU if shape.device_type == "cpu" else _GPU
    kept = sum(tokens * stack.kept_bytes(shape.itemsize) for stack, tokens in _layer_tokens(shape, step))
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
        layers, width, vocab_size, length, batch_size: L, D, V, T and B.
        inner: features inside its gated feed-forward layers.
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
    labels, tokens, head = inputs.get("labels"), inputs.get("input_ids"), find_head(model)
    heads: Any = getattr(config, "num_attention_heads", None)
    width: Any = getattr(config, "hidden_size", None)
    stacks, matrices = find_layer_stacks(model), _matrices(model)
    sizes_known = matrices and isinstance(heads, int) and isinstance(width, int)
    if not (stacks and sizes_known and isinstance(labels, Tensor) and isinstance(tokens, Tensor)):
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
        kept = 2 * sum(matrix.put_out for matrix in one_layer)
        # GPT-2's activation is written out in single operations, which keep three features more for each.
        written_out = sum(isinstance(m, NewGELUActivation) for m in stack[0].modules())
        kept += 3 * written_out * max((matrix.taken_in for matrix in one_layer), default=0)
        weights, probabilities = sum(matrix.weights for matrix in one_layer), heads * attended * keeps_probabilities
        found.append(LayerStack(len(stack), own, weights, kept, attention_width * attended, probabilities))
    parameters, by_token = list(model.parameters()), labels.dim() > 1 and not labels.is_floating_point()
    return ModelShape(
        tuple(found),
        batch_size=tokens.numel() // length,  # of multiple choices, each is a row
        items=labels.shape[-1] if by_token else 1,
        width=width,
        classes=config.num_labels if head is None else len(cast(Tensor, head.weight)),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        trained_share=sum(m.weights for m in matrices if m.is_trained) / sum(m.weights for m in matrices),
        labelled=float((labels != -100).float().mean()) if by_token and on_cpu else 1.0,
        itemsize=itemsize or parameters[0].element_size(),
        gradient_itemsize=parameters[0].element_size(),
        device_type=labels.device.type,
    )


class _Matrix(NamedTuple):
    taken_in: int
    put_out: int
    is_trained: bool

    @property
    def weights(self) -> int:  # of the weight itself, ZeRO-3 and quantisation leave something else
        return self.taken_in * self.put_out


def _matrices(module: nn.Module) -> list[_Matrix]:
    linear: list[Any] = [m for m in module.modules() if isinstance(m, (nn.Linear, Conv1D))]
    sizes = [(m.nx, m.nf) if isinstance(m, Conv1D) else (m.in_features, m.out_features) for m in linear]
    return [_Matrix(*size, m.weight.requires_grad) for size, m in zip(sizes, linear, strict=True)]
