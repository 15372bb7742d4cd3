"""The pages' Python examples run as they stand, their commands name scripts and arguments that exist, their links lead
somewhere, and the figures of guides and reference pages are those of the committed files."""

import importlib
import json
import math
import re
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, default_data_collator

import benchmark as benchmark_script
import compare
import consistency
import families
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
from support import ROOT
from support.pages import (
    CARDS,
    CARDS_FOLDER,
    PAGES,
    README,
    REFERENCE,
    anchors,
    bash_lines,
    benchmark,
    blocks,
    commands,
    comparison,
    name,
    prose,
    row,
)
from support.training import make_model, make_rows

CONFIGURATIONS = sorted(REFERENCE.glob("*.yaml"))
SCRIPTS = {
    "run_clm.py": (run_clm.ModelArguments, run_clm.ClmArguments, run_clm.RDropTrainingArguments),
    "run_glue.py": (
        run_glue.ModelArguments,
        run_glue.GlueArguments,
        run_glue.UnlabeledArguments,
        run_glue.RDropTrainingArguments,
    ),
    "run_ner.py": (run_ner.ModelArguments, run_ner.NerArguments, run_ner.RDropTrainingArguments),
    "run_translation.py": (
        run_translation.ModelArguments,
        run_translation.TranslationArguments,
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
        run_image_classification.RDropTrainingArguments,
    ),
    "init_model.py": (init_model.InitModelArguments,),
    "benchmark.py": (benchmark_script.BenchmarkArguments,),
}
WORDS = ["[PAD]", "[UNK]", "[SEP]", *(f"w{i}" for i in range(37))]


# ---- Python ----


PYTHON = [
    pytest.param(block, id=f"{name(page)}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks("python", page))
    if page != README or number == 1  # test_readme.py runs the first example and the one to paste
]


def readers_names() -> dict[str, Any]:
    rows = make_rows("single", 8)
    return {
        **{public: getattr(hf_rdrop, public) for public in hf_rdrop.__all__},
        "model": make_model("single").train(),
        "tokenizer": None,
        "train_dataset": rows,
        "eval_dataset": rows,
        "inputs": {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "attention_mask")},
        "labels": torch.tensor([row["labels"] for row in rows]),
        "dataloader": DataLoader(rows, batch_size=4, collate_fn=default_data_collator),
    }


@pytest.mark.parametrize("block", PYTHON)
def test_python_examples(block, tmp_path, monkeypatch):
    if "from trl import" in block:
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    exec(block, readers_names())


def test_the_recipe_for_trl_trains(tmp_path):
    """With the default loss of every version that has an `nll`, and of no version of its own."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    (recipe,) = (block for block in blocks("python", CARDS_FOLDER / "guides/other-trainers.md") if "trl" in block)
    names: dict[str, Any] = {"__name__": __name__}
    exec(recipe, names)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
    args = names["RDropSFTConfig"](str(tmp_path), rdrop_dropout=0.3, max_steps=2, logging_steps=1, **quiet)
    trainer = names["RDropSFTTrainer"](
        model=LlamaForCausalLM(LlamaConfig(vocab_size=40, pad_token_id=0, eos_token_id=2, **sizes)),
        args=args,
        train_dataset=Dataset.from_dict({"text": [f"w{i} w{i + 1} w{i + 2}" for i in range(16)]}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[SEP]"),
    )
    trainer.train()
    assert [line["kl_loss"] > 0 for line in trainer.state.log_history if "kl_loss" in line] == [True, True]


# ---- Commands ----

MEASURES = ("benchmarking.startup", "benchmarking.floor")  # which have a parser of their own


def readers_machine(monkeypatch):
    """With a GPU, and the folders that the commands name."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    for variable in ("DATA", "ENCODER", "MODEL", "VIT"):
        monkeypatch.setenv(variable, variable.lower())


def check_arguments(script, arguments):
    parser = HfArgumentParser(SCRIPTS[script], allow_abbrev=False)
    *_, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    assert not unknown


def check_comparison(asked):
    runs = compare.plan(asked, choose(asked, plan_trials(asked), guess=True))
    arms = {run.arm for run in runs}
    assert "baseline" in arms and any(arm.startswith("rdrop") for arm in arms)
    for run in runs:
        check_arguments(run.script, [*run.arguments, "--output_dir", "x"])


