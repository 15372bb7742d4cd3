"""Bad input ends a script before its first step: status 2, one message that says what to change, nothing on disk."""

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, MBartConfig, MBartForConditionalGeneration

import run_glue
import run_glue_no_trainer
import run_ner
import run_translation
from finetuning.command_line import cli
from support import ROOT
from support import script_data as made
from support.corrupt_data import Payload

SCRIPTS = {"glue": run_glue, "ner": run_ner, "translation": run_translation, "loop": run_glue_no_trainer}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models: as they should be, and with something missing."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    mbart = MBartForConditionalGeneration(MBartConfig(vocab_size=200, **sizes, **heads))
    mbart.save_pretrained(folder / "no-decoder-start")
    made.make_tokenizer().save_pretrained(folder / "no-decoder-start")
    file = folder / "a-file"
    file.write_text("no model")
    (folder / "no-model").mkdir()
    incomplete = folder / "no-weights"
    made.make_encoder(incomplete)
    (incomplete / "model.safetensors").unlink()
    return {
        "encoder": made.make_encoder(folder / "encoder"),
        "seq2seq": made.make_seq2seq(folder / "seq2seq"),
        "no dropout": made.make_encoder(folder / "no-dropout", dropout=0.0),
        "no decoder start": str(folder / "no-decoder-start"),
        "file": str(file),
        "no model": str(folder / "no-model"),
        "missing": str(folder / "missing"),
        "no weights": str(incomplete),
    }


GOOD_ROWS = {
    "glue": lambda rows, seed: made.classification_rows("pairs", rows, seed),
    "loop": lambda rows, seed: made.classification_rows("pairs", rows, seed),
    "ner": made.ner_rows,
    "translation": made.translation_rows,
}


def refused(script, folder, capsys, *more, model, train=None, validation=None, out="out", data=True, steps=None):
    """Run a script on good data but for what the test changes; returns the message."""
    rows = GOOD_ROWS[script]
    files = {"train_file": train, "validation_file": validation}
    argv = []
    for seed, (name, content) in enumerate(files.items()):
        if data and not isinstance(content, str):
            content = made.write(folder / f"{name}.jsonl", rows(12, seed) if content is None else content)
        if content:
            argv.append(f"--{name}={content}")
    argv += [f"--model_name_or_path={model}", f"--output_dir={folder / out}"]
    if script != "loop":
        argv += ["--max_steps=1", "--use_cpu", *(steps or ["--do_train", "--do_eval"])]
    if script == "translation" and not any(str(item).startswith(("--text_column", "--source_lang")) for item in more):
        argv += ["--source_lang=en", "--target_lang=de"]
    with pytest.raises(SystemExit) as stop:
        cli(lambda: SCRIPTS[script].main([*argv, *map(str, more)]))
    captured = capsys.readouterr()
    assert stop.value.code == 2
    errors = [line for line in captured.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and errors[0].startswith("error: "), captured.err
    assert "Traceback" not in captured.err
    assert not (folder / "out").exists() or out != "out"
    return errors[0]


def check(message, *words):
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


# ---- Arguments ----


@pytest.mark.parametrize("script", list(SCRIPTS))
@pytest.mark.parametrize("alpha", ["-1", "nan", "inf", "-inf", "much"])
def test_alpha_out_of_range(tmp_path, capsys, models, script, alpha):
    model = models["seq2seq" if script == "translation" else "encoder"]
    check(refused(script, tmp_path, capsys, f"--rdrop_alpha={alpha}", model=model), "rdrop_alpha", alpha)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (["--rdrop_passes=1"], ["rdrop_passes", "2"]),
        (["--rdrop_dropout=1.5"], ["rdrop_dropout", "1.5"]),
        (["--rdrop_alhpa=1"], ["--rdrop_alhpa", "did you mean '--rdrop_alpha'"]),
        (["--rdrop_alp", "1"], ["unknown argument"]),
        (["--learning_rate=fast"], ["learning_rate", "fast"]),
        (["--max_train_samples=0"], ["--max_train_samples", "at least 1"]),
        (["--sample_seed=1"], ["--sample_seed", "--max_train_samples"]),
        (["--validation_from_train=1"], ["--validation_from_train", "between 0 and 1"]),
        (["--validation_from_train=0.001"], ["--validation_from_train", "leaves no row"]),
        (["--label_noise=1.5"], ["--label_noise", "from 0 to 1"]),
        (["--label_noise=0.5", "--problem_type=regression"], ["--label_noise", "regression"]),
        (["--max_seq_length=1"], ["--max_seq_length", "at least 3"]),
        (["--task_name=mrcp"], ["mrcp", "no GLUE task", "did you mean 'mrpc'"]),
        (["--metric=accuracy"], ["--metric", "accuracy", "no GLUE task"]),
        (["--problem_type=ranking"], ["problem_type", "ranking", "regression"]),
        (["--dataset_name=glue"], ["--dataset_name", "files"]),
        (["--text_columns", "a", "b", "c"], ["--text_columns", "two"]),
        (["--do_predict"], ["--do_predict", "--test_file"]),
        (["--fp16", "--bf16"], ["fp16", "bf16"]),
        (["--label_smoothing_factor=0.1", "--problem_type=regression"], ["label_smoothing", "regression"]),
    ],
)
def test_arguments(tmp_path, capsys, models, argument, words):
    check(refused("glue", tmp_path, capsys, *argument, model=models["encoder"]), *words)


