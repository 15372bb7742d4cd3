"""The scripts end to end on tiny models and data, in this process where possible: starting one costs seconds."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbTokenizer,
    PreTrainedTokenizerFast,
)

import run_glue
import run_glue_no_trainer
import run_ner
import run_translation
from finetuning.data import DataArguments
from finetuning.labels import Labels
from finetuning.run import find_checkpoint
from support import ROOT
from support import script_data as made
from support.script_runs import QUICK, arguments, assert_same_weights, classification, logged, read, write_splits
from tasks import tagging, translation
from tasks.classification import flip_labels
from tasks.glue import tokenize

SCRIPTS = ROOT / "scripts"
RESULTS = ("train_results.json", "eval_results.json", "predict_results.json", "all_results.json")
GROUPING = ["--train_sampling_strategy", "group_by_length"]


@pytest.fixture(scope="session")
def seq2seq(tmp_path_factory):
    return made.make_seq2seq(tmp_path_factory.mktemp("seq2seq"))


# ---- Text classification ----


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize(
    ("kind", "name", "metrics", "num_labels"),
    [
        ("names", "{split}.csv", {"accuracy", "f1_macro", "matthews_correlation"}, 2),
        ("names", "{split}.tsv", {"accuracy", "f1_macro", "matthews_correlation"}, 2),
        ("pairs", "{split}.json", {"accuracy", "f1_macro", "matthews_correlation"}, 2),
        ("three-way", "{split}.jsonl.gz", {"accuracy", "f1_macro", "matthews_correlation"}, 3),
        ("regression", "{split}.csv", {"mse", "pearson", "spearmanr"}, 1),
        ("multi-label", "{split}.jsonl", {"subset_accuracy", "f1_micro", "f1_macro"}, 4),
    ],
)
def test_glue_with_own_files(tmp_path, encoder, kind, name, metrics, num_labels, alpha):
    files = write_splits(tmp_path, classification(kind), name)
    returned = run_glue.main(arguments(tmp_path, files, encoder, "--rdrop_alpha", alpha))

    assert all((tmp_path / "out" / file).is_file() for file in RESULTS)
    assert read(tmp_path) == json.loads(json.dumps(returned))
    assert {f"eval_{metric}" for metric in metrics} <= returned.keys()
    assert {f"predict_{metric}" for metric in metrics} <= returned.keys()
    assert all(math.isfinite(value) for value in returned.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config.get("id2label", {0: ""})) == num_labels
    steps = logged(tmp_path)
    assert len(steps) == 3
    assert all((entry["kl_loss"] > 0) == (alpha > 0) for entry in steps)
    assert all(abs(entry["loss"] - entry["ce_loss"] - alpha / 2 * entry["kl_loss"]) < 1e-4 for entry in steps)
    lines = (tmp_path / "out" / "predict_results.txt").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(7)]


def test_part_of_the_training_rows_for_validation():
    rows = datasets.Dataset.from_dict({"row": list(range(100))})
    splits = {"train": rows, "test": rows}
    chosen = DataArguments(validation_from_train=0.2, max_train_samples=50).choose_rows(splits)
    train, validation = (list(chosen[split]["row"]) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (40, 10) and sorted(train + validation) == list(range(50))
    again = DataArguments(validation_from_train=0.2, max_train_samples=50).choose_rows(splits)
    assert list(again["validation"]["row"]) == validation and len(chosen["test"]) == 100
    drawn = DataArguments(max_train_samples=50, sample_seed=1).choose_rows(splits)["train"]["row"]
    assert len(set(drawn)) == 50 and max(drawn) > 60
    assert list(DataArguments(max_train_samples=50, sample_seed=1).choose_rows(splits)["train"]["row"]) == (
        list(drawn)
    )


@pytest.mark.parametrize("script", ["glue", "ner", "translation"])
def test_validation_from_train_needs_no_validation_file(tmp_path, encoder, seq2seq, script):
    rows = {"glue": classification("names"), "ner": made.ner_rows, "translation": made.translation_rows}[script]
    train, *_ = write_splits(tmp_path, rows)
    model, languages = encoder, []
    if script == "translation":
        model, languages = seq2seq, ["--source_lang=en", "--target_lang=de"]
    line = arguments(tmp_path, [train], model, "--validation_from_train=0.25", *languages, steps="do_train do_eval")
    returned = {"glue": run_glue, "ner": run_ner, "translation": run_translation}[script].main(line)
    assert (returned["train_samples"], returned["eval_samples"]) == (18, 6)
    assert returned["train_cpu_seconds"] > 0 and returned["train_peak_memory_mib"] > 50
    with pytest.raises(ValueError, match="needs --do_train"):
        run_ner.main(arguments(tmp_path / "b", [train], encoder, "--validation_from_train=0.25", steps="do_eval"))


def test_label_noise_gives_other_classes_to_training_rows_only(tmp_path, encoder, monkeypatch):
    labels = Labels("single_label_classification", ["a", "b", "c"])
    clean = [0, 1, 2] * 100
    noisy = flip_labels(clean, labels, 0.2, seed=3)
    changed = [(a, b) for a, b in zip(clean, noisy, strict=True) if a != b]
    assert len(changed) == 60 and len(set(changed)) == 6  # each class becomes each of the others
    assert noisy == flip_labels(clean, labels, 0.2, seed=3) != flip_labels(clean, labels, 0.2, 4)
    assert flip_labels(clean, labels, 1.0, seed=0) != clean

    seen = {}

    def remember(dataset, split, tokenizer, columns, targets, data_args):
        seen[split] = targets
        return tokenize(dataset, split, tokenizer, columns, targets, data_args)

    monkeypatch.setattr(run_glue, "tokenize", remember)
    files = write_splits(tmp_path, classification("names"))
    for folder, noise in (("clean", 0), ("noisy", 0.5)):
        run_glue.main(arguments(tmp_path / folder, files, encoder, f"--label_noise={noise}", "--rdrop_alpha=0"))
        seen[folder] = dict(seen)
    assert sum(a != b for a, b in zip(seen["clean"]["train"], seen["noisy"]["train"], strict=True)) == 12
    assert seen["clean"]["validation"] == seen["noisy"]["validation"]


def test_predicted_labels_are_names_of_the_data(tmp_path, encoder):
    files = write_splits(tmp_path, classification("names"))
    run_glue.main(arguments(tmp_path, files, encoder))
    lines = (tmp_path / "out" / "predict_results.txt").read_text().splitlines()[1:]
    assert {line.split("\t")[1] for line in lines} <= {"negative", "positive"}


@pytest.mark.parametrize(
    ("task", "kind", "metrics"),
    [
        ("mrpc", "pairs", {"accuracy", "f1", "combined_score", "ece", "nll", "brier"}),
        ("stsb", "regression", {"pearson", "spearmanr", "combined_score"}),
        ("mnli", "three-way", {"accuracy", "ece", "nll", "brier"}),
    ],
)
def test_glue_task_on_local_files(tmp_path, encoder, task, kind, metrics):
    files = write_splits(tmp_path, classification(kind), "{split}.csv")
    returned = run_glue.main(arguments(tmp_path, files, encoder, "--task_name", task))
    scores = {name[5:] for name in returned if name.startswith("eval_")}
    assert scores - {"loss", "runtime", "samples", "samples_per_second", "steps_per_second"} == metrics
    assert (tmp_path / "out" / f"predict_results_{task}.txt").is_file()


def glue_stand_in(calls, test_label=-1):
    """In place of datasets.load_dataset: MNLI with its five splits, as the Hub has it."""
    names = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])

    def load_dataset(*args, **kwargs):
        calls.append(args)
        splits = {}
        sizes = {"train": 24, "validation_matched": 10, "validation_mismatched": 11}
        for split, size in {**sizes, "test_matched": 5, "test_mismatched": 6}.items():
            rows = made.classification_rows("three-way", size, len(split))
            if split.startswith("test"):
                rows = [{**row, "label": test_label} for row in rows]
            splits[split] = datasets.Dataset.from_list(rows).cast_column("label", names)
        return datasets.DatasetDict(splits)

    return load_dataset


def test_mnli_from_the_hub_has_two_validation_sets(tmp_path, encoder, monkeypatch):
    calls = []
    monkeypatch.setattr("datasets.load_dataset", glue_stand_in(calls))
    returned = run_glue.main(arguments(tmp_path, [], encoder, "--task_name", "MNLI"))
    assert calls == [("nyu-mll/glue", "mnli")]
    assert returned["eval_samples"] == 10 and returned["eval_samples_mm"] == 11
    assert {"eval_accuracy", "eval_accuracy_mm"} <= returned.keys()
    for name, rows in (("mnli", 5), ("mnli-mm", 6)):
        lines = (tmp_path / "out" / f"predict_results_{name}.txt").read_text().splitlines()[1:]
        assert len(lines) == rows
        assert {line.split("\t")[1] for line in lines} <= {"entailment", "neutral", "contradiction"}
    assert "predict_accuracy" not in returned  # labels are withheld (-1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "entailment", "1": "neutral", "2": "contradiction"}


def test_labels_follow_a_fine_tuned_model(tmp_path, encoder, monkeypatch):
    """A model whose classes have another order is evaluated by name: the same accuracy as where it was trained."""
    files = write_splits(tmp_path, classification("names"), sizes=(48, 30, 7))
    first = run_glue.main(arguments(tmp_path, files, encoder, "--max_steps", 20))
    config_file = tmp_path / "out" / "config.json"
    config = json.loads(config_file.read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    (tmp_path / "again").mkdir()
    again = arguments(tmp_path / "again", files[:2], str(tmp_path / "out"), steps="do_eval")
    assert run_glue.main(again)["eval_accuracy"] == first["eval_accuracy"]
    config["id2label"] = {"0": "positive", "1": "negative"}
    config["label2id"] = {"positive": 0, "negative": 1}
    config_file.write_text(json.dumps(config))
    again = arguments(tmp_path / "again", files[:2], str(tmp_path / "out"), steps="do_eval")
    assert run_glue.main(again)["eval_accuracy"] == pytest.approx(1 - first["eval_accuracy"])


def test_multi_label_flags_mean_the_same_in_evaluation_alone(tmp_path, encoder):
    def rows(count, seed):
        return [
            {
                **row,
                "label": [float("good" in row["label"]), float("film" in row["label"]), float("book" in row["label"])],
            }
            for row in made.classification_rows("multi-label", count, seed)
        ]

    files = write_splits(tmp_path, rows)
    first = run_glue.main(arguments(tmp_path, files, encoder, "--max_steps", 20))
    (tmp_path / "again").mkdir()
    again = run_glue.main(arguments(tmp_path / "again", files, str(tmp_path / "out"), steps="do_eval"))
    assert again["eval_f1_micro"] == first["eval_f1_micro"] and again["eval_loss"] == first["eval_loss"]


def test_push_to_the_hub_comes_after_the_results(tmp_path, encoder, monkeypatch):
    pushes = []

    def push(self, **kwargs):
        pushes.append((kwargs, (tmp_path / "out" / "all_results.json").exists()))

    monkeypatch.setattr(run_glue.GlueTrainer, "init_hf_repo", lambda self: None)
    monkeypatch.setattr(run_glue.GlueTrainer, "push_to_hub", push)
    files = write_splits(tmp_path, classification("pairs"))
    run_glue.main(arguments(tmp_path, files, encoder, "--task_name", "mrpc", "--push_to_hub"))
    card, finished = pushes[-1]
    assert finished and card["dataset"] == "GLUE MRPC" and card["tasks"] == "text-classification"
    assert card["finetuned_from"] is None  # a local folder: nothing to ask the Hub about


def test_the_card_shows_what_was_measured(tmp_path, encoder):
    files = write_splits(tmp_path, classification("pairs"))
    comparison = str(ROOT / "model_cards" / "reference" / "short" / "comparison.json")
    more = ("--task_name", "mrpc", "--consistency_samples", "2")
    run_glue.main(arguments(tmp_path, files, encoder, *more, "--card_comparison", comparison))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| baseline | 3 | 76.39 ± 1.11 |" in card and "sub-models" in card

    (tmp_path / "own").mkdir()
    for source, problem in (([str(tmp_path / "none.json")], "cannot be read"), ([comparison], "several tasks")):
        with pytest.raises(ValueError, match=problem):
            run_glue.main(arguments(tmp_path / "own", files, encoder, "--card_comparison", *source))
        assert not (tmp_path / "own" / "out").exists()  # before training
    run_glue.main(arguments(tmp_path / "own", files, encoder, "--card_comparison", comparison, "cola"))
    assert "| baseline | 3 | 22.40 ± 2.65 |" in (tmp_path / "own" / "out" / "README.md").read_text()


def test_json_argument_file_is_the_command_line(tmp_path, encoder):
    files = write_splits(tmp_path, classification("pairs"))
    command = run_glue.main(arguments(tmp_path, files, encoder, "--text_columns", "sentence1", "sentence2"))
    values = {
        "model_name_or_path": encoder,
        "train_file": files[0],
        "validation_file": files[1],
        "test_file": files[2],
        "text_columns": ["sentence1", "sentence2"],
        "output_dir": str(tmp_path / "json"),
        "do_train": True,
        "do_eval": True,
        "do_predict": True,
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "save_strategy": "no",
        "lr_scheduler_kwargs": {},
        "run_name": None,
    }
    (tmp_path / "arguments.json").write_text(json.dumps(values))
    from_file = run_glue.main([str(tmp_path / "arguments.json")])
    assert from_file["eval_loss"] == command["eval_loss"]
    assert_same_weights(tmp_path / "out", tmp_path / "json")


# ---- Named entities ----


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ner(tmp_path, encoder, alpha, caplog):
    files = write_splits(tmp_path, made.ner_rows)
    rows = [*made.ner_rows(6, 9), {"tokens": [], "ner_tags": []}]
    rows[0]["tokens"][0] = "x" * 60  # more tokens than the model can take
    rows[1] = {"tokens": ["anna"] * 70, "ner_tags": ["B-person"] * 70}
    rows[2]["tokens"][-1] = " "  # a word without a token
    files[2] = made.write(tmp_path / "test.jsonl", rows)
    more = ("--rdrop_alpha", alpha, "--return_entity_level_metrics", "--label_all_tokens")
    returned = run_ner.main(arguments(tmp_path, files, encoder, *more))
    assert {"eval_f1", "eval_precision", "eval_recall", "eval_accuracy", "eval_person_f1"} <= returned.keys()
    assert all((tmp_path / "out" / file).is_file() for file in RESULTS)
    lines = (tmp_path / "out" / "predictions.txt").read_text().splitlines()
    assert [len(line.split()) for line in lines] == [len(row["tokens"]) for row in rows]
    assert set(" ".join(lines).split()) <= {"O", "B-person", "I-person", "B-place", "I-place"}
    assert lines[1].split()[46:] == ["O"] * 24  # 48 positions, two of them for [CLS] and [SEP]
    assert "words in 3 of 7 rows are lost" in caplog.text


def test_ner_labels_each_word_once_for_evaluation(tmp_path, encoder):
    """Words of several tokens count once, also when all their tokens are trained on."""
    rows = datasets.Dataset.from_list([{"tokens": ["anna", "zoo", "is"], "ner_tags": ["O", "B-place", "O"]}])
    data_args = tagging.NerArguments(train_file="x", label_all_tokens=True, max_seq_length=20)
    labels = Labels("single_label_classification", ["B-place", "I-place", "O"])
    tokenizer = made.make_tokenizer()
    targets = tagging.read_targets(rows, "train", labels, data_args)
    train, first = tagging.tokenize(rows, "train", tokenizer, labels, targets, data_args)
    assert list(train["labels"]) == [[-100, 2, 0, 1, 1, 2, -100]]  # [CLS] anna z ##o ##o is [SEP]
    assert first == [[-1, 0, 1, -1, -1, 2, -1]]
    evaluation, _ = tagging.tokenize(rows, "validation", tokenizer, labels, targets, data_args)
    assert list(evaluation["labels"]) == [[-100, 2, 0, -100, -100, 2, -100]]


def test_byte_level_tokenizer_sees_the_blank_before_each_word():
    """RoBERTa's kind of tokenizer has other tokens for a word after a blank, and splits lists of words without one."""
    tokens = ["<pad>", "</s>", "<unk>", *pre_tokenizers.ByteLevel.alphabet(), "an", "Ġan"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "n"), ("Ġ", "an")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    rows = datasets.Dataset.from_list([{"tokens": ["an", "ana"], "ner_tags": ["A", "B"]}])
    data_args = tagging.NerArguments(train_file="x", max_seq_length=20)
    labels = Labels("single_label_classification", ["A", "B"])
    encoded, first = tagging.tokenize(rows, "train", tokenizer, labels, [[0, 1]], data_args)
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"][0]) == ["Ġan", "Ġan", "a"]
    assert first == [[0, 1, -1]] and list(encoded["labels"]) == [[0, 1, -100]]


