"""How the batches of a model are read: rows, labels, and what is repeated."""

import pytest
import torch
from torch import nn

from hf_rdrop.batch import NON_BATCH_INPUTS
from hf_rdrop.objective.batch_layout import BatchLayout
from support.head_models import build
from support.settings import HEADS


@pytest.mark.parametrize(
    ("head", "shifts"), [("causal", True), ("gpt2", True), ("token", False), ("seq2seq", False), ("masked", False)]
)
def test_causal_language_models_shift_their_labels(head, shifts):
    model = HEADS[head].model()
    layout = BatchLayout.of(model, ["labels"], NON_BATCH_INPUTS)
    assert (layout.shifts_labels, layout.config, layout.label_names) == (shifts, model.config, ("labels",))
    labels = torch.tensor([[5, 6, -100]])
    assert layout.labelled_items(labels).sum() == (1 if shifts else 2)


def test_a_module_without_a_configuration():
    layout = BatchLayout.of(nn.Linear(2, 2), (), NON_BATCH_INPUTS)
    assert layout == BatchLayout() and layout.labels({"input_ids": torch.ones(2, 3)}) is None


def test_labels_by_their_names():
    topics = torch.tensor([1, 2])
    layout = BatchLayout(label_names=("topic", "tags"))
    assert layout.labels({"topic": topics, "tags": topics + 1}) is topics
    assert layout.size({"other": torch.ones(7), "topic": topics}) == 2
    layout = BatchLayout.of(build("question"), ["start_positions", "end_positions"], NON_BATCH_INPUTS)
    inputs = {"input_ids": torch.ones(2, 8), "start_positions": topics, "end_positions": topics + 1}
    assert layout.labels(inputs).tolist() == [[1, 2], [2, 3]] and layout.size(inputs) == 2


def test_a_batch_is_repeated_but_for_what_is_not_per_example():
    layout = BatchLayout(non_batch_inputs={*NON_BATCH_INPUTS, "table"})
    inputs = {"input_ids": torch.arange(6).view(2, 3), "labels": torch.tensor([0, 1]), "table": torch.ones(2, 2)}
    repeated = layout.repeat(inputs, 3)
    assert repeated["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5]] * 3 and repeated["labels"].tolist() == [0, 1] * 3
    assert repeated["table"] is inputs["table"] and len(inputs["labels"]) == 2


def test_items_of_rows_without_a_label():
    """The tokens of such a row take part, padding does not."""
    labels = torch.tensor([[1, -100, -100], [-100, -100, -100]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    inputs = {"input_ids": torch.ones(2, 3).long(), "attention_mask": mask, "labels": labels}
    found = BatchLayout().items_to_compare(labels, inputs)
    assert found.tolist() == [[True, False, False], [True, True, False]]
