"""run_ner.py on files with a word and its tag on each line, and on tags of every scheme."""

import json

import numpy as np
import pytest
from transformers import EvalPrediction

import run_ner
from finetuning.labels import SINGLE, Labels
from support import script_data as made
from support.script_runs import arguments
from tasks import tagging
from tasks.column_files import read_words
from tasks.tag_schemes import PREFIX, SUFFIX, complete, find_shape, scheme_name, to_iob2

SENTENCES = [(["the", "film"], ["O", "O"]), (["anna", "saw", "rome"], ["B-x", "O", "B-y"])]


def read(folder, name, text, **options):
    file = folder / name
    file.write_text(text, encoding="utf-8", newline="")
    rows = read_words(str(file), "tokens", "ner_tags", **options)
    tags = list(rows["ner_tags"]) if "ner_tags" in rows.column_names else [None] * len(rows)
    return list(zip(rows["tokens"], tags, strict=True))


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("a.txt", "the O\nfilm O\n\nanna B-x\nsaw O\nrome B-y", {}),  # no blank line at the end
        ("a.conll", "the\tO\r\nfilm\tO\r\n\r\n\t\r\nanna\tB-x\r\nsaw\tO\r\nrome\tB-y\r\n\r\n\r\n", {}),
        (
            "eng.testa",
            "-DOCSTART- -X- -X- O\n\nthe DT I-NP O\nfilm NN I-NP O\n-DOCSTART- -X- -X- O\nanna N N B-x\nsaw V V O\n"
            "rome N N B-y\n",
            {},
        ),
        ("a.txt", "# id 1\nthe O\nfilm O\n\n# text = anna\nanna B-x\nsaw O\nrome B-y\n", {}),
        ("a.tsv", "#\thttp://x\n1\tthe\tO\tO\n2\tfilm\tO\tB-z\n\n1\tanna\tB-x\tO\n2\tsaw\tO\tO\n3\trome\tB-y\tO\n",
         {"positions": (2, 3)}),
        ("a.bio", "O\tthe\nO\tfilm\n\nB-x\tanna\nO\tsaw\nB-y\trome\n", {"positions": (-1, 1)}),
        ("a.csv", "Sentence #,Word,POS,Tag\ns1,the,D,O\n,film,N,O\ns2,anna,N,B-x\n,saw,V,O\n,rome,N,B-y\n", {}),
        ("a.csv", "doc,sent_id,token,label\na,0,the,O\na,0,film,O\nb,0,anna,B-x\nb,0,saw,O\nb,0,rome,B-y\n", {}),
        ("a.csv", "word;tag\nthe;O\nfilm;O\n;\nanna;B-x\nsaw;O\nrome;B-y\n", {}),
        ("a.tsv", "word\ttag\nthe\tO\nfilm\tO\n\nanna\tB-x\nsaw\tO\nrome\tB-y\n", {}),
        ("a.csv", "n,w,t\n1,the,O\n1,film,O\n2,anna,B-x\n2,saw,O\n2,rome,B-y\n", {"sentences": "n", "own": "wt"}),
    ],
)  # fmt: skip
def test_layouts(tmp_path, name, text, options):
    own = options.pop("own", None)
    if own:
        (tmp_path / name).write_text(text)
        rows = read_words(str(tmp_path / name), *own, **options)
        found = list(zip(rows["w"], rows["t"], strict=True))
    else:
        found = read(tmp_path, name, text, **options)
    assert found == SENTENCES


def test_signs_of_comments_may_be_words(tmp_path):
    found = read(tmp_path, "a.txt", "# O\n#film B-x\nthe O\n# a comment in words\n\n-DOCSTART- O\n\nof O\n")
    assert found == [(["#", "#film", "the"], ["O", "B-x", "O"]), (["of"], ["O"])]


def test_words_alone_have_no_tags(tmp_path):
    assert read(tmp_path, "a.txt", "the\nfilm\n\nanna\n") == [(["the", "film"], None), (["anna"], None)]


