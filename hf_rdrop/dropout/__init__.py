"""What is stochastic in a model (`sources`), setting its rates (`rates`), and dropout off for a moment (`modes`)."""

from .modes import dropout_off, modes_restored
from .rates import set_dropout
from .sources import (
    DropoutSource,
    describe_sources,
    inspect_dropout,
    is_dropout,
    is_stochastic,
    settings_beside_dropout,
)

__all__ = [
    "DropoutSource",
    "describe_sources",
    "dropout_off",
    "inspect_dropout",
    "is_dropout",
    "is_stochastic",
    "modes_restored",
    "set_dropout",
    "settings_beside_dropout",
]
