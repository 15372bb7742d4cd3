"""families.py: a sample of the sweep, faults that it must find, hangs and crashes, going on, the table."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import families
from hf_rdrop.fused.head import FusedHead
from hf_rdrop.objective import batch_loss
from hf_rdrop.objective.heads import Head
from support.pages import CARDS_FOLDER, README
from surveying.checks import Record, check_pair
from surveying.children import run_each
from surveying.pairs import HEADS, Pair, all_pairs
from surveying.reference import scored_terms
from surveying.table import lines
from surveying.tiny_configs import VOCABULARY, tiny_config

# Forty pairs: every head, and the ways in which families differ (recurrence, mixtures of experts, several towers,
# heads that do not shift, relative positions, convolutions).
SAMPLE = {
    "sequence classification": ("bert", "deberta-v2", "gpt2", "llama", "t5", "jamba"),
    "token classification": ("roberta", "distilbert", "bloom"),
    "question answering": ("electra", "splinter", "bart"),
    "multiple choice": ("albert", "mpnet"),
    "masked LM": ("bert", "esm", "modernbert"),
    "causal LM": ("gpt_neox", "bart", "mixtral", "gemma2", "xlnet", "phimoe"),
    "seq2seq LM": ("marian", "m2m_100", "mt5"),
    "image-text-to-text": ("llava", "qwen2_vl"),
    "speech seq2seq": ("whisper", "speech_to_text"),
    "image classification": ("vit", "swin", "resnet"),
    "video classification": ("videomae",),
    "audio classification": ("wav2vec2", "audio-spectrogram-transformer"),
    "semantic segmentation": ("segformer",),
    "CTC": ("hubert",),
    "next sentence": ("bert",),
    "visual question answering": ("vilt",),
}
PAIRS = {(pair.head, pair.family): pair for pair in all_pairs()}


def tried(*pairs, jobs=1, limit=60.0):
    """Try pairs as the script does: records by (head, family)."""
    pairs = [PAIRS[pair] for pair in pairs]
    families.warm_up(pairs)
    return {(pair.head, pair.family): record for pair, record, _ in families.sweep(pairs, jobs=jobs, limit=limit)}


# ---- A sample of the sweep ----


def test_forty_pairs():
    sample = [(head, family) for head, names in SAMPLE.items() for family in names]
    assert len(sample) == 40
    found = tried(*sample, jobs=2)
    assert {
        pair: record["reasons"] for pair, record in found.items() if record["status"] not in ("right", "refused")
    } == {}
    right = [pair for pair, record in found.items() if record["status"] == "right"]
    assert len(right) >= 37
    for pair in right:
        values = found[pair]["values"]["rdrop"]
        assert values["kl"] == pytest.approx(values["reference kl"], rel=1e-3) and values["kl"] > 0


def test_every_head_is_read_from_a_mapping_of_transformers():
    assert {pair.head for pair in all_pairs()} == set(HEADS)
    assert len(all_pairs()) > 700


# ---- Faults are found ----

BERT, LM = ("sequence classification", "bert"), ("causal LM", "gpt2")


@pytest.mark.parametrize("pair", [BERT, LM])
def test_a_wrong_divergence_is_found(pair, monkeypatch):
    right = Head.divergence
    monkeypatch.setattr(Head, "divergence", lambda self, *a, **k: 1.01 * right(self, *a, **k))
    record = tried(pair)[pair]
    assert record["status"] == record["rdrop"] == "wrong"
    assert "kl_loss" in record["reasons"]["rdrop"]


def test_a_divergence_at_the_wrong_positions_is_found(monkeypatch):
    monkeypatch.setattr(batch_loss.Objective, "_predictions", unshifted(batch_loss.Objective._predictions))
    record = tried(LM)[LM]
    assert record["status"] == "wrong" and "kl_loss" in record["reasons"]["rdrop"]


def unshifted(right):
    def predictions(self, *args, **kwargs):
        layout, self.layout = self.layout, self.layout._replace(shifts_labels=False)
        try:
            return right(self, *args, **kwargs)
        finally:
            self.layout = layout

    return predictions


def test_a_wrong_gradient_of_the_fused_head_is_found(monkeypatch):
    right = FusedHead.loss

    def loss(self, *args, **kwargs):
        value, ce, kl = right(self, *args, **kwargs)
        return value + 0.1 * (value - value.detach()), ce, kl

    monkeypatch.setattr(FusedHead, "loss", loss)
    record = tried(LM)[LM]
    assert record["status"] == record["fused_head"] == "wrong" and record["rdrop"] == "right"
    assert "gradient" in record["reasons"]["fused_head"]


def test_a_loss_that_depends_on_accumulation_is_found(monkeypatch):
    monkeypatch.setattr("hf_rdrop.training.item_counts.ItemCounts.shares", lambda *a, **k: (0.25, 0.25))
    record = tried(BERT)[BERT]
    assert record["status"] == "wrong"


@pytest.mark.parametrize("error, status", [(TypeError("no such thing"), "error"), (ValueError("elsewhere"), "error")])
def test_an_error_that_is_no_refusal_of_ours_is_a_fault(error, status, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(batch_loss.Objective, "compared", fail)
    record = tried(BERT)[BERT]
    assert record["status"] == record["rdrop"] == status and str(error) in record["reasons"]["rdrop"]


def test_a_refusal_keeps_its_reason():
    record = tried(("object detection", "detr"), ("sequence classification", "gpt2"))
    assert record["sequence classification", "gpt2"]["status"] == "right"
    other = record["object detection", "detr"]
    assert other["status"] in ("refused", "not tried") and other["reasons"]


def test_the_reference_is_the_naive_sum():
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, 5), torch.tensor([[1, -100, 2], [0, 4, -100]])
    ce = kl = 0.0
    for b, t in ((0, 0), (0, 2), (1, 0), (1, 1)):
        p, q = (logits[row, t].double().softmax(-1) for row in (b, b + 2))
        ce -= (p[labels[b, t]].log() + q[labels[b, t]].log()) / 2
        kl += sum(pi * (pi / qi).log() + qi * (qi / pi).log() for pi, qi in zip(p, q, strict=True)) / 2
    found = scored_terms(logits, labels, False)
    assert found.ce == pytest.approx(float(ce)) and found.kl == pytest.approx(float(kl)) and found.items == 4


# ---- Children ----


def work(name):
    if name == "hang":
        time.sleep(60)
    if name == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "fail":
        raise RuntimeError
    return {"name": name, "size": "x" * 200_000}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_hang_and_a_crash_take_their_own_work_only(jobs):
    start = time.monotonic()
    found = {
        name: (answer, why)
        for name, answer, why, _ in run_each(["a", "hang", "crash", "fail", "b"], work, jobs=jobs, limit=1.0)
    }
    assert time.monotonic() - start < 20
    assert found["a"] == (work("a"), None) and found["b"] == (work("b"), None)
    assert found["hang"] == (None, "no end after 1 s")
    assert found["crash"] == (None, "the process ended with SIGKILL")
    assert found["fail"] == (None, "the process ended with 1")


def children_of_this_process():
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are read off Linux' /proc")
def test_a_sweep_that_is_given_up_leaves_no_process():
    before = children_of_this_process()
    runs = run_each(["a", "hang"], work, jobs=2, limit=60.0)
    assert next(runs)[0] == "a"
    assert children_of_this_process() > before
    runs.close()
    assert children_of_this_process() == before


# ---- Going on ----


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Pairs that are tried, one a line of a file: children cannot tell otherwise."""
    file = tmp_path / "tried"
    file.touch()

    def check(pair):
        with file.open("a") as lines_:
            lines_.write(pair.name + "\n")
        return Record(pair.head, pair.family, pair.model_class, rdrop="right", dropout="default")

    monkeypatch.setattr(families, "check_pair", check)
    return lambda: file.read_text().split("\n")[:-1]


