"""Text and cells of a card: paths that are private, Markdown that is escaped."""

import math

import pytest

from hf_rdrop.cards.markdown import inline, is_hub_id, number, public, table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/alice/x/model", "model"),
        (r"C:\Users\alice\model", "model"),
        ("~/models/tiny/", "tiny"),
        ("file:///home/alice/data.csv", "data.csv"),
        ("--data_dir=/home/alice/d and ../q/r", "--data_dir=d and r"),
        ("org/name", "org/name"),
        ("WMT14 en/de", "WMT14 en/de"),
        ("https://huggingface.co/org/name", "https://huggingface.co/org/name"),
        ("$DATA/sst2/train.jsonl.gz", "$DATA/sst2/train.jsonl.gz"),
    ],
)
def test_public(text, shown):
    assert public(text) == shown


def test_relative_folders_are_no_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "base").mkdir(parents=True)
    assert not is_hub_id("outputs/base") and public("outputs/base") == "base"
    assert is_hub_id("org/base") and not is_hub_id("") and not is_hub_id(None) and not is_hub_id("a b")


def test_cells():
    assert table(["a"], [[inline("x|y")]]).splitlines()[-1] == r"| x\|y |"
    assert [number(value) for value in (None, 3, 0.123456, 123456.7, math.inf, "a_b")] == [
        *("–", "3", "0.1235", "123457", "inf", "a_b")
    ]
