"""Repeating a batch and cutting outputs back."""

import collections

import pytest
import torch
from transformers import BatchEncoding
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_rdrop.batch import (
    few_rows,
    first_rows,
    get_batch_size,
    repeat_batch,
    split_passes,
    stack_passes,
    unlike_rows,
)


def test_every_tensor_with_a_batch_dimension_is_repeated_pass_after_pass():
    batch = {
        "input_ids": torch.tensor([[1, 2], [3, 4]]),
        "labels": torch.tensor([0, 1]),
        "nested": {"pixel_values": torch.arange(2.0)[:, None], "pair": (torch.tensor([5, 6]), torch.zeros(3))},
        "texts": ["a", "b"],
        "position_ids": torch.arange(2)[None],
        "scale": torch.tensor(2.0),
        "flag": True,
        "nothing": None,
    }
    out = repeat_batch(batch, 3)
    assert out["input_ids"].tolist() == [[1, 2], [3, 4]] * 3
    assert out["labels"].tolist() == [0, 1] * 3
    assert out["nested"]["pixel_values"].shape == (6, 1)
    assert out["nested"]["pair"][0].tolist() == [5, 6] * 3 and out["nested"]["pair"][1].shape == (3,)
    assert out["texts"] == ["a", "b"] * 3
    assert out["position_ids"].shape == (1, 2) and out["scale"].dim() == 0
    assert out["flag"] is True and out["nothing"] is None


def test_the_callers_batch_is_not_changed():
    batch = {"input_ids": torch.tensor([[1], [2]]), "labels": torch.tensor([0, 1]), "more": {"x": torch.zeros(2)}}
    kept = {"input_ids": batch["input_ids"].clone(), "labels": batch["labels"].clone()}
    out = repeat_batch(batch)
    out["labels"].zero_()
    out["more"]["x"].fill_(7)
    assert set(batch) == {"input_ids", "labels", "more"} and batch["more"]["x"].tolist() == [0, 0]
    assert all(torch.equal(batch[name], value) for name, value in kept.items())


def test_inputs_that_are_not_per_example_stay_even_if_their_first_dimension_is_the_batch_size():
    batch = {"input_ids": torch.zeros(2, 4), "head_mask": torch.ones(2, 8), "class_weights": torch.ones(2)}
    assert repeat_batch(batch)["head_mask"].shape == (2, 8)
    assert repeat_batch(batch)["class_weights"].shape == (4,)  # cannot be known ...
    assert repeat_batch(batch, non_batch_inputs={"class_weights"})["class_weights"].shape == (2,)  # ... unless told


def test_batch_of_one_and_a_single_pass():
    assert repeat_batch({"labels": torch.tensor([1])}, 2)["labels"].tolist() == [1, 1]
    assert repeat_batch({"labels": torch.tensor([1, 2])}, 1)["labels"].tolist() == [1, 2]


def test_batch_size_is_read_off_the_labels_first():
    assert get_batch_size({"class_weights": torch.ones(5), "labels": torch.zeros(3)}) == 3
    assert get_batch_size(BatchEncoding({"pixel_values": torch.zeros(4, 2)})) == 4
    with pytest.raises(ValueError, match="no tensor with a batch dimension"):
        get_batch_size({"scale": torch.tensor(1.0), "text": "x"})


def test_splitting_undoes_repeating_without_a_copy():
    x = torch.arange(6.0).view(3, 2)
    repeated = repeat_batch({"labels": x}, 2)["labels"]
    parts = split_passes(repeated, 2)
    assert all(torch.equal(part, x) for part in parts)
    assert stack_passes(repeated, 2).data_ptr() == repeated.data_ptr()
    with pytest.raises(ValueError, match="5 rows for a batch repeated 2 times"):
        stack_passes(torch.zeros(5, 1), 2)


def test_outputs_are_cut_back_to_the_rows_of_the_batch():
    logits = torch.arange(8.0).view(4, 2)
    out = SequenceClassifierOutput(loss=torch.tensor(1.0), logits=logits, hidden_states=(torch.zeros(4, 3, 2),) * 2)
    cut = first_rows(out, 4, 2)
    assert isinstance(cut, SequenceClassifierOutput) and torch.equal(cut.logits, logits[:2])
    assert cut.loss.dim() == 0 and [h.shape[0] for h in cut.hidden_states] == [2, 2]
    assert out.logits.shape == (4, 2)  # the model's own output is left alone
    assert [t.shape for t in first_rows((torch.tensor(1.0), logits), 4, 2)] == [torch.Size([]), torch.Size([2, 2])]
    assert first_rows({"logits": logits, "note": "x"}, 4, 2)["note"] == "x"


