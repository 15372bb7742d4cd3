"""Cards of reference runs: figures and words that follow from a comparison.json alone, and nothing of this machine."""

import json
import re
import shlex

import pytest
from huggingface_hub import ModelCard

import reference_cards
import run_glue
from comparison.card_words import in_words
from comparison.cards import options_of
from comparison.config import parse as parse_comparison
from comparison.figures import make_report
from comparison.report import as_json
from finetuning.run import parse_arguments
from support import ROOT
from support.comparison_data import ARMS, METRICS, make_choices, make_run, make_runs

REFERENCE = ROOT / "model_cards" / "reference"
SHORT = REFERENCE / "short" / "comparison.json"


def write_comparison(folder, runs=None, **changes):
    """A comparison.json of made-up runs."""
    runs = make_runs() if runs is None else runs
    for run in runs:
        run.setdefault("arguments", ["--model_name_or_path", "/home/alice/base", "--rdrop_alpha=2", "--own", "a b"])
    arms = [arm for arm in ARMS if any(run["arm"] == arm for run in runs)]
    found = {
        "about": {
            "tasks": {"ner": "`run_ner.py --x`", "mt": "`run_translation.py --x`"},
            "setup": {"device": "3 CPU cores", "torch": "2.0"},
        },
        "choices": [{"task": task, "arm": arm, **choice} for (task, arm), choice in make_choices().items()],
        **as_json(make_report(runs, METRICS, arms)),
        "failed": {"ner / rdrop / seed 9": "Error in /home/alice"},
        "runs": runs,
        "trials": [],
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(found), "utf-8")
    return folder / "comparison.json"


def make(comparison, output, *arguments):
    paths = reference_cards.main(["--comparison", str(comparison), "--output_dir", str(output), *arguments])
    texts = {path.stem: path.read_text("utf-8") for path in paths}
    for path, text in zip(paths, texts.values(), strict=True):
        data = ModelCard.load(path).data
        assert data.tags == ["r-drop"] and data.eval_results is None and data.base_model is None
        assert not re.search(r"\bNone\b|\bnan\b|More information", text) and "\n\n\n" not in text
    return texts


def section(text, title):
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)[1]


def commands(text):
    lines = "".join(re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)).splitlines()
    return [shlex.split(line)[1:] for line in lines]


def test_the_reference_comparison(tmp_path, monkeypatch):
    consistency = SHORT.parent / "consistency-sst2" / "consistency.json"
    monkeypatch.chdir(REFERENCE.parents[1])
    config = "model_cards/reference/short.yaml"
    texts = make(SHORT, tmp_path, "--config", config, "--consistency", f"sst2={consistency}", "--note", "MiniLM | x")
    assert list(texts) == ["sst2", "mrpc", "cola"]
    report = (SHORT.parent / "comparison.md").read_text("utf-8")
    for task, text in texts.items():
        data = ModelCard(text).data
        assert data.datasets == ["glue"] and data.language == "en"
        for title in ("Cost", "Best, worst and spread over seeds"):  # the report's own tables, of this task
            rows = [line for line in section(report, title).splitlines() if line.startswith(f"| {task} |")]
            assert rows and all(row in section(text, title) for row in rows)
        for row in re.findall(rf"^\| {task} \| (?:baseline|rdrop) \| 0\.0001 .*$", report, flags=re.MULTILINE):
            assert row in section(text, "How it was trained")
        assert "$ENCODER" in text and f"$DATA/{task}/train.jsonl.gz" in text and "MiniLM | x" in text
    text = texts["sst2"]
    assert "+0.57 [+0.34, +0.80]. The interval lies above 0." in section(text, "What came out")
    assert "The interval contains 0" in section(texts["cola"], "What came out")
    assert "| rdrop | accuracy | 0.8360 |" in text and "ensemble of sub-models" not in texts["cola"]
    assert "(CE_1 + CE_2) / 2 + 2 * sKL(P_1, P_2)" in section(text, "R-Drop")
    (script, *again), *single = commands(text)
    assert script == "scripts/compare.py"
    monkeypatch.setenv("DATA", "data"), monkeypatch.setenv("ENCODER", "encoder")
    again[again.index("--output_dir") + 1] = str(tmp_path / "again")
    assert [arm.name for arm in parse_comparison(again, "").arms] == ["baseline", "rdrop"]
    assert [command[0] for command in single] == ["scripts/run_glue.py"] * 2
    classes = (run_glue.ModelArguments, run_glue.GlueArguments, run_glue.RDropTrainingArguments)
    alphas = [parse_arguments(classes, command[1:], None)[2].rdrop_alpha for command in single]
    assert alphas == [0.0, 4.0]


def test_made_up_comparison(tmp_path):
    comparison = write_comparison(tmp_path / "found")
    (tmp_path / "found" / "curves.png").touch()
    texts = make(comparison, tmp_path / "found" / "a" / "cards")
    text = texts["ner"]
    assert "alice" not in "".join(texts.values()) and "`base`" not in texts["mt"].split("## How")[0]
    assert "(../../curves.png)" in text
    assert "| rdrop | 3 | 58.67 ± 4.73 |" in section(text, "Comparison with plain fine-tuning")
    assert "| rdrop-shared |" in text and "over baseline-2x" in section(text, "Against the controls")
    # mean over seeds of CE and KL of the R-Drop arm, log lines 1 to 4 of the first epoch
    ce = sum(1 / i for i in range(1, 5)) / 4
    assert f"| 1 | 40 | {ce:.4g} | {ce:.4g} | {ce / 10:.4g} |" in section(text, "Training by epoch")
    assert "ner / rdrop / seed 9" in section(text, "Limitations") and "3 CPU cores" in text
    assert "at most 6 trials" in section(text, "Limitations")
    assert "Nothing was tuned" in section(texts["mt"], "Limitations")
    assert "the vocabulary at every token" in texts["mt"] and "the classes at every token" in text
    assert "| rdrop | dropout 0.1, rdrop_alpha 2 | 60.00 | chosen |" in text
    assert make(comparison, tmp_path / "found" / "a" / "cards") == texts
    assert "curves.png" not in make(comparison, tmp_path / "other", "--tasks", "ner")["ner"]
    assert [command[0] for command in commands(text)] == ["scripts/run_ner.py"] * 4
    assert "a b" in commands(text)[0]