def test_pos_tags_from_the_hub(tmp_path, encoder, monkeypatch):
    """Integer tags with names (ClassLabel) that mark no spans: accuracy is the metric."""
    names = datasets.ClassLabel(names=["NOUN", "VERB", "DET"])
    feature = {"tokens": datasets.List(datasets.Value("string")), "pos_tags": datasets.List(names)}
    draw = random.Random(0)

    def split(count):
        rows = [
            {"tokens": draw.choices(made.OTHER, k=4), "pos_tags": draw.choices(range(3), k=4)} for _ in range(count)
        ]
        return datasets.Dataset.from_list(rows, features=datasets.Features(feature))

    stand_in = {"train": split(20), "validation": split(8), "test": split(5)}
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: stand_in)
    more = ("--dataset_name", "some/corpus", "--task_name", "pos")
    returned = run_ner.main(arguments(tmp_path, [], encoder, *more))
    assert "eval_accuracy" in returned and "eval_f1" not in returned
    words = (tmp_path / "out" / "predictions.txt").read_text().split()
    assert len(words) == 20 and set(words) <= {"NOUN", "VERB", "DET"}


def test_type_with_single_words_in_training_may_have_more_elsewhere(tmp_path, encoder):
    rows = made.ner_rows(24, 0)
    assert not any("I-person" in row["ner_tags"] for row in rows)
    files = write_splits(tmp_path, made.ner_rows)
    made.write(tmp_path / "validation.jsonl", [{"tokens": ["anna", "bob"], "ner_tags": ["B-person", "I-person"]}])
    assert "eval_f1" in run_ner.main(arguments(tmp_path, files, encoder, steps="do_train do_eval"))


