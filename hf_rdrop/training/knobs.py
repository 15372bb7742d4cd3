"""Name what would make the passes of one very model differ, for the refusals of models in which nothing does."""

from typing import Any

from torch import nn

from ..dropout import inspect_dropout, is_dropout, set_dropout, settings_beside_dropout
from ..sub_models import SubModels
from ..sub_models.places import embeds_with_noise


def ways_to_differ(model: nn.Module, without: str = "") -> str:
    """List the settings, each of which makes the passes of this model differ, joined for a message.

    Args:
        model: the model itself.
        without: a name of `rdrop_*` that has been tried.
    """
    ways = []
    if any(map(is_dropout, inspect_dropout(model))):
        ways.append("rdrop_dropout=0.1")
    for name in ("insert_dropout", "layer_drop"):
        given: Any = {name: 0.1}
        try:
            SubModels(model, **given).remove()
        except ValueError:  # no place for it in this model
            continue
        ways.append(f"rdrop_{name}=0.1")
    ways = [way for way in ways if way.partition("=")[0] != without]
    if beside := settings_beside_dropout(model):
        ways.append(f"the model loaded with {' or '.join(beside)} (from_pretrained takes them)")
    if hasattr(model, "get_input_embeddings") and _has_noise(model):
        ways.append("neftune_noise_alpha=5")
    return "; ".join(ways) or "dropout modules (nn.Dropout) added to its code"


def _has_noise(model: nn.Module) -> bool:
    try:
        return isinstance(model.get_input_embeddings(), nn.Embedding) and embeds_with_noise(model)  # type: ignore
    except (NotImplementedError, AttributeError):
        return False


def set_rate(model: Any, p: float | None) -> None:
    """Set `rdrop_dropout`, if it is given; a model without a place for it is refused with what it has instead."""
    if p is None:
        return
    if not any(map(is_dropout, inspect_dropout(model))):
        raise ValueError(
            f"rdrop_dropout={p!r}, but {type(model).__name__} has no dropout that could be set: neither a dropout "
            "module nor an attribute that holds a dropout rate. R-Drop compares two passes that differ by something "
            f"random. Leave rdrop_dropout out. For this model there is: {ways_to_differ(model)}."
        )
    try:
        set_dropout(model, p)
    except ValueError as error:
        raise ValueError(f"{error} For this model there is: {ways_to_differ(model, 'rdrop_dropout')}.") from error
