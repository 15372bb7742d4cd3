"""Find the layers, blocks and embeddings of a model that can make sub-models."""

import inspect
import re
from contextlib import suppress
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..dropout import settings_beside_dropout
from ..trunk.shared import find_layer_stacks

_BLOCK = re.compile(r"attention|attn|mlp|ffn|feed_?forward|moe", re.IGNORECASE)
_NO_BLOCK = re.compile(r"norm|rotary|router|dropout", re.IGNORECASE)


def hidden_layers(model: nn.Module, source: str) -> list[nn.Module]:
    """List the transformer layers of a model, encoder and decoder; `source` names their purpose in the error.

    Raises:
        ValueError: there are none.
    """
    # (Activation checkpointing of FSDP wraps the layers.)
    layers = [
        next(module for module in layer.modules() if isinstance(module, GradientCheckpointingLayer))
        for stack in find_layer_stacks(model).values()
        for layer in stack
    ]
    if not layers:
        raise ValueError(
            f"{source}: no list of transformer layers found in {type(model).__name__} (an nn.ModuleList of "
            f"Transformers' GradientCheckpointingLayer). Set {source} to 0{_instead(model)}, or derive the model's "
            "layers from GradientCheckpointingLayer."
        )
    return list(dict.fromkeys(layers))


def _instead(model: nn.Module) -> str:
    ways = settings_beside_dropout(model)
    return f" and load the model with {' or '.join(ways)}" if ways else ""


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    """List the attention and feed-forward blocks whose output a layer adds to its residual stream.

    Raises:
        ValueError: there are none.
    """
    blocks = [block for layer in hidden_layers(model, "insert_dropout") for block in _blocks(layer)]
    if not blocks:
        raise ValueError(
            f"insert_dropout: no attention or feed-forward block found in the layers of {type(model).__name__} whose "
            "output the layer adds to its residual stream (BERT and T5 do so within the blocks). Such models have "
            "dropout of their own: use rdrop_dropout, or hf_rdrop.set_dropout(model, p)."
        )
    return list(dict.fromkeys(blocks))


def _blocks(layer: nn.Module) -> list[nn.Module]:
    names = {child: type(child).__name__ for child in layer.children()}
    if not any("norm" in name.lower() for name in names.values()):  # norm and residual are in the blocks
        return []
    found = [child for child, name in names.items() if _BLOCK.search(name) and not _NO_BLOCK.search(name)]
    # (BLOOM and MPT hand the residual to the block.)
    return [block for block in found if "residual" not in inspect.signature(block.forward).parameters]


def embeds_with_noise(model: Any) -> bool:
    """Tell whether Trainer's NEFTune acts on a model: it hooks the module that `get_input_embeddings` names.

    BART, T5 and their like name one there that they never call: their encoder and decoder have embeddings of their
    own, with the same weights.
    """
    found = []
    for part in [part for side in _sides(model) for part in (side, *_sides(side))]:
        with suppress(NotImplementedError):
            found += [part.get_input_embeddings()] if hasattr(part, "get_input_embeddings") else []
    inner = [module for module in found if isinstance(module, nn.Module)]
    return not inner or model.get_input_embeddings() in inner


def _sides(model: Any) -> list[Any]:
    base = getattr(model, "base_model", model)
    return [getattr(base, "encoder", None), getattr(base, "decoder", None)]
