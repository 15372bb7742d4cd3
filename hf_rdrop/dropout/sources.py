"""List what is stochastic in a model.

Dropout is found by the types and names of modules and attributes, so any `nn.Module` will do.
"""

import copy
import dis
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeGuard

from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn

# Tried in this order, because "layerdrop" and "path_dropout" are not dropout of single elements. The rank_dropout and
# module_dropout of PEFT's LoHa and LoKr change the weight: drawn once for the whole batch, as layerdrop is.
_KINDS = (
    ("layerdrop", re.compile(r"layer_?drop(?!_?out)|(rank|module)_dropout", re.IGNORECASE)),
    ("drop_path", re.compile(r"drop(out)?_?path|path_?drop|drop_?connect|stochastic_?depth", re.IGNORECASE)),
    ("functional", re.compile(r"drop_?out|(^|_)p?drop$|(^|_)drop_(\w+_)?(p|prob|rate)$", re.IGNORECASE)),
)


class DropoutSource(NamedTuple):
    """One place in a model that draws random numbers while training.

    Args:
        name: qualified name of the dropout module, or of the attribute that holds the rate, such as
            `"model.layers.0.self_attn.attention_dropout"`.
        kind: `"dropout"` (a dropout module), `"functional"` (a rate that a module's forward hands to a dropout or an
            attention function), `"drop_path"` (stochastic depth: a branch dropped per example) or `"layerdrop"`
            (a whole layer skipped, drawn once for the whole batch) or `"spec_augment"` (spans of frames, or of
            features, masked in each row: the share that is asked for).
        rate: the probability in force now, in [0, 1].
    """

    name: str
    kind: str
    rate: float


class Knob(NamedTuple):
    """A source, and the object and attribute that hold its rate."""

    source: DropoutSource
    owner: Any
    attribute: str


def kind_of(name: str) -> str | None:
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), None)


def _module_kind(module: nn.Module, name: str) -> str | None:
    """Return the kind of a module that is a dropout itself, None for every other module."""
    kind = kind_of(type(module).__name__)
    if isinstance(module, nn.modules.dropout._DropoutNd) or kind == "functional":
        # HGNet and PatchTST use nn.Dropout under the name, and at the rate, of a drop path.
        return "drop_path" if kind_of(name) == "drop_path" else "dropout"
    return kind