def test_nothing_to_do_and_nothing_to_do_it_with(tmp_path, capsys, models):
    model = models["encoder"]
    check(
        refused("glue", tmp_path, capsys, model=model, steps=["--no_remove_unused_columns"]),
        "nothing to do",
        "--do_train",
    )
    check(refused("glue", tmp_path, capsys, model=model, data=False), "no data", "--task_name")
    message = refused("glue", tmp_path, capsys, "--task_name=mrpc", model=model, train="", validation=None)
    check(message, "--do_train", "--train_file")
    check(refused("ner", tmp_path, capsys, model=model, data=False), "no data", "--train_file")
    with pytest.raises(ValueError, match="required: --model_name_or_path"):
        run_glue.main(["--task_name=mrpc", f"--output_dir={tmp_path / 'out'}", "--do_train"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot be read"]),
        ("{", ["malformed JSON", "line 1"]),
        ("[]", ["one JSON object"]),
        ('{"rdrop_alhpa": 1}', ["rdrop_alhpa", "did you mean 'rdrop_alpha'"]),
        ('{"rdrop_alpha": 1}', ["required", "--model_name_or_path"]),
        ('{"rdrop_alpha": -1, "model_name_or_path": "x", "train_file": "x"}', ["rdrop_alpha", "-1"]),
        ('{"rdrop_alpha": "big", "model_name_or_path": "x", "train_file": "x"}', ["rdrop_alpha", "big"]),
        ('{"do_train": 5, "model_name_or_path": "x"}', ["do_train", "5"]),
    ],
)
def test_argument_file(tmp_path, content, words):
    file = tmp_path / "arguments.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError) as error:
        run_glue.main([str(file)])
    check(str(error.value), *words)


# ---- The output folder ----


