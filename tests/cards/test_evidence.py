"""Comparisons and measured consistency on a card; files that are broken are refused."""

import json
from pathlib import Path

import pytest

from hf_rdrop import Consistency
from hf_rdrop.cards.evidence import read_comparison, read_consistency
from hf_rdrop.consistency import Score
from support.cards import (
    DATA,
    SHORT,
    card,
    section,
)


def test_comparison(trained):
    trainer = trained
    text = section(
        card(trainer, comparison=str(SHORT / "comparison.json"), **DATA), "Comparison with plain fine-tuning"
    )
    assert "not of this model" in text and "`mrpc`" in text
    # the figures of the report beside it
    assert "| rdrop | 3 | 76.63 ± 0.37 | +0.25 [-1.23, +1.72] | 1.81x | 1.53x |" in text
    assert "| baseline | 3 | 76.39 ± 1.11 | – | 1.00x | 1.00x |" in text and "75%" in text
    report = (SHORT / "comparison.md").read_text("utf-8")
    assert "76.63 ± 0.37" in report and "+0.25 [-1.23, +1.72]" in report


def test_which_task_of_a_comparison():
    found = json.loads((SHORT / "comparison.json").read_text("utf-8"))
    assert read_comparison(found, ["rdrop-CoLA"])["task"] == "cola"
    assert read_comparison((found, "sst2"), ["cola"])["task"] == "sst2"
    assert read_comparison({"rows": [row for row in found["rows"] if row["task"] == "mrpc"]})["task"] == "mrpc"
    assert read_comparison(None) is None
    for names in ((), ("qqp",), ("cola", "sst2")):
        with pytest.raises(ValueError, match="sst2, mrpc, cola"):
            read_comparison(found, names)
    with pytest.raises(ValueError, match="no task 'qqp'"):
        read_comparison((found, "qqp"))
    assert read_comparison({"rows": [{**found["rows"][0], "differences": {}}]})["coverage"] == "75"
    of_a_loss = [{**row, "lower_is_better": True} for row in found["rows"] if row["task"] == "mrpc"]
    assert "lower is better | gain over baseline" in read_comparison({"rows": of_a_loss})["table"]


def make_consistency(score=0.75):
    scores = {"loss": Score(0.5, (0.6, 0.8), (0.6, 0.55)), "accuracy": Score(score, (0.5, 0.75), (0.5, 0.75))}
    return Consistency(2, 8, scores, 0.25, 0.125, (0.1, 0.0625))


def test_consistency(tmp_path, trained):
    trainer = trained
    found = make_consistency()
    (tmp_path / "consistency.json").write_text(json.dumps({"validation": found.to_dict()}), "utf-8")
    first = card(trainer, consistency=found)
    for source in (found.to_dict(), {"validation": found.to_dict()}, tmp_path / "consistency.json"):
        assert card(trainer, consistency=source) == first
    text = section(first, "Is dropout off what the ensemble of sub-models would be?")
    assert "| loss | 0.5000 | 0.7000 ± 0.1414 | 0.5500 |" in text
    assert "| 8 | 2 | 0.25 | 0.125 | 0.0625 |" in text and "nats" in text
    several = {"models": {"base": {"validation": found.to_dict()}, "r|d": {"validation": found.to_dict()}}}
    text = section(card(trainer, consistency=several), "Is dropout off what the ensemble of sub-models would be?")
    assert "| base | loss |" in text and r"| r\|d | accuracy |" in text and "not about all" in text
    two = read_consistency({"matched": found.to_dict(), "mismatched": found.to_dict()})
    assert "| mismatched | loss |" in two["scores"] and not two["several_models"]


BROKEN = ("{", "[1]", "{}", '{"rows": []}', '{"rows": [{"task": "a"}]}', '{"a": {"scores": 1}}', '{"a": 1}')


@pytest.mark.parametrize("read", [read_comparison, read_consistency])
@pytest.mark.parametrize("content", [None, 3, *BROKEN])
def test_broken_evidence(read, content, tmp_path):
    source = tmp_path / "evidence.json"
    if isinstance(content, str):
        source.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=r": give |: finish it"):
        read(3 if content == 3 else source)


@pytest.mark.parametrize("argument", ["comparison", "consistency"])
def test_broken_evidence_is_refused_before_anything_is_written(argument, trained, tmp_path):
    before = card(trained)
    with pytest.raises(ValueError, match="cannot be read"):
        trained.create_model_card(**{argument: tmp_path / "none.json"})
    assert (Path(trained.args.output_dir) / "README.md").read_text("utf-8") == before
