"""Make sub-models beside a model's own dropout: dropped layers and inserted dropout."""

from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

from torch import nn

from .modules import StochasticDepth, drop_output
from .places import hidden_layers, residual_blocks


class SubModels:
    """Put sources of sub-models on a model that it does not have by itself.

    They act in training mode only; in evaluation the model is the stock one, bit for bit. No parameter, buffer or
    config entry is added, so `save_pretrained` writes a stock model. Both sources may be used together, and beside the
    model's dropout.

    Args:
        model: the model itself, without wrappers for parallelism, compilation or adapters.
        layer_drop: probability p in [0, 1) that a row of the batch skips a hidden layer (of encoder and decoder). The
            layer's input is then its output, without rescaling, as in LayerDrop (Fan et al. 2019, arXiv 1909.11556).
            Drawn for each row of a repeated batch, so the passes differ. Skipped layers are computed all the same.
        insert_dropout: rate p in [0, 1) of dropout put on the outputs of the attention and feed-forward blocks of each
            layer, for models that have none there (Llama, Qwen, Mistral, ModernBERT, ...).

    Attributes:
        differs: whether a source makes the passes differ by itself, without dropout in the model.

    Raises:
        ValueError: if a value is out of range or the model has no place for a source; nothing is left on the model.

    Example:
        >>> sources = SubModels(model, layer_drop=0.1)
        >>> model(**repeat_batch(inputs, 2)).loss.backward()
        >>> sources.remove()
    """

    def __init__(self, model: nn.Module, *, layer_drop: float = 0.0, insert_dropout: float = 0.0) -> None:
        _check_rate("layer_drop", layer_drop)
        _check_rate("insert_dropout", insert_dropout)
        self.model, self.differs = model, bool(layer_drop or insert_dropout)
        self._undo: list[Callable[[], Any]] = []
        try:
            if layer_drop:
                self._drop_layers(layer_drop)
            if insert_dropout:
                self._insert_dropout(insert_dropout)
        except Exception:
            self.remove()
            raise

    def remove(self) -> None:
        """Leave the model as it was before."""
        while self._undo:
            self._undo.pop()()

    def _add(self, owner: nn.Module, name: str, child: nn.Module) -> Any:
        if hasattr(owner, name):
            raise ValueError(
                f"{type(self.model).__name__} has a source of sub-models of this kind already ({name}). Call "
                "remove() of the one there before putting on another."
            )
        owner.add_module(name, child.train(owner.training))
        self._undo.append(partial(delattr, owner, name))
        return child

    def _drop_layers(self, p: float) -> None:
        for layer in hidden_layers(self.model, "layer_drop"):
            drop = self._add(layer, "rdrop_layer_drop", StochasticDepth(p))
            # First, so that a shared trunk repeats what comes out.
            hook = layer.register_forward_hook(drop.after_layer, with_kwargs=True, prepend=True)
            self._undo.append(hook.remove)

    def _insert_dropout(self, p: float) -> None:
        for block in residual_blocks(self.model):
            self._add(block, "rdrop_dropout", nn.Dropout(p))
            self._undo.append(block.register_forward_hook(drop_output).remove)


def insert_dropout(model: nn.Module, p: float) -> SubModels:
    """Put dropout of rate p in [0, 1) on the outputs of the attention and feed-forward blocks that have none.

    The model is changed in place; its code, parameters and config stay as they are. `inspect_dropout` and
    `set_dropout` see the new places, and `remove()` of what is returned takes the dropout out again.

    Raises:
        ValueError: if `p` is out of range, or the layers' blocks cannot be found.

    Example:
        >>> inserted = insert_dropout(model, 0.1)
        >>> inserted.remove()
    """
    return SubModels(model, insert_dropout=p)


def _check_rate(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < 1:
        raise ValueError(
            f"{name} is {value!r}, but it must be a number of at least 0 and less than 1 (at 1 nothing would be "
            "left). Set it to 0.1, say."
        )
