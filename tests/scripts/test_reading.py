"""What run_glue.py takes for text, label and classes: no guess in silence, and the same when it predicts."""

import json

import datasets
import pytest

import run_glue
import run_glue_no_trainer
from finetuning.columns import CODE, DATE, NUMBER, TEXT, WORD, find_text_columns, kind_of_column
from finetuning.label_kinds import infer_labels
from support import script_data as made
from support.script_runs import arguments

KNOWN = [["sentence1", "sentence2"], ["sentence"], ["text"]]


def rows_with(count=16, seed=0, **columns):
    """Sentences in `review`, 0 and 1 in `label`, and further columns: of each a function of the row's number."""
    return [
        {**{name: value(i) for name, value in columns.items()}, "review": text, "label": label}
        for i, (text, label) in enumerate(made.sentences(count, seed))
    ]


def train(folder, rows, model, *more, name="train.csv", script=run_glue):
    folder.mkdir(exist_ok=True)
    file = made.write(folder / name, rows)
    if script is run_glue_no_trainer:
        line = [f"--train_file={file}", f"--validation_file={file}", f"--model_name_or_path={model}"]
        return script.main([*line, f"--output_dir={folder / 'out'}", "--use_cpu", "--max_train_steps=1", *more])
    return script.main(arguments(folder, [file], model, "--max_steps", 1, *more, steps="do_train"))


def config_of(folder):
    return json.loads((folder / "out" / "config.json").read_text())


# ---- Text columns ----


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("a", ["12", "3.5", "-1e5", "$4.20", "12 kg", "5%"], NUMBER),
        ("a", ["2020-01-31", "1/2/2021", "3.4.2022 12:30"], DATE),
        ("a", ["March 3, 2020", "Mon 4 May 2020 10:30 PM UTC", "2020-01-31T10:00:00Z"], DATE),
        ("a", ["u17", "gj04", "a_b", "x@y.org", "https://x.org/a", "5f-3c", "case 12", "SW1A 1AA"], CODE),
        ("user_id", ["anna", "bob meier", "carl otto"], CODE),
        ("a", ["anna", "bob", "Otto-Karl"], WORD),
        ("a", ["very good", "bad", "12"], TEXT),
        ("a", ["\u597d\u7535\u5f71", "\u5f88\u5dee"], TEXT),
    ],
)
def test_kinds_of_columns(name, values, kind):
    assert kind_of_column(name, values) == kind


@pytest.mark.parametrize("script", [run_glue, run_glue_no_trainer])
def test_ids_dates_and_numbers_are_never_text(tmp_path, encoder, caplog, script):
    rows = rows_with(user=lambda i: f"u{i}", date=lambda i: f"2020-01-{i + 1:02}", stars=lambda i: str(i / 2))
    train(tmp_path, rows, encoder, script=script)
    assert caplog.text.count("Read as text: review; label: label; problem type: single_label_classification") == 1
    zeros = sum(row["label"] == 0 for row in rows)
    assert f"by class: 0 ({zeros}), 1 ({16 - zeros})" in caplog.text
    assert config_of(tmp_path)["data_reading"]["text_columns"] == ["review"]


@pytest.mark.parametrize(
    "columns",
    [
        {"title": lambda i: f"the film of {'abcdefghijklmnop'[i]}"},
        {"author": lambda i: made.LETTERS[i : i + 4]},
    ],
)
def test_more_than_one_reading_is_refused(tmp_path, encoder, columns):
    with pytest.raises(ValueError, match=r"unclear which columns.*review \(text\).*--text_columns"):
        train(tmp_path, rows_with(**columns), encoder)
    train(tmp_path, rows_with(**columns), encoder, "--text_columns", "review")


def test_no_column_of_text(tmp_path, encoder):
    rows = [{"day": f"2020-01-{i + 1:02}", "code": f"c{i}", "label": i % 2} for i in range(9)]
    with pytest.raises(ValueError, match=r"no column holds text: .*day \(dates\), code \(ids or codes\)"):
        train(tmp_path, rows, encoder)


