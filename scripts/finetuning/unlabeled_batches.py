"""Training batches of labelled rows with rows without labels beside them, for the scripts' trainers."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import RandomSampler, Sampler

RATIO = 3  # of UDA (Xie et al. 2020, arXiv 1904.12848) in its authors' script for a base-size BERT


class UnlabeledMixin:
    """Puts rows without labels beside the labelled ones of each training batch, for a `Trainer`.

    Args (beside the Trainer's):
        unlabeled: the rows, tokenized and with labels of -100; None for none.
        unlabeled_ratio: how many of them come with each labelled row.
    """

    def __init__(
        self, *args: Any, unlabeled: Dataset | None = None, unlabeled_ratio: int = RATIO, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.unlabeled_ratio = unlabeled_ratio
        if unlabeled is not None:
            # (Here, because the Trainer knows the columns of `datasets` only.)
            parts = (self._remove_unused_columns(part, "training") for part in (self.train_dataset, unlabeled))
            self.train_dataset: Any = _MixedRows(*parts)
            self.data_collator = partial(_collate_all, self.data_collator)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(rows, _MixedRows):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        labelled = super()._get_train_sampler(rows.labelled)
        if isinstance(labelled, RandomSampler):  # what Accelerate does to one that it sees
            labelled = SeedableRandomSampler(rows.labelled, data_seed=seed)
        return MixedSampler(labelled, len(rows.unlabeled), self.unlabeled_ratio, seed)


def _collate_all(collate: Callable[[list[Any]], Any], features: list[Any]) -> Any:
    """Make one batch of all rows; those of evaluation come one by one."""
    return collate([row for feature in features for row in (feature if isinstance(feature, list) else [feature])])


class _MixedRows(torch.utils.data.Dataset):
    """At `(i, j, k, ...)` the labelled row i and the rows j, k, ... without labels; as long as the labelled rows."""

    def __init__(self, labelled: Dataset, unlabeled: Dataset) -> None:
        self.labelled, self.unlabeled = labelled, unlabeled

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, rows: tuple[int, ...]) -> list[Any]:
        first, *others = rows
        return [self.labelled[first], *(self.unlabeled[row] for row in others)]


class MixedSampler(Sampler):
    """With each labelled row the numbers of `ratio` rows without labels, by seed and epoch alone.

    The labelled rows come in their own sampler's order. The others are gone through round after round, each round in
    an order of its own, and an epoch begins where the one before ended, so that all come equally often. All processes
    draw the same and take their batches from it; a resumed run goes on in it.

    Args:
        sampler: of the labelled rows.
        rows: number of rows without labels.
        ratio: how many of them come with a labelled row.
        seed: of their order.
    """

    def __init__(self, sampler: Any, rows: int, ratio: int, seed: int) -> None:
        self.sampler, self.rows, self.ratio, self.seed, self.epoch = sampler, rows, ratio, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        others = self._from(self.epoch * len(self) * self.ratio)
        for row in self.sampler:
            yield (row, *itertools.islice(others, self.ratio))

    def _from(self, place: int) -> Iterator[int]:
        """Yield the rows without labels from this place of their sequence on."""
        first, done = divmod(place, self.rows)
        for number in itertools.count(first):
            order = np.random.default_rng((self.seed, number)).permutation(self.rows)
            yield from order[done if number == first else 0 :].tolist()
