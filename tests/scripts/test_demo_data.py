"""The demo corpora are what their docstring says."""

import json
import random
from collections import Counter

import pytest

pytest.importorskip("datasets", reason="the scripts need the scripts extra")

import demo_data
from demo import corpora
from demo.grammars import InventedLanguage, english_verb

HEADS = list(corpora.SIZES)
TYPES = {"PER", "LOC", "ORG"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return corpora.write_demo_data(tmp_path_factory.mktemp("demo"), seed=0)


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def source(row):
    return row.get("sentence") or " ".join(row.get("tokens", ())) or row["translation"]["en"]


def entities(tags):
    """(type or None, first, last) of every entity; fails on anything that is not IOB2."""
    found = []
    for place, tag in enumerate(tags):
        if tag == "O":
            continue
        prefix, kind = tag.split("-")
        assert prefix in "BI" and kind in TYPES
        if prefix == "I":
            assert found and found[-1] == [kind, found[-1][1], place - 1], f"{tag} continues nothing"
            found[-1][2] = place
        else:
            found.append([kind, place, place])
    return found


def test_same_seed_same_bytes(written, tmp_path):
    again = corpora.write_demo_data(tmp_path / "again", seed=0)
    other = corpora.write_demo_data(tmp_path / "other", seed=1)
    for head in HEADS:
        for split in ("train", "validation"):
            assert again[head][split].read_bytes() == written[head][split].read_bytes()
            assert other[head][split].read_bytes() != written[head][split].read_bytes()


def test_the_callers_random_state_is_left_alone():
    random.seed(0)
    before = random.getstate()
    corpora.corpus("ner", seed=0)
    assert random.getstate() == before


@pytest.mark.parametrize("head", HEADS)
def test_sizes_and_no_overlap(written, head):
    train, validation = ([source(row) for row in rows(written[head][split])] for split in ("train", "validation"))
    assert (len(train), len(validation)) == corpora.SIZES[head]
    assert not set(train) & set(validation)
    assert len(set(train)) == len(train)


@pytest.mark.parametrize("head", HEADS)
def test_validation_set_holds_no_noise(head):
    assert corpora.corpus(head, 0)["validation"] == corpora.corpus(head, 0, noise=False)["validation"]


@pytest.mark.parametrize("head", HEADS)
def test_most_words_are_rare(written, head):
    counts = Counter(word for row in rows(written[head]["train"]) for word in source(row).split())
    ordered = sorted(counts.values(), reverse=True)
    assert sum(ordered[: len(ordered) // 5]) > 0.6 * sum(ordered)  # a fifth of the words is most of the text
    assert ordered[-1] <= 5


def test_labels_are_balanced_and_flipped_at_the_stated_rate(written):
    train, clean = (
        rows(written["classification"]["train"]),
        corpora.corpus("classification", 0, noise=False)["train"],
    )
    assert [row["sentence"] for row in train] == [row["sentence"] for row in clean]
    flipped = sum(row["label"] != true["label"] for row, true in zip(train, clean, strict=True))
    assert flipped == corpora.NOISE["classification"] * len(train)
    for split in ("train", "validation"):
        labels = [row["label"] for row in rows(written["classification"][split])]
        assert 0.45 < sum(labels) / len(labels) < 0.55


def test_reviews_say_what_their_label_says():
    """Read back without the generator: the last word of a plain sentence, and whether it is denied."""
    good, bad = {"good", "great", "lovely"}, {"bad", "dull", "awful"}
    checked = 0
    for row in corpora.corpus("classification", 0, noise=False)["train"]:
        text = row["sentence"]
        if any(word in text.split() for word in ("but", "although", ",", "and")):
            continue
        word = text.split()[-2]
        if word in good | bad:
            denied = any(denial in text for denial in (" not ", " never ", " hardly ", " anything but ", " far from "))
            assert row["label"] == int((word in good) != denied), text
            checked += 1
    assert checked > 50


def test_tags_are_iob2_and_balanced(written):
    for split in ("train", "validation"):
        kinds = Counter()
        for row in rows(written["ner"][split]):
            assert len(row["tokens"]) == len(row["ner_tags"])
            kinds.update(kind for kind, _, _ in entities(row["ner_tags"]))
        assert set(kinds) == TYPES
        assert max(kinds.values()) < 2 * min(kinds.values())


def test_entities_are_spoilt_at_the_stated_rate(written):
    train, clean = rows(written["ner"]["train"]), corpora.corpus("ner", 0, noise=False)["train"]
    total = wrong = 0
    for row, true in zip(train, clean, strict=True):
        assert row["tokens"] == true["tokens"]
        for entity in entities(true["ner_tags"]):
            total += 1
            wrong += entity not in entities(row["ner_tags"])
    assert wrong == round(corpora.NOISE["ner"] * total)


def test_validation_has_names_that_training_lacks(written):
    names = [
        {
            word
            for row in rows(written["ner"][split])
            for word, tag in zip(row["tokens"], row["ner_tags"], strict=True)
            if tag != "O"
        }
        for split in ("train", "validation")
    ]
    assert len(names[1] - names[0]) > 20
    assert len(names[1] & names[0]) > 20


def test_translations_are_wrong_at_the_stated_rate(written):
    train, clean = rows(written["translation"]["train"]), corpora.corpus("translation", 0, noise=False)["train"]
    pairs = [(row["translation"], true["translation"]) for row, true in zip(train, clean, strict=True)]
    assert all(row["en"] == true["en"] for row, true in pairs)
    wrong = [(row["xx"].split(), true["xx"].split()) for row, true in pairs if row["xx"] != true["xx"]]
    assert len(wrong) == corpora.NOISE["translation"] * len(train)
    assert all(sum(a != b for a, b in zip(row, true, strict=True)) == 1 for row, true in wrong)


def test_the_invented_grammar():
    language = InventedLanguage(random.Random(0))
    language.words.update(dog="hun", old="gam", see="vid")
    language.feminine = {"dog"}
    assert language.noun_phrase("dog", "old", plural=True, case="k") == "hunik gamaik"
    language.feminine = set()
    assert language.noun_phrase("dog", "old", plural=False, case="") == "hun gamo"
    assert language.verb("see", past=True, negated=True, plural=False) == "nevidtam"
    assert english_verb("see", past=True, negated=False, plural=False) == "saw"
    assert english_verb("teach", past=False, negated=False, plural=False) == "teaches"
    assert english_verb("call", past=False, negated=True, plural=True) == "do not call"


def test_command_line(written, tmp_path, capsys):
    demo_data.main(["--output_dir", str(tmp_path / "new"), "--seed", "0"])
    for head in HEADS:
        path = tmp_path / "new" / head / "train.jsonl"
        assert path.read_bytes() == written[head]["train"].read_bytes()
        assert str(path) in capsys.readouterr().out or head != HEADS[0]