def test_a_cache_with_as_many_layers_as_rows_is_repeated_inside():
    """Not taken for a list with a value per example."""
    keys = torch.arange(4.0).view(2, 1, 2)
    cache = repeat_batch({"labels": torch.zeros(2), "past_key_values": ((keys, keys), (keys, keys))})[
        "past_key_values"
    ]
    assert len(cache) == 2 and all(torch.equal(t, torch.cat([keys, keys])) for layer in cache for t in layer)


def test_outputs_of_any_mapping_type_are_cut_back():
    for values in (BatchEncoding({"x": torch.zeros(4)}), collections.OrderedDict({0: torch.zeros(4), "n": 1})):
        cut = first_rows(values, 4, 2)
        assert type(cut) is type(values) and list(cut) == list(values)
        assert next(iter(cut.values())).shape == (2,) and next(iter(values.values())).shape == (4,)


def test_numbers_of_passes_that_make_no_sense():
    with pytest.raises(ValueError, match="passes must be at least 1"):
        repeat_batch({"labels": torch.zeros(2)}, 0)
    with pytest.raises(ValueError, match="rows"):
        stack_passes(torch.tensor(1.0), 2)


def test_images_of_any_number_to_a_row_are_repeated_as_a_whole():
    patches, grids = torch.arange(14.0).view(7, 2), torch.tensor([[1, 2, 2], [1, 1, 3], [1, 1, 1]])
    batch = {
        "input_ids": torch.zeros(2, 5).long(),
        "pixel_values": patches,  # of three images, packed
        "image_grid_thw": grids,
        "image_sizes": [(2, 2), (1, 3), (1, 1)],
        "input_features": [torch.zeros(1, 4), torch.ones(2, 4)],  # a list with one entry per row: no batch in them
        "audio_feature_lengths": torch.tensor([4, 5, 6, 7]),
        "deepstack_visual_embeds": [torch.arange(3.0)[:, None], torch.arange(3.0)[:, None] + 10],  # one per layer
        "video_fps": torch.tensor(2.0),
        "images": None,
        "interpolate_pos_encoding": True,
    }
    out = repeat_batch(batch, 2)
    assert torch.equal(out["pixel_values"], torch.cat((patches, patches)))
    assert out["image_grid_thw"].tolist() == grids.tolist() * 2 and out["image_sizes"] == batch["image_sizes"] * 2
    assert [len(item) for item in out["input_features"]] == [1, 2, 1, 2]
    assert out["audio_feature_lengths"].tolist() == [4, 5, 6, 7] * 2
    assert [layer.flatten().tolist() for layer in out["deepstack_visual_embeds"]] == [
        [0, 1, 2, 0, 1, 2],
        [10, 11, 12, 10, 11, 12],
    ]
    assert out["video_fps"].dim() == 0 and out["images"] is None and out["interpolate_pos_encoding"] is True
    one = {**batch, "pixel_values": patches[:1]}  # a single image for all rows of the batch
    assert repeat_batch(one, 3)["pixel_values"].shape == (3, 2)
    assert repeat_batch(batch, non_batch_inputs={"image_sizes"})["image_sizes"] == batch["image_sizes"]


def test_position_ids_of_several_axes_have_their_rows_in_the_second_dimension():
    for rows in (1, 2, 3, 4):
        ids = torch.zeros(rows, 5).long()
        positions = torch.arange(3 * rows * 5).view(3, rows, 5)
        out = repeat_batch({"position_ids": positions, "input_ids": ids}, 2)
        assert torch.equal(out["position_ids"], torch.cat((positions, positions), 1))
        assert get_batch_size({"position_ids": positions, "attention_mask": ids}) == rows
        points = torch.arange(rows * 5 * 2).view(rows, 5, 2)  # two coordinates for each position
        out = repeat_batch({"position_ids": points, "input_ids": ids}, 2)
        assert torch.equal(out["position_ids"], torch.cat((points, points)))


def test_what_is_not_one_per_row_is_told():
    batch = {
        "input_ids": torch.zeros(2, 5).long(),
        "attention_mask": torch.ones(2, 5),
        "pixel_values": torch.zeros(7, 2),
        "position_ids": torch.zeros(3, 2, 5),
        "weights": torch.ones(4),
        "table": torch.ones(9),
    }
    found = unlike_rows(batch, 2, {"table"})
    assert found == {
        "pixel_values": "pixel_values [7, 2]: repeated as a whole, as what belongs to the rows one after the other",
        "position_ids": "position_ids [3, 2, 5]: repeated in its second dimension",
        "weights": "weights [4]: not repeated, as what is the same for all rows",
    }
    few = few_rows(batch, 2, 1)
    assert few["input_ids"].shape == (1, 5) and few["position_ids"].shape == (3, 1, 5) and "pixel_values" not in few
    assert few["weights"].shape == (4,)
    assert few_rows({**batch, "pixel_values": torch.zeros(2, 3)}, 2, 1)["pixel_values"].shape == (1, 3)
    assert few_rows(batch, 2, 2)["pixel_values"].shape == (7, 2)