def test_folder_in_use_is_left_as_it_is(tmp_path, capsys, models):
    folder = tmp_path / "used"
    folder.mkdir()
    (folder / "all_results.json").write_text('{"old": 1}')
    (folder / "notes.txt").write_text("mine")
    for more, words in (
        ([], ["not empty", "another folder"]),
        (["--resume_from_checkpoint=last"], ["no complete checkpoint"]),
        (["--resume_from_checkpoint=true"], ["no complete checkpoint"]),
        ([f"--resume_from_checkpoint={folder}"], ["no complete checkpoint", "trainer_state.json"]),
        (["--resume_from_checkpoint=elsewhere"], ["elsewhere", "no complete checkpoint"]),
    ):
        check(refused("glue", tmp_path, capsys, *more, model=models["encoder"], out="used"), *words)
    check(refused("loop", tmp_path, capsys, model=models["encoder"], out="used"), "not empty")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3}')
    save_file({"weight": torch.zeros(1)}, folder / "checkpoint-3" / "model.safetensors")
    check(
        refused("glue", tmp_path, capsys, model=models["encoder"], out="used"),
        "checkpoint-3",
        "--resume_from_checkpoint last",
    )
    bad = [{"sentence1": "a", "sentence2": "b", "label": None}]
    more = ["--resume_from_checkpoint=last"]
    check(refused("glue", tmp_path, capsys, *more, model=models["encoder"], out="used", train=bad), "label")
    more = ["--resume_from_checkpoint=last", "--rdrop_alpha=1"]  # refused by the trainer itself
    check(refused("glue", tmp_path, capsys, *more, model=models["no dropout"], out="used"), "stochastic")
    assert json.loads((folder / "all_results.json").read_text()) == {"old": 1}
    assert {path.name for path in folder.iterdir()} == {"all_results.json", "notes.txt", "checkpoint-3"}


def test_output_folder_is_a_file(tmp_path, capsys, models):
    (tmp_path / "taken").write_text("x")
    check(refused("glue", tmp_path, capsys, model=models["encoder"], out="taken"), "is a file")
    assert (tmp_path / "taken").read_text() == "x"


def test_empty_folder_of_the_users_stays(tmp_path, capsys, models):
    (tmp_path / "empty").mkdir()
    refused("glue", tmp_path, capsys, model=models["no dropout"], out="empty")
    assert list((tmp_path / "empty").iterdir()) == []


# ---- Models ----


@pytest.mark.parametrize(
    ("script", "model", "words"),
    [
        ("glue", "missing", ["--model_name_or_path", "does not exist"]),
        ("glue", "file", ["is a file"]),
        ("glue", "no model", ["no config.json"]),
        ("glue", "no weights", ["is not complete", "model.safetensors"]),
        ("glue", "seq2seq", ["marian", "no", "sequence classification"]),
        ("ner", "seq2seq", ["marian", "token classification"]),
        ("translation", "encoder", ["bert", "sequence-to-sequence"]),
        ("translation", "no decoder start", ["decoder_start_token_id"]),
        ("glue", "no dropout", ["stochastic", "rdrop_dropout", "rdrop_alpha to 0"]),
        ("loop", "no dropout", ["stochastic", "--rdrop_dropout", "--rdrop_alpha 0"]),
        ("loop", "missing", ["does not exist"]),
    ],
)
def test_model(tmp_path, capsys, models, script, model, words):
    check(refused(script, tmp_path, capsys, model=models[model]), *words)


def test_model_that_is_nowhere(tmp_path, capsys):
    check(
        refused("glue", tmp_path, capsys, model="nobody/no-such-model"),
        "nobody/no-such-model",
        "neither a folder here",
    )


def damaged(folder, name, change):
    """A copy of a model's folder with a change."""
    copy = folder / name
    made.make_encoder(copy)
    change(copy)
    return str(copy)


