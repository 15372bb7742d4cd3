"""The README: what a reader pastes runs, and every figure is that of the committed comparisons and benchmarks."""

import re
import resource
import statistics
import subprocess
import sys

import pytest
from huggingface_hub import HfApi

import init_model
from support import ROOT
from support.hub_server import Hub, run_program, use_hub
from support.pages import README, benchmark, blocks, comparison, prose, row

TEXT = README.read_text("utf-8")
FLAT = " ".join(TEXT.split())


def test_length():
    assert len(TEXT.splitlines()) <= 330


def test_the_gate_finds_one_test_command():
    """`.ci/run` reads it from here."""
    found = [line for line in TEXT.splitlines() if line.startswith("pip install ") and " pytest" in line]
    assert found == ['pip install -c constraints.txt -e ".[test]" && python -m pytest -m "not slow"']


PACKAGES = ("transformers", "torch", "accelerate")


@pytest.mark.parametrize("package", PACKAGES)
def test_versions(package):
    """What `constraints.txt` and `.ci/oldest.txt` pin, and what pyproject.toml allows."""
    pins = [(ROOT / file).read_text().splitlines() for file in ("constraints.txt", ".ci/oldest.txt")]
    newest, oldest = (
        next(line for line in lines if line.startswith(f"{package}=="))[len(package) + 2 :] for lines in pins
    )
    (line,) = (line for line in TEXT.splitlines() if line.startswith(f"| {package} |"))
    assert line.endswith(f"| {newest} | {oldest} |")
    lowest = line.split("|")[2].split()[0]
    assert f'"{package}>={lowest}' in (ROOT / "pyproject.toml").read_text()


def test_sentences_have_at_most_two_numbers():
    lines = [line for line in prose(README).splitlines() if not line.startswith(("|", "#", "!"))]
    paragraphs = re.split(r"\n\s*\n|\n(?=- )", "\n".join(lines))
    sentences = [s for part in paragraphs for s in re.split(r"(?<=[.!?:])\s+", " ".join(part.split()))]
    assert not [s for s in sentences if len(re.findall(r"(?<![\w-])\d[\d.,]*", s)) > 2]
    assert not [s for s in sentences if len(s.split()) > 32]


# ---- Examples ----


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
        program = blocks("python", README)[0]
        program += "\nassert trainer.state.epoch == 5 and trainer.evaluate()['eval_loss'] > 0\n"
        run_program(hub, tmp_path, program)


def test_the_example_to_try_within_a_minute(tmp_path):
    """Offline, in an empty folder, it prints both losses at every step, in under 20 seconds of processor time."""
    program = next(block for block in blocks("python", README) if "BertConfig" in block)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "'ce_loss'" in line]
    assert len(lines) == 3 and all(re.search(r"'kl_loss': '?0\.\d*[1-9]", line) for line in lines)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20


# ---- Results ----


def scores(folder, task, arm):
    """Scores by seed, from the runs themselves; of the average over tasks the mean of each seed's."""
    found = comparison(folder)
    tasks = found["averaged"] if task == "average" else [task]
    runs = [run for run in found["runs"] if run["arm"] == arm and run["task"] in tasks]
    metric = {row["task"]: row["metric"] for row in found["rows"]}
    by_seed: dict[int, list[float]] = {}
    for run in runs:
        by_seed.setdefault(run["seed"], []).append(_points(run["metrics"][metric[run["task"]]], metric[run["task"]]))
    return {seed: statistics.mean(values) for seed, values in by_seed.items() if len(values) == len(tasks)}


def _points(score, metric):
    """Accuracies, F1 and correlations are fractions in the runs, and points in reports; BLEU is in points."""
    return score if metric == "eval_bleu" else 100 * score


def gain(folder, task, arm):
    """Mean paired gain over plain training."""
    ours, plain = scores(folder, task, arm), scores(folder, task, "baseline")
    return statistics.mean(ours[seed] - plain[seed] for seed in ours.keys() & plain.keys())


def best_plain(folder, task):
    """The best setting of plain training on the task: its name, and its scores by seed."""
    arms = {run["arm"] for run in comparison(folder)["runs"] if run["arm"].startswith("baseline")} - {"baseline"}
    found = {arm: scores(folder, task, arm) for arm in arms}
    return max(
        ((arm, by_seed) for arm, by_seed in found.items() if by_seed),
        key=lambda item: statistics.mean(item[1].values()),
    )


RESULTS = {
    "Translation, Multi30k en-de": ("translation", "multi30k-60"),
    "Named entities, WNUT-17": ("classification", "wnut17"),
    "Average of SST-2, WNUT-17, CoLA and MRPC": ("classification", "average"),
    "SST-2, 2,000 rows, 20% of the labels wrong": ("robustness", "sst2-noise"),
}
CONTROLS = {
    "baseline-dropout": "dropout 0.2",
    "baseline-2x": "twice the epochs",
    "baseline-2x-dropout-2": "dropout 0.2 and twice the epochs",
}
PAPER = {"GLUE average, BERT-base": (82.85, 84.06), "IWSLT14 de-en, from scratch": (34.64, 37.25)}


