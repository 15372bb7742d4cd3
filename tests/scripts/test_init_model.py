"""init_model.py: what it writes loads as any model does, trains, and is the same for the same seed."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets", reason="the scripts need the scripts extra")

import numpy as np
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import init_model
from from_scratch.model import read_texts

SCRIPT = Path(init_model.__file__)
SENTENCES = [
    "the old dog sees the cat .",
    "a small bird hears the horse today",
    "Anna follows the river",
    "Größe: 5 m² , naïve café",
    "the king paints the bridge",
    "two dogs greet one cat",
    "the baker does not trust the wolf",
    "horses fear fire",
]
TARGETS = [
    "der alte Hund sieht die Katze.",
    "ein kleiner Vogel hört heute das Pferd",
    "Anna folgt dem Fluss",
    "Größe: 5 m², naïve Café",
    "der König malt die Brücke",
    "zwei Hunde grüßen eine Katze",
    "der Bäcker traut dem Wolf nicht",
    "Pferde fürchten Feuer",
]
SMALL = ["--hidden_size", "32", "--num_layers", "1", "--num_heads", "2", "--max_length", "32"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same texts as .txt, .csv, .jsonl.gz with a nested column, and .json with word lists."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "plain.txt").write_text("\n".join(SENTENCES) + "\n\n", encoding="utf-8")
    (folder / "table.csv").write_text(
        "sentence,label\n" + "\n".join(f'"{text}",1' for text in SENTENCES), encoding="utf-8"
    )
    with gzip.open(folder / "pairs.jsonl.gz", "wt", encoding="utf-8") as file:
        for en, de in zip(SENTENCES, TARGETS, strict=True):
            file.write(json.dumps({"translation": {"en": en, "de": de}}) + "\n")
    words = [{"tokens": text.split(), "id": number} for number, text in enumerate(SENTENCES)]
    (folder / "words.json").write_text(json.dumps(words), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def encoder(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("models") / "encoder"
    arguments = ["--train_files", str(files / "plain.txt"), "--output_dir", str(output), "--vocab_size", "400"]
    return init_model.main([*arguments, *SMALL])


@pytest.fixture(scope="module")
def decoder(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("models") / "decoder"
    arguments = ["--train_files", str(files / "plain.txt"), "--output_dir", str(output), "--vocab_size", "400"]
    return init_model.main([*arguments, "--architecture", "decoder", *SMALL])


@pytest.fixture(scope="module")
def translator(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("models") / "deep" / "translator"
    arguments = ["--train_files", str(files / "pairs.jsonl.gz"), "--output_dir", str(output), "--vocab_size", "500"]
    columns = ["--text_columns", "translation.en", "translation.de", "--architecture", "encoder-decoder"]
    return init_model.main([*arguments, *columns, *SMALL[:-1], "48"])


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# --- what is written ---


def test_encoder_for_classification(encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
    assert (encoder / "model.safetensors").is_file()
    assert model.config.vocab_size == len(tokenizer) <= 400
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.1
    batch = tokenizer(["the dog", "a cat"], ["a bird", "horses"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask"}
    pair = tokenizer("the dog", "the cat")
    tokens = tokenizer.convert_ids_to_tokens(pair["input_ids"])
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and tokens.count("[SEP]") == 2
    assert pair["token_type_ids"] == [0] * (tokens.index("[SEP]") + 1) + [1] * (
        len(tokens) - tokens.index("[SEP]") - 1
    )
    assert model(**batch).logits.shape == (2, 3)
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_decoder(decoder):
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    model = AutoModelForCausalLM.from_pretrained(decoder).eval()
    config = model.config
    assert config.model_type == "gpt2" and config.vocab_size == len(tokenizer) and config.n_positions == 32
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.1
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    # One token ends a text and begins the next; it is not the padding, and is not put around what is to go on.
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == config.eos_token_id == config.bos_token_id
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}) == 3
    ids = tokenizer("the old dog", return_tensors="pt").input_ids
    assert tokenizer.eos_token_id not in ids[0] and tokenizer.decode(ids[0]) == "the old dog"
    with torch.no_grad():
        logits, changed = model(ids).logits, model(torch.cat([ids[:, :-1], ids[:, :1]], 1)).logits
    assert torch.equal(logits[:, :-1], changed[:, :-1])
    # As good as chance before training: embeddings of std 1 / sqrt(width) give logits of about std 1.
    assert 0.5 < logits.std() < 2


def test_encoder_for_token_classification(encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModelForTokenClassification.from_pretrained(encoder, num_labels=3)
    words = ["Anna", "follows", "unbelievable", "rivers"]
    encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    ids = encoded.word_ids()
    assert tokenizer.is_fast
    assert ids[0] is None and ids[-1] is None
    assert sorted(set(ids[1:-1])) == [0, 1, 2, 3]
    assert model(**encoded).logits.shape[1] == len(ids)


def test_vision(tmp_path):
    sizes = ["--image_size", "12", "--patch_size", "4", "--num_channels", "1", *SMALL]
    before = torch.get_rng_state()
    first, same, other = (
        init_model.main(["--architecture", "vision", "--output_dir", str(tmp_path / name), *sizes, "--seed", seed])
        for name, seed in (("first", "3"), ("same", "3"), ("other", "4"))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert {file.name for file in first.iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert digests(first) == digests(same) and digests(first) != digests(other)
    model, report = ViTForImageClassification.from_pretrained(first, num_labels=5, output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not report["unexpected_keys"]
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.1
    processor = ViTImageProcessorPil.from_pretrained(first)
    image = Image.fromarray(np.arange(0, 250, 2, dtype=np.uint8).reshape(25, 5))
    batch = processor([image, image.rotate(90)], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 1, 12, 12) and -1 <= batch["pixel_values"].min() < 0
    assert model.eval()(**batch).logits.shape == (2, 5)


def test_truncation(encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    assert len(tokenizer("the " * 100, truncation=True).input_ids) == 32


def test_encoder_decoder_ids(translator):
    tokenizer = AutoTokenizer.from_pretrained(translator)
    model = AutoModelForSeq2SeqLM.from_pretrained(translator)
    for config in (model.config, model.generation_config):
        assert config.pad_token_id == tokenizer.pad_token_id
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.decoder_start_token_id == tokenizer.bos_token_id
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}) == 4
    assert model.generation_config.max_length == 48
    assert model.config.dropout == 0.3
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert set(tokenizer("a dog")) == {"input_ids", "attention_mask"}
    assert tokenizer(text_target="ein Hund").input_ids[-1] == tokenizer.eos_token_id

    collator = DataCollatorForSeq2Seq(tokenizer, model)
    batch = collator([{**tokenizer(en), "labels": tokenizer(text_target=de).input_ids} for en, de in PAIRS])
    shifted = batch["decoder_input_ids"]
    assert (shifted[:, 0] == tokenizer.bos_token_id).all()
    labels = batch["labels"].masked_fill(batch["labels"] == -100, tokenizer.pad_token_id)
    assert torch.equal(shifted[:, 1:], labels[:, :-1])


PAIRS = list(zip(SENTENCES, TARGETS, strict=True))


@pytest.mark.parametrize("which", ["encoder", "translator"])
def test_any_text_survives_the_tokenizer(which, request):
    """Bytes stand in for characters that training never saw, so that nothing becomes unknown."""
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(which))
    for text in [*SENTENCES, *TARGETS, "漢字 and emoji 🙂 , ẞ!", "Straße (alt).", "<0x41> A"]:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer("  two   blanks ").input_ids, skip_special_tokens=True) == "two blanks"


def test_eight_pairs_are_learnt_by_heart(translator):
    """Every part has to work for this: shifted labels, masks, special tokens, positions, generation."""
    tokenizer = AutoTokenizer.from_pretrained(translator)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_pretrained(translator, dropout=0.0)
    collator = DataCollatorForSeq2Seq(tokenizer, model)
    batch = collator([{**tokenizer(en), "labels": tokenizer(text_target=de).input_ids} for en, de in PAIRS])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    first = None
    for _ in range(150):
        loss = model(**batch).loss
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        assert model(**batch).loss.item() < 0.05 < 3 < first
    written = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert tokenizer.batch_decode(written, skip_special_tokens=True) == TARGETS


# --- input, seeds, output folder ---


def test_every_kind_of_file_gives_the_same_texts(files):
    expected = SENTENCES
    assert list(read_texts(str(files / "plain.txt"), None)) == expected
    assert list(read_texts(str(files / "table.csv"), ["sentence"])) == expected
    assert list(read_texts(str(files / "pairs.jsonl.gz"), ["translation.en"])) == expected
    assert list(read_texts(str(files / "words.json"), ["tokens"])) == expected


def test_the_seed_decides_the_weights(files, encoder, tmp_path):
    """In another process, where hash tables have another order: the library's WordPiece trainer fails this."""
    command = [sys.executable, SCRIPT, "--train_files", files / "plain.txt", "--vocab_size", "400", *SMALL]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([*command, "--output_dir", tmp_path / "same"], check=True, env=environment, timeout=120)
    same = digests(tmp_path / "same")
    assert same == digests(encoder)
    arguments = ["--train_files", str(files / "plain.txt"), "--vocab_size", "400", *SMALL]
    other = init_model.main([*arguments, "--output_dir", str(tmp_path / "other"), "--seed", "1"])
    assert digests(other)["model.safetensors"] != same["model.safetensors"]
    assert digests(other)["tokenizer.json"] == same["tokenizer.json"]


