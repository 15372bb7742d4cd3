"""Lower layers that the passes share: `shared` runs them once, `check` tries on real rows that it changes nothing."""

from .shared import SharedTrunk, find_layer_stacks
