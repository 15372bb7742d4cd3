"""Compute a language model's loss in place of its head, inside the model's own forward."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import few_rows, has_items_in_order
from ..dropout import dropout_off
from ..loss import RDropLossOutput
from ..objective.heads import find_logits, shifted_labels
from .linear import linear_rdrop_loss

logger = logging.getLogger(__name__)

# From this vocabulary on it pays; below it the full logits are small (see the benchmark's loss stage).
MIN_VOCAB_SIZE = 1000
# The buffer that BART and its relatives (Marian, mBART, Pegasus, ...) add to the head's output in their forward.
_FINAL_BIAS = "final_logits_bias"


def choose_fused_head(
    mode: str,
    model: nn.Module,
    wrapped: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor | None,
    *,
    shift_labels: bool,
    obstacle: str | None,
) -> "FusedHead | None":
    """Return the `FusedHead` of a model, or None where `mode`, the model or `obstacle` is against it; log the reason.

    Args:
        mode: `"auto"`, `"on"` or `"off"`, as `rdrop_fused_head`.
        model, wrapped: the model itself, and as training calls it (in DDP, FSDP, ...).
        inputs, labels: the first batch, not repeated, and its labels.
        shift_labels: whether the head scores position t against label t + 1.
        obstacle: what the caller knows against it, or None.

    Raises:
        ValueError: it is impossible and `mode` is `"on"`.
    """
    if mode == "off" or (mode == "auto" and find_output_embeddings(model) is None):
        return None
    try:
        head = FusedHead(model)
        if mode == "auto" and head.vocab_size < MIN_VOCAB_SIZE:
            return None
        if obstacle is not None or labels is None:
            raise ValueError(obstacle or "the batch has no `labels`")
        head.check(wrapped, inputs, labels, shift_labels)
        return head
    except Exception as error:  # whatever a model does when it is tried out, it may train on its full logits
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        message = f"the loss cannot be computed in place of the head: {reason}"
        if mode == "on":
            raise ValueError(
                f"rdrop_fused_head='on', but {message}. The full logits give the same loss in more time and memory: "
                "set rdrop_fused_head to 'auto' or 'off'."
            ) from error
        logger.warning(f"R-Drop keeps the full logits, because {message}.")
        return None


def find_output_embeddings(model: Any) -> nn.Module | None:
    """Return the module that makes a language model's logits, None for every other model."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _maker_of_decoder_inputs(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Find what makes a model's decoder inputs of its labels, as its forward does; None when nothing is known."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels  # type: ignore[return-value]
    config: Any = getattr(model, "config", None)
    if getattr(config, "pad_token_id", None) is None and hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)  # Florence-2, which reads images beside the text
    for base in type(model).__mro__:  # M2M100, Blenderbot, Whisper, ...: a function of their module
        if shift := getattr(sys.modules.get(base.__module__), "shift_tokens_right", None):
            return lambda labels: shift(labels, config.pad_token_id, config.decoder_start_token_id)
    return None


