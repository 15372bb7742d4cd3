"""Thousands of spoilt data files through the scripts, in this process.

Each case ends in one of two ways: the script takes every row of the file as it stands there, or it stops with one
message that says where the fault is. Nothing on disk changes. Models are tiny, and in most cases the run ends before
training; see `test_whole_runs_on_spoilt_files` for those that go on.
"""

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import logging
import math
import re
import shutil
import signal
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoTokenizer

import run_glue
import run_ner
import run_translation
from finetuning.command_line import cli
from finetuning.run import parse_arguments
from support import corrupt_data
from support import script_data as made
from support.fuzzing import FACTOR

CASES = 40  # of each set-up by default
FLAT = [".csv", ".tsv", ".json", ".jsonl", ".jsonl.gz", ".csv.gz"]
NESTED = [".json", ".jsonl", ".jsonl", ".jsonl.gz"]


def flat_translation(rows, seed):
    return [row["translation"] for row in made.translation_rows(rows, seed)]


def word_classes(rows, seed):
    """Tags of single words, and now and then rows without words."""
    found = made.ner_rows(rows, seed, "pos_tags")
    return [
        {"tokens": row["tokens"] * (seed % 7 > 0), "pos_tags": [tag[0] for tag in row["pos_tags"]] * (seed % 7 > 0)}
        for row in found
    ]


def glue(kind):
    return lambda rows, seed: made.classification_rows(kind, rows, seed)


# script, rows, formats, arguments
SETUPS = {
    "names": (run_glue, glue("names"), FLAT, []),
    "pairs": (run_glue, glue("pairs"), FLAT, ["--task_name=mrpc"]),
    "regression": (run_glue, glue("regression"), FLAT, ["--task_name=stsb"]),
    "numbers": (run_glue, glue("regression"), FLAT, []),
    "multi-label": (run_glue, glue("multi-label"), NESTED, []),
    "ner": (run_ner, made.ner_rows, NESTED, []),
    "words": (run_ner, word_classes, NESTED, ["--task_name=pos"]),
    "translation": (run_translation, made.translation_rows, NESTED, ["--source_lang=en", "--target_lang=de"]),
    "flat": (run_translation, flat_translation, FLAT, ["--source_lang=en", "--target_lang=de"]),
    "summaries": (run_translation, flat_translation, FLAT, ["--text_column=en", "--summary_column=de"]),
}
TRAINERS = {run_glue: "GlueTrainer", run_ner: "NerTrainer", run_translation: "TranslationTrainer"}


class Hang(BaseException):
    """Not an Exception, so that nothing takes it for an error of the data."""


