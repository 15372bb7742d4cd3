"""The README's Python examples run as they stand, and its bash examples name scripts and arguments that exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from transformers import default_data_collator

import benchmark
import compare
import consistency
import hf_rdrop
import init_model
import run_clm
import run_contrastive
import run_glue
import run_image_classification
import run_ner
import run_translation
import sweep
from comparison.config import parse
from comparison.tuning import choose, plan_trials
from finetuning.run import parse_arguments
from finetuning.trainer import ReportArguments
from support import ROOT
from support.hub_server import Hub, run_program, use_hub
from support.training import make_model, make_rows

README = (ROOT / "README.md").read_text("utf-8")
CONFIGURATIONS = sorted((ROOT / "model_cards" / "reference").glob("*.yaml"))
CARDS = sorted((ROOT / "model_cards" / "reference").rglob("cards/*.md"))
METHOD_CARD = (ROOT / "model_cards" / "r-drop.md").read_text("utf-8")
SCRIPTS = {
    "run_clm.py": (run_clm.ModelArguments, run_clm.ClmArguments, ReportArguments, run_clm.RDropTrainingArguments),
    "run_glue.py": (
        run_glue.ModelArguments,
        run_glue.GlueArguments,
        run_glue.UnlabeledArguments,
        ReportArguments,
        run_glue.RDropTrainingArguments,
    ),
    "run_ner.py": (run_ner.ModelArguments, run_ner.NerArguments, ReportArguments, run_ner.RDropTrainingArguments),
    "run_translation.py": (
        run_translation.ModelArguments,
        run_translation.TranslationArguments,
        ReportArguments,
        run_translation.RDropSeq2SeqTrainingArguments,
    ),
    "run_contrastive.py": (
        run_contrastive.ModelArguments,
        run_contrastive.ContrastiveArguments,
        run_contrastive.ContrastiveTrainingArguments,
    ),
    "run_image_classification.py": (
        run_image_classification.ImageModelArguments,
        run_image_classification.ImageArguments,
        ReportArguments,
        run_image_classification.RDropTrainingArguments,
    ),
    "init_model.py": (init_model.InitModelArguments,),
    "benchmark.py": (benchmark.BenchmarkArguments,),
}


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(page=README):
    text = "\n".join(blocks("bash", page)).replace("\\\n", " ")
    for name, value in re.findall(r'^(\w+)="(.*)"$', text, flags=re.MULTILINE):
        text = text.replace(f"${name}", value)
    return [line for line in text.splitlines() if line.startswith("python scripts/")]


def test_the_first_example_as_it_is_pasted(tmp_path, monkeypatch):
    """With a tiny BERT and eight sentence pairs under the names that it loads from the Hub."""
    pairs = "".join(
        f'{{"sentence1": "a red bird", "sentence2": "a bird {i}", "label": {i % 2}, "idx": {i}}}\n' for i in range(8)
    )
    (tmp_path / "text.txt").write_text("a red bird sings 0 1 2 3 4 5 6 7\n" * 4)
    init_model.main(
        f"--train_files {tmp_path}/text.txt --vocab_size 300 --hidden_size 16 --num_layers 1 --num_heads 2 "
        f"--output_dir {tmp_path}/bert".split()
    )
    card = "---\nconfigs:\n- config_name: mrpc\n  data_files:\n"
    card += "".join(f"  - split: {split}\n    path: mrpc/{split}.jsonl\n" for split in ("train", "validation"))
    with Hub() as hub:
        use_hub(hub, tmp_path / "home", monkeypatch)
        api = HfApi(endpoint=hub.url, token=hub.token)
        hub.user, model = "google-bert", "google-bert/bert-base-cased"
        api.create_repo(model)
        api.upload_folder(repo_id=model, folder_path=tmp_path / "bert")
        hub.user, data = "nyu-mll", "nyu-mll/glue"
        api.create_repo(data, repo_type="dataset")
        files = {"README.md": f"{card}---\n", "mrpc/train.jsonl": pairs, "mrpc/validation.jsonl": pairs}
        for name, text in files.items():
            api.upload_file(path_or_fileobj=text.encode(), path_in_repo=name, repo_id=data, repo_type="dataset")
        program = blocks("python")[0] + "\nassert trainer.state.epoch == 5 and trainer.evaluate()['eval_loss'] > 0\n"
        run_program(hub, tmp_path, program)


@pytest.mark.parametrize("block", [*blocks("python")[1:], *blocks("python", METHOD_CARD)])
def test_python_examples(block, tmp_path, monkeypatch):
    if "from trl import" in block:
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    rows = make_rows("single", 8)
    names: dict[str, Any] = {
        **{name: getattr(hf_rdrop, name) for name in hf_rdrop.__all__},
        "model": make_model("single"),
        "tokenizer": None,
        "train_dataset": rows,
        "eval_dataset": rows,
        "inputs": {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask")},
        "labels": torch.tensor([row["labels"] for row in rows]),
        "dataloader": DataLoader(rows, batch_size=4, collate_fn=default_data_collator),
    }
    names["model"].train()
    exec(block, names)


def readers_machine(monkeypatch):
    """With a GPU, and the folders that the commands name."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    for name in ("DATA", "ENCODER", "MODEL", "VIT"):
        monkeypatch.setenv(name, name.lower())


def check_comparison(comparison):
    runs = compare.plan(comparison, choose(comparison, plan_trials(comparison), guess=True))
    arms = {run.arm for run in runs}
    assert "baseline" in arms and any(arm.startswith("rdrop") for arm in arms)
    for run in runs:
        parse_arguments(SCRIPTS[run.script], [*run.arguments, "--output_dir", "x"], None)


@pytest.mark.parametrize(
    "command", [*commands(), *(command for card in CARDS for command in commands(card.read_text("utf-8")))]
)
def test_bash_examples_parse(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    readers_machine(monkeypatch)
    _, script, *arguments = shlex.split(command)
    script = Path(script).name
    if script == "compare.py":
        check_comparison(parse(arguments))
        return
    if script in ("sweep.py", "consistency.py"):
        for model in re.findall(r"=(outputs/\S+)", command):
            Path(model).mkdir(parents=True)
            (Path(model) / "config.json").touch()
        args = {"sweep.py": sweep, "consistency.py": consistency}[script].parse(arguments)
        script, arguments = args.script, [*args.arguments, "--model_name_or_path=x", "--output_dir=x"]
    parse_arguments(SCRIPTS[script], arguments, None)


@pytest.mark.parametrize("block", [*blocks("yaml"), *(path.read_text("utf-8") for path in CONFIGURATIONS)])
def test_configurations_parse(block, tmp_path, monkeypatch):
    readers_machine(monkeypatch)
    (tmp_path / "comparison.yaml").write_text(block)
    check_comparison(parse(["--config", str(tmp_path / "comparison.yaml"), "--output_dir", "x"]))


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "model_cards" / "r-drop.md", *CARDS], ids=str)
def test_pictures_and_links_to_files_lead_somewhere(page):
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text("utf-8")) if "://" not in target]
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_links_within_the_readme_lead_to_headings():
    headings = re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    targets = set(re.findall(r"\]\(#([^)]+)\)", README))
    assert len(targets) > 10 and targets <= anchors


def test_there_is_something_to_test():
    assert len(blocks("python")) >= 3 and len(commands()) >= 6 and len(blocks("yaml")) == 1
    assert len(blocks("python", METHOD_CARD)) == 3 and CARDS and len(CONFIGURATIONS) >= 8
