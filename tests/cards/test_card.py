"""Model cards of every head: metadata, facts of the run, code that runs, and nothing of this machine."""

import json
import math
import re
import socket
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from PIL import Image
from transformers import (
    Trainer,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_rdrop.cards.card import PLOT
from hf_rdrop.cards.facts import dropout_rates
from support.cards import (
    DATA,
    MORE,
    SHORT,
    card,
    data_of,
    make_language_model,
    run,
    run_usage,
    section,
)
from support.training import HEADS, make_model, make_rows

# ---- Every head ----

OBJECTIVES = {
    "single": "(CE_1 + CE_2) / 2 + 1.5 * sKL(P_1, P_2)",
    "multi": "(BCE_1 + BCE_2) / 2 + 1.5 * sKL(P_1, P_2)",
    "regression": "(MSE_1 + MSE_2) / 2 + 1.5 * d(P_1, P_2)",
    "token": "(CE_1 + CE_2) / 2 + 1.5 * sKL(P_1, P_2)",
    "seq2seq": "(CE_1 + CE_2) / 2 + 1.5 * sKL(P_1, P_2)",
    "causal": "(CE_1 + CE_2) / 2 + 1.5 * sKL(P_1, P_2)",
    "masked": "(CE_1 + CE_2) / 2 + 1.5 * sKL(P_1, P_2)",
    **dict.fromkeys(MORE, "(CE_1 + CE_2) / 2 + 1.5 * sKL(P_1, P_2)"),
}
TASKS = {
    **{"token": "token-classification", "seq2seq": "text2text-generation", "causal": "text-generation"},
    **{"masked": "fill-mask", "question": "question-answering", "choice": "multiple-choice"},
    **{"image": "image-classification", "audio": "audio-classification"},
}
MEANS = {
    **{"multi": "the same rows and labels", "question": "the same answers (start and end)"},
    **dict.fromkeys(("token", "seq2seq", "causal", "masked"), "the same tokens"),
}


@pytest.mark.parametrize("head", [*HEADS, "causal", "masked", *MORE])
def test_every_head(head, tmp_path, capsys, monkeypatch):
    # (Where `transformers` asks for torchvision for Pillow's processors too: its oldest releases.)
    monkeypatch.setattr(transformers, "AutoImageProcessor", AutoImageProcessor)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 10), "red").save("image.png")
    trainer = run(tmp_path, head, rdrop_alpha=3.0)
    trainer.state.log_history[-1]["eval_accuracy"] = 0.25
    trainer.save_model()
    text = card(trainer, **DATA)
    assert OBJECTIVES[head] in section(text, "R-Drop")
    assert "0.1 (" in section(text, "R-Drop") and MEANS.get(head, "the same rows") in section(text, "R-Drop")
    data = data_of(trainer)
    (result,) = data.eval_results
    assert result.task_type == TASKS.get(head, "text-classification")
    assert (result.dataset_type, result.dataset_name, result.dataset_config) == ("glue", "GLUE MRPC", "mrpc")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.25)
    assert data.model_name == "model" and data.metrics == ["accuracy"] and data.library_name == "transformers"
    assert "r-drop" in data.tags and data.language in ("en", ["en"]) and data.datasets == ["glue"]
    assert "| accuracy | 0.25 |" in section(text, "Evaluation results")
    names, printed = run_usage(text, {"model": tmp_path / "model"}, capsys)
    assert printed.strip()
    assert type(names["model"]) is type(trainer.base_model)
    for ours, theirs in zip(names["model"].parameters(), trainer.base_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("head", ["single", "token", "causal", "seq2seq"])
def test_adapters(head, tmp_path, capsys):
    base = make_language_model("causal") if head == "causal" else make_model(head)
    base.save_pretrained(tmp_path / "secret" / "base")
    base = type(base).from_pretrained(tmp_path / "secret" / "base")
    task = {"single": TaskType.SEQ_CLS, "token": TaskType.TOKEN_CLS, "causal": TaskType.CAUSAL_LM}.get(head)
    targets = {"causal": ["c_attn"], "seq2seq": ["q_proj"]}.get(head, ["query"])
    model = get_peft_model(base, LoraConfig(task_type=task or TaskType.SEQ_2_SEQ_LM, r=2, target_modules=targets))
    trainer = run(tmp_path, head, model)
    first = card(trainer, tags="mine")
    trainer.save_model()  # PEFT rewrites the card's metadata and looks for its version in the body
    text = card(trainer, tags="mine")
    assert text == first
    data = data_of(trainer)
    assert data.library_name == "peft" and data.base_model is None
    assert {"lora", "mine", "r-drop", "generated_from_trainer"} <= set(data.tags)
    assert "secret" not in text
    names, printed = run_usage(text, {"model": tmp_path / "model", "base": tmp_path / "secret" / "base"}, capsys)
    assert isinstance(names["model"], PeftModel) and printed.strip()
    inputs = {key: torch.tensor([make_rows("single")[0][key]]) for key in ("input_ids", "attention_mask")}
    if head == "single":
        with torch.no_grad():
            torch.testing.assert_close(names["model"](**inputs).logits, trainer.model.eval()(**inputs).logits)


def test_names_of_classes_are_in_an_adapters_code(tmp_path, capsys):
    model = make_model("single")
    model.config.id2label, model.config.label2id = {0: "no", 1: 'a "b"', 2: "c|d"}, {"no": 0, 'a "b"': 1, "c|d": 2}
    model.save_pretrained(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["query"])
    trainer = run(tmp_path, "single", get_peft_model(base, lora))
    trainer.save_model()
    places = {"model": tmp_path / "model", "base": tmp_path / "base"}
    _, printed = run_usage(card(trainer), places, capsys)
    assert 'a "b"' in printed and "c|d" in printed


# ---- Metadata ----


def test_written_the_same_however_often(tmp_path):
    trainer, tags = run(tmp_path), ["mine", "r-drop"]
    first = card(trainer, tags=tags, comparison=SHORT / "comparison.json", **DATA)
    assert tags == ["mine", "r-drop"]
    assert card(trainer, tags=tags, comparison=SHORT / "comparison.json", **DATA) == first
    assert first.count("## R-Drop\n") == 1 and data_of(trainer).tags.count("r-drop") == 1
    # user tags of an earlier card stay, whatever form the new ones have
    assert "mine" in ModelCard(card(trainer)).data.tags
    assert {"mine", "other"} <= set(ModelCard(card(trainer, tags="other")).data.tags)
    assert ModelCard(card(trainer, "de", "mit", ["third"])).data.license == "mit"  # positional, as the base class


def test_a_baseline_is_not_tagged(tmp_path, pictures):
    trainer = run(tmp_path, rdrop_alpha=0.0)
    (tmp_path / "model" / "README.md").write_text("---\ntags: [r-drop, mine]\n---\n", "utf-8")
    text = card(trainer)
    assert "r-drop" not in data_of(trainer).tags and "mine" in data_of(trainer).tags
    assert "plain fine-tuning" in text and "sKL" not in text and not (tmp_path / "model" / PLOT).exists()


def test_without_a_step(tmp_path):
    trainer = run(tmp_path)
    trainer.state.global_step, trainer.state.log_history = 0, []
    text = card(trainer)
    assert "no training step" in text and "## Evaluation" not in text and "by epoch" not in text


def test_results_need_a_data_set_a_task_and_finite_scores(tmp_path):
    trainer = run(tmp_path)
    trainer.state.log_history[-1] |= {"eval_accuracy": math.nan, "eval_f1": 0.5, "eval_own|one": 1.0, "eval_bleu": "x"}
    card(trainer, **DATA)
    assert [result.metric_type for result in data_of(trainer).eval_results] == ["f1"]
    text = card(trainer)
    assert data_of(trainer).eval_results is None and "model-index" not in text
    assert "a data set that this card cannot name" in text
    assert data_of(trainer).metrics == ["f1"] and r"| own\|one | 1 |" in text
    card(trainer, dataset_tags=["glue", "imdb"], dataset=["GLUE", "IMDB"])  # which of them were they found on?
    assert data_of(trainer).eval_results is None and data_of(trainer).datasets == ["glue", "imdb"]


def test_data_sets_from_memory_have_no_name(tmp_path):
    datasets = pytest.importorskip("datasets")
    trainer = run(tmp_path)
    trainer.eval_dataset = datasets.Dataset.from_list(make_rows("single", 4))
    assert "data set that this card cannot name" in card(trainer) and data_of(trainer).datasets is None


def test_base_model_on_the_hub(tmp_path):
    trainer = run(tmp_path, hub_model_id="someone/rdrop-mrpc")
    trainer.model.config._name_or_path = "google-bert/bert-base-cased"
    text = card(trainer)
    assert data_of(trainer).base_model == "google-bert/bert-base-cased"
    assert "[google-bert/bert-base-cased](https://huggingface.co/google-bert/bert-base-cased), fine-tuned" in text
    assert 'name = "someone/rdrop-mrpc"' in text


@pytest.mark.parametrize(
    "name", ["a|b *c* [d](e) <f>", "--- : {x}", "ünïcode 模型", "'\"#&$`", "{{ 7 * 7 }}", "x\ny", "# title"]
)
def test_awkward_names(name, trained, monkeypatch):
    trainer = trained
    history = [*trained.state.log_history, {"step": 4, "eval_accuracy": 0.5, f"eval_{name}": 0.5}]
    monkeypatch.setattr(trained.state, "log_history", history)
    text = card(trainer, model_name=name, dataset=name, dataset_tags="glue", tags=[name])
    data = data_of(trainer)
    assert data.model_name == name and data.eval_results[0].dataset_name == name and name in data.tags
    assert len(re.findall(r"^# ", text, flags=re.MULTILINE)) == 1 and "49" not in section(text, "Evaluation results")
    rows = [line for line in section(text, "Evaluation results").splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    compile(re.search(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)[1], "card", "exec")


def test_nothing_of_this_machine(tmp_path, monkeypatch, pictures):
    home = tmp_path / "home" / "alice-of-this-machine"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "alice-of-this-machine")
    make_model("single").save_pretrained(home / "base")
    model = type(make_model("single")).from_pretrained(home / "base")
    trainer = run(home, model=model, hub_token="hf_verysecrettoken", optim_args=f"a={home}/optim")
    comparison = json.loads((SHORT / "comparison.json").read_text("utf-8"))
    for run_ in comparison["runs"]:
        run_["arguments"] += ["--train_file", f"{home}/train.csv"]
    given = {"tags": [f"base_model:adapter:{home}/base", f"{home}/tag"], "dataset_args": f"{home}/args"}
    for _ in range(2):
        text = card(
            trainer,
            model_name=f"{home}/model",
            finetuned_from=f"{home}/base",
            dataset=f"{home}/data.csv",
            dataset_tags=f"{home}/data.csv",
            comparison=(comparison, "mrpc"),
            **given,
        )
    for secret in ("alice", str(tmp_path), str(Path.cwd()), "hf_verysecrettoken", socket.gethostname() + "."):
        assert secret not in text
    assert "`base`" in text and "data.csv" in text and "# model\n" in text
    assert (home / "model" / PLOT).is_file()
    assert b"alice" not in (home / "model" / PLOT).read_bytes()


def test_broken_front_matter_is_refused(tmp_path):
    trainer = run(tmp_path)
    readme = tmp_path / "model" / "README.md"
    for broken in ("---\ntags: [a\n---\n", "---\n- a\n---\n"):
        readme.write_text(broken, "utf-8")
        with pytest.raises(ValueError, match="repair"):
            trainer.create_model_card()
        assert readme.read_text("utf-8") == broken


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    trainer = run(tmp_path)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert not (tmp_path / "model" / "README.md").exists()


def test_base_class_fails_halfway(tmp_path, monkeypatch):
    """The card that is there, and output_dir, survive whatever the base class does."""
    trainer = run(tmp_path)
    before = card(trainer)

    def fail(self, *args, **kwargs):
        Path(self.args.output_dir, "README.md").write_text("half", "utf-8")
        raise OSError("disk full")

    monkeypatch.setattr(Trainer, "create_model_card", fail)
    with pytest.raises(OSError, match="disk full"):
        trainer.create_model_card()
    assert (tmp_path / "model" / "README.md").read_text("utf-8") == before
    assert trainer.args.output_dir == str(tmp_path / "model")


def test_without_a_processor(tmp_path):
    for head, name in (("image", "image processor"), ("audio", "feature extractor"), ("choice", "tokenizer")):
        trainer = run(tmp_path / head, head, trainer_kwargs={"processing_class": None})
        text = card(trainer)
        assert f"No {name} was saved with the model" in text and "Processor" not in section(text, "How to use it")


def test_dropout_rates():
    model = make_model("single", 0.1)
    model.dropout.p = 0.3
    assert dropout_rates(model) == "0.3 (dropout modules: 1); 0.1 (dropout modules: 7)"
    assert dropout_rates(torch.nn.Linear(2, 2)) == ""
