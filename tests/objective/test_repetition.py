"""Inputs that have not one row for each example: how they are repeated is measured on the first batch."""

import pytest
import torch
from torch import nn

from hf_rdrop.objective.batch_layout import BatchLayout
from hf_rdrop.objective.repetition import measure_repetition


class Reader(nn.Module):
    """Adds to each row of text what it reads of the images: two a row, in order, or the same for all rows."""

    def __init__(self, shared=False):
        super().__init__()
        self.shared, self.head, self.calls = shared, nn.Linear(2, 3), 0

    def forward(self, input_ids, pixel_values=None, extra=None, labels=None):
        self.calls += 1
        images = extra if pixel_values is None else pixel_values
        if images is not None and self.shared:
            return {"logits": self.head(input_ids.float() + images.sum(0))}
        if images is not None:
            if len(images) != 2 * len(input_ids):
                raise RuntimeError(f"{len(images)} images for {len(input_ids)} rows")
            input_ids = input_ids + images.view(len(input_ids), 2, 2).sum(1)
        return {"logits": self.head(input_ids.float())}


def batch(rows=4, **extra):
    return {"input_ids": torch.randn(rows, 2), "labels": torch.zeros(rows, dtype=torch.long), **extra}


def measure(model, inputs, **layout):
    return measure_repetition(model, BatchLayout(**layout), inputs, 2, 1e-3)


@pytest.mark.parametrize("name", ["pixel_values", "extra"])
@pytest.mark.parametrize("rows", [3, 4])
def test_two_images_a_row_are_repeated_as_a_whole_whatever_their_name(name, rows):
    images = torch.randn(2 * rows, 2)
    inputs = batch(rows, **{name: images})
    found = measure(Reader(), inputs).repeat(inputs, 2)
    assert torch.equal(found[name], torch.cat([images] * 2)) and len(found["input_ids"]) == 2 * rows


@pytest.mark.parametrize("name", ["pixel_values", "extra"])
def test_what_all_rows_share_is_left_alone_whatever_its_name(name):
    inputs = batch(4, **{name: torch.randn(5, 2)})
    found = measure(Reader(shared=True), inputs).repeat(inputs, 2)
    assert found[name] is inputs[name]


def test_a_batch_of_rows_costs_no_forward():
    model = Reader()
    assert measure(model, batch(4)) == BatchLayout()
    assert measure(model, batch(4, extra=torch.ones(5, 2)), non_batch_inputs={"extra"}).whole_inputs("pixel_values")
    assert model.calls == 0


@pytest.mark.parametrize(
    ("images", "reason"),
    [(torch.ones(5, 2), "fails then .RuntimeError"), (torch.full((8, 2), torch.nan), "other log")],
)
def test_what_fits_no_reading_is_refused_with_its_shape(images, reason):
    class Odd(Reader):
        def forward(self, input_ids, **kwargs):
            if len(input_ids) == 4:  # x alone is read well
                return super().forward(input_ids)
            return super().forward(input_ids, **kwargs)

    shape = rf"4 rows.*pixel_values \({len(images)}, 2\).*{reason}.*non_batch_inputs"
    with pytest.raises(ValueError, match=shape):
        measure(Odd(), batch(4, pixel_values=images))


def test_measuring_draws_no_random_number_and_keeps_modes():
    model = Reader().train()
    state = torch.get_rng_state()
    measure(model, batch_of_images := {"input_ids": torch.ones(2, 2), "pixel_values": torch.ones(4, 2)})
    assert torch.equal(torch.get_rng_state(), state) and model.training and len(batch_of_images) == 2
