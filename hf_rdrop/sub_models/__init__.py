"""Sub-models beyond a model's own dropout: `sources` puts them on, `places` finds where, `modules` are what is put."""

from .sources import SubModels, insert_dropout
