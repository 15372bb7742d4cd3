"""Set every dropout rate that a model has, in its modules and in what is saved."""

import logging
import math
import re
from numbers import Real
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn

from .reloading import try_reloading
from .sources import configs_of, is_dropout, is_rate, kind_of, knobs_of

logger = logging.getLogger(__name__)


def set_dropout(model: nn.Module, p: float) -> None:
    """Set every dropout of `model` to `p`, in place: in its modules and in its configs.

    Modules, rates that are handed to functions (such as attention dropout) and the entries of the model's config and
    sub-configs all get `p`, so that the model has the same rates after `save_pretrained` and `from_pretrained`. So do
    PEFT's `lora_dropout` and an `nn.Identity` in the place of a dropout of rate 0, which becomes an `nn.Dropout(p)`.
    Config entries that are None stay None where the model is the same with None. Layerdrop, stochastic depth (drop
    path) and SpecAugment keep their rates.

    `save_pretrained` does not store a rate that a model's code fixes without its config, nor one that the config's
    type does not admit (MPT's is a whole number): a warning names them. Nor does it store the base model's rates when
    only an adapter is saved. Call this again after loading. No weight is touched and no random number is drawn.

    Args:
        model: the model, changed in place.
        p: probability that an element is dropped, in [0, 1).

    Raises:
        ValueError: if `p` is not a number in [0, 1), or if `model` has no dropout that could be set.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
        >>> set_dropout(model, 0.3)
        >>> inspect_dropout(model)
        [DropoutSource(name='1', kind='dropout', rate=0.3)]
    """
    if isinstance(p, bool) or not isinstance(p, Real) or not math.isfinite(p) or not 0 <= p < 1:
        raise ValueError(
            f"The dropout rate is {p!r}, but it is the probability that an element is dropped: a number of at least 0 "
            "and less than 1 (at 1 nothing would be left to train on). Pass for example 0.1."
        )
    every = list(knobs_of(model))
    knobs = [knob for knob in every if is_dropout(knob.source)]
    if not knobs:
        raise ValueError(
            f"{type(model).__name__} has no dropout that could be set: neither a dropout module nor an attribute that "
            "holds a dropout rate. R-Drop compares two passes that differ by dropout, so add `nn.Dropout` modules to "
            "the model or use a model that has them."
        )
    rate = float(p)
    reloaded = try_reloading(model, every, rate, _set_rates)
    if reloaded.kept.issuperset(knob.source.name for knob in knobs):
        raise ValueError(
            f"{type(model).__name__} has no dropout that could be set: all that it drops is stochastic depth, whose "
            "rate is an entry of its config. Set that one."
        )
    for source, owner, name in knobs + [knob for knob in every if knob.source.name in reloaded.also]:
        if source.name in reloaded.kept:
            continue
        if isinstance(getattr(owner, name), nn.Identity):
            owner.register_module(name, nn.Dropout(rate).train(owner.training))
        else:
            setattr(owner, name, rate)
    for place in reloaded.new:
        path, _, name = place.rpartition(".")
        owner = model.get_submodule(path)
        setattr(owner, name, nn.Dropout(rate).train(owner.training))
    for config in configs_of(model):
        _set_rates(config, rate)
    for name in reloaded.entries:
        setattr(model.config, name, rate)
    if reloaded.lost:
        places = ", ".join(sorted({re.sub(r"\d+", "*", place) for place in reloaded.lost}))
        logger.warning(
            f"save_pretrained loses the dropout rate {rate:g} of {places}: the code of {type(model).__name__} fixes "
            "it, or the config does not admit another. Call set_dropout again after loading."
        )


def _set_rates(config: Any, rate: float, kind: str = "functional") -> None:
    for name, value in list(vars(config).items()):
        if kind_of(name) != kind:
            continue
        if is_rate(value):
            try:
                setattr(config, name, rate)
            except StrictDataclassFieldValidationError as error:  # MPT's takes whole numbers only
                logger.warning(f"The config keeps {name}={value!r}, so save_pretrained loses the rate: {error}")
        elif isinstance(value, (list, tuple)) and all(map(is_rate, value)):  # one rate per stage, as in CvT
            setattr(config, name, type(value)([rate] * len(value)))