def test_a_resumed_sweep_repeats_nothing(counted, tmp_path):
    line = ["--output_dir", str(tmp_path / "out"), "--heads", "next sentence", "--only"]
    assert families.main([*line, "bert"]) == 0
    assert counted() == ["next sentence/bert"]
    assert families.main([*line, "bert", "fnet"]) == 0
    assert counted() == ["next sentence/bert", "next sentence/fnet"]
    assert families.main([*line, "bert", "fnet"]) == 0
    assert len(counted()) == 2
    assert families.main([*line, "fnet", "--again"]) == 0
    assert counted()[2:] == ["next sentence/fnet"]
    survey = json.loads((tmp_path / "out" / "families.json").read_text())
    assert set(survey["pairs"]) == {"next sentence/bert", "next sentence/fnet"}
    assert "| bert | yes |" in (tmp_path / "out" / "README.md").read_text()


def test_faults_are_the_exit_status(monkeypatch, tmp_path):
    monkeypatch.setattr(families, "check_pair", lambda pair: Record(*pair, status="wrong", rdrop="wrong"))
    assert families.main(["--output_dir", str(tmp_path), "--heads", "next sentence", "--only", "bert"]) == 1


# ---- Tiny configurations and the table ----


def test_every_kind_of_layer_stays():
    config = tiny_config("qwen3_next")
    assert set(config.layer_types) == {"linear_attention", "full_attention"}
    assert config.num_hidden_layers == len(config.layer_types) <= 6