def as_pickle(model, payload=None):
    """Replace the weights by a pickle of them, with an object that makes a folder when it is unpickled."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights if payload is None else {**weights, "x": payload}, model / "pytorch_model.bin")


def with_code(model, payload):
    """Say that the model needs the code beside it."""
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"import os\nos.mkdir({str(payload.marker)!r})\n")


def test_damaged_models(tmp_path, capsys):
    for name, change, words in (
        ("short", lambda m: os.truncate(m / "model.safetensors", 500), ["cannot be loaded", "damaged"]),
        ("empty", lambda m: (m / "model.safetensors").write_bytes(b""), ["cannot be loaded", "damaged"]),
        ("config", lambda m: (m / "config.json").write_text('{"a":'), ["config.json", "not a valid JSON"]),
        ("tokenizer", lambda m: (m / "tokenizer.json").write_text("{}"), ["cannot be loaded", "damaged"]),
        ("half", lambda m: (m / "tokenizer.json").write_text('{"a":'), ["cannot be loaded", "damaged"]),
        ("type", lambda m: (m / "config.json").write_text('{"model_type": "x"}'), ["cannot be loaded", "`x`"]),
    ):
        message = refused("glue", tmp_path, capsys, model=damaged(tmp_path, name, change))
        check(message, "--model_name_or_path", name, *words)


def test_nothing_that_comes_with_a_model_or_data_is_run(tmp_path, capsys, models, monkeypatch):
    """Pickles with code in them, models and data sets with code beside them: refused, and the code has not run."""
    payload = Payload(tmp_path / "payload")
    for name, change, words in (
        ("pickle", lambda m: as_pickle(m, payload), ["more than tensors", "safetensors"]),
        ("code", lambda m: with_code(m, payload), ["code of its own", "--trust_remote_code"]),
    ):
        check(refused("glue", tmp_path, capsys, model=damaged(tmp_path, name, change)), name, *words)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, content in (("train.pkl", pickle.dumps(payload)), ("corpus.py", b"import os; os.mkdir('payload')")):
        corpus = tmp_path / name.split(".")[1] / "corpus"
        corpus.mkdir(parents=True)
        (corpus / name).write_bytes(content)
        more = (f"--dataset_name={corpus}", f"--cache_dir={tmp_path / 'cache'}")
        check(refused("glue", tmp_path, capsys, *more, model=models["encoder"], data=False), "could not be loaded")
    assert not payload.marker.exists() and not Path("payload").exists()
    pickle.loads(pickle.dumps(payload))  # so it would have been seen
    assert payload.marker.exists()


def test_weights_in_an_old_file_are_read_without_running_anything(tmp_path):
    """pytorch_model.bin with nothing but tensors still loads, and what is saved is safetensors."""
    model = damaged(tmp_path, "old", as_pickle)
    train = made.write(tmp_path / "train.jsonl", made.classification_rows("names", 12, 0))
    run_glue.main([f"--train_file={train}", f"--model_name_or_path={model}", f"--output_dir={tmp_path / 'out'}",
                   "--do_train", "--max_steps=1", "--use_cpu", "--save_strategy=no"])  # fmt: skip
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert {path.name for path in (tmp_path / "out").glob("*.bin")} <= {"training_args.bin"}


def test_tokenizer_without_padding(tmp_path, capsys, models):
    tokenizer = made.make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    AutoConfig.from_pretrained(models["encoder"]).save_pretrained(tmp_path / "tokenizer")
    message = refused("glue", tmp_path, capsys, f"--tokenizer_name={tmp_path / 'tokenizer'}", model=models["encoder"])
    check(message, "no padding token")


def test_head_for_other_labels(tmp_path, capsys, models):
    """A fine-tuned model keeps its head only for data with its own labels."""
    train = made.write(tmp_path / "names.jsonl", made.classification_rows("names", 12, 0))
    model = str(tmp_path / "trained")
    run_glue.main([f"--train_file={train}", f"--model_name_or_path={models['encoder']}", f"--output_dir={model}",
                   "--do_train", "--max_steps=1", "--use_cpu", "--save_strategy=no"])  # fmt: skip
    three = made.classification_rows("three-way", 12, 0)
    message = refused("glue", tmp_path, capsys, model=model, train=three, validation=three)
    check(message, "3 labels", "--ignore_mismatched_sizes")
    message = refused("glue", tmp_path, capsys, model=model, train="", validation=three, steps=["--do_eval"])
    check(message, "row 1", "validation", "does not occur in the training data", "negative, positive")


# ---- Files ----

ROW = json.dumps({"sentence1": "a", "sentence2": "b", "label": 1})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.jsonl", b"", ["is empty", "no example"]),
        ("train.jsonl", b"\n\n", ["is empty"]),
        ("train.csv", b"sentence1,sentence2,label\n", ["is empty"]),
        ("train.json", b"[]", ["is empty"]),
        ("train.jsonl.gz", gzip.compress(b""), ["is empty"]),
        ("train.jsonl", f"{ROW}\n\n{ROW[:-3]}\n{ROW}\n".encode(), ["line 3", "malformed JSON"]),
        ("train.jsonl.gz", gzip.compress(f"{ROW}\n{ROW[:-3]}\n".encode()), ["line 2", "malformed JSON"]),
        ("train.jsonl", f"{ROW}\n[1, 2]\n".encode(), ["line 2", "no JSON object"]),
        ("train.json", f"[{ROW},\n{ROW},\n3]".encode(), ["row 3", "no JSON object"]),
        ("train.json", f"[{ROW},\n{ROW}\n{ROW}]".encode(), ["line 3", "malformed JSON"]),
        ("train.jsonl.gz", gzip.compress(ROW.encode() * 50)[:-9], ["not a complete gzip file"]),
        ("train.jsonl.gz", ROW.encode(), ["not a complete gzip file"]),
        ("train.jsonl", f"{ROW}\n".encode() + '{"sentence1": "Größe"}'.encode("latin-1"), ["line 2", "UTF-8"]),
        ("train.csv", b"\x89PNG\r\n\x1a\n\x00\x01", ["UTF-8"]),
        ("train.csv", b"sentence1,label\na\x00b,1\n", ["line 2", "NUL"]),
        ("train.csv", b"sentence1,sentence2,label\na,b,1\na,b,c,0\n", ["line 3", "4 fields", "3 (sentence1"]),
        ("train.csv", b'sentence1,sentence2,label\n"a,b,1\nc,d,0\n', ["malformed csv", "end of data"]),
        ("train.csv", b"sentence1,label,label\na,b,1\n", ["line 1", "'label'", "more than once"]),
        ("train.txt", b"hello", ["no known format", ".jsonl"]),
        ("train.pkl", b"\x80\x04N.", ["no known format", ".jsonl"]),
        ("train.jsonl", f"{ROW}\n".encode() + b"[" * 100_000, ["line 2", "too many levels"]),
        ("train.jsonl", f'{ROW}\n{ROW[:-1]}, "label": 0}}\n'.encode(), ["line 2", "'label'", "more than once"]),
        ("train.jsonl", f"{ROW}\n{ROW[:-2]}{'9' * 5000}}}\n".encode(), ["line 2", "cannot be read", "4300 digits"]),
        ("train.jsonl", ROW.replace('"a"', '"\\ud83d"').encode(), ["'sentence1'", "row 1", "half of a character"]),
        ("train.jsonl", ROW.replace("sentence1", "\\ud83d").encode(), ["name of column", "no valid Unicode"]),
        ("train.jsonl", ROW.replace('"a"', "[" * 100 + "]" * 100).encode(), ["no table", "Give columns"]),
        ("train.jsonl", f"{ROW}\n{ROW[:-2]}true}}\n".encode(), ["row 2 holds True", "row 1 1", "more than one type"]),
        ("train.jsonl", f"{ROW[:-2]}0.5}}\n{ROW[:-2]}true}}\n".encode(), ["row 2 holds True", "row 1 0.5"]),
        ("train.jsonl", f'{ROW}\n{ROW[:-2]}"x"}}\n'.encode(), ["'label'", "row 2", "'x'", "more than one type"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_file(tmp_path, capsys, models, name, content, words):
    file = tmp_path / name
    file.write_bytes(content)
    check(refused("glue", tmp_path, capsys, model=models["encoder"], train=str(file)), str(file), *words)


def test_file_that_is_not_there(tmp_path, capsys, models):
    message = refused("glue", tmp_path, capsys, model=models["encoder"], train=str(tmp_path / "nothing.csv"))
    check(message, "nothing.csv", "does not exist")
    check(refused("glue", tmp_path, capsys, model=models["encoder"], train=str(tmp_path)), "is a folder")


def test_path_that_is_no_file(tmp_path, capsys, models):
    """A pipe would be waited for, and cannot be read twice."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for name, word in (("pipe.jsonl", "is no regular file"), ("loop.jsonl", "does not exist")):
        message = refused("glue", tmp_path, capsys, model=models["encoder"], train=str(tmp_path / name))
        check(message, name, word)


