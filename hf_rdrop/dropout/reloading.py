"""Find which rates a model would have after it was saved with other dropout, and loaded again.

A model without memory (on the device `meta`) is made of the config as it would be saved, so that no rule about the
names of entries has to be right for every family.
"""

import copy
import dis
import inspect
import logging
import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from .sources import DropoutSource, Knob, configs_of, inspect_dropout, is_dropout, kind_of


class Reloaded(NamedTuple):
    """What the saved config says of places whose rate is not simply the one that was set.

    Args:
        kept: places that follow stochastic depth (EfficientNet hands its rates to `nn.Dropout`), left as they are.
        also: places that look like stochastic depth, but follow the dropout of the config (SwiftFormer).
        new: places that hold None now, where a rate above 0 puts a dropout (CPM-Ant).
        entries: entries of the model's config that its code asks for and that it does not have (GPT-2's
            `classifier_dropout`, the `summary_first_dropout` of XLNet).
        lost: places whose rate is fixed by the model's code, so that no config can keep another one.
    """

    kept: frozenset[str] = frozenset()
    also: frozenset[str] = frozenset()
    new: frozenset[str] = frozenset()
    entries: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def try_reloading(model: Any, knobs: list[Knob], rate: float, set_rates: Callable[..., None]) -> Reloaded:
    """Tell what becomes of the dropout places of a model when it is saved at `rate` and loaded.

    Args:
        model: the model, not changed.
        knobs: all its places.
        rate: of the dropout.
        set_rates: sets the entries of a config, by kind.

    Raises:
        ValueError: the model could not be loaded again with this rate.
    """
    if not hasattr(model, "_from_config") or not hasattr(getattr(model, "config", None), "from_dict"):
        return Reloaded()
    config = copy.deepcopy(model.config)
    _set_all(config, set_rates, rate)
    try:
        loaded = _sources_of(type(model), config)
    except Exception as error:
        try:
            _sources_of(type(model), model.config)
        except Exception:  # not a question of the rate
            return Reloaded()
        raise ValueError(
            f"{type(model).__name__} cannot have a dropout rate of {rate:g}, as it could not be loaded again: "
            f"{error} Leave its dropout as it is."
        ) from error
    dropouts = [knob for knob in knobs if is_dropout(knob.source)]
    others = [k for k in dropouts if k.source.name in loaded and loaded[k.source.name].rate != rate]
    present = {knob.source.name for knob in knobs}
    paths = {k.source.name for k in knobs if not is_dropout(k.source) and k.source.rate != rate}
    also = {name for name in paths & loaded.keys() if loaded[name].rate == rate}
    new = {name for name in loaded.keys() - present if loaded[name].kind == "dropout" and _holds_none(model, name)}
    if also:  # not those whose config had this rate before, and which were set by hand
        before = _sources_of(type(model), model.config)
        also = {name for name in also if name in before and before[name].rate != rate}
    if not others:
        return Reloaded(also=frozenset(also), new=frozenset(new))
    kept = _following_depth(type(model), config, others, set_rates)
    left = [knob.source.name for knob in others if knob.source.name not in kept]
    entries, lost = _missing_entries(model, config, left, rate)
    return Reloaded(frozenset(kept), frozenset(also), frozenset(new), tuple(entries), tuple(lost))


def _following_depth(model_class: Any, config: Any, places: list[Knob], set_rates: Callable[..., None]) -> set[str]:
    """Find the places whose rate follows that of stochastic depth, in all blocks (in the first one it is often 0)."""
    found = []
    for depth in (0.0, 0.5):  # (LeViT's entry takes whole numbers only: nothing but set_dropout can change its rate.)
        each = copy.deepcopy(config)
        _set_all(each, set_rates, depth, "drop_path")
        try:
            found.append(_sources_of(model_class, each))
        except Exception:  # not a rate that this model takes
            return set()
    names = [knob.source.name for knob in places]
    moved = {_any_block(name) for name in names if found[0].get(name) != found[1].get(name)}
    return {name for name in names if _any_block(name) in moved}


def _missing_entries(model: Any, config: Any, places: list[str], rate: float) -> tuple[list[str], list[str]]:
    """Find entries that give places their rate, where the code of a place's module asks for them; and what is lost."""
    entries: list[str] = []
    for place in places:
        if place in (lost := _lost(model, config, places, rate)):
            builder: Any = type(model.get_submodule(place.rpartition(".")[0]))
            for name in _words_of(builder):
                if getattr(config, name, None) is not None:
                    continue
                trial = copy.deepcopy(config)
                setattr(trial, name, rate)
                if len(_lost(model, trial, places, rate)) < len(lost):
                    config = trial
                    entries.append(name)
                    break
    return entries, _lost(model, config, places, rate)


def _lost(model: Any, config: Any, places: list[str], rate: float) -> list[str]:
    try:
        loaded = _sources_of(type(model), config)
    except Exception:  # an entry that the model does not take
        return places
    return [place for place in places if place not in loaded or loaded[place].rate != rate]


def _sources_of(model_class: Any, config: Any) -> dict[str, DropoutSource]:
    config = type(config).from_dict(config.to_dict())
    with torch.device("meta"):
        return {source.name: source for source in inspect_dropout(model_class(config))}


def _set_all(config: Any, set_rates: Callable[..., None], *args: Any) -> None:
    holder = nn.Module()
    holder.config = config
    logger = logging.getLogger(set_rates.__module__)
    logger.disabled, was = True, logger.disabled  # what a config does not take is told where it is set
    try:
        for each in configs_of(holder):
            set_rates(each, *args)
    finally:
        logger.disabled = was


def _any_block(place: str) -> str:
    return re.sub(r"\d+", "*", place)


def _holds_none(model: nn.Module, place: str) -> bool:
    path, _, leaf = place.rpartition(".")
    try:
        return getattr(model.get_submodule(path), leaf, model) is None
    except AttributeError:
        return False


@cache
def _words_of(module_class: Any) -> list[str]:
    """List the names of dropout rates that the code which builds a module mentions."""
    inits = [vars(c)["__init__"] for c in module_class.__mro__ if "__init__" in vars(c) and c is not nn.Module]
    codes = [getattr(inspect.unwrap(init), "__code__", None) for init in inits]
    words = [i.argval for code in codes if code for i in dis.get_instructions(code)]
    return list(dict.fromkeys(word for word in words if isinstance(word, str) and kind_of(word) == "functional"))