@pytest.mark.parametrize(
    "command", [pytest.param(line, id=name(page)) for page in [*PAGES, *CARDS] for line in commands(page)]
)
def test_commands_parse(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_cards").symlink_to(CARDS_FOLDER)
    readers_machine(monkeypatch)
    _, script, *arguments = shlex.split(command)
    assert (ROOT / script).is_file()
    if f"{Path(script).parent.name}.{Path(script).stem}" in MEASURES:
        importlib.import_module(f"benchmarking.{Path(script).stem}").parse(arguments)
        return
    script = Path(script).name
    if script == "compare.py":
        asked = parse(arguments)
        if not asked.demo:
            check_comparison(asked)
        return
    if script == "families.py":
        families.parse(arguments)
        return
    if script in ("sweep.py", "consistency.py"):
        for model in re.findall(r"=(outputs/\S+)", command):
            Path(model).mkdir(parents=True)
            (Path(model) / "config.json").touch()
        args = {"sweep.py": sweep, "consistency.py": consistency}[script].parse(arguments)
        script, arguments = args.script, [*args.arguments, "--model_name_or_path=x", "--output_dir=x"]
    check_arguments(script, arguments)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_other_lines_of_bash(page):
    """Everything that is no call of a script is one of a few harmless things."""
    known = r"(pip install|python -m pytest|export \w+=|\w+=\"|for \w+ in|done$|#)"
    assert not [line for line in bash_lines(page) if "python scripts/" not in line and not re.match(known, line)]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_launch_lines_in_the_text(page, monkeypatch):
    readers_machine(monkeypatch)
    for line in re.findall(r"`((?:accelerate launch|torchrun) [^`]*scripts/[^`]*)`", page.read_text("utf-8")):
        launcher, _, rest = line.partition("scripts/run_")
        script, *arguments = shlex.split(rest)
        check_arguments(f"run_{script}", [*arguments, "--task_name=mrpc", "--model_name_or_path=x", "--output_dir=x"])
        for file in re.findall(r"--config_file (\S+)", launcher):
            assert "distributed_type" in yaml.safe_load((ROOT / file).read_text())


@pytest.mark.parametrize(
    "text",
    [*(block for page in PAGES for block in blocks("yaml", page)), *(path.read_text() for path in CONFIGURATIONS)],
)
def test_configurations_parse(text, tmp_path, monkeypatch):
    readers_machine(monkeypatch)
    (tmp_path / "comparison.yaml").write_text(text)
    check_comparison(parse(["--config", str(tmp_path / "comparison.yaml"), "--output_dir", "x"]))


# ---- Links ----


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_reference_folder_has_a_page():
    folders = {path.parent for path in REFERENCE.glob("*/comparison.json")}
    assert folders == {page.parent for page in REFERENCE.glob("*/README.md")}
    listed = (REFERENCE / "README.md").read_text("utf-8")
    assert all(f"({folder.name}/README.md)" in listed for folder in folders)


def test_there_is_something_to_test():
    assert len(PYTHON) >= 10 and sum(len(commands(page)) for page in PAGES) >= 30
    assert sum(len(blocks("yaml", page)) for page in PAGES) == 1 and CARDS and len(CONFIGURATIONS) >= 8


# ---- Figures ----


def numbers(value: Any) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict):
        yield from (number for item in value.values() for number in numbers(item))
    elif isinstance(value, list):
        yield from (number for item in value for number in numbers(item))
    elif isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value):
        yield float(value)


def measured(folder: str) -> set[float]:
    """The figures of a comparison: rows and averages, differences both ways round, means of other metrics."""
    found = comparison(folder)
    rows = [*found["rows"], *found["average"]]
    values = {number for found in rows for number in numbers({**found, "secondary": {}, "scores": {}})}
    for found in rows:
        others = [list(by_seed.values()) for by_seed in found["secondary"].values()]
        values |= {statistics.mean(by_seed) for by_seed in others if None not in by_seed}
    for path in (REFERENCE / folder).glob("consistency-*/consistency.json"):
        values |= set(numbers(json.loads(path.read_text())))
    return values


#: Beside the measured figures: settings, sizes, and what the paper and other parts of the page define.
SETTINGS = {0.0, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 1.0, 1.2, 1.3, 22.7}
FIGURES = {
    **{name(page): (page.parent.name,) for page in REFERENCE.glob("*/README.md")},
    "model_cards/guides/variants.md": ("variants", "unlabeled", "translation", "classification"),
}


@pytest.mark.parametrize("page", FIGURES)
def test_figures_of_reference_pages_and_variants(page):
    known = set().union(*(measured(folder) for folder in FIGURES[page]))
    text = prose(ROOT / page)
    figures = re.findall(r"(?<![\w.])[+-]?\d+\.\d+", text)
    assert figures

    def found(figure):
        digits, value = len(figure.partition(".")[2]), float(figure)
        if figure[0] in "+-":
            return any(f"{number:+.{digits}f}" == figure for number in known)
        return value in SETTINGS or any(f"{number:.{digits}f}" == figure for number in known)

    assert not [figure for figure in figures if not found(figure)]