def test_messages_stay_short(tmp_path, capsys, models):
    """What is found is cut where it is as long as a book."""
    book = "very " * 200_000
    for rows in (
        [{book: "a", "label": 1}],
        [glue_row(label=book), glue_row(label=book)],
        [glue_row(sentence1={book: 1})],
    ):
        assert len(refused("glue", tmp_path, capsys, model=models["encoder"], train=rows)) < 1000
    good = [glue_row(label="yes"), glue_row(label="no")]
    message = refused("glue", tmp_path, capsys, model=models["encoder"], train=good, validation=[glue_row(label=book)])
    assert len(message) < 1000
    (tmp_path / "train.csv").write_text(f"{book},label\na,b,c\n")
    assert len(refused("glue", tmp_path, capsys, model=models["encoder"], train=str(tmp_path / "train.csv"))) < 1000


def test_data_set_of_the_hub(tmp_path, capsys, models, monkeypatch):
    more = ("--dataset_name=some/corpus", "--dataset_config_name=x")
    message = refused("glue", tmp_path, capsys, *more, model=models["encoder"], data=False)
    check(message, "some/corpus x", "could not be loaded", "--train_file")
    rows = made.classification_rows("pairs", 8, 0)
    stand_in = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: stand_in)
    check(
        refused("glue", tmp_path, capsys, *more, model=models["encoder"], data=False), "no split 'validation'", "train"
    )