def test_task_chooses_the_column(tmp_path):
    text = "the DT B-NP O\nfilm NN I-NP B-x\n"
    assert [read(tmp_path, "a.txt", text, task=task)[0][1] for task in ("pos", "chunk", "ner")] == [
        ["DT", "NN"], ["B-NP", "I-NP"], ["O", "B-x"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "options", "words"),
    [
        ("a.txt", "the X O\nfilm X O\nrome B-y\n", {}, "line 3: 2 column.*most lines have 3"),
        (
            "a.tsv",
            "1\tthe\tO\n2\tfilm\tO\n",
            {},
            r"first of its 3 columns holds numbers.*1 \| the.*--column_positions",
        ),
        ("a.bio", "O\tthe\nB-x\tfilm\n", {}, "holds numbers or tags.*--column_positions"),
        ("a.txt", "the O\n", {"positions": (1, 3)}, "--column_positions 1 3.*has 2 columns"),
        ("a.csv", "word,tag\nthe,O\nfilm,O\n", {}, "nothing says where a sentence ends.*--sentence_column_name"),
        (
            "a.csv",
            "x,y,sent\nthe,O,1\n",
            {},
            "unclear which column holds the words; there are x, y.*--text_column_name",
        ),
        ("a.csv", "word,tag,sent\nthe,O,a\nfilm,O,b\nof,O,a\n", {}, "line 4: the sentence 'a' goes on after another"),
        ("a.csv", "word,tag,sent\nthe,O\n", {}, "line 2: 2 fields"),
        ("a.txt", "\n\n", {}, "is empty"),
    ],
)
def test_refused(tmp_path, name, text, options, words):
    with pytest.raises(ValueError, match=f"a\\.{name[2:]}.*{words}|{words}"):
        read(tmp_path, name, text, **options)


# ---- Schemes ----


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ([["I-x", "I-x", "B-x", "O", "I-y"]], "IOB1"),
        ([["O", "I-x"], ["I-y", "I-x"]], "IOB1"),
        ([["B-x", "I-x", "O", "I-y"]], "IOB2"),
        ([["B-x", "E-x", "S-y"]], "BIOES"),
        ([["B-x", "L-x", "U-y"]], "BILOU"),
    ],
)
def test_names_of_schemes(rows, name):
    assert scheme_name(rows, PREFIX) == name
    turned = [[tag if tag == "O" else f"{tag[2:]}-{tag[0]}" for tag in tags] for tags in rows]
    assert scheme_name(turned, find_shape({tag for tags in turned for tag in tags})) == name


def test_iob1_to_iob2():
    assert to_iob2(["I-x", "I-x", "B-x", "I-y", "O", "I-y"], PREFIX) == ["B-x", "I-x", "B-x", "B-y", "O", "B-y"]
    assert to_iob2(["x-I", "x-I", "O"], SUFFIX) == ["x-B", "x-I", "O"]


def test_types_of_single_words_get_the_other_tags():
    assert complete(["O", "B-x", "I-x", "B-y"]) == ["B-x", "B-y", "I-x", "I-y", "O"]
    assert set(complete(["O", "x-B", "x-L", "y-U"])) == {"O", *(f"{k}-{letter}" for k in "xy" for letter in "BLU")}
    with pytest.raises(ValueError, match="no scheme"):
        complete(["O", "B-x", "L-x", "S-x"])
    assert complete(["NOUN", "VERB"]) == ["NOUN", "VERB"]


def run(folder, model, files, *more):
    return run_ner.main(arguments(folder, files, model, *more))


def as_columns(path, rows, change=lambda tags: tags):
    sentences = [
        "".join(f"{w} X {t}\n" for w, t in zip(r["tokens"], change(r["ner_tags"]), strict=True)) for r in rows
    ]
    path.write_text("-DOCSTART- X O\n\n" + "\n".join(sentences).rstrip("\n"))
    return str(path)


def iob1(tags):
    before, found = "O", []
    for tag in tags:
        begins = tag[0] == "B" and before[2:] != tag[2:]
        found.append(f"I-{tag[2:]}" if begins else tag)
        before = tag
    return found


