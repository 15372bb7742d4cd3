"""ROUGE: the metric against counts made by hand and by brute force, and summaries end to end."""

import itertools
import json
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("evaluate", reason="hf_rdrop.metrics needs the scripts extra")

from transformers import EvalPrediction

import run_translation
from hf_rdrop.metrics import Rouge
from support import script_data as made
from tasks import translation


def f1(hits, predicted, expected):
    return 2 * hits / (predicted + expected) if hits else 0.0


def naive(prediction, reference):
    """ROUGE-1, -2 and -L of one pair of lists of words; the longest common subsequence by trying them all."""
    scores = []
    for n in (1, 2):
        a, b = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (prediction, reference))
        scores.append(f1((a & b).total(), a.total(), b.total()))
    parts = [{part for k in range(8) for part in itertools.combinations(w, k)} for w in (prediction, reference)]
    longest = max(map(len, parts[0] & parts[1]))
    return [*scores, f1(longest, len(prediction), len(reference))]


def test_scores_are_those_of_a_naive_count():
    draw = random.Random(0)
    texts = [[draw.choices("abcd", k=draw.randrange(1, 8)) for _ in range(30)] for _ in range(2)]
    expected = np.mean([naive(*pair) for pair in zip(*texts, strict=True)], axis=0)
    predictions, references = ([" ".join(words) for words in side] for side in texts)
    scores = Rouge().compute(predictions=predictions, references=references)
    assert list(scores) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert [scores[name] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx(list(expected))
    assert scores["rougeLsum"] == pytest.approx(scores["rougeL"])  # one line each


def test_by_hand():
    # 2 of 3 words and 1 of 2 pairs are among the reference's 4 words and 3 pairs.
    scores = Rouge().compute(predictions=["the cat sat"], references=["The cat lay down!"])
    assert scores == pytest.approx({"rouge1": 4 / 7, "rouge2": 2 / 5, "rougeL": 4 / 7, "rougeLsum": 4 / 7})
    # In order only "a b" or "c d" of five; line by line "a b" and "c d" of five.
    scores = Rouge().compute(predictions=["c d\na x b"], references=["a b\nc d e"])
    assert (scores["rouge1"], scores["rougeL"], scores["rougeLsum"]) == pytest.approx((0.8, 0.4, 0.8))


def test_stems_several_references_and_texts_without_words():
    pair = {"predictions": ["cats running"], "references": ["cat runs"]}
    assert Rouge().compute(**pair)["rouge1"] == 0 and Rouge().compute(**pair, use_stemmer=True)["rouge1"] == 1
    # Each score has its own best reference: all words of the first, in another order than in the second.
    scores = Rouge().compute(predictions=["a b c"], references=[["c b a", "a b x"]])
    assert scores == pytest.approx({"rouge1": 1, "rouge2": 0.5, "rougeL": 2 / 3, "rougeLsum": 2 / 3})
    for prediction, reference in (("", "a"), ("a", ""), ("", ""), ("...", "a"), ("猫", "猫")):
        assert set(Rouge().compute(predictions=[prediction], references=[reference]).values()) == {0.0}


def test_batches_and_the_global_generator():
    metric, state = Rouge(), np.random.get_state()[1].copy()
    metric.add_batch(predictions=["a b"], references=["a b"])
    metric.add(prediction="a", reference="b")
    assert metric.compute()["rouge1"] == 0.5
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([3], ["a"], "rouge: row 0 .*decode"),
        (["a"], [[]], "at least one reference"),
        (["a"], [None], "at least one reference"),
        (["a", "b"], ["a"], "2 predictions for 1 references"),
    ],
)
def test_bad_input(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        Rouge().compute(predictions=predictions, references=references)


# ---- In run_translation.py ----


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("One. Two! Three? four", ["One.", "Two!", "Three?", "four"]),
        (" A b .\nC d . \n\n E", ["A b .", "C d .", "E"]),
        ("3.5 metres, i.e.so", ["3.5 metres, i.e.so"]),
        ("", []),
    ],
)
def test_sentences(text, lines):
    assert translation.sentence_lines(text) == "\n".join(lines)


def test_lines_that_were_generated_are_sentences():
    """Sentences of both sides are matched one by one, wherever they stand."""
    texts = {0: "c d .\na x b", 1: "a b . c d e"}
    tokenizer = SimpleNamespace(pad_token_id=9, batch_decode=lambda ids, **_: [texts[row[0]] for row in ids])
    arguments = SimpleNamespace(target_lang=None, summary_column="summary")
    score = translation.score_against([texts[1]], tokenizer, arguments)
    found = score(EvalPrediction(np.array([[0]]), None))
    assert (found["rougeL"], found["rougeLsum"], found["gen_len"]) == pytest.approx((40, 80, 1))


def test_summaries_without_latin_letters_are_told(caplog):
    arguments = SimpleNamespace(target_lang=None, summary_column="summary")
    translation.score_against(["猫。", "犬。"], None, arguments)
    assert "ROUGE counts words of the letters a to z" in caplog.text


def test_summarisation(tmp_path):
    def rows(count, seed):
        texts = [text for text, _ in made.sentences(count, seed)]
        return [{"article": f"{text} . {text}", "highlights": " ".join(text.split()[:2])} for text in texts]

    model = made.make_seq2seq(tmp_path / "model")
    files = [made.write(tmp_path / f"{seed}.jsonl", rows(12, seed)) for seed in range(3)]
    data = [f"--{name}_file={file}" for name, file in zip(("train", "validation", "test"), files, strict=True)]
    columns = ["--text_column=article", "--summary_column=highlights", "--val_max_target_length=6", "--use_cpu"]
    steps = [
        "--do_train",
        "--do_eval",
        "--do_predict",
        "--predict_with_generate",
        "--max_steps=2",
        "--logging_steps=1",
    ]
    more = [f"--model_name_or_path={model}", f"--output_dir={tmp_path / 'out'}", "--rdrop_alpha=0.7"]
    found = run_translation.main([*data, *columns, *steps, *more, "--report_to=none"])
    names = {"rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf"}
    assert {f"{split}_{name}" for split in ("eval", "predict") for name in names} <= found.keys()
    written = (tmp_path / "out" / "generated_predictions.txt").read_text().splitlines()
    expected = [row["highlights"] for row in rows(12, 2)]
    again = Rouge().compute(predictions=written, references=expected, use_stemmer=True)
    for name in ("rouge1", "rouge2", "rougeL"):
        assert found[f"predict_{name}"] == pytest.approx(100 * again[name])
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any(line.get("kl_loss", 0) > 0 for line in log)
