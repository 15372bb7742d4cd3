"""Another dropout rate for each pass, within one forward over a repeated batch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dropout import inspect_dropout

# Dropout of tables of positions, which are the same for all rows (DeBERTa, Funnel).
_TABLE_DROPOUTS = frozenset({"pos_dropout", "sin_dropout", "cos_dropout"})


class PassRows:
    """Which rows of a tensor belong to which pass, in a forward over a repeated batch.

    Attributes:
        passes: number of passes m.
        rows: m * B as the input embeddings have it, None where they are not called.
    """

    def __init__(self) -> None:
        self.passes = 1
        self.rows: int | None = None

    def start(self, passes: int) -> None:
        """Forwards from now on are over batches repeated `passes` times; 1 for plain ones."""
        self.passes, self.rows = passes, None

    def after_embeddings(self, embeddings: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """The forward hook of the input embeddings."""
        self.rows = len(output)

    def parts(self, size: int, what: str) -> int:
        """Into how many parts, one for each pass, to divide a tensor of `size` rows: m, or 1 if the passes share it.

        Raises:
            ValueError: when the rows cannot be told apart by pass.
        """
        # (In layers that the passes share there are B rows, and what is the same for all rows has one.)
        if self.passes == 1 or size == 1 or size * self.passes == self.rows:
            return 1
        if size % (self.rows or self.passes):
            raise ValueError(
                f"{what}: a tensor of {size} rows cannot be divided by pass where the batch, repeated {self.passes} "
                f"times, has {self.rows or 'another number of'} rows: the first dimension is not the batch's "
                "(unpadded or routed tokens, sequences before batches). Leave this source of sub-models out."
            )
        return self.passes


class PassDropout:
    """Between `start` and `stop`, dropout of the passes 2..m has another rate; the first pass keeps the model's.

    That holds for `nn.Dropout`, for `torch.nn.functional.dropout` and for the dropout of
    `scaled_dot_product_attention`, wherever their own rate is above 0: these two functions are replaced in
    `torch.nn.functional`. (A `TorchFunctionMode` would not reach the layers that gradient checkpointing runs again in
    the backward pass.)

    Args:
        q: the rate of the other passes, in [0, 1).
        pass_rows: tells the rows of the passes apart.
    """

    def __init__(self, q: float, pass_rows: PassRows) -> None:
        self.q, self.pass_rows = q, pass_rows
        self._in_table = False
        self._replaced: dict[str, Any] = {}

    def start(self) -> None:
        """Be in force until `stop`, also in the backward pass, where gradient checkpointing runs layers again."""
        for function in (self.dropout, self.scaled_dot_product_attention):
            name = function.__name__
            self._replaced.setdefault(name, getattr(F, name))
            setattr(F, name, function)

    def stop(self) -> None:
        """Be in force no more."""
        while self._replaced:
            setattr(F, *self._replaced.popitem())

    def hook(self, model: nn.Module) -> list[Any]:
        """Note when a table of positions is dropped from, whose rows are not the batch's; returns the handles."""
        tables = [module for name, module in model.named_modules() if name.rpartition(".")[2] in _TABLE_DROPOUTS]
        handles: list[Any] = [table.register_forward_pre_hook(self._before_table) for table in tables]
        return handles + [table.register_forward_hook(self._after_table, always_call=True) for table in tables]

    def _before_table(self, *args: Any) -> None:
        self._in_table = True

    def _after_table(self, *args: Any) -> None:
        self._in_table = False

    # The code of a compiled graph looks functions up by their names, so these two call others than they replace.

    def dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """In place of `torch.nn.functional.dropout`."""
        parts = self._parts(input) if training and p > 0 else 1
        if parts == 1:
            return torch.dropout_(input, p, training) if inplace else torch.dropout(input, p, training)
        return torch.cat([torch.dropout(x, self.q if i else p, True) for i, x in enumerate(input.chunk(parts))])

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """In place of `torch.nn.functional.scaled_dot_product_attention`."""
        attention: Any = torch.ops.aten.scaled_dot_product_attention
        parts = self._parts(query) if dropout_p > 0 else 1
        if parts == 1:
            return attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        queries, keys, values = (x.chunk(parts) for x in (query, key, value))
        is_per_row = attn_mask is not None and attn_mask.dim() == query.dim() and len(attn_mask) == len(query)
        masks = attn_mask.chunk(parts) if attn_mask is not None and is_per_row else [attn_mask] * parts
        rates = [dropout_p] + [self.q] * (parts - 1)
        return torch.cat(
            [attention(queries[i], keys[i], values[i], masks[i], rates[i], is_causal, **kwargs) for i in range(parts)]
        )

    def _parts(self, x: Tensor) -> int:
        return 1 if self._in_table or not x.dim() else self.pass_rows.parts(len(x), "second_dropout")


def check_pass_dropout(model: nn.Module) -> None:
    """Check that a model has dropout, and only such whose rate can differ between the passes.

    Raises:
        ValueError: when it has none, or some that cannot.
    """
    name = type(model).__name__
    active = [s for s in inspect_dropout(model) if s.rate > 0 and s.kind in ("dropout", "functional")]
    if not active:
        raise ValueError(
            f"second_dropout: {name} has no dropout with a rate above 0, whose rate could differ between the passes. "
            "Give it one (rdrop_dropout=0.1), or leave second_dropout out."
        )
    for source in active:
        path = source.name if source.kind == "dropout" else source.name.rpartition(".")[0]
        owner = model.get_submodule("" if path == "config" else path.removesuffix(".config"))
        is_other_kind = source.kind == "dropout" and not isinstance(owner, nn.Dropout)
        if is_other_kind or isinstance(owner, (nn.MultiheadAttention, nn.RNNBase)):
            raise ValueError(
                f"second_dropout: {source.name} of {name} is the dropout of a {type(owner).__name__}, which cannot "
                "have a rate for each pass. Leave second_dropout out."
            )
    kernel = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if kernel not in (None, "eager", "sdpa") and any(source.kind == "functional" for source in active):
        raise ValueError(
            f"second_dropout: the dropout of attn_implementation={kernel!r} cannot have a rate for each pass. Load "
            "the model with attn_implementation='sdpa' or 'eager', or leave second_dropout out."
        )