# ---- Translation and summarisation ----

TRANSLATION = ("--source_lang", "en", "--target_lang", "de", "--predict_with_generate", "--max_target_length", "12")


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_translation(tmp_path, seq2seq, alpha):
    files = write_splits(tmp_path, made.translation_rows, "{split}.jsonl.gz")
    more = (*TRANSLATION, "--rdrop_alpha", alpha, "--label_smoothing_factor", 0.1, "--num_beams", 2)
    returned = run_translation.main(arguments(tmp_path, files, seq2seq, *more))
    assert {"eval_bleu", "eval_chrf", "eval_gen_len", "predict_bleu", "predict_chrf"} <= returned.keys()
    assert returned["eval_gen_len"] <= 12
    assert all((tmp_path / "out" / file).is_file() for file in RESULTS)
    assert len((tmp_path / "out" / "generated_predictions.txt").read_text().splitlines()) == 7
    assert all((entry["kl_loss"] > 0) == (alpha > 0) for entry in logged(tmp_path))


def test_translation_with_every_economy(tmp_path, seq2seq, caplog):
    files = write_splits(tmp_path, made.translation_rows, "{split}.jsonl.gz")
    more = (*TRANSLATION, "--rdrop_fused_head", "on", "--rdrop_shared_layers", "1", "--rdrop_interval", "2")
    run_translation.main(arguments(tmp_path, files, seq2seq, *more))
    assert [entry["kl_loss"] > 0 for entry in logged(tmp_path)] == [True, False, True]
    assert caplog.text.count("x the time and") == 1  # a user of the scripts sees the prediction