VARIANTS = {
    "`symmetric_kl`": "rdrop",
    "`one_sided_kl`": "one-sided",
    "`jensen_shannon`": "jensen-shannon",
    "`squared_logits`": "squared-logits",
    "`squared_probabilities`": "squared-probabilities",
    "`hidden_states`": "hidden-states",
    "`info_nce`": "info-nce",
    "`rdrop_layer_drop=0.1`": "layer-drop",
    "`rdrop_insert_dropout=0.2`": "inserted-dropout",
    "`rdrop_alpha_schedule`": "alpha-ramp",
    "R-Drop": "rdrop",
    "control: plain training without dropout": "plain-without-dropout",
}


@pytest.mark.parametrize("option", VARIANTS)
def test_worth_of_each_variant(option):
    """The last four cells of its row are its gains over plain training."""
    page = (CARDS_FOLDER / "guides" / "variants.md").read_text("utf-8")
    line = next(line for line in page.splitlines() if line.startswith(f"| {option} |"))
    arm, cells = VARIANTS[option], []
    for task in ("sst2", "mrpc", "wnut17", "digits"):
        if any((row["task"], row["arm"]) == (task, arm) for row in comparison("variants")["rows"]):
            cells.append(f"{row('variants', task, arm)['differences']['baseline']['mean']:+.2f}")
        else:
            cells.append("–")
    assert line.endswith(f"| {' | '.join(cells)} |")


BENCHMARK_PAGE = CARDS_FOLDER / "benchmark" / "README.md"
OFFICIAL_LOW = "official, the logits' precision"
LLAMA_3 = {"vocab_size": 128_256, "key_value_width": 1024}
HEADS = ("sequence-classification", "token-classification", "translation", "causal-lm", "masked-lm")


def time_ratio(arms, arm, base):
    return statistics.median(a / b for a, b in zip(arms[arm]["seconds"], arms[base]["seconds"], strict=True))


def test_the_step_beside_the_doubled_batch():
    groups = {group["head"]: group["arms"] for group in benchmark("steps")["groups"] if group["section"] == "steps"}
    lines = BENCHMARK_PAGE.read_text("utf-8").splitlines()
    for arm, start in (("r-drop", "| R-Drop, full logits |"), ("r-drop + fused", "| R-Drop with the fused head")):
        cells = [f"{time_ratio(groups[h], arm, 'plain 2B'):.2f}" if arm in groups[h] else "–" for h in HEADS]
        (line,) = (line for line in lines if line.startswith(start))
        assert line.endswith(f"| {' | '.join(cells)} |")


def test_the_loss_stage():
    large = [group["arms"] for group in benchmark("loss")["groups"] if group["vocab"] >= 32_000]
    faster = min(time_ratio(arms, "official", "fused") for arms in large)
    less = min(arms["official"]["peak_bytes"] / arms["fused"]["peak_bytes"] for arms in large)
    text = " ".join(BENCHMARK_PAGE.read_text("utf-8").split())
    assert f"at least {faster:.2f}x faster than the official formula and needs {less:.2f}x less memory" in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_precision(dtype):
    found = [g for g in benchmark("precision")["groups"] if (g["classes"], g["dtype"]) == (1000, dtype)]
    errors = {group["target"]: group["errors"] for group in found}

    def percent(kl, formula):
        error = errors[kl][formula]["gradient"]
        return f"{error:.2%}" if error < 0.1 else f"{error:.0%}"

    pairs = [f"{percent(kl, OFFICIAL_LOW)} / {percent(kl, 'ours')}" for kl in (1, 1e-2, 1e-4, 1e-6)]
    (line,) = (line for line in BENCHMARK_PAGE.read_text("utf-8").splitlines() if line.startswith(f"| {dtype} logits"))
    assert line.endswith(f"| {' | '.join(pairs)} |")


@pytest.mark.parametrize(
    ("start", "sizes"),
    [
        ("| 7B", {"layers": 32, "width": 4096, "inner": 11008, "vocab_size": 32_000}),
        ("| 8B", {"layers": 32, "width": 4096, "inner": 14336, **LLAMA_3}),
        ("| 70B", {"layers": 80, "width": 8192, "inner": 28672, **LLAMA_3, "shards": 64}),
    ],
)
def test_costs_on_paper(start, sizes):
    from hf_rdrop.cost import decoder_shape, predict_cost

    shape, layers = decoder_shape(**sizes, length=2048, batch_size=4), sizes["layers"]
    settings = [{}, {"fused_head": True}]
    settings += [{"fused_head": True, "shared_layers": k} for k in (layers // 2, 3 * layers // 4, layers - 1)]
    settings += [{"fused_head": True, "interval": 2}]
    costs = [predict_cost(shape, **setting, gradient_checkpointing=True) for setting in settings]
    (line,) = (line for line in BENCHMARK_PAGE.read_text("utf-8").splitlines() if line.startswith(start))
    assert line.endswith("| " + " | ".join(f"{cost.time:.2f} / {cost.memory:.2f}" for cost in costs) + " |")
