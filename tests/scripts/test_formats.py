"""Formats that people have beside csv and json: parallel texts, TMX, other delimiters, parquet and arrow."""

import datasets
import pytest
from pyarrow import feather, parquet

import run_glue
import run_translation
from finetuning.files import read_table
from support import script_data as made
from support.script_runs import arguments, classification, write_splits
from tasks.parallel_texts import read_translations

LANGUAGES = ("en", "de")
TMX = (
    '<?xml version="1.0" encoding="UTF-8"?><tmx version="1.4"><header srclang="en"/><body>'
    '<tu><tuv xml:lang="en-GB"><seg>the <b>film</b></seg></tuv><tuv xml:lang="de"><seg>der\nFilm</seg></tuv></tu>'
    '<tu><tuv xml:lang="de"><seg>gut</seg></tuv><tuv xml:lang="en-GB"><seg>good</seg></tuv></tu></body></tmx>'
)


def read(folder, *names, languages=LANGUAGES, **files):
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return read_translations([str(folder / name) for name in names], languages, None).to_dict()


def test_parallel_texts(tmp_path):
    expected = {"en": ["a b", "c"], "de": ["x", "y z"]}
    assert read(tmp_path, "p.en", "p.de", p__en="a b\r\nc\r\n", p__de="x\ny z") == expected
    assert read(tmp_path, "p") == expected  # Moses: the common beginning
    named = {"en_XX": expected["en"], "de_DE": expected["de"]}
    assert read(tmp_path, "p.en", "p.de", languages=("en_XX", "de_DE")) == named


@pytest.mark.parametrize(
    ("texts", "names", "words"),
    [
        (("a\nb\n", "x\n"), ("p.en", "p.de"), "p.en has 2 lines and .*p.de 1"),
        (("a\nb\nc\n", "x\n \nz\n"), ("p.en", "p.de"), "p.de, line 2: empty"),
        (("a\n", "x\n"), ("p.de", "p.en"), "order de, en.*order source, target"),
        (("", ""), ("p.en", "p.de"), "is empty"),
        (("a\n", "x\n"), ("p.en", "q.de"), "q.de does not exist"),
        (("a\n", "x\n"), ("q",), "q does not exist, and neither.*q.en.*q.de"),
        (("a\n", "x\n"), ("p.en", "p.de", "p.fr"), "got 3"),
    ],
)
def test_parallel_texts_that_do_not_fit(tmp_path, texts, names, words):
    with pytest.raises(ValueError, match=words):
        read(tmp_path, *names, p__en=texts[0], p__de=texts[1])


def test_tmx(tmp_path):
    assert read(tmp_path, "p.tmx", p__tmx=TMX) == {"en": ["the film", "good"], "de": ["der Film", "gut"]}
    with pytest.raises(ValueError, match=r"translation unit 1: the text in 'fr' is missing.*en-gb, de"):
        read(tmp_path, "p.tmx", languages=("en", "fr"))
    with pytest.raises(ValueError, match=r"unit 2: the text in 'de' is empty"):
        read(tmp_path, "p.tmx", p__tmx=TMX.replace("gut", " "))
    with pytest.raises(ValueError, match=r"line 2: malformed XML"):
        read(tmp_path, "p.tmx", p__tmx=TMX[:-20])
    with pytest.raises(ValueError, match="entities of its own"):
        read(tmp_path, "p.tmx", p__tmx='<!DOCTYPE t [<!ENTITY a "b">]>' + TMX)


def test_parallel_texts_train_as_rows_do(tmp_path, tmp_path_factory):
    model = made.make_seq2seq(tmp_path_factory.mktemp("seq2seq"))
    rows = [row["translation"] for row in made.translation_rows(12, 0)]
    for language in LANGUAGES:
        (tmp_path / f"p.{language}").write_text("".join(f"{row[language]}\n" for row in rows))
    file = made.write(tmp_path / "p.jsonl", [{"translation": row} for row in rows])
    prefix, losses = str(tmp_path / "p"), []
    pair = ["--train_file", f"{prefix}.en", f"{prefix}.de", "--validation_file", prefix, "--test_file", f"{prefix}.en"]
    more = ["--source_lang=en", "--target_lang=de", "--predict_with_generate", "--max_target_length=12"]
    for name, files, given in (("a", [file] * 3, []), ("b", [], pair)):
        (tmp_path / name).mkdir()
        losses.append(run_translation.main(arguments(tmp_path / name, files, model, *more, *given))["eval_loss"])
        assert len((tmp_path / name / "out" / "generated_predictions.txt").read_text().splitlines()) == 12
    assert losses[0] == losses[1]


# ---- Tables ----


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_delimiters(tmp_path, caplog, sign):
    (tmp_path / "a.csv").write_text(f"text{sign}label\na, b{sign}0\nc{sign}1\n")
    expected = [{"text": "a, b", "label": "0"}, {"text": "c", "label": "1"}]
    assert read_table(str(tmp_path / "a.csv")).to_list() == expected
    assert f"read as parted by {sign!r}" in caplog.text
    caplog.clear()
    assert read_table(str(tmp_path / "a.csv"), delimiter=sign).to_list() == expected and not caplog.text


def test_no_guess_where_there_is_a_comma_or_one_column(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("text;x,label\na;b,0\n")
    assert read_table(str(tmp_path / "a.csv")).to_list() == [{"text;x": "a;b", "label": "0"}]
    (tmp_path / "b.csv").write_text("text\nc; d\n")
    assert read_table(str(tmp_path / "b.csv")).to_list() == [{"text": "c; d"}] and not caplog.text


def test_delimiter_of_a_run(tmp_path, encoder):
    files = write_splits(tmp_path, classification("names"), "{split}.csv")
    for path in map(str, files):
        with open(path, encoding="utf-8") as file:
            text = file.read().replace(",", "~")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    assert "eval_accuracy" in run_glue.main(arguments(tmp_path, files, encoder, "--delimiter", "~"))
    with pytest.raises(ValueError, match="--delimiter must be one character"):
        run_glue.main(arguments(tmp_path / "b", files, encoder, "--delimiter", "~~"))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather", "datasets"])
def test_parquet_and_arrow(tmp_path, encoder, kind):
    rows = made.classification_rows("multi-label", 12, 0)
    file = str(tmp_path / f"a.{'arrow' if kind == 'datasets' else kind}")
    table = datasets.Dataset.from_list(rows)
    if kind == "parquet":
        parquet.write_table(table.data.table, file)
    elif kind == "datasets":
        table.save_to_disk(str(tmp_path / "set"))
        next((tmp_path / "set").glob("*.arrow")).rename(file)
    else:
        feather.write_feather(table.data.table, file, compression="uncompressed")
    assert read_table(file).to_list() == rows
    assert "eval_f1_micro" in run_glue.main(arguments(tmp_path, [file] * 3, encoder))
    with open(file, "rb+") as half:
        half.truncate(60)
    with pytest.raises(ValueError, match="is not complete"):
        read_table(file)