@contextlib.contextmanager
def time_limit(seconds):
    def stop(*_):
        raise Hang

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    encoder, seq2seq = made.make_encoder(folder / "encoder"), made.make_seq2seq(folder / "seq2seq")
    return {run_glue: encoder, run_ner: encoder, run_translation: seq2seq}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def snapshot(folder):
    """What lies in a folder: names, kinds and contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        is_plain = path.is_file() and not path.is_symlink()
        found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if is_plain else path.lstat().st_mode
    return found


def outcome(main, seconds=60):
    """What the script returns, or its message."""
    errors = io.StringIO()
    kept = []
    with contextlib.redirect_stderr(errors), time_limit(seconds):
        try:
            cli(lambda: kept.append(main()))
        except SystemExit as stop:
            assert stop.code == 2
            (message,) = [line for line in errors.getvalue().split("\n") if line.startswith("error")]
            return None, message
    return kept[0], ""


def check_message(message, files):
    """It says where the fault is, in a length that a terminal shows."""
    names_place = any(str(file) in message for file in files) or re.search(
        r"the (train|validation|test) data", message
    )
    assert names_place, message[:500]
    assert len(message) < 1000, f"{len(message)} characters: {message[:500]}"
    # In files and rows the scripts' own words, not those of a library that met what it did not expect.
    assert not re.search(
        r"object is not|Expected .* got|codec can't|unhashable|NoneType|maximum recursion", message
    ), message


def draw_files(folder, setup, draw):
    """Three files, one of them spoilt (now and then exchanged with one of another set-up)."""
    _, rows, formats, _ = SETUPS[setup]
    files = {}
    spoilt = draw.choice(["train", "train", "validation", "test"])
    for seed, split in enumerate(("train", "validation", "test")):
        good = rows(6, seed + draw.randrange(50))
        if split == spoilt and draw.random() < 0.02:
            good = SETUPS[draw.choice(list(SETUPS))][1](6, seed)
            files[split] = folder / "other.jsonl"
            made.write(files[split], good)
        elif split == spoilt:
            files[split] = corrupt_data.make_file(folder, split, good, formats, draw)
        else:
            files[split] = Path(made.write(folder / f"{split}.jsonl", good))
    return files


class Bench:
    """A script with model, tokenizer and arguments made once: the data go through its own `main` up to the trainer."""

    def __init__(self, setup, models, monkeypatch, folder):
        self.script, _, _, more = SETUPS[setup]
        self.setup, self.columns = setup, None
        model = models[self.script]
        self.tokenizer, config = AutoTokenizer.from_pretrained(model), AutoConfig.from_pretrained(model)
        argv = [f"--model_name_or_path={model}", f"--output_dir={folder / 'out'}", "--use_cpu", "--do_train"]
        argv += ["--do_eval", "--do_predict", "--train_file=x", "--disable_tqdm=true", *more]
        argv += ["--predict_with_generate"] if self.script is run_translation else []
        arguments = self.arguments_of(argv, monkeypatch)

        def parse(classes, files, _):
            model_args, data_args, *others = arguments
            named = {f"{split}_file": str(path) for split, path in files.items()}
            return [model_args, dataclasses.replace(data_args, **named), *others]

        def load_model(auto_class, head, model_args, config, tokenizer):
            return SimpleNamespace(config=config, generation_config=SimpleNamespace())

        monkeypatch.setattr(self.script, "parse_arguments", parse)
        monkeypatch.setattr(self.script, "load_config", lambda _: copy.deepcopy(config))
        name = "load_word_tokenizer" if self.script is run_ner else "load_tokenizer"
        monkeypatch.setattr(self.script, name, lambda *_: self.tokenizer)
        monkeypatch.setattr(self.script, "load_model", load_model)
        monkeypatch.setattr(self.script, TRAINERS[self.script], lambda **given: SimpleNamespace(**given))
        if self.script is run_glue:
            choose = run_glue.choose_text_columns
            monkeypatch.setattr(run_glue, "choose_text_columns", lambda *given: self.note(choose(*given)))
        self.data = {}
        tokenize = self.script.tokenize

        def noted(dataset, split, *given):
            self.data[split] = tokenize(dataset, split, *given)
            return self.data[split]

        monkeypatch.setattr(self.script, "tokenize", noted)

    def arguments_of(self, argv, monkeypatch):
        found = []
        with monkeypatch.context() as patch:
            parse = parse_arguments
            patch.setattr(self.script, "parse_arguments", lambda *given: found.extend(parse(*given)) or 1 / 0)
            with pytest.raises(ZeroDivisionError):
                self.script.main(argv)
        return found

    def note(self, columns):
        self.columns = columns
        return columns

    def run(self, files):
        self.data = {}
        return outcome(lambda: self.script.main(files, use_trainer=lambda trainer: trainer))

    def check_rows(self, trainer, files):
        """Each row of each file is there, with its own text and label."""
        for split, path in files.items():
            rows, data = corrupt_data.read_again(path), self.data[split]
            check = {run_glue: self.check_glue, run_ner: self.check_ner, run_translation: self.check_translation}
            data = data[0] if isinstance(data, tuple) else data
            assert len(data) == len(rows), f"{split}: {len(rows)} rows, {len(data)} examples"
            check[self.script](rows, data, trainer.model.config, split)

    def check_glue(self, rows, data, config, split):
        texts = [[row[name] for row in rows] for name in self.columns]
        assert data["input_ids"] == self.tokenizer(*texts, truncation=True, max_length=48)["input_ids"]
        if "labels" not in data.column_names:
            assert split == "test"
            return
        values = [row["label"] for row in rows]
        for value, found in zip(values, data["labels"], strict=True):
            if config.problem_type == "regression":
                assert not isinstance(value, bool) and "_" not in str(value)
                assert found == float(value) and abs(found) < 1e18, (found, value)  # else its square is inf in float32
            elif config.problem_type == "single_label_classification":
                assert config.id2label[found] == self.name_of(value), (value, config.id2label)
            else:
                names = [config.id2label[i] for i, flag in enumerate(found) if flag]
                flags = any(isinstance(item, float) for item in value)
                assert found == value if flags else sorted(names) == sorted(map(self.name_of, value)), (found, value)

    def name_of(self, value):
        names = ["not_equivalent", "equivalent"] if self.setup == "pairs" else None
        if isinstance(value, float):
            assert value == int(value)
            value = int(value)
        if names and not (isinstance(value, str) and value in names):
            return names[int(value)]
        return str(value)

    def check_ner(self, rows, data, config, split):
        tags = "pos_tags" if self.setup == "words" else "ner_tags"
        for row, ids, labels in zip(rows, data["input_ids"], self.column(data, "labels"), strict=True):
            encoded = self.tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=48)
            assert ids == encoded["input_ids"]
            if labels is None:
                assert split == "test"
                continue
            words = [word for word in dict.fromkeys(encoded.word_ids()) if word is not None]
            assert [config.id2label[label] for label in labels if label != -100] == [
                self.name_of(row[tags][word]) for word in words
            ]

    def check_translation(self, rows, data, config, split):
        is_flat = self.setup == "summaries" or {"en", "de"} <= {name for row in rows for name in row}
        rows = rows if is_flat else [row["translation"] for row in rows]
        sources = [row["en"] for row in rows]
        assert data["input_ids"] == self.tokenizer(sources, truncation=True, max_length=48)["input_ids"]
        for row, labels in zip(rows, self.column(data, "labels"), strict=True):
            if labels is None:
                assert split == "test" and any(row.get("de") is None for row in rows)
            else:
                assert labels == self.tokenizer(row["de"], truncation=True, max_length=48)["input_ids"]

    def column(self, data, name):
        return data[name] if name in data.column_names else [None] * len(data)


@pytest.mark.parametrize("setup", list(SETUPS))
def test_spoilt_files_are_read_right_or_refused(tmp_path, models, monkeypatch, setup):
    bench = Bench(setup, models, monkeypatch, tmp_path)
    counts = {"taken": 0, "refused": 0}
    for case in range(CASES * FACTOR):
        folder = tmp_path / "case"
        folder.mkdir()
        files = draw_files(folder, setup, Random(f"{setup} {case}"))
        before = snapshot(folder)
        try:
            trainer, message = bench.run(files)
            if message:
                check_message(message, files.values())
            else:
                bench.check_rows(trainer, files)
        except (Exception, Hang) as error:
            names = [path.name for path in files.values()]
            raise AssertionError(f"case {case} of {setup}, {names}: {error!r:.600}") from error
        assert snapshot(folder) == before
        assert not (tmp_path / "out").exists()
        counts["refused" if message else "taken"] += 1
        shutil.rmtree(folder)
    print(f"{setup}: {counts}")
    assert min(counts.values()) > 0, counts


# ---- Through training, evaluation and prediction ----


def finite(value):
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    return not isinstance(value, float) or math.isfinite(value)


def whole_run(setup, models, files, out, steps):
    script, _, _, more = SETUPS[setup]
    argv = [f"--model_name_or_path={models[script]}", f"--output_dir={out}", "--use_cpu", "--max_steps=1", *more]
    argv += ["--save_strategy=no", "--disable_tqdm=true", "--report_to=none", *(f"--do_{step}" for step in steps)]
    argv += ["--predict_with_generate", "--val_max_target_length=8"] if script is run_translation else []
    argv += [f"--{split}_file={path}" for split, path in files.items()]
    return outcome(lambda: script.main(argv), seconds=120)


@pytest.mark.parametrize("setup", list(SETUPS))
def test_whole_runs_on_spoilt_files(tmp_path, models, setup):
    """A run on what was taken ends with finite metrics over all rows; one that is refused leaves no trace."""
    ended = 0
    for case in range(2 * FACTOR):
        folder, out = tmp_path / "case", tmp_path / "out"
        folder.mkdir()
        draw = Random(f"whole {setup} {case}")
        files = draw_files(folder, setup, draw)
        training = draw.random() < 0.8
        if not training:  # results of another run, which a refusal must leave as they are
            out.mkdir()
            (out / "all_results.json").write_text('{"old": 1}')
        before = snapshot(folder), snapshot(out) if out.exists() else None
        steps = ["train", "eval", "predict"] if training else ["predict"]
        try:
            _, message = whole_run(setup, models, files, out, steps)
            if message:
                check_message(message, files.values())
                assert (snapshot(out) if out.exists() else None) == before[1]
            else:
                results = json.loads((out / "all_results.json").read_text())
                assert finite(results), results
                for split, name in (("train", "train_samples"), ("validation", "eval_samples")):
                    assert not training or results[name] == len(corrupt_data.read_again(files[split]))
                rows = len(corrupt_data.read_again(files["test"]))
                assert results["predict_samples"] == rows
                (predicted,) = [*out.glob("predict_results*.txt"), *out.glob("*predictions.txt")]
                header = SETUPS[setup][0] is run_glue
                assert len(predicted.read_text().splitlines()) == rows + header
                ended += 1
            assert snapshot(folder) == before[0]
        except (Exception, Hang) as error:
            names = [path.name for path in files.values()]
            raise AssertionError(f"case {case} of {setup}, {names}: {error!r:.600}") from error
        shutil.rmtree(folder)
        shutil.rmtree(out, ignore_errors=True)
    print(f"{setup}: {ended} of {2 * FACTOR} ended with results")