# ---- Columns and labels of text classification ----


def glue_row(**changes):
    return {"sentence1": "a good film", "sentence2": "a bad film", "label": 1, **changes}


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize("script", ["glue", "loop"])
@pytest.mark.parametrize(
    ("more", "rows", "words"),
    [
        ([], [without(glue_row(lable=0), "label")], ["no column 'label'", "did you mean 'lable'", "--label_column"]),
        (["--label_column=labl"], [glue_row()], ["no column 'labl'", "did you mean 'label'"]),
        (["--text_columns", "sentence_1"], [glue_row()], ["no column 'sentence_1'", "did you mean 'sentence1'"]),
        (["--task_name=qqp"], [glue_row()], ["no column 'question1'", "sentence1, sentence2, label"]),
        (["--task_name=mrpc"], [glue_row(), glue_row(label=2)], ["row 2", "train", "2 is out of range", "0 to 1"]),
        (["--task_name=mrpc"], [glue_row(), glue_row(label=-1)], ["row 2", "-1", "out of range", "without a label"]),
        (["--task_name=mrpc"], [glue_row(label="1"), glue_row(label="maybe")], ["row 2", "'maybe'", "equivalent"]),
        (["--task_name=mrpc"], [glue_row(label=0.5)], ["row 1", "0.5", "float"]),
        (["--task_name=mrpc"], [glue_row(), glue_row(label=None)], ["row 2", "missing"]),
        (["--task_name=mrpc"], [glue_row(), glue_row(label=float("nan"))], ["row 2", "nan", "missing"]),
        (["--task_name=mrpc"], [glue_row(label={"a": 1})], ["row 1", "no class"]),
        (["--task_name=stsb"], [glue_row(label=2.5), glue_row(label=float("nan"))], ["row 2", "nan", "finite number"]),
        (["--task_name=stsb"], [glue_row(label=2.5), glue_row(label=float("inf"))], ["row 2", "inf", "finite number"]),
        (["--task_name=stsb"], [glue_row(label="2.5"), glue_row(label="x")], ["row 2", "'x'", "finite number"]),
        (["--task_name=stsb"], [glue_row(label=[1.0])], ["row 1", "finite number"]),
        (["--task_name=stsb"], [glue_row(label="2.5"), glue_row(label="1_0")], ["row 2", "'1_0'", "finite number"]),
        (["--task_name=stsb"], [glue_row(label=2.5), glue_row(label=1e30)], ["row 2", "1e+30", "too large"]),
        ([], [glue_row(label="2.5"), glue_row(label="x")], ["row 2", "'x'", "--problem_type"]),
        ([], [glue_row(label=0), glue_row(label=None)], ["row 2", "missing"]),
        ([], [glue_row(label=1.5), glue_row(label=None)], ["row 2", "finite number"]),
        ([], [glue_row(label=None)], ["'label'", "holds no label"]),
        ([], [glue_row(), glue_row()], ["every row", "'1'", "nothing to tell apart"]),
        ([], [glue_row(label=["x", "y"]), glue_row(label=["x", "x"])], ["row 2", "twice"]),
        ([], [glue_row(label=[0.0, 1.0]), glue_row(label=[0.0, 1.0, 1.0])], ["row 2", "2 flags"]),
        ([], [glue_row(), glue_row(sentence2=None)], ["row 2", "'sentence2'", "None", "no text"]),
        (["--text_columns", "label"], [glue_row()], ["row 1", "'label'", "no text"]),
        ([], [{"id": 3, "label": 1}], ["no column holds text"]),
    ],
)
def test_rows_of_glue(tmp_path, capsys, models, script, more, rows, words):
    check(refused(script, tmp_path, capsys, *more, model=models["encoder"], train=rows), *words)


