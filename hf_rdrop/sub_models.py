"""Sources of sub-models beside a model's own dropout: layers, weights, embeddings, inserted dropout, unequal rates."""

import math
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

from torch import nn

from .inserted import DropConnect, EmbeddingNoise, StochasticDepth, add_noise, drop_output, drop_weights
from .pass_dropout import PassDropout, PassRows, check_pass_dropout
from .places import hidden_layers, input_embeddings, linear_maps, residual_blocks


class SubModels:
    """Sources of sub-models that a model does not have by itself.

    They act in training mode only, whether or not a batch is repeated; in evaluation the model is the stock one, bit
    for bit. No parameter, buffer or config entry is added, so what `save_pretrained` writes is a stock model's.
    Several sources may be used together, and beside the model's dropout.

    Args:
        model: the model itself, without wrappers for parallelism, compilation or adapters.
        layer_drop: probability p that a row of the batch skips a hidden layer (of encoder and decoder), in [0, 1).
            The layer's input is then its output, without rescaling, as in LayerDrop (Fan et al. 2019, arXiv
            1909.11556): the 1 / (1 - p) of stochastic depth belongs to a residual branch, and the layers of BERT and
            its like end in a norm, so have none. Drawn for each row of a repeated batch, so the passes differ. Layers
            that a row skips are computed all the same: it saves no time.
        insert_dropout: rate p of dropout put on the outputs of the attention and feed-forward blocks of each layer,
            as far as they are modules of their own, in [0, 1): for models that have none there (Llama, Qwen, Mistral,
            ModernBERT, ...).
        drop_connect: probability p that a weight of a linear map in the layers is dropped, in [0, 1): rows of pass i
            see ``W * mask_i / (1 - p)``, one mask for each pass and forward (DropConnect, Wan et al. 2013). The
            graph holds a copy of these weights for each pass.
        embedding_noise: standard deviation of the normal noise added to each element of the input embeddings, >= 0
            (R3F, Aghajanyan et al. 2020, arXiv 2008.03156, uses 1e-5).
        second_dropout: rate q, in [0, 1), of all dropout in the passes 2..m, the first keeping the model's own (an
            ablation of R-Drop's paper); None for equal rates. Where the model's own rate is 0 it stays 0 in all
            passes.

    Attributes:
        differs: whether a source makes the passes differ by itself, without dropout in the model.

    Raises:
        ValueError: if a value is out of range or the model has no place for a source; nothing is left on the model.

    Example:
        >>> sources = SubModels(model, layer_drop=0.1)
        >>> sources.start(passes=2)
        >>> model(**repeat_batch(inputs, 2)).loss.backward()
        >>> sources.stop()
        >>> sources.remove()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layer_drop: float = 0.0,
        insert_dropout: float = 0.0,
        drop_connect: float = 0.0,
        embedding_noise: float = 0.0,
        second_dropout: float | None = None,
    ) -> None:
        rates = {"layer_drop": layer_drop, "insert_dropout": insert_dropout, "drop_connect": drop_connect}
        for name, rate in {**rates, "second_dropout": second_dropout or 0.0}.items():
            _check_number(name, rate, below=1.0)
        _check_number("embedding_noise", embedding_noise)
        self.model, self.differs = model, any((*rates.values(), embedding_noise))
        self._rows = PassRows()
        self._pass_dropout: PassDropout | None = None
        self._undo: list[Callable[[], Any]] = []
        try:
            if layer_drop:
                self._drop_layers(layer_drop)
            if insert_dropout:
                self._insert_dropout(insert_dropout)
            if drop_connect:
                self._drop_connect(drop_connect)
            if embedding_noise:
                self._add_noise(embedding_noise)
            if second_dropout is not None:
                self._set_second_dropout(second_dropout)
            if drop_connect or second_dropout is not None:
                for embeddings in input_embeddings(model):
                    self._undo.append(embeddings.register_forward_hook(self._rows.after_embeddings).remove)
        except Exception:
            self.remove()
            raise

    def start(self, passes: int) -> None:
        """From now on every forward is over a batch repeated `passes` times, pass after pass."""
        self._rows.start(passes)
        if self._pass_dropout is not None and passes > 1:
            self._pass_dropout.start()

    def stop(self) -> None:
        """Back to plain batches. Call it after the backward pass, where gradient checkpointing runs layers again."""
        self._rows.start(1)
        if self._pass_dropout is not None:
            self._pass_dropout.stop()

    def remove(self) -> None:
        """Leave the model as it was before."""
        self.stop()
        self._pass_dropout = None
        while self._undo:
            self._undo.pop()()

    # ---- The sources ----

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

    def _drop_connect(self, p: float) -> None:
        for linear in linear_maps(self.model):
            self._add(linear, "rdrop_drop_connect", DropConnect(p, self._rows))
            drop_weights(linear)
            self._undo.append(partial(delattr, linear, "forward"))

    def _add_noise(self, std: float) -> None:
        found = input_embeddings(self.model)
        if not found:
            raise ValueError(
                f"embedding_noise: {type(self.model).__name__} does not tell its input embeddings "
                "(get_input_embeddings). Set embedding_noise to 0, or give the model that method."
            )
        for embeddings in found:
            self._add(embeddings, "rdrop_embedding_noise", EmbeddingNoise(std))
            self._undo.append(embeddings.register_forward_hook(add_noise).remove)

    def _set_second_dropout(self, q: float) -> None:
        check_pass_dropout(self.model)
        self._pass_dropout = PassDropout(q, self._rows)
        self._undo += [handle.remove for handle in self._pass_dropout.hook(self.model)]


def insert_dropout(model: nn.Module, p: float) -> SubModels:
    """Put dropout on the outputs of the attention and feed-forward blocks of a model that has none there.

    Its code, parameters and config stay as they are. `inspect_dropout` and `set_dropout` see the new places.

    Args:
        model: the model itself, changed in place.
        p: the rate, in [0, 1).

    Returns:
        An object whose `remove()` takes the dropout out again.

    Raises:
        ValueError: if `p` is out of range, or the layers' blocks cannot be found.

    Example:
        >>> inserted = insert_dropout(model, 0.1)
        >>> inserted.remove()
    """
    return SubModels(model, insert_dropout=p)


def _check_number(name: str, value: Any, below: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < below:
        limit = " and less than 1 (at 1 nothing would be left)" if below == 1 else ""
        raise ValueError(f"{name} is {value!r}, but it must be a number of at least 0{limit}. Set it to 0.1, say.")
