"""Items of batches, and what a batch's mean weighs in the mean over its optimizer step."""

import pytest
import torch

from hf_rdrop.objective.batch_layout import BatchLayout
from hf_rdrop.training.item_counts import ItemCounts

TOKENS = [[1, 2, -100, -100], [3, -100, -100, -100], [-100] * 4, [4, 5, 6, 7]]
CPU = torch.device("cpu")


def batch(labels):
    labels = torch.tensor(labels)
    return {"input_ids": torch.ones_like(labels), "attention_mask": torch.ones_like(labels), "labels": labels}


def test_labelled_items_are_those_of_the_heads_own_loss():
    assert ItemCounts(BatchLayout(), False).labelled(batch(TOKENS)) == 7
    assert ItemCounts(BatchLayout(shifts_labels=True), False).labelled(batch(TOKENS)) == 4  # no row's first one
    assert ItemCounts(BatchLayout(), False).labelled({"input_ids": torch.ones(2, 3)}) is None
    real = {"labels": torch.tensor([0.5, -100.0, 2.0])}
    assert ItemCounts(BatchLayout(), True).labelled(real) == 2
    assert ItemCounts(BatchLayout(), True).compared(real) == 3


@pytest.mark.parametrize("unlabeled", [False, True])
def test_the_shares_of_a_step_add_up_to_one(unlabeled):
    items = ItemCounts(BatchLayout(), unlabeled)
    batches = [batch(TOKENS[:1]), batch(TOKENS[1:3]), batch(TOKENS[3:])]
    total = items.of_step(batches, CPU, gather=None)
    assert total == 7
    found = [items.shares(b, items.labelled(b), total, ranks=1, accumulation=3) for b in batches]
    expected = [2 / 7, 1 / 7, 4 / 7]
    assert [share.item() for share, _ in found] == pytest.approx(expected)
    of_divergence = [share.item() for _, share in found]
    # Of all 11: two and one of the rows with labels, and four of the row without.
    assert of_divergence == pytest.approx([2 / 11, 5 / 11, 4 / 11] if unlabeled else expected)


@pytest.mark.parametrize("unlabeled", [False, True])
@pytest.mark.parametrize("count", [1, 3, 7, 49, 10_007])
def test_a_batch_that_is_the_whole_step_weighs_exactly_one(count, unlabeled):
    items = ItemCounts(BatchLayout(), unlabeled)
    whole = {"labels": torch.zeros(count, dtype=torch.long)}
    total = items.of_step([whole], CPU, gather=None)
    assert items.shares(whole, items.labelled(whole), total, ranks=1, accumulation=1) == (1.0, 1.0)


def test_ranks_whose_gradients_are_averaged():
    """Each weighs its batch by the items of all ranks, times their number: the average is the mean over all items."""
    ranks = [batch(TOKENS[:2]), batch(TOKENS[2:])]
    shares = []
    for own in ranks:
        items = ItemCounts(BatchLayout(), False)
        total = items.of_step([own], CPU, gather=lambda _: torch.tensor([[3], [4]]))
        assert total == 7
        shares.append(items.shares(own, items.labelled(own), total, ranks=2, accumulation=1)[0].item())
    assert shares == pytest.approx([2 * 3 / 7, 2 * 4 / 7])


def test_without_a_count_every_batch_of_the_step_weighs_the_same():
    items = ItemCounts(BatchLayout(), False)
    bare = {"input_ids": torch.ones(2, 3)}
    assert items.of_step([batch(TOKENS), bare], CPU, gather=None) is None
    assert items.of_step([], CPU, gather=None) is None
    assert items.shares(bare, None, None, ranks=1, accumulation=4) == (0.25, 0.25)


def test_a_step_without_an_item_weighs_nothing():
    items, bare = ItemCounts(BatchLayout(), False), batch(TOKENS[2:3])
    total = items.of_step([bare], CPU, gather=None)
    assert total == 0 and items.shares(bare, items.labelled(bare), total, ranks=1, accumulation=1) == (0, 0)
