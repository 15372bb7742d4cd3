"""Set every dropout rate that a model has, in its modules and in what is saved."""

import copy
import dis
import inspect
import logging
import math
import re
from collections.abc import Callable
from functools import cache
from numbers import Real
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn

from .sources import Knob, configs_of, inspect_dropout, is_rate, kind_of, knobs_of

logger = logging.getLogger(__name__)


def set_dropout(model: nn.Module, p: float) -> None:
    """Set every dropout of `model` to `p`, in place: in its modules and in its configs.

    Modules, rates that are handed to functions (such as attention dropout) and the entries of the model's config and
    sub-configs all get `p`, so that the model has the same rates after `save_pretrained` and `from_pretrained`. So do
    PEFT's `lora_dropout` and an `nn.Identity` in the place of a dropout of rate 0, which becomes an `nn.Dropout(p)`.
    Config entries that are None stay None. Layerdrop, stochastic depth (drop path) and SpecAugment keep their rates.

    `save_pretrained` does not store a rate that a model's code fixes without its config, one that the config's type
    does not admit (MPT's is a whole number; a warning says so), nor the base model's rates when only an adapter is
    saved: call this again after loading. No weight is touched and no random number is drawn.

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
    knobs = [knob for knob in knobs_of(model) if knob.source.kind in ("dropout", "functional")]
    if not knobs:
        raise ValueError(
            f"{type(model).__name__} has no dropout that could be set: neither a dropout module nor an attribute that "
            "holds a dropout rate. R-Drop compares two passes that differ by dropout, so add `nn.Dropout` modules to "
            "the model or use a model that has them."
        )
    rate = float(p)
    governed_otherwise = _prepare_config(model, knobs, rate)
    for source, owner, name in knobs:
        if source.name in governed_otherwise:
            continue
        if isinstance(getattr(owner, name), nn.Identity):
            owner.register_module(name, nn.Dropout(rate).train(owner.training))
        else:
            setattr(owner, name, rate)
    for config in configs_of(model):
        _set_rates(config, rate)


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


# ---- What a model made of the saved config will have ----


def _prepare_config(model: nn.Module, knobs: list[Knob], rate: float) -> set[str]:
    """Find the places whose rate follows stochastic depth, and add the entries that a model's code asks for.

    A model without memory is made of the config as it would be saved. (EfficientNet hands the rates of its stochastic
    depth to `nn.Dropout`; a `SequenceSummary` has a first dropout only where the config has an entry for it.)

    Raises:
        ValueError: the model could not be loaded again with this rate.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(model, "_from_config") or not hasattr(config, "from_dict"):
        return set()
    config = copy.deepcopy(config)
    logger.disabled, was = True, logger.disabled  # what is lost is told where it is set
    try:
        for each in _with_parts(config):
            _set_rates(each, rate)
        try:
            loaded = _rates_of(type(model), config)
        except Exception as error:
            try:
                _rates_of(type(model), model.config)
            except Exception:  # not a question of the rate
                return set()
            raise ValueError(
                f"{type(model).__name__} cannot have a dropout rate of {rate:g}, as it could not be loaded again: "
                f"{error} Leave its dropout as it is."
            ) from error
        others = [knob for knob in knobs if loaded.get(knob.source.name, rate) != rate]
        if not others:
            return set()
        for knob in others:
            _add_entries(model.config, knob.owner, rate)
        for each in _with_parts(config):
            _set_rates(each, 0.0, "drop_path")
        without_depth = _rates_of(type(model), config)
    finally:
        logger.disabled = was
    follow = {_place(name) for name in (k.source.name for k in others) if without_depth.get(name) != loaded[name]}
    return {knob.source.name for knob in knobs if _place(knob.source.name) in follow}


def _place(name: str) -> str:
    return re.sub(r"\d+", "*", name)  # in all blocks: that of the first one has rate 0


def _with_parts(config: Any) -> list[Any]:
    return configs_of(nn.ModuleList([_Holder(config)]))


class _Holder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def _rates_of(model_class: Any, config: Any) -> dict[str, float]:
    config = type(config).from_dict(config.to_dict())
    with torch.device("meta"):
        return {source.name: source.rate for source in inspect_dropout(model_class(config))}


def _add_entries(config: Any, owner: Any, rate: float) -> None:
    """Give a config the rates that the code of a module looks for with `hasattr`, and that it has not."""
    for name in _dropout_words(type(owner).__init__):
        if name.startswith("summary_") and not hasattr(config, name):
            setattr(config, name, rate)


@cache
def _dropout_words(function: Callable[..., Any]) -> list[str]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    words = [i.argval for i in dis.get_instructions(code)] if code else []
    return [word for word in dict.fromkeys(w for w in words if isinstance(w, str)) if kind_of(word) == "functional"]