def cells_of(start):
    (line,) = (line for line in TEXT.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


@pytest.mark.parametrize("start", RESULTS)
def test_results_table(start):
    folder, task = RESULTS[start]
    plain, ours = (scores(folder, task, arm) for arm in ("baseline", "rdrop"))
    assert plain.keys() == ours.keys()
    low, high = row(folder, task, "rdrop")["differences"]["baseline"]["interval"]
    arm, control = best_plain(folder, task)
    by_hand = [
        str(len(ours)),
        *(f"{statistics.mean(values.values()):.2f}" for values in (plain, ours)),
        f"{gain(folder, task, 'rdrop'):+.2f} [{low:+.2f}, {high:+.2f}]",
        f"{statistics.mean(control.values()):.2f}, {CONTROLS[arm]}",
    ]
    by_hand[-1] += {1: ", one seed", 2: ", two seeds"}.get(len(control), "")
    assert cells_of(start) == by_hand


@pytest.mark.parametrize("start", PAPER)
def test_results_of_the_paper(start):
    """Quoted from Liang et al. 2021, tables 1 and 2."""
    plain, ours = PAPER[start]
    assert cells_of(f"The paper: {start}")[1:4] == [f"{plain}", f"{ours}", f"{ours - plain:+.2f}"]


def step_ratios(head, arm):
    (group,) = (g for g in benchmark("steps")["groups"] if g["section"] == "steps" and g["head"] == head)
    ours, plain = group["arms"][arm], group["arms"]["plain B"]
    time = statistics.median(a / b for a, b in zip(ours["seconds"], plain["seconds"], strict=True))
    return time, ours["peak_bytes"] / plain["peak_bytes"]


HEADS = {
    "sequence classification": "sequence-classification",
    "token classification": "token-classification",
    "translation": "translation",
    "causal language model": "causal-lm",
    "masked language model": "masked-lm",
}


def as_it_comes(head):
    """The benchmark's name of R-Drop with the default fused head."""
    return "r-drop" if "classification" in head else "r-drop + fused"


@pytest.mark.parametrize("start", HEADS)
def test_cost_table(start):
    head = HEADS[start]
    arms = ("plain 2B", "two forwards", as_it_comes(head), "trunk 3L/4", "interval 2")
    pairs = ["{:.2f} / {:.2f}".format(*step_ratios(head, arm)) for arm in arms]
    assert f"| {start} | {' | '.join(pairs)} |" in TEXT


def statements():
    """What the text says of our runs, word for word, with the figures of the files."""
    translation = row("translation", "multi30k-60", "rdrop")["differences"]["baseline"]
    average = row("classification", "average", "rdrop")["differences"]["baseline"]
    times = [step_ratios(head, as_it_comes(head))[0] for head in HEADS.values()]
    more_dropout = gain("translation", "multi30k-60", "baseline-dropout")
    twice = statistics.mean(scores("classification", "wnut17", "rdrop-2x").values())
    longer = scores("translation", "multi30k-60", "baseline-2x-dropout-2")
    ours = scores("translation", "multi30k-60", "rdrop")
    count = {2: "two", 3: "three", 5: "five"}[len(longer)]
    beside = statistics.mean(ours[seed] for seed in longer)
    return [
        f"gained {translation['mean']:.2f} BLEU over plain training (p {translation['p_value']:.3f})",
        f"training with dropout 0.2 already gains {more_dropout:.2f}.",
        f"it reaches {statistics.mean(longer.values()):.2f} over {count} seeds, and R-Drop {beside:.2f} with the same "
        "seeds.",
        f"gained {average['mean']:.2f} points (p {average['p_value']:.3f})",
        f"same doubled batch without agreement gained {gain('classification', 'average', 'doubled'):.2f}.",
        f"Twice the epochs of plain training gained {gain('classification', 'average', 'baseline-2x'):.2f}.",
        f"A step costs {min(times):.1f} to {max(times):.1f} times a plain one",
        f"R-Drop reaches {twice:.2f} in the second row",
    ]


@pytest.mark.parametrize("statement", statements())
def test_statements(statement):
    assert statement in FLAT


#: Decimal numbers that are no results of ours: alphas, dropout rates, sizes in millions, versions, the licence's.
OTHERS = {"0.1", "0.2", "0.5", "0.6", "0.7", "1.0", "1.2", "22.7", "3.10", "3.11", "5.6", "2.7", "1.3", "2.0"}


def test_every_other_figure_is_a_setting_or_a_version():
    checked = " ".join([*statements(), *(line for line in TEXT.splitlines() if _is_checked_row(line))])
    figures = set(re.findall(r"\d+\.\d+", prose(README)))
    assert figures - OTHERS <= set(re.findall(r"\d+\.\d+", checked))


def _is_checked_row(line):
    starts = (*RESULTS, *(f"The paper: {start}" for start in PAPER), *HEADS, *PACKAGES)
    return line.startswith(tuple(f"| {start}" for start in starts))