@pytest.mark.parametrize("script", ["glue", "loop"])
def test_label_of_the_validation_data_that_training_never_saw(tmp_path, capsys, models, script):
    train = [glue_row(label="yes"), glue_row(label="no")]
    validation = [glue_row(label="yes"), glue_row(label="perhaps")]
    message = refused(script, tmp_path, capsys, model=models["encoder"], train=train, validation=validation)
    check(message, "row 2", "validation", "'perhaps'", "does not occur in the training data", "no, yes")


# ---- Words and tags ----


def ner_row(**changes):
    return {"tokens": ["anna", "is", "in", "rome"], "ner_tags": ["B-person", "O", "O", "B-place"], **changes}


@pytest.mark.parametrize(
    ("more", "train", "validation", "words"),
    [
        ([], [without(ner_row(), "ner_tags")], None, ["no column 'ner_tags'", "--label_column_name"]),
        ([], [without(ner_row(words=["a"]), "tokens")], None, ["no column 'tokens'", "--text_column_name"]),
        (["--task_name=pos"], None, None, ["no column 'pos_tags'", "tokens, ner_tags"]),
        ([], [ner_row(), ner_row(ner_tags=["O", "O"])], None, ["row 2", "train", "4 words", "2 tags"]),
        ([], [ner_row(), ner_row(tokens=None)], None, ["row 2", "list of words"]),
        ([], [ner_row(tokens=["anna", None, "in", "rome"])], None, ["row 1", "list of words"]),
        ([], [ner_row(tokens="anna is in rome")], None, ["row 1", "'anna is in rome'", "list of words"]),
        ([], [ner_row(), ner_row(ner_tags=None)], None, ["row 2", "list of tags"]),
        ([], [ner_row(), ner_row(ner_tags=["O", None, "O", "O"])], None, ["row 2", "'ner_tags'", "missing"]),
        ([], [ner_row(), ner_row(ner_tags=[0.5, 1, 1, 1])], None, ["row 2", "more than one type"]),
        ([], None, [ner_row(), ner_row(ner_tags=["B-god", "O", "O", "O"])], ["row 2", "validation", "'B-god'"]),
        ([], None, [ner_row(ner_tags=["O", "O"])], ["row 1", "validation", "4 words", "2 tags"]),
        ([], [ner_row(ner_tags=["O"] * 4)], None, ["no other tag", "O"]),
        (
            [],
            None,
            [ner_row(tokens=[], ner_tags=[])] * 2,
            ["validation data", "no word that the model sees", "tokens"],
        ),
        ([], None, [ner_row(tokens=[" "], ner_tags=["O"])], ["validation data", "no word that the model sees"]),
    ],
)
def test_rows_of_ner(tmp_path, capsys, models, more, train, validation, words):
    message = refused("ner", tmp_path, capsys, *more, model=models["encoder"], train=train, validation=validation)
    check(message, *words)