@pytest.mark.parametrize("arm", ["rdrop-shared", "rdrop"])
def test_arms_with_an_argument_that_is_gone_keep_their_figures_but_are_not_run_again(arm, tmp_path):
    runs = make_runs()
    for run in runs:
        gone = ["--rdrop_second_dropout", "0.3"] if run["arm"] == arm else []
        run["arguments"] = ["--rdrop_alpha", "2", *gone]
    comparison = write_comparison(tmp_path / "found", runs)
    text = make(comparison, tmp_path / "cards", "--config", "own.yaml", "--tasks", "ner")["ner"]
    assert f"| {arm} |" in section(text, "Comparison with plain fine-tuning")
    again = next(command for command in commands(text) if "compare.py" in command[0])
    assert "baseline" in again and arm not in again and "second_dropout" not in str(commands(text))
    assert f"no longer has cannot be run again: `{arm}` (`rdrop_second_dropout`)." in text
    assert ("## R-Drop\n" in text) == (arm != "rdrop")  # nothing is said of an objective that is gone


def test_without_an_rdrop_arm_or_arguments(tmp_path):
    runs = [make_run("ner", "baseline", seed, 0.5 + seed / 10) for seed in range(2)]
    text = make(write_comparison(tmp_path / "found", runs, about={}, choices=[], failed={}), tmp_path / "cards")["ner"]
    assert "## R-Drop\n" not in text and "by epoch" not in text and "## Framework" not in text
    assert "2 seeds an arm" in text


def rows_of(baseline, arm, **metrics):
    runs = [
        make_run("ner", name, seed, score, **{key: values[name][seed] for key, values in metrics.items()})
        for name, scores in (("baseline", baseline), ("rdrop", arm))
        for seed, score in enumerate(scores)
    ]
    report = make_report(runs, {"ner": "eval_f1"}, ["baseline", "rdrop"])
    return report.of_task("ner")["rdrop"], report.of_task("ner").get("baseline")


def test_words_follow_the_figures():
    better = in_words(*rows_of((0.5, 0.6, 0.7), (0.6, 0.71, 0.82)))
    assert "The interval lies above 0." in better and "+11.00" in better and "not confirm" not in better
    worse = in_words(*rows_of((0.6, 0.71, 0.82), (0.5, 0.6, 0.7)))
    assert "The interval lies below 0." in worse and "-11.00" in worse
    assert "The interval contains 0" in in_words(*rows_of((0.5, 0.6, 0.7), (0.6, 0.5, 0.71)))
    assert "does not confirm" in in_words(*rows_of((0.5, 0.5, 0.5), (0.51, 0.6, 0.9)))
    assert "no interval" in in_words(*rows_of((0.5,), (0.6,)))
    assert "no run of the baseline" in in_words(*rows_of((), (0.6, 0.7)))
    assert "the baseline, +11.00 over the 2 seeds that both have." in in_words(*rows_of((0.5, 0.6, 0), (0.6, 0.72)))
    assert "+10.00 with seed 0, the only one that both have." in in_words(*rows_of((0.5, 0.6), (0.6,)))
    assert "that both have" not in better
    ece = {"eval_ece": {"baseline": (0.2, 0.2, 0.2), "rdrop": (0.1, 0.1, 0.4)}}
    told = in_words(*rows_of((0.5, 0.6, 0.7), (0.6, 0.71, 0.82), **ece))
    assert "ece 0.200 beside 0.200 (lower with 2 of 3 seeds)" in told and "1.00x the time" in told


def test_options():
    given = ["--a", "1", "--b=/home/alice/x.csv", "--flag", "--c", "$DATA/x/y", "--many", "1", "/tmp/z"]
    assert options_of(given) == {"a": "1", "b": "x.csv", "flag": "", "c": "$DATA/x/y", "many": "1 z"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        *((content, "no comparison.json") for content in (None, "{", "[]", "{}")),
        ('{"rows": [], "runs": []}', "no run has finished"),
    ],
)
def test_bad_comparisons(content, reason, tmp_path):
    if content is not None:
        (tmp_path / "comparison.json").write_text(content, "utf-8")
    with pytest.raises(ValueError, match=reason):
        reference_cards.main(["--comparison", str(tmp_path / "comparison.json"), "--output_dir", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


def test_bad_arguments(tmp_path):
    comparison = ["--comparison", str(SHORT)]
    (tmp_path / "file").touch()
    for arguments, reason in (
        (["--output_dir", str(tmp_path / "file")], "is a file"),
        (["--output_dir", str(tmp_path / "o"), "--tasks", "mprc"], "did you mean 'mrpc'"),
        (["--output_dir", str(tmp_path / "o"), "--consistency", "qqp=x"], "TASK=FILE"),
        (["--output_dir", str(tmp_path / "o"), "--consistency", "mrpc=none.json"], "cannot be read"),
    ):
        with pytest.raises(ValueError, match=reason):
            reference_cards.main([*comparison, *arguments])
    assert not (tmp_path / "o").exists()
