"""run_glue.py with rows without labels: which rows meet in a batch, and that their labels are never seen."""

import json
import logging
import math

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

import run_glue
from finetuning.unlabeled_batches import MixedSampler
from support import script_data as made
from support.script_runs import arguments, assert_same_weights, classification, logged, write_splits

STEPS = "do_train do_eval"
BATCHES = ["--per_device_train_batch_size=8"]


def unlabeled_rows(kind, count, seed=7, **more):
    rows = made.classification_rows(kind, count, seed)
    return [{**{name: value for name, value in row.items() if name != "label"}, **more} for row in rows]


@pytest.fixture
def batches(monkeypatch):
    """The labels and tokens of each training batch."""
    seen = []
    original = run_glue.GlueTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            texts = [tuple(i for i in row if i) for row in inputs["input_ids"].tolist()]  # without padding
            seen.append((self.state.global_step, list(zip(inputs["labels"].tolist(), texts, strict=True))))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(run_glue.GlueTrainer, "compute_loss", compute_loss)
    return seen


@pytest.mark.parametrize(
    ("kind", "name", "more"),
    [
        ("names", "unlabeled.csv", {}),
        ("pairs", "unlabeled.jsonl.gz", {"label": "anything"}),
        pytest.param("three-way", "unlabeled.tsv", {"label": ""}, marks=pytest.mark.slow),
        ("regression", "unlabeled.json", {"label": None}),
        ("multi-label", "unlabeled.jsonl", {"other": 3}),
    ],
)
def test_a_file_without_labels(tmp_path, encoder, batches, kind, name, more, caplog):
    files = write_splits(tmp_path, classification(kind))
    extra = made.write(tmp_path / name, unlabeled_rows(kind, 30, **more))
    with caplog.at_level(logging.INFO):
        returned = run_glue.main(
            arguments(
                tmp_path, files, encoder, "--unlabeled_file", extra, "--unlabeled_ratio=2", *BATCHES, steps=STEPS
            )
        )
    assert (returned["train_samples"], returned["unlabeled_samples"], returned["eval_samples"]) == (24, 30, 12)
    assert "30 rows without labels (--unlabeled_file), 2 beside each labelled one" in caplog.text
    assert len(batches) == len(logged(tmp_path)) == 3
    for _, rows in batches:
        none = [label for label, _ in rows if label in (-100, [-100.0] * 4)]
        assert (len(none), len(rows)) == (16, 24)
    for line in logged(tmp_path):
        assert line["ce_loss"] > 0 and line["kl_loss"] > 0
        assert line["loss"] == pytest.approx(line["ce_loss"] + line["kl_loss"] / 2, rel=1e-4)
    assert (
        math.isfinite(returned["eval_loss"])
        and "unlabeled_samples" in (tmp_path / "out/train_results.json").read_text()
    )


@pytest.mark.parametrize("order", [[], ["--train_sampling_strategy=group_by_length"]])
def test_labelled_rows_come_as_without_the_others_which_take_turns(tmp_path, encoder, batches, order):
    files = write_splits(tmp_path, classification("names"), sizes=(20, 4, 4))
    extra = made.write(tmp_path / "extra.jsonl", unlabeled_rows("names", 25))
    runs = {}
    for name, more in (("plain", []), ("mixed", ["--unlabeled_file", extra])):
        line = [*BATCHES, *order, *more, "--num_train_epochs", 2, "--rdrop_alpha=2"]
        run_glue.main(arguments(tmp_path / name, files, encoder, *line, steps="do_train"))
        runs[name] = batches[:]
        batches.clear()
    assert [len(rows) for _, rows in runs["plain"]] == [8, 8, 4] * 2
    assert [len(rows) for _, rows in runs["mixed"]] == [32, 32, 16] * 2
    assert [[row for row in rows if row[0] != -100] for _, rows in runs["mixed"]] == [
        rows for _, rows in runs["plain"]
    ]
    texts = [text for _, rows in runs["mixed"] for label, text in rows if label == -100]
    rounds = [texts[start : start + 25] for start in range(0, 120, 25)]  # an epoch ends within the third
    assert all(sorted(part) == sorted(rounds[0]) for part in rounds[:4]) and len({*map(tuple, rounds)}) == 5