def test_the_callers_random_state_is_left_alone(files, tmp_path):
    before = torch.get_rng_state()
    init_model.main(["--train_files", str(files / "plain.txt"), "--output_dir", str(tmp_path / "m"), *SMALL])
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_and_dropout(files, tmp_path):
    arguments = ["--train_files", str(files / "plain.txt"), "--output_dir", str(tmp_path / "m"), "--dropout", "0.25"]
    init_model.main([*arguments, "--intermediate_size", "48", *SMALL])
    config = json.loads((tmp_path / "m" / "config.json").read_text("utf-8"))
    expected = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    expected |= {"max_position_embeddings": 32, "hidden_dropout_prob": 0.25}
    assert {name: config[name] for name in expected} == expected


def test_overwrite(files, encoder, tmp_path):
    arguments = ["--train_files", str(files / "plain.txt"), "--output_dir", str(tmp_path / "m"), *SMALL]
    init_model.main(arguments)
    before = digests(tmp_path / "m")
    with pytest.raises(ValueError, match="not empty"):
        init_model.main([*arguments, "--seed", "1"])
    assert digests(tmp_path / "m") == before
    init_model.main([*arguments, "--seed", "1", "--overwrite"])
    assert digests(tmp_path / "m") != before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]  # nothing left beside it

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="something else than a model"):
        init_model.main([*arguments[:3], str(tmp_path / "notes"), "--overwrite", *SMALL])
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"