class FusedHead:
    """Take the place of the output embeddings of a model (not a wrapper) for the length of one forward.

    Only the head's `forward` is replaced: modules, hooks and the order in which they run stay the model's own, so what
    FSDP and DeepSpeed do around them stays valid. It returns the loss, broadcast to the shape `[m * B, T, 1]`, as the
    model's "logits": the graph goes through the model's outputs, where those engines look.

    Raises:
        ValueError: the model has no head for which this is possible; `check` finds out the rest.
    """

    def __init__(self, model: nn.Module) -> None:
        name = type(model).__name__
        head = find_output_embeddings(model)
        if head is None:
            raise ValueError(f"{name} has no language-model head (output embeddings)")
        # By its forward and not by its type, which FSDP replaces by a subclass.
        if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
            raise ValueError(
                f"the head of {name} is no plain torch.nn.Linear but {type(head).__name__} (an adapter, quantised "
                "weights or a replaced forward), so its output is more than hidden states times weight"
            )
        self.needs_decoder_inputs = bool(getattr(model.config, "is_encoder_decoder", False))
        self._decoder_inputs = _maker_of_decoder_inputs(model)
        self.model, self.head = model, head
        self._loss: Callable[[Tensor], RDropLossOutput] | None = None
        self._found: RDropLossOutput | None = None
        # One object for good: torch.compile would compile the model again for every new one.
        self._forward = torch.compiler.disable(self._compute)

    @property
    def vocab_size(self) -> int:
        return self.head.out_features

    def loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        repeat: Callable[[dict[str, Any], int], dict[str, Any]],
        *,
        passes: int,
        shift_labels: bool,
        alpha: float,
        label_smoothing: float,
    ) -> RDropLossOutput:
        """Run one forward over the repeated batch with `linear_rdrop_loss` in place of the head.

        Args:
            model: the model as training calls it.
            inputs: the batch with its labels, not repeated.
            repeat: repeats a batch, given it and the number of passes.
            passes: m; 1 for a plain step.
            shift_labels: whether the head scores position t against label t + 1.
            alpha, label_smoothing: as for `linear_rdrop_loss`.
        """
        labels, inputs = inputs["labels"], self._without_labels(inputs)
        target = shifted_labels(labels) if shift_labels else labels
        options: dict[str, Any] = {"alpha": alpha, "label_smoothing": label_smoothing, "passes": passes}
        self._loss = partial(self._linear_loss, final_bias=self._final_bias, labels=target, **options)
        with self._replaced(self._forward, without_final_bias=True):
            outputs = model(**(repeat(inputs, passes) if passes > 1 else inputs))
        found, self._found, self._loss = self._found, None, None
        if found is None:
            raise RuntimeError(f"{type(self.model).__name__} did not call its head.")
        return found._replace(loss=find_logits(outputs, passes * len(labels)).flatten()[0])

    def _without_labels(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Take the labels out of a batch, with the decoder inputs in it that the model makes of them."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        given = inputs.get("decoder_input_ids") is not None or inputs.get("decoder_inputs_embeds") is not None
        if self.needs_decoder_inputs and not given:
            if self._decoder_inputs is None:
                raise ValueError(f"{type(self.model).__name__} cannot make its decoder inputs without its labels")
            inputs["decoder_input_ids"] = self._decoder_inputs(labels)
        return inputs

    def _compute(self, hidden: Tensor) -> Tensor:
        if self._loss is None:
            raise RuntimeError("The head computes a loss only within `FusedHead.loss`.")
        self._found = self._loss(hidden)
        return self._found.loss.expand(*hidden.shape[:-1], 1)

    def _linear_loss(
        self, hidden: Tensor, final_bias: Tensor | None, labels: Tensor, **kwargs: Any
    ) -> RDropLossOutput:
        bias: Tensor | None = self.head.bias  # read here, where FSDP has gathered it, as the weight
        if final_bias is not None:
            bias = final_bias[0] if bias is None else bias + final_bias[0]
        return linear_rdrop_loss(hidden, self.head.weight, labels, bias=bias, **kwargs)

    @property
    def _final_bias(self) -> Tensor | None:
        return self.model._buffers.get(_FINAL_BIAS)

    @contextmanager
    def _biases_moved(self) -> Iterator[None]:
        """Have every parameter that may be added to the logits beside the head's own differ from zero."""
        with ExitStack() as stack:
            for p in self.model.parameters():
                if p.shape == (self.vocab_size,) and p is not self.head.bias and type(p.data) is Tensor:
                    stack.callback(p.data.copy_, p.data.clone())
                    p.data.add_(1)
            yield

    @contextmanager
    def _replaced(self, forward: Callable[[Tensor], Tensor], without_final_bias: bool = False) -> Iterator[None]:
        final_bias = self._final_bias
        self.head.forward = forward  # type: ignore
        if without_final_bias and final_bias is not None:
            self.model._buffers[_FINAL_BIAS] = final_bias.new_zeros(1, 1)
        try:
            yield
        finally:
            del self.head.forward
            if final_bias is not None:
                self.model._buffers[_FINAL_BIAS] = final_bias

    def check(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, shift_labels: bool) -> None:
        """Try with dropout off, on two rows of a batch, that `linear_rdrop_loss` computes the model's loss.

        The head's output is replaced by random numbers, large enough for any soft-capping to show. They must come out
        of the model unchanged (but for `final_logits_bias`), and its loss must be their mean cross-entropy. Parameters
        that may be added to them (a bias outside the head, zero at first) are other than zero meanwhile. Without
        labels the head must be applied to the same hidden states.

        Raises:
            ValueError: the loss cannot be computed in place of this head; with the reason.
        """
        name, size = type(self.model).__name__, len(labels)
        if inputs.get("labels") is not labels or labels.is_floating_point():
            raise ValueError("the batch has no integer `labels`")
        rows = few_rows(inputs, size, min(size, 2))
        fakes: list[Tensor] = []
        hiddens, weight_types = [], []

        def probe(hidden: Tensor) -> Tensor:
            hiddens.append(hidden)
            weight_types.append(type(self.head.weight.data))  # here, where FSDP has gathered it
            generator = torch.Generator(hidden.device).manual_seed(0)  # the training's own stays as it is
            shape = (*hidden.shape[:-1], self.vocab_size)
            fakes.append(10 * torch.randn(shape, generator=generator, device=hidden.device).to(hidden.dtype))
            return fakes[-1]

        with dropout_off(self.model), torch.no_grad(), self._replaced(probe), self._biases_moved():
            try:
                outputs = model(**rows)
            except Exception:
                if len(rows["labels"]) == size or not has_items_in_order(inputs):
                    raise
                # Of images, of which these rows may have more or fewer than one each, or none may be left out.
                rows = dict(inputs)
                for seen in (fakes, hiddens, weight_types):
                    seen.clear()
                outputs = model(**rows)
            model(**self._without_labels(rows))
        labels = rows["labels"]
        if [fake.shape[:-1] for fake in fakes] != [labels.shape] * 2:
            shapes = ", ".join(str(tuple(fake.shape[:-1])) for fake in fakes[: (len(fakes) + 1) // 2]) or "nothing"
            raise ValueError(
                f"{name} applies it to {shapes}, and not once to each of the labels {tuple(labels.shape)}"
            )
        if not torch.allclose(hiddens[0], hiddens[1], rtol=1e-3, atol=1e-5):
            raise ValueError(f"{name} makes other decoder inputs of its labels")
        if weight_types[0] is not Tensor:
            raise ValueError(f"its weight is a {weight_types[0].__name__}: sharded (tensor parallel) or quantised")
        expected = fakes[0] if self._final_bias is None else fakes[0] + self._final_bias
        logits = find_logits(outputs, len(labels))
        if logits.shape != expected.shape or not torch.allclose(logits.float(), expected.float(), rtol=1e-3):
            raise ValueError(f"{name} changes what comes out of it (soft-capping, scaling)")
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
        target = shifted_labels(labels) if shift_labels else labels
        ce = F.cross_entropy(expected.float().flatten(0, -2), target.flatten())
        # Marian, for one, takes the mean in the type of its logits: bfloat16 under FSDP's mixed precision.
        close = torch.allclose(loss.float(), ce, rtol=max(2e-5, 2 * torch.finfo(loss.dtype).eps), equal_nan=True)
        if not close or getattr(outputs, "aux_loss", None) is not None:  # may be too small to be seen
            raise ValueError(
                f"the loss of {name} is not the mean cross-entropy of its logits ({loss:.4g} instead of {ce:.4g} on "
                "real rows): an auxiliary loss, or a loss function of its own"
            )
