"""Read off a model and its batches the sizes that decide the cost of a training step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from ..fused.head import find_output_embeddings
from ..trunk.shared import find_layer_stacks

# Names of attention dropout in configurations; with it, no kernel of the CPU avoids keeping the probabilities.
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")


class LayerStack(NamedTuple):
    """Transformer layers of one size.

    Args:
        layers: their number L.
        length: tokens T of an example.
        weights: parameters W in the matrices of one layer; each is multiplied with every token.
        kept: features K that one layer keeps of a token for its backward pass, without R: about twice what its
            matrices put out, once as they are and once normalised, activated or masked.
        attention: A, width (heads x their size) times tokens attended to, added up over the attentions of one layer.
        probabilities: R, heads x tokens attended to, if their probabilities, masks and products are kept; else 0.
    """

    layers: int
    length: int
    weights: int
    kept: int
    attention: int
    probabilities: int = 0


class ModelShape(NamedTuple):
    """Sizes that decide the cost of a step, read off a model by `describe_model` or written down by hand.

    Args:
        stacks: in the order in which they run, so that the shared layers come first.
        batch_size: examples B of a plain batch on one device.
        items: scored places N of an example: its tokens, or 1.
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
        """Count the bytes that a layer keeps of a token: norms and residuals are float32 in mixed precision too."""
        mixed = 1.4 if self.itemsize < self.gradient_itemsize else 1
        return mixed * self.itemsize * (stack.kept + 3 * stack.probabilities)


def decoder_shape(
    layers: int, width: int, inner: int, *, vocab_size: int, length: int, batch_size: int = 1, **others: Any
) -> ModelShape:
    """Work out the shape of a decoder such as Llama, trained in bfloat16 on a GPU.

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
    """Read the sizes off a model (without wrappers for parallelism) and a training batch with labels, not repeated.

    `itemsize` is that of an activation in bytes: 2 in mixed precision, by default that of a parameter. Returns None
    without a stack of Transformers' layers, labels or tokens.
    """
    config: Any = getattr(model, "config", None)
    batch: list[Any] = [inputs.get(name) for name in ("labels", "input_ids")]
    sizes: list[Any] = [getattr(config, name, None) for name in ("num_attention_heads", "hidden_size")]
    (labels, tokens), (heads, width) = batch, sizes
    stacks, matrices, is_lm = find_layer_stacks(model), _matrices(model), find_output_embeddings(model) is not None
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
        trainable=sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad),  # ZeRO-3 leaves none
        trained_share=sum(a * b * is_trained for a, b, is_trained in matrices) / sum(a * b for a, b, _ in matrices),
        labelled=float((labels != -100).float().mean()) if by_token and on_cpu else 1.0,
        itemsize=itemsize or parameters[0].element_size(),
        gradient_itemsize=parameters[0].element_size(),
        device_type=labels.device.type,
        tied=is_lm and bool(config.tie_word_embeddings),
    )


def _matrices(module: nn.Module) -> list[tuple[int, int, bool]]:
    """List features in, features out and whether it is trained, for every matrix (also 4-bit or sharded ones)."""
    linear: list[Any] = [m for m in module.modules() if isinstance(m, (nn.Linear, Conv1D))]
    sizes = ((m.nx, m.nf) if isinstance(m, Conv1D) else (m.in_features, m.out_features) for m in linear)
    return [(*size, m.weight.requires_grad) for size, m in zip(sizes, linear, strict=True)]