def test_column_files_train_as_rows_of_lists_do(tmp_path, encoder, caplog):
    data = [made.ner_rows(size, seed) for seed, size in enumerate((24, 12, 7))]
    lists = [made.write(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate(data)]
    columns = [as_columns(tmp_path / f"{i}.txt", rows, iob1) for i, rows in enumerate(data)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    expected, found = run(tmp_path / "a", encoder, lists), run(tmp_path / "b", encoder, columns)
    assert "Tags of the train data: scheme IOB1 -> IOB2." in caplog.text
    assert "0.txt: 24 sentences, word in column 1, tag in column 3 of 3" in caplog.text
    assert found["eval_loss"] == expected["eval_loss"] and found["predict_f1"] == expected["predict_f1"]
    texts = [(tmp_path / name / "out" / "predictions.txt").read_text() for name in "ab"]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("shape", ["{type}-{letter}", "{letter}-{type}"])
@pytest.mark.parametrize("single", [None, "U"])
def test_every_style_is_scored(tmp_path, encoder, shape, single):
    """Predictions that are the tags themselves have F1 1, and half of the spans right have F1 0.667."""

    def style(tags):
        found = []
        for i, tag in enumerate(tags):
            letter, kind = tag[0], tag[2:]
            if single and letter == "B" and tags[i + 1 : i + 2] != [f"I-{kind}"]:
                letter = single
            elif single and letter == "I":
                letter = "L"
            found.append("O" if tag == "O" else shape.format(letter=letter, type=kind))
        return found

    files = [
        made.write(
            tmp_path / f"{i}.jsonl", [{**row, "ner_tags": style(row["ner_tags"])} for row in made.ner_rows(9, i)]
        )
        for i in range(3)
    ]
    returned = run(tmp_path, encoder, files)
    assert {"eval_f1", "predict_f1"} <= returned.keys()
    names = list(json.loads((tmp_path / "out" / "config.json").read_text())["id2label"].values())
    labels, data_args = Labels(SINGLE, names), tagging.NerArguments(train_file="x")
    gold = np.array([[names.index(tag) for tag in style(["B-person", "B-person", "O"])]])
    half = gold.copy()
    half[0, 1] = names.index("O")
    for predictions, f1 in ((gold, 1.0), (half, 2 / 3)):
        scores = tagging.compute_metrics(EvalPrediction(predictions, gold), labels, data_args)
        assert scores["f1"] == pytest.approx(f1)


def test_tags_of_no_scheme_are_refused_before_training(tmp_path, encoder):
    rows = [{"tokens": ["a", "b", "c"], "ner_tags": ["B-x", "L-x", "S-x"]}] * 4
    with pytest.raises(ValueError, match=r"letters B, L, S .* no scheme"):
        run(tmp_path, encoder, [made.write(tmp_path / "a.jsonl", rows)] * 3)
    assert not (tmp_path / "out").exists()


def test_predictions_of_tags_with_blanks_can_be_read_back(tmp_path, encoder):
    names = {"B-person": "B-Person Name", "B-place": "B-Place Name", "I-place": "I-Place Name", "O": "O"}
    rows = [{**row, "ner_tags": [names[tag] for tag in row["ner_tags"]]} for row in made.ner_rows(12, 0)]
    run(tmp_path, encoder, [made.write(tmp_path / "a.jsonl", rows)] * 3)
    lines = (tmp_path / "out" / "predictions.txt").read_text().splitlines()
    assert [len(line.split("\t")) for line in lines] == [len(row["tokens"]) for row in rows]
    assert {tag for line in lines for tag in line.split("\t")} <= {*names.values(), "I-Person Name"}
    odd = [{"tokens": ["a", "b"], "ner_tags": ["B-x\ty", "O"]}]
    with pytest.raises(ValueError, match="holds a tab"):
        run(tmp_path / "odd", encoder, [made.write(tmp_path / "b.jsonl", odd)] * 3)