def test_they_change_what_is_learned_but_not_the_number_of_steps_and_alpha_0_leaves_them_out(
    tmp_path,
    encoder,
    batches,
    caplog,
):
    files = write_splits(tmp_path, classification("names"))
    extra = ["--unlabeled_file", made.write(tmp_path / "extra.csv", unlabeled_rows("names", 9))]
    for name, more in (("plain", []), ("mixed", extra)):
        for alpha in (0, 1):
            line = [*more, f"--rdrop_alpha={alpha}"]
            with caplog.at_level(logging.INFO):
                run_glue.main(arguments(tmp_path / f"{name}{alpha}", files, encoder, *line, steps="do_train"))
    assert_same_weights(tmp_path / "plain0/out", tmp_path / "mixed0/out")
    assert "The 9 rows of --unlabeled_file are left out" in caplog.text
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "plain1/out", tmp_path / "mixed1/out")
    assert len(logged(tmp_path / "plain1")) == len(logged(tmp_path / "mixed1"))


def test_labels_of_the_training_rows_left_out_are_never_seen(tmp_path, encoder, batches):
    rows = made.classification_rows("names", 40, 0)
    chosen = ["--max_train_samples=10", "--sample_seed=3", "--unlabeled_from_train=20", "--unlabeled_ratio=2"]
    line = [*chosen, "--per_device_train_batch_size=10", "--max_steps=2", "--rdrop_alpha=1"]
    tokens = made.make_tokenizer()
    ids = {tuple(tokens(row["text"])["input_ids"]): row["label"] for row in rows}
    file = made.write(tmp_path / "train.jsonl", rows)
    run_glue.main(arguments(tmp_path / "a", [file], encoder, *line, steps="do_train"))
    (first, second), labels = ([rows for _, rows in batches], {"negative": 0, "positive": 1})
    with_labels = {text for label, text in first if label != -100}
    assert {text for label, text in second if label != -100} == with_labels and len(with_labels) == 10
    without = {text for label, text in first if label == -100}
    assert len(without) == 20 and not without & with_labels and without | with_labels < ids.keys()
    assert all(label == labels[ids[text]] for label, text in first if label != -100)

    other = {"negative": "positive", "positive": "negative"}
    wrong = [
        {**row, "label": row["label"] if text in with_labels else other[row["label"]]}
        for row, text in zip(rows, ids, strict=True)
    ]
    file = made.write(tmp_path / "wrong.jsonl", wrong)
    run_glue.main(arguments(tmp_path / "b", [file], encoder, *line, steps="do_train"))
    assert_same_weights(tmp_path / "a/out", tmp_path / "b/out")

    batches.clear()  # no more than there are
    line[2] = "--unlabeled_from_train=999"
    returned = run_glue.main(arguments(tmp_path / "c", [file], encoder, *line, steps="do_train"))
    assert returned["unlabeled_samples"] == 30