def test_bleu_is_against_the_references_as_written(tmp_path, seq2seq, monkeypatch):
    """Perfect output scores 100 though the tokenizer cannot write the references, and wrong references do not."""
    files = write_splits(tmp_path, made.translation_rows)
    rows = [{"translation": {"en": "the film", "de": f"Größe {i} äöü ßßß ÄÖÜ"}} for i in range(5)]
    for file in files[1:]:
        made.write(Path(file), rows)
    written = [row["translation"]["de"] for row in rows]
    monkeypatch.setattr(translation, "decode", lambda predictions, tokenizer: written)
    returned = run_translation.main(arguments(tmp_path, files, seq2seq, *TRANSLATION))
    assert returned["eval_bleu"] == pytest.approx(100) and returned["predict_chrf"] == pytest.approx(100)


def test_summarisation_with_prefix_and_without_test_targets(tmp_path, seq2seq):
    def rows(count, seed):
        pairs = [row["translation"] for row in made.translation_rows(count, seed)]
        return [{"article": pair["en"], "highlights": pair["de"]} for pair in pairs]

    files = write_splits(tmp_path, rows, "{split}.csv")
    files[2] = made.write(tmp_path / "test.jsonl", [{"article": "the film"}, {"article": "a book"}])
    more = ("--text_column", "article", "--summary_column", "highlights", "--source_prefix", "very: ")
    more = (*more, "--predict_with_generate", "--val_max_target_length", 9)
    returned = run_translation.main(arguments(tmp_path, files, seq2seq, *more))
    assert "eval_bleu" in returned and "predict_bleu" not in returned
    assert len((tmp_path / "out" / "generated_predictions.txt").read_text().splitlines()) == 2