def test_a_failure_while_writing_leaves_nothing(files, tmp_path, monkeypatch):
    def full_disk(self, *args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.BertModel.save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        init_model.main(["--train_files", str(files / "plain.txt"), "--output_dir", str(tmp_path / "m"), *SMALL])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_files", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--train_files", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--train_files", "{files}/table.csv"], "--text_columns is missing.*sentence, label"),
        (["--train_files", "{files}/table.csv", "--text_columns", "text"], "no 'text' here, only sentence, label"),
        (["--train_files", "{files}/pairs.jsonl.gz", "--text_columns", "translation"], "such as translation.en"),
        (["--train_files", "{files}/pairs.jsonl.gz", "--text_columns", "translation.fr"], "no 'fr' here, only en, de"),
        (["--train_files", "{files}/words.json", "--text_columns", "id"], "row 1.*no text"),
        (["--train_files", "{bad}/broken.jsonl", "--text_columns", "a"], "line 2"),
        (["--train_files", "{bad}/blank.txt"], "no text"),
        (["--train_files", "{bad}/latin.txt"], "not UTF-8"),
        (["--train_files", "{bad}/text.pdf"], "format"),
        (["--train_files", "{files}/plain.txt", "--vocab_size", "270"], "--vocab_size 270 is too small"),
        (["--train_files", "{files}/plain.txt", "--hidden_size", "30", "--num_heads", "4"], "not a multiple"),
        (["--train_files", "{files}/plain.txt", "--dropout", "1.0"], "--dropout"),
        (["--train_files", "{files}/plain.txt", "--dropout", "nan"], "--dropout"),
        (["--train_files", "{files}/plain.txt", "--num_layers", "0"], "--num_layers must be at least 1"),
        (["--train_files", "{files}/plain.txt", "--max_length", "2"], "--max_length must be at least 4"),
        ([], "--architecture encoder needs text.*--train_files"),
        (["--architecture", "vision", "--train_files", "{files}/plain.txt"], "vision has no tokenizer"),
        (["--architecture", "vision", "--image_size", "30"], "--image_size 30 is not a multiple of --patch_size 16"),
        (["--architecture", "vision", "--patch_size", "0"], "--patch_size must be at least 1"),
        (["--architecture", "vision", "--num_channels", "2"], "--num_channels must be 1"),
        (["--train_files", "{files}/plain.txt", "--architecture", "recurrent"], "architecture"),
    ],
)
def test_user_errors_come_before_anything_is_written(files, tmp_path, arguments, message):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "broken.jsonl").write_text('{"a": "fine"}\n{"a": "fi\n')
    (bad / "blank.txt").write_text("\n \n")
    (bad / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (bad / "text.pdf").write_text("no")
    arguments = [argument.format(files=files, bad=bad) for argument in arguments]
    with pytest.raises(ValueError, match=message):
        init_model.main([*arguments, "--output_dir", str(tmp_path / "m")])
    assert not (tmp_path / "m").exists()


def test_command_line_error_is_one_line():
    command = [sys.executable, SCRIPT, "--train_files", "nowhere.txt", "--output_dir", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "error: nowhere.txt does not exist."
    assert "Traceback" not in done.stderr