@pytest.mark.parametrize(
    "order", [[], pytest.param(["--train_sampling_strategy=group_by_length"], marks=pytest.mark.slow)]
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, encoder, batches, order):
    """From the middle of the second epoch, with dropout."""
    files = write_splits(tmp_path, classification("names"), sizes=(20, 4, 4))
    extra = ["--unlabeled_file", made.write(tmp_path / "extra.csv", unlabeled_rows("names", 7))]
    quick = ["--use_cpu", "--disable_tqdm=true", "--logging_steps=1", "--learning_rate=1e-3", "--rdrop_alpha=1"]
    line = [*quick, *extra, *BATCHES, *order, "--max_steps=7", "--save_strategy=steps", "--save_steps=4"]
    run_glue.main(arguments(tmp_path, files, encoder, *line, steps="do_train", quick=[]))
    whole = batches[:]
    batches.clear()
    (tmp_path / "out").rename(tmp_path / "whole")
    resumed = [*line, f"--resume_from_checkpoint={tmp_path / 'whole/checkpoint-4'}"]
    run_glue.main(arguments(tmp_path, files, encoder, *resumed, steps="do_train", quick=[]))
    assert batches == whole[4:]
    assert_same_weights(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_processes_take_their_batches_from_one_sequence(rows):
    def make():
        sampler = MixedSampler(SequentialSampler(range(16)), rows, 3, seed=1)
        sampler.set_epoch(2)
        return sampler

    alone = list(make())
    shards = [
        list(BatchSamplerShard(BatchSampler(make(), 4, drop_last=False), num_processes=2, process_index=rank))
        for rank in (0, 1)
    ]
    assert [item for pair in zip(*shards, strict=True) for batch in pair for item in batch] == alone
    assert [row for row, *_ in alone] == list(range(16)) and {len(item) for item in alone} == {4}
    counts = [sum(item[1:].count(row) for item in alone) for row in range(rows)]
    assert sum(counts) == 48 and max(counts) - min(counts) <= 2  # of parts of two rounds at most


def test_processes_that_load_the_data(tmp_path, encoder, batches):
    files = write_splits(tmp_path, classification("names"))
    extra = ["--unlabeled_file", made.write(tmp_path / "extra.csv", unlabeled_rows("names", 9))]
    runs = []
    for workers in (0, 1):
        line = [*extra, *BATCHES, f"--dataloader_num_workers={workers}"]
        run_glue.main(arguments(tmp_path / str(workers), files, encoder, *line, steps="do_train"))
        runs.append(batches[:])
        batches.clear()
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("none.csv", None, "does not exist"),
        ("extra.parquet", [], "no known format"),
        ("extra.jsonl", [], "is empty"),
        ("extra.jsonl", [{"txt": "a film"}], "the unlabelled data have no column 'text'.*did you mean 'txt'"),
        (
            "extra.jsonl",
            [{"text": "a film"}, {"text": None}],
            "row 2 of the unlabelled data: column 'text' holds None",
        ),
        ("extra.jsonl", ["a film"], "is no JSON object"),
    ],
)
def test_bad_files_are_refused(tmp_path, encoder, name, rows, message):
    files = write_splits(tmp_path, classification("names"))
    if rows is not None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for alpha in (0, 1):
        line = ["--unlabeled_file", tmp_path / name, f"--rdrop_alpha={alpha}"]
        with pytest.raises(ValueError, match=message):
            run_glue.main(arguments(tmp_path, files, encoder, *line, steps="do_train"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--unlabeled_file={}", "--unlabeled_from_train=5"], "give one of them"),
        (["--unlabeled_file={}", "--unlabeled_ratio=0"], "--unlabeled_ratio must be at least 1"),
        (["--unlabeled_from_train=0", "--max_train_samples=9"], "--unlabeled_from_train must be at least 1"),
        (["--unlabeled_ratio=2"], "needs rows without labels: give --unlabeled_file"),
        (["--rdrop_unlabeled"], "--rdrop_unlabeled needs rows without labels"),
        (["--unlabeled_from_train=5"], "below the 24 rows of the training data"),
        (["--unlabeled_from_train=5", "--max_train_samples=24"], "leaves none"),
        (["--unlabeled_file={}", "--train_sampling_strategy=batch_rebalance"], "batch_rebalance"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, encoder, line, message):
    files = write_splits(tmp_path, classification("names"))
    extra = made.write(tmp_path / "extra.csv", unlabeled_rows("names", 5))
    line = [argument.format(extra) for argument in line]
    with pytest.raises(ValueError, match=message):
        run_glue.main(arguments(tmp_path, files, encoder, *line, steps="do_train"))
    assert not (tmp_path / "out").exists()


def test_rows_without_labels_need_training(tmp_path, encoder):
    files = write_splits(tmp_path, classification("names"))
    extra = made.write(tmp_path / "extra.csv", unlabeled_rows("names", 5))
    with pytest.raises(ValueError, match="it needs --do_train"):
        run_glue.main(arguments(tmp_path, files, encoder, "--unlabeled_file", extra, steps="do_eval"))