def test_languages_may_be_columns(tmp_path, seq2seq):
    files = write_splits(
        tmp_path, lambda n, seed: [r["translation"] for r in made.translation_rows(n, seed)], "{split}.csv"
    )
    assert "eval_chrf" in run_translation.main(arguments(tmp_path, files, seq2seq, *TRANSLATION))


def test_multilingual_tokenizer(tmp_path):
    """NLLB: the source begins with its language's token, and what is generated with the target's."""
    words = sorted({*made.OTHER, *made.GERMAN})
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *dict.fromkeys("▁" + "".join(words))]
    tokenizer = NllbTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "decoder_start_token_id": 2}
    config = M2M100Config(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **heads)
    M2M100ForConditionalGeneration(config).save_pretrained(tmp_path / "nllb")
    tokenizer.save_pretrained(tmp_path / "nllb")
    files = write_splits(tmp_path, lambda n, seed: [
        {"translation": {"eng": row["translation"]["en"], "deu": row["translation"]["de"]}}
        for row in made.translation_rows(n, seed)
    ])  # fmt: skip
    more = ["--source_lang=eng_Latn", "--target_lang=deu_Latn", "--predict_with_generate", "--max_target_length=9"]
    run_translation.main(arguments(tmp_path, files, str(tmp_path / "nllb"), *more))
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["forced_bos_token_id"] == tokenizer.convert_tokens_to_ids("deu_Latn")
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.convert_ids_to_tokens(saved("the film")["input_ids"])[0] == "eng_Latn"
    (tmp_path / "again").mkdir()
    more = ("--source_lang", "eng_Latn", "--target_lang", "deu")
    with pytest.raises(ValueError, match="--target_lang deu is no language"):
        run_translation.main(arguments(tmp_path / "again", files, str(tmp_path / "nllb"), *more, steps="do_train"))


# ---- What baseline and R-Drop must share ----