def test_tokens_of_a_composite_keep_their_meaning():
    config = tiny_config("qwen2_5_vl")
    ids = {config.image_token_id, config.video_token_id, config.vision_start_token_id}
    assert len(ids) == 3 and max(ids) < VOCABULARY == config.text_config.vocab_size


def test_a_family_that_cannot_be_built_is_named(monkeypatch):
    record = check_pair(Pair("causal LM", "bert", "NoSuchClass"))
    assert record.status == "not tried" and "NoSuchClass" in record.reasons["not tried"]


def test_the_table_names_what_is_wrong_and_what_is_refused():
    def record(family, **given):
        return vars(Record("masked LM", family, f"{family.title()}ForMaskedLM", **given))

    pairs = [
        record("a", rdrop="right", trunk="right", fused_head="right", dropout="default"),
        record("b", status="refused", rdrop="refused", dropout="none", reasons={"rdrop": "BForMaskedLM is odd"}),
        record("c", status="refused", rdrop="refused", dropout="none", reasons={"rdrop": "CForMaskedLM is odd"}),
        record(
            "d", status="wrong", rdrop="wrong", dropout="rdrop_dropout", reasons={"rdrop": "kl_loss: 1, right is 2"}
        ),
        record("e", status="not tried", reasons={"not tried": "no timm"}),
    ]
    survey = {"pairs": {r["family"]: r for r in pairs}, "transformers": "5", "torch": "2", "date": "d", "commit": "c"}
    found = "\n".join(lines(survey))
    assert "| a | yes | yes | yes | by default |" in found
    assert "| b | refused [1] |" in found and "| c | refused [1] |" in found and "1. the model is odd" in found
    assert "| d | **wrong** [2] |" in found and "| masked LM | e | no timm |" in found
    assert "Of 5 pairs of head and family 4 were tried" in found


# ---- The committed survey ----

SURVEY = json.loads((CARDS_FOLDER / "families" / "families.json").read_text("utf-8"))


def test_the_committed_table_is_that_of_its_figures():
    assert (CARDS_FOLDER / "families" / "README.md").read_text("utf-8") == "\n".join(lines(SURVEY)) + "\n"


def test_the_readme_says_what_was_found():
    assert {record["status"] for record in SURVEY["pairs"].values()} == {"right", "refused", "not tried"}
    text = " ".join(README.read_text("utf-8").split())
    assert f"transformers {SURVEY['transformers']} was trained with them on {SURVEY['date']}" in text
    newest = {record["versions"]["transformers"] for record in SURVEY["pairs"].values()}
    assert newest == {SURVEY["transformers"]} and len(SURVEY["pairs"]) > 700