def test_few_words_beside_the_text_are_categories():
    rows = datasets.Dataset.from_list([{"kind": ["news", "sport"][i % 2], "x": f"a film {i} here"} for i in range(9)])
    assert find_text_columns(rows, "train", KNOWN) == ["x"]
    assert find_text_columns(rows.rename_column("x", "text"), "train", KNOWN) == ["text"]


def test_the_model_predicts_from_the_columns_it_was_trained_on(tmp_path, encoder, caplog):
    train(tmp_path / "a", rows_with(title=lambda i: f"film {i} of mine"), encoder, "--text_columns", "review")
    test = [{"id": f"a strange id {i}", "title": "x y", "review": row["review"]} for i, row in enumerate(rows_with())]
    file = made.write(tmp_path / "test.csv", test)
    model = str(tmp_path / "a" / "out")
    caplog.clear()
    run_glue.main(arguments(tmp_path, ["", "", file], model, steps="do_predict"))
    assert "Read as text: review;" in caplog.text
    made.write(tmp_path / "test.csv", [{"id": f"u{i}", "text": "x y"} for i in range(5)])
    run_glue.main(arguments(tmp_path, ["", "", file], model, steps="do_predict"))
    assert "was trained on the text of review, which these data lack" in caplog.text


def test_one_of_two_columns_that_the_model_was_trained_on(tmp_path, encoder):
    train(tmp_path / "a", made.classification_rows("pairs", 8, 0), encoder)
    file = made.write(tmp_path / "test.csv", [{"sentence1": "a film", "other": "a book"}])
    with pytest.raises(ValueError, match=r"no column 'sentence2'.*--text_columns"):
        run_glue.main(arguments(tmp_path, ["", "", file], str(tmp_path / "a" / "out"), steps="do_predict"))


# ---- Labels ----


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl"])
@pytest.mark.parametrize("classes", [2, 3])
def test_whole_numbers_written_as_real_ones_are_classes(tmp_path, encoder, caplog, name, classes):
    rows = [{"text": row["review"], "label": float(i % classes)} for i, row in enumerate(rows_with())]
    train(tmp_path, rows, encoder, name=name)
    assert "whole numbers written as real ones (0.0): they are taken for classes" in caplog.text
    config = config_of(tmp_path)
    assert config["problem_type"] == "single_label_classification"
    assert config["id2label"] == {str(i): str(i) for i in range(classes)}
    (tmp_path / "eval").mkdir()
    again = arguments(tmp_path / "eval", ["", str(tmp_path / name)], str(tmp_path / "out"), steps="do_eval")
    assert "eval_accuracy" in run_glue.main(again)
    train(tmp_path / "numbers", rows, encoder, "--problem_type", "regression", name=name)
    assert config_of(tmp_path / "numbers")["problem_type"] == "regression"


def test_many_whole_numbers_may_be_quantities():
    with pytest.raises(ValueError, match=r"60 different whole numbers.*--problem_type"):
        infer_labels([f"{10 * i}.0" for i in range(60)], "price")
    assert infer_labels(["1.5", "2.0"], "price").problem_type == "regression"


@pytest.mark.parametrize(
    ("marker", "others"), [(-1, (0, 1, 2)), ("-", ("yes", "no", "maybe")), ("-1.0", ("0.0", "1.0"))]
)
def test_rows_without_a_gold_label(tmp_path, encoder, caplog, marker, others):
    rows = [{"text": row["review"], "label": others[i % len(others)]} for i, row in enumerate(rows_with())]
    rows[4]["label"] = rows[9]["label"] = marker
    with pytest.raises(ValueError, match=r"row 5 of the train data.*in 2 of 16 rows.*--missing_label drop"):
        train(tmp_path / "a", rows, encoder)
    train(tmp_path / "b", rows, encoder, "--missing_label", "drop")
    assert "train: 2 of 16 rows without a label are left out" in caplog.text
    assert len(config_of(tmp_path / "b").get("id2label", {0: "", 1: ""})) == len(others)
    train(tmp_path / "c", rows, encoder, "--missing_label", "class")
    assert len(config_of(tmp_path / "c")["id2label"]) == len(others) + 1


def test_minus_one_of_two_classes_is_a_class():
    assert infer_labels([-1, 1, 1, -1], "label", refuse_markers=True).names == ["-1", "1"]


