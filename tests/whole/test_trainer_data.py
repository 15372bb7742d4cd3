"""R-Drop on every kind of data that the Trainer takes: samplers, streams and texts beside tensors."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DataCollatorWithFlattening

from hf_rdrop import RDropTrainer
from support.short_runs import ALPHA, make_llama, refuse, run, values
from support.training import InOrder, make_model, make_rows, train


def record_inputs(model):
    """The training inputs of a model, batch by batch."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()) if module.training else None,
        with_kwargs=True,
    )
    return seen


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_baseline_and_r_drop_see_the_same_rows_in_the_same_order(strategy):
    """By length too, of which the Trainer draws the order from the random numbers that dropout draws."""
    datasets = pytest.importorskip("datasets", reason="a column of lengths needs datasets, of the scripts extra")
    rows = [{**row, "length": sum(row["attention_mask"])} for row in make_rows("single", 32)]
    rows, seen = datasets.Dataset.from_list(rows), {}
    for alpha in (0.0, ALPHA):
        model = make_model("single", 0.3)
        seen[alpha] = record_inputs(model)
        train(
            model,
            rows=rows,
            rdrop_alpha=alpha,
            per_device_train_batch_size=4,
            max_steps=12,
            train_sampling_strategy=strategy,
            remove_unused_columns=False,  # the Trainer would remove the lengths first
        )
    assert len(seen[0.0]) == len(seen[ALPHA]) == 12
    for plain, doubled in zip(seen[0.0], seen[ALPHA], strict=True):
        assert torch.equal(torch.cat((plain, plain)), doubled)
    if strategy == "group_by_length":  # sorted within every two batches, but for the longest, which comes first
        lengths = [(batch != 0).sum(1) for batch in seen[0.0][:8]]
        assert sum((a.min() >= b.max()).item() for a, b in zip(lengths[::2], lengths[1::2], strict=True)) >= 3


def test_a_stream_of_a_json_file(tmp_path):
    datasets = pytest.importorskip("datasets", reason="streaming needs datasets, of the scripts extra")
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps({**row, "text": "unused"}) for row in make_rows("single", 32)))
    stream = datasets.load_dataset("json", data_files=str(file), split="train", streaming=True)
    with pytest.raises(ValueError, match="max_steps"):  # the Trainer's own: a stream has no length
        train(make_model("single", 0.3), rows=stream, max_steps=-1, num_train_epochs=1)
    streamed = run(make_model("single", 0.3), rows=stream, max_steps=5, per_device_train_batch_size=8)
    in_order = run(
        make_model("single", 0.3), rows=InOrder(make_rows("single", 32)), max_steps=5, per_device_train_batch_size=8
    )
    assert streamed.state.epoch > 1 and values(streamed) == values(in_order)


def test_predictions_batch_by_batch_are_those_of_the_whole():
    predictions = [
        run(make_model("single", 0.3), max_steps=1, eval_do_concat_batches=whole, per_device_eval_batch_size=4)
        .predict(InOrder(make_rows("single", 10)))
        .predictions
        for whole in (True, False)
    ]
    assert len(predictions[1]) == 3 and np.array_equal(predictions[0], np.concatenate(predictions[1]))


def test_padding_free_batches_are_refused():
    rows = [{"input_ids": [5, 6, 7, 8][: 2 + i % 3], "labels": [5, 6, 7, 8][: 2 + i % 3]} for i in range(16)]
    for options in ({}, {"return_position_ids": False, "return_flash_attn_kwargs": True}, {"return_seq_idx": True}):

        class Flattening(RDropTrainer):
            collator = DataCollatorWithFlattening(**options)

            def get_train_dataloader(self):
                self.data_collator = self.collator
                return super().get_train_dataloader()

        refuse(make_llama(), "packed", trainer_class=Flattening, rows=rows)


class Describing(nn.Module):
    """Takes texts, or anything, along with the ids."""

    def __init__(self):
        super().__init__()
        self.bert = make_model("single", 0.3)
        self.texts = []

    def forward(self, input_ids, attention_mask, text, labels=None):
        assert [len(t) for t in text] == (input_ids != 0).sum(1).tolist()
        if self.training:  # not while the first batch is looked at
            self.texts.append(len(text))
        return self.bert(input_ids, attention_mask, labels=labels)


def test_text_columns_are_repeated_with_their_rows():
    rows = [{**row, "text": "x" * sum(row["attention_mask"])} for row in make_rows("single", 32)]

    class WithText(RDropTrainer):
        def get_train_dataloader(self):
            tensors = self.data_collator
            self.data_collator = lambda rows: {**tensors(rows), "text": [row["text"] for row in rows]}
            return super().get_train_dataloader()

    model = Describing()
    run(model, trainer_class=WithText, rows=rows, remove_unused_columns=False)
    assert model.texts == [32, 32]
