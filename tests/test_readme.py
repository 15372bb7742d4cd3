"""The README's Python examples run as they stand, and its bash examples name scripts and arguments that exist."""

import re
import shlex
from pathlib import Path

import benchmark
import compare
import init_model
import pytest
import run_glue
import run_ner
import run_translation
import torch
from common import parse_arguments
from conftest import make_model, make_rows

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
SCRIPTS = {
    "run_glue.py": (run_glue.ModelArguments, run_glue.GlueArguments, run_glue.RDropTrainingArguments),
    "run_ner.py": (run_ner.ModelArguments, run_ner.NerArguments, run_ner.RDropTrainingArguments),
    "run_translation.py": (
        run_translation.ModelArguments,
        run_translation.TranslationArguments,
        run_translation.RDropSeq2SeqTrainingArguments,
    ),
    "init_model.py": (init_model.InitModelArguments,),
    "benchmark.py": (benchmark.BenchmarkArguments,),
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands():
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    for name, value in re.findall(r'^(\w+)="(.*)"$', text, flags=re.MULTILINE):
        text = text.replace(f"${name}", value)
    return [line for line in text.splitlines() if line.startswith("python scripts/")]


@pytest.mark.parametrize("block", blocks("python"))
def test_python_examples(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = make_rows("single", 8)
    names = {
        "model": make_model("single"),
        "tokenizer": None,
        "train_dataset": rows,
        "eval_dataset": rows,
        "inputs": {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask")},
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
    names["model"].train()
    exec(block, names)


@pytest.mark.parametrize("command", commands())
def test_bash_examples_parse(command):
    _, script, *arguments = shlex.split(command)
    script = Path(script).name
    if script == "compare.py":
        args = compare.parse(arguments)
        script, arguments = args.script, [*args.arguments, "--output_dir", "x"]
    parse_arguments(SCRIPTS[script], arguments, None)


def test_there_is_something_to_test():
    assert len(blocks("python")) >= 3 and len(commands()) >= 6