@pytest.mark.parametrize("grouping", [[], GROUPING])
def test_data_order_depends_on_the_seed_and_not_on_alpha(tmp_path, seq2seq, monkeypatch, grouping):
    files = write_splits(tmp_path, made.translation_rows)
    orders, original = {}, run_translation.PairCollator

    def order(name, *more):
        batches = orders.setdefault(name, [])

        class Recording(original):
            def __call__(self, features, return_tensors=None):
                batches.append([list(feature["input_ids"]) for feature in features])
                return super().__call__(features, return_tensors)

        monkeypatch.setattr(run_translation, "PairCollator", Recording)
        (tmp_path / name).mkdir()
        more = ("--num_train_epochs", 3, "--per_device_train_batch_size", 4, *TRANSLATION[:4], *grouping, *more)
        run_translation.main(arguments(tmp_path / name, files, seq2seq, *more, steps="do_train"))
        return batches

    baseline = order("baseline", "--rdrop_alpha", 0)
    assert len(baseline) == 18 and baseline[:6] != baseline[6:12] != baseline[12:]
    assert order("rdrop", "--rdrop_alpha", 5) == baseline
    assert order("more-dropout", "--rdrop_alpha", 1, "--rdrop_dropout", 0.4) == baseline
    assert order("seed", "--rdrop_alpha", 0, "--seed", 7) != baseline


def test_predictions_keep_the_order_of_the_rows_under_length_grouping(tmp_path, encoder, seq2seq):
    rows = made.classification_rows("regression", 20, 3)
    test = made.write(tmp_path / "test.jsonl", rows)
    trained = write_splits(tmp_path, classification("regression"), "{split}.csv")
    run_glue.main(arguments(tmp_path, trained, encoder, steps="do_train"))
    outputs = []
    for name, more in (("plain", []), ("grouped", GROUPING)):
        (tmp_path / name).mkdir()
        more = (*more, f"--test_file={test}", "--per_device_eval_batch_size", 3)
        run_glue.main(arguments(tmp_path / name, [], str(tmp_path / "out"), *more, steps="do_predict"))
        outputs.append((tmp_path / name / "out" / "predict_results.txt").read_text())
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0].split())) > 15  # different rows do get different predictions


# ---- Resuming, and runs that end early ----