def test_a_tag_that_turns_the_f1_off_is_named(tmp_path, caplog, models):
    train = made.write(tmp_path / "train.jsonl", [ner_row(), ner_row(ner_tags=["Bperson", "O", "O", "O"])] * 2)
    with caplog.at_level("WARNING", logger="hf_rdrop.scripts"):
        results = run_ner.main([f"--train_file={train}", f"--validation_file={train}", "--do_train", "--do_eval",
                                f"--model_name_or_path={models['encoder']}", f"--output_dir={tmp_path / 'out'}",
                                "--max_steps=1", "--use_cpu", "--save_strategy=no"])  # fmt: skip
    assert "Bperson marks no span" in caplog.text
    assert "eval_accuracy" in results and "eval_f1" not in results


# ---- Pairs of texts ----


@pytest.mark.parametrize(
    ("more", "train", "words"),
    [
        (
            [],
            [{"translation": {"en": "a", "de": "b"}}, {"translation": {"en": "a"}}],
            ["row 2", "'de'", "missing", "en"],
        ),
        ([], [{"translation": {"en": "a", "ge": "b"}}], ["row 1", "'de'", "missing", "en, ge"]),
        ([], [{"translation": {"en": "a", "de": 3}}], ["row 1", "'de'", "3", "no text"]),
        ([], [{"translation": None}, {"translation": {"en": "a", "de": "b"}}], ["row 1", "no languages"]),
        ([], [{"translation": "a"}], ["row 1", "no languages"]),
        ([], [{"traslation": {"en": "a", "de": "b"}}], ["no column 'translation'", "did you mean 'traslation'"]),
        (["--text_column=article"], None, ["--source_lang", "--text_column", "unclear"]),
        (
            ["--text_column=article", "--summary_column=summary"],
            [{"article": "a", "sumary": "b"}],
            ["did you mean 'sumary'"],
        ),
        (["--text_column=a", "--summary_column=b"], [{"a": "x", "b": "y"}, {"a": "x", "b": None}], ["row 2", "'b'"]),
        (["--source_lang=en"], None, ["--target_lang", "unclear"]),
        (["--source_lang=en", "--target_lang=de", "--forced_bos_token=<de>"], None, ["--forced_bos_token", "<de>"]),
        (["--num_beams=0"], None, ["--num_beams", "at least 1"]),
    ],
)
def test_rows_of_translation(tmp_path, capsys, models, more, train, words):
    check(refused("translation", tmp_path, capsys, *more, model=models["seq2seq"], train=train), *words)


def test_predicting_without_generating(tmp_path, capsys, models):
    message = refused("translation", tmp_path, capsys, "--do_predict", model=models["seq2seq"])
    check(message, "--predict_with_generate")


# ---- As a user meets it ----


def test_status_and_message_of_a_process(tmp_path, models):
    rows = made.write(tmp_path / "train.jsonl", [glue_row(label=7)])
    script = ROOT / "scripts" / "run_glue.py"
    command = [sys.executable, str(script), "--task_name=mrpc", f"--train_file={rows}", "--do_train", "--use_cpu",
               f"--model_name_or_path={models['encoder']}", f"--output_dir={tmp_path / 'out'}"]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert run.returncode == 2
    assert run.stderr.startswith("error: row 1 of the train data, column 'label': label 7 is out of range")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_traceback_on_request(capsys, monkeypatch):
    monkeypatch.setenv("HF_RDROP_DEBUG", "1")
    with pytest.raises(SystemExit) as stop:
        cli(lambda: run_glue.main(["--model_name_or_path=x", "--task_name=mrpc", "--rdrop_alpha=-1"]))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and error.splitlines()[-1].startswith("error: rdrop_alpha")