def is_rate(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


@cache
def _names_read_from_config(forward: Callable[..., Any]) -> list[str]:
    """Find the dropout names that a forward reads as `self.config.name` at every call (Falcon, ProphetNet, ...)."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    words = [instruction.argval for instruction in dis.get_instructions(code)] if code else []
    found = [
        name for before, name in pairwise(words) if before == "config" and isinstance(name, str) and kind_of(name)
    ]
    return list(dict.fromkeys(found))


def knobs_of(model: nn.Module) -> Iterator[Knob]:
    for path, module in model.named_modules():
        prefix, leaf = f"{path}." if path else "", path.rpartition(".")[2]
        module_kind = _module_kind(module, leaf)
        for name, value in vars(module).items():
            kind = kind_of(name)
            # torch's recurrent layers drop between layers: with one layer their rate does nothing.
            if not is_rate(value) or (isinstance(module, nn.RNNBase) and module.num_layers == 1):
                continue
            if module_kind and (kind or name == "p"):
                yield Knob(DropoutSource(path, module_kind, float(value)), module, name)
            elif kind:
                yield Knob(DropoutSource(prefix + name, kind, float(value)), module, name)
        for name in _names_read_from_config(type(module).forward):
            config = getattr(module, "config", None)
            value, kind = getattr(config, name, None), kind_of(name)
            if kind and is_rate(value):
                yield Knob(DropoutSource(f"{prefix}config.{name}", kind, float(value)), config, name)
        if hasattr(module, "_mask_hidden_states") or hasattr(module, "_mask_input_features"):  # speech encoders
            config = getattr(module, "config", None)
            asked = bool(getattr(config, "apply_spec_augment", True))
            for name in ("mask_time_prob", "mask_feature_prob"):
                if is_rate(value := getattr(config, name, None)):
                    source = DropoutSource(f"{prefix}config.{name}", "spec_augment", asked * float(value))
                    yield Knob(source, config, name)
        for name, child in module.named_children():
            # ModernBERT, PEFT and others put an Identity where a dropout of rate 0 would be. Inside a container the
            # container's name tells: lora_dropout.default.
            kind = kind_of(leaf if isinstance(module, (nn.ModuleDict, nn.ModuleList)) else name)
            if kind and isinstance(child, nn.Identity):
                kind = "dropout" if kind == "functional" else kind
                yield Knob(DropoutSource(prefix + name, kind, 0.0), module, name)


def configs_of(model: nn.Module) -> list[Any]:
    """Collect the configs of a model and its parts, with their sub-configs and PEFT's adapter configs, each once."""
    queue = [vars(module).get(name) for module in model.modules() for name in ("config", "peft_config")]
    found: dict[int, Any] = {}
    while queue:
        item = queue.pop()
        if isinstance(item, dict):
            queue.extend(item.values())
        elif hasattr(item, "to_dict") and id(item) not in found:
            found[id(item)] = item
            queue.extend(vars(item).values())
    return list(found.values())


def settings_beside_dropout(model: nn.Module) -> list[str]:
    """List the entries of a model's configs, each with a value, that make its passes differ without dropout."""
    found = []
    for config in configs_of(model):
        # (Not by getattr: a config whose layers differ raises an error for what each of them has for itself.)
        for name, value in vars(config).items():
            if kind_of(name) == "drop_path" and is_rate(value) and _admits(config, name, 0.1):
                found.append(f"{name}=0.1")
            elif name in ("router_jitter_noise", "input_jitter_noise") and is_rate(value):
                found.append(f"{name}=0.01")
            elif name == "mask_feature_prob" and is_rate(value):
                found.append("apply_spec_augment=True, mask_feature_prob=0.1")
    return list(dict.fromkeys(found))


def _admits(config: Any, name: str, value: Any) -> bool:
    config = copy.deepcopy(config)
    try:
        setattr(config, name, value)
    except StrictDataclassFieldValidationError:  # LeViT's drop_path_rate is a whole number
        return False
    return True


def inspect_dropout(model: nn.Module) -> list[DropoutSource]:
    """List everything in `model` that is random while training, in the order of `model.named_modules()`.

    The rates are read from the modules that use them, so they are those in force even where a module was changed
    after it was built from its config. Places of rate 0 are listed too: [`set_dropout`] can turn them up.

    Example:
        >>> from torch import nn
        >>> inspect_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
        [DropoutSource(name='1', kind='dropout', rate=0.1)]
    """
    return [knob.source for knob in knobs_of(model)]


def is_dropout(source: DropoutSource) -> bool:
    """Tell whether a source draws for each element, so that `set_dropout` is meant for it."""
    return source.kind in ("dropout", "functional")


def is_stochastic(sources: Iterable[DropoutSource]) -> bool:
    """Tell whether the passes of a repeated batch `[x; x]` differ in training mode, given `inspect_dropout(model)`.

    True if a source other than layerdrop, which is drawn once for the whole batch, has a rate above 0 and below 1.

    Example:
        >>> is_stochastic([DropoutSource("encoder.layerdrop", "layerdrop", 0.5)])
        False
    """
    return any(source.kind != "layerdrop" and 0 < source.rate < 1 for source in sources)


def describe_sources(sources: Iterable[DropoutSource]) -> str:
    """List the places by their last names with kind and rate, each kind of place once, for a message."""
    found = {f"{s.name.rpartition('.')[2]} ({s.kind}) = {s.rate:g}" for s in sources}
    return ", ".join(sorted(found)) or "no dropout at all"