@pytest.mark.parametrize("width", [2, 3])
def test_rows_of_zeros_and_ones_are_flags(tmp_path, encoder, width, monkeypatch):
    rows = [
        {"text": row["review"], "label": [int(j == i % width) for j in range(width)]}
        for i, row in enumerate(rows_with())
    ]
    seen = []
    tokenize = run_glue.tokenize
    monkeypatch.setattr(run_glue, "tokenize", lambda *given: seen.append(given[4]) or tokenize(*given))
    train(tmp_path, rows, encoder, name="train.jsonl")
    (tmp_path / "eval").mkdir()
    file = made.write(tmp_path / "eval.jsonl", rows)
    run_glue.main(arguments(tmp_path / "eval", ["", file], str(tmp_path / "out"), steps="do_eval"))
    assert seen == [[row["label"] for row in rows]] * 2
    assert config_of(tmp_path)["problem_type"] == "multi_label_classification"


def test_lists_of_class_numbers_stay_lists():
    labels = infer_labels([[0, 1], [1], []], "label")
    assert not labels.flags and labels.encode([1]) == [0.0, 1.0]


def test_lists_written_as_text_are_refused(tmp_path, encoder):
    rows = [{"text": row["review"], "label": "[0, 1]" if i % 2 else "[1, 0]"} for i, row in enumerate(rows_with())]
    with pytest.raises(ValueError, match=r"row 1 .*'\[1, 0\]' is a list written as text.*--label_columns"):
        train(tmp_path, rows, encoder)


def test_several_columns_of_labels(tmp_path, encoder, caplog):
    columns = {"rude": lambda i: i % 2, "spam": lambda i: int(i % 3 == 0), "other": lambda i: "x"}
    rows = [{n: v for n, v in row.items() if n != "label"} for row in rows_with(**columns)]
    train(tmp_path / "a", rows, encoder, "--label_columns", "spam", "rude")
    assert "label: spam, rude; problem type: multi_label_classification" in caplog.text
    assert "spam (6), rude (8)" in caplog.text
    assert config_of(tmp_path / "a")["id2label"] == {"0": "spam", "1": "rude"}
    for name, more in (
        ("b", []),
        ("c", ["--label_columns", "rude", "spam"]),
    ):  # as the model's own, or in another order
        (tmp_path / name).mkdir()
        model, files = str(tmp_path / "a" / "out"), ["", str(tmp_path / "a" / "train.csv"), made.write(
            tmp_path / "test.csv", [{"review": "a film"}])]  # fmt: skip
        caplog.clear()
        run_glue.main(arguments(tmp_path / name, files, model, *more, steps="do_eval do_predict"))
        assert "spam (6), rude (8)" in caplog.text

    rows[2]["rude"] = 2
    with pytest.raises(ValueError, match=r"row 3 of the train data: column 'rude' of --label_columns holds '2'"):
        train(tmp_path / "d", rows, encoder, "--label_columns", "spam", "rude")
    with pytest.raises(ValueError, match="no column 'spam '"):
        train(tmp_path / "d", rows, encoder, "--label_columns", "spam ", "rude")
    with pytest.raises(ValueError, match="--label_column, --task_name"):
        train(tmp_path / "d", rows, encoder, "--label_columns", "spam", "rude", "--label_column", "spam")


# ---- Columns that are not used ----


def test_only_the_columns_in_use_must_fit(tmp_path, encoder):
    for i, value in enumerate((lambda i: f"x{i}" if i % 2 else i, lambda i: [i] if i % 2 else {"a": i})):
        train(tmp_path / str(i), rows_with(other=value), encoder, name="train.jsonl")
    rows = rows_with()
    rows[3]["label"] = "x"
    for more in ([], ["--max_train_samples", "2"]):
        with pytest.raises(ValueError, match=r"train.jsonl, column 'label'.*row 4 'x'"):
            train(tmp_path / "label", rows, encoder, *more, name="train.jsonl")
    rows = rows_with(other=lambda i: 1)
    rows[3]["review"] = 5  # a column of texts that do not fit is not passed over
    with pytest.raises(ValueError, match=r"train.jsonl, column 'review'.*row 4 5"):
        train(tmp_path / "text", rows, encoder, name="train.jsonl")