@pytest.mark.parametrize("resume", ["last", "true", "checkpoint-4"])
def test_glue_resumed_is_as_uninterrupted(tmp_path, encoder, resume):
    files = write_splits(tmp_path, classification("pairs"))
    quick = [*QUICK[:-2], "--save_steps", "4", "--num_train_epochs", "2", "--per_device_train_batch_size", "4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    full = run_glue.main(arguments(whole, files, encoder, quick=quick))
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        stop_at_step(patch, run_glue.GlueTrainer, 6)
        run_glue.main(arguments(parts, files, encoder, quick=quick))
    assert not any((parts / "out" / file).exists() for file in RESULTS)
    resume = str(parts / "out" / resume) if resume.startswith("checkpoint") else resume
    resumed = run_glue.main(arguments(parts, files, encoder, "--resume_from_checkpoint", resume, quick=quick))
    assert_same_weights(whole / "out", parts / "out")
    assert resumed["eval_loss"] == full["eval_loss"]


def stop_at_step(patch, trainer_class, step):
    """Interrupt training in the middle of the step after `step`, as a killed run is."""
    original = trainer_class.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    patch.setattr(trainer_class, "training_step", training_step)


def test_translation_resumes_within_a_length_grouped_epoch(tmp_path, seq2seq):
    files = write_splits(tmp_path, made.translation_rows)
    quick = [*QUICK[:-2], "--save_steps", "4", "--num_train_epochs", "3", "--per_device_train_batch_size", "4"]
    more = (*TRANSLATION[:4], *GROUPING)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    run_translation.main(arguments(whole, files, seq2seq, *more, steps="do_train", quick=quick))
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        stop_at_step(patch, run_translation.TranslationTrainer, 9)
        run_translation.main(arguments(parts, files, seq2seq, *more, steps="do_train", quick=quick))
    more = (*more, "--resume_from_checkpoint", "last")
    run_translation.main(arguments(parts, files, seq2seq, *more, steps="do_train", quick=quick))
    assert_same_weights(whole / "out", parts / "out")


def test_checkpoint_with_other_weights_is_not_resumed(tmp_path, encoder):
    """The Trainer only warns of it, and goes on with fresh weights."""
    files = write_splits(tmp_path, classification("pairs"))
    quick = [*QUICK[:-2], "--save_steps", "2", "--max_steps"]
    run_glue.main(arguments(tmp_path, files, encoder, quick=[*quick, "2"]))
    checkpoint = tmp_path / "out" / "checkpoint-2" / "model.safetensors"
    save_file({name.replace("LayerNorm", "norm"): w.clone() for name, w in load_file(checkpoint).items()}, checkpoint)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="other names than the model's"):
        run_glue.main(arguments(tmp_path, files, encoder, "--resume_from_checkpoint", "last", quick=[*quick, "4"]))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_results_of_an_earlier_end_do_not_outlive_a_resumed_run_that_fails(tmp_path, encoder):
    files = write_splits(tmp_path, classification("pairs"))
    quick = [*QUICK[:-2], "--save_steps", "2", "--max_steps"]
    run_glue.main(arguments(tmp_path, files, encoder, quick=[*quick, "2"]))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert (tmp_path / "out" / "all_results.json").exists()
    with (
        pytest.raises(RuntimeError, match=r"step 3.*resume_from_checkpoint last"),
        pytest.MonkeyPatch.context() as patch,
    ):

        def fail(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise ValueError("disk on fire")
            return original(self, *args, **kwargs)

        original = run_glue.GlueTrainer.training_step
        patch.setattr(run_glue.GlueTrainer, "training_step", fail)
        run_glue.main(arguments(tmp_path, files, encoder, "--resume_from_checkpoint", "last", quick=[*quick, "6"]))
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not left & {*RESULTS, "trainer_state.json", "predict_results.txt"}
    assert {"notes.txt", "checkpoint-2"} <= left


def test_half_written_checkpoint_is_passed_over(tmp_path):
    for step, state in ((2, '{"global_step": 2}'), (4, '{"global_st'), (6, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file({"weight": torch.zeros(1)}, tmp_path / f"checkpoint-{step}" / "model.safetensors")
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert find_checkpoint(str(tmp_path), "last") == str(tmp_path / "checkpoint-2")


def test_evaluation_of_a_finished_run_adds_to_its_results(tmp_path, encoder):
    files = write_splits(tmp_path, classification("pairs"))
    run_glue.main(arguments(tmp_path, files, encoder, steps="do_train"))
    before = read(tmp_path)
    run_glue.main(arguments(tmp_path, files, str(tmp_path / "out"), steps="do_eval"))
    after = read(tmp_path)
    assert "eval_loss" in after and "eval_loss" not in before
    assert before["train_loss"] == after["train_loss"]


# ---- The plain loop ----

LOOP = ["--use_cpu", "--learning_rate", "1e-3", "--logging_steps", "1"]


def loop_arguments(folder, files, model, *more):
    return arguments(folder, files[:2], model, *more, steps="", quick=LOOP)


@pytest.mark.parametrize("kind", ["pairs", "regression", "multi-label"])
@pytest.mark.parametrize("options", [("--rdrop_alpha", 0), ("--rdrop_alpha", 1, "--rdrop_passes", 3)])
def test_plain_loop(tmp_path, encoder, kind, options, caplog):
    files = write_splits(tmp_path, classification(kind))
    returned = run_glue_no_trainer.main(loop_arguments(tmp_path, files, encoder, "--num_train_epochs", 1, *options))
    assert read(tmp_path) == returned
    assert returned["eval_samples"] == 12 and math.isfinite(returned["train_loss"])
    kl = [float(line.rpartition(" ")[2]) for line in caplog.text.splitlines() if "kl_loss" in line]
    assert len(kl) == 3 and all((value > 0) == (options[1] > 0) for value in kl)
    (tmp_path / "again").mkdir()  # what it saves is a model like any other
    again = run_glue.main(arguments(tmp_path / "again", files, str(tmp_path / "out"), steps="do_eval"))
    name = next(key for key in returned if key.startswith("eval_") and key != "eval_samples")
    assert again[name] == pytest.approx(returned[name], abs=1e-6)


def test_plain_loop_accumulates_exactly_over_a_ragged_epoch(tmp_path, encoder):
    """Without dropout, 3 x 8 examples in one batch a step are 3 x 8 in small batches; 22 rows leave a ragged end."""
    files = write_splits(tmp_path, classification("pairs"), sizes=(22, 5, 5))
    for size, accumulation in ((8, 1), (4, 2), (3, 3)):
        folder = tmp_path / f"{size}x{accumulation}"
        folder.mkdir()
        sizes = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulation)
        more = ("--rdrop_alpha", 0, "--rdrop_dropout", 0, "--num_train_epochs", 1, *sizes)
        run_glue_no_trainer.main(loop_arguments(folder, files, encoder, *more))
    assert_same_weights(tmp_path / "8x1" / "out", tmp_path / "4x2" / "out", atol=2e-6)
    with pytest.raises(AssertionError):  # steps of nine rows are others
        assert_same_weights(tmp_path / "8x1" / "out", tmp_path / "3x3" / "out", atol=2e-6)


def test_plain_loop_trains_as_the_trainer_does(tmp_path, encoder):
    """The same data order, objective and schedule: without randomness in the model, the same weights."""
    files = write_splits(tmp_path, classification("pairs"), sizes=(22, 5, 5))
    more = ("--rdrop_alpha", 0, "--rdrop_dropout", 0, "--num_train_epochs", 2, "--gradient_accumulation_steps", 2)
    for folder in ("loop", "trainer"):
        (tmp_path / folder).mkdir()
    run_glue_no_trainer.main(loop_arguments(tmp_path / "loop", files, encoder, *more))
    run_glue.main(arguments(tmp_path / "trainer", files, encoder, *more, steps="do_train"))
    assert_same_weights(tmp_path / "loop" / "out", tmp_path / "trainer" / "out", atol=2e-6)


def test_plain_loop_resumed_is_as_uninterrupted(tmp_path, encoder, monkeypatch):
    files = write_splits(tmp_path, classification("pairs"))
    more = ("--checkpointing_steps", 4, "--num_train_epochs", 2, "--per_device_train_batch_size", 4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    full = run_glue_no_trainer.main(loop_arguments(whole, files, encoder, *more))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_glue_no_trainer, "evaluate", raise_interrupt)  # after the first epoch: six steps
        run_glue_no_trainer.main(loop_arguments(parts, files, encoder, *more))
    assert [path.name for path in (parts / "out").iterdir()] == ["checkpoint-4"]
    more = (*more, "--resume_from_checkpoint", "last")
    resumed = run_glue_no_trainer.main(loop_arguments(parts, files, encoder, *more))
    assert_same_weights(whole / "out", parts / "out")
    assert resumed["train_loss"] == pytest.approx(full["train_loss"])


def test_plain_loop_does_not_inherit_the_precision_of_an_earlier_run(tmp_path, encoder):
    files = write_splits(tmp_path, classification("pairs"), sizes=(8, 5, 5))
    for name in ("alone", "bf16", "after"):
        (tmp_path / name).mkdir()
    run_glue_no_trainer.main(loop_arguments(tmp_path / "alone", files, encoder, "--max_train_steps", 1))
    run_glue.main(arguments(tmp_path / "bf16", files, encoder, "--bf16", steps="do_train"))
    run_glue_no_trainer.main(loop_arguments(tmp_path / "after", files, encoder, "--max_train_steps", 1))
    assert_same_weights(tmp_path / "alone" / "out", tmp_path / "after" / "out")


def raise_interrupt(*args):
    raise KeyboardInterrupt


# ---- Command line, processes, network ----


@pytest.mark.parametrize("script", [run_glue, run_ner, run_translation, run_glue_no_trainer])
def test_help_names_every_argument_of_rdrop(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"--rdrop_{name}" in text for name in ("alpha", "passes", "dropout"))
    assert "loss = CE + alpha/2 * KL" in text and "sKL(P, Q) = 1/2 KL(P||Q) + 1/2 KL(Q||P)" in text


def run_process(*command, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, timeout=300, check=False
    )


OFFLINE = """
import runpy, socket, sys
def refuse(*args, **kwargs):
    print("NETWORK", args, file=sys.stderr)
    raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_nothing_asks_the_network_when_everything_is_local(tmp_path, encoder):
    files = write_splits(tmp_path, classification("pairs"))
    script = str(SCRIPTS / "run_glue.py")
    run = run_process(
        "-c", OFFLINE, script, *arguments(tmp_path, files, encoder), HF_HUB_OFFLINE="0", PYTHONPATH=str(SCRIPTS)
    )
    assert run.returncode == 0, run.stderr
    assert "NETWORK" not in run.stderr
    assert (tmp_path / "out" / "all_results.json").is_file()


@pytest.mark.slow
def test_accelerate_launch(tmp_path, encoder):
    files = write_splits(tmp_path, classification("pairs"))
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "bf16"]
    run = run_process(*launch, str(SCRIPTS / "run_glue_no_trainer.py"), *loop_arguments(tmp_path, files, encoder))
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "all_results.json").is_file()


TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # `accelerate launch` on several GPUs


@pytest.mark.parametrize("script", ["run_glue.py", pytest.param("run_glue_no_trainer.py", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(tmp_path, encoder, script):
    """Without dropout, two processes with half the batch each end at the same weights, and write the same results."""
    files = write_splits(tmp_path, classification("regression"), sizes=(24, 13, 7))
    more = ("--rdrop_alpha", 0, "--rdrop_dropout", 0)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    build = arguments if script == "run_glue.py" else loop_arguments
    more = (*more, "--num_train_epochs", 1)
    module = sys.modules[script[:-3]]
    single = module.main(build(one, files, encoder, *more, "--per_device_train_batch_size", 8))
    run = run_process(
        *TWO, str(SCRIPTS / script), *build(two, files, encoder, *more, "--per_device_train_batch_size", 4)
    )
    assert run.returncode == 0, run.stderr
    assert_same_weights(one / "out", two / "out", atol=2e-6)
    double = read(two)
    for name in ("eval_pearson", "eval_mse", "eval_samples", "predict_mse"):
        assert double.get(name) == pytest.approx(single.get(name), abs=1e-4), name
    if script == "run_glue.py":
        texts = [(folder / "out" / "predict_results.txt").read_text() for folder in (one, two)]
        assert texts[0].count("\n") == texts[1].count("\n") == 8
