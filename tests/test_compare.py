"""compare.py and what it is made of: the queue of runs, the statistics, the report."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import compare
import pytest
from comparison_report import as_json, make_rows, markdown_table, plot, terminal_table
from rich.console import Console
from run_queue import SCRIPTS, Run, check_same_comparison, run_all

# A stand-in for a training script: writes its arguments as results, or fails.
SCRIPT = """
import json, pathlib, sys, time
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(args["--output_dir"])
out.mkdir(parents=True)  # fails if a killed run's folder is still there
if args.get("--fail") == args["--seed"]:
    sys.exit("error: no such file")
time.sleep(float(args.get("--sleep", 0)))
(out / "all_results.json").write_text(json.dumps({"eval_f1": float(args["--value"]), "train_runtime": 2.0}))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def make_run(script, folder, seed, *arguments):
    return Run("task", "arm", seed, script, ("--value", f"0.{seed}5", *arguments), folder / f"seed-{seed}")


def test_every_run_has_its_result_and_a_failed_one_does_not_sink_the_rest(script, tmp_path):
    runs = [make_run(script, tmp_path / "runs", seed, "--fail", "2") for seed in (1, 2, 3)]
    failed = run_all(runs, jobs=2, describe=lambda run: "done")
    assert list(failed) == [runs[1]] and "error: no such file" in failed[runs[1]]
    assert [run.results().get("eval_f1") for run in runs] == [0.15, None, 0.35]
    assert json.loads((runs[0].folder / "run.json").read_text())["seconds"] > 0


def test_finished_runs_are_not_repeated_and_killed_ones_start_anew(script, tmp_path):
    runs = [make_run(script, tmp_path / "runs", seed) for seed in (1, 2)]
    assert run_all(runs[:1], 1, lambda run: "") == {}
    stamp = (runs[0].output / "all_results.json").stat().st_mtime_ns
    runs[1].output.mkdir(parents=True)
    (runs[1].output / "half").touch()  # what a kill leaves
    assert run_all(runs, 1, lambda run: "") == {}
    assert (runs[0].output / "all_results.json").stat().st_mtime_ns == stamp
    assert runs[1].results() and not (runs[1].output / "half").exists()


def test_ending_the_comparison_ends_its_runs(script, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "from pathlib import Path\nfrom run_queue import Run, run_all\n"
        f"run = Run('t', 'a', 1, {script!r}, ('--value', '1', '--sleep', '60'), Path({str(tmp_path / 'r')!r}))\n"
        "run_all([run], 1, lambda run: '')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "r" / "output").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    left = [pid for pid in os.listdir("/proc") if pid.isdigit() and script in _command_line(pid)]
    assert left == [] and not (tmp_path / "r" / "output" / "all_results.json").exists()


def _command_line(pid):
    try:
        return Path("/proc", pid, "cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def test_a_folder_holds_one_comparison(tmp_path):
    check_same_comparison(tmp_path / "new", {"seeds": (0, 1)})
    check_same_comparison(tmp_path / "new", {"seeds": (0, 1)})
    with pytest.raises(ValueError, match="holds another comparison"):
        check_same_comparison(tmp_path / "new", {"seeds": (0, 1, 2)})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds other files"):
        check_same_comparison(tmp_path / "mine", {})
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


RESULTS = {
    ("ner", "baseline", 0): {"eval_f1": 0.50, "train_runtime": 10.0},
    ("ner", "baseline", 1): {"eval_f1": 0.60, "train_runtime": 10.0},
    ("ner", "baseline", 2): {"eval_f1": 0.90, "train_runtime": 10.0},  # its partner failed
    ("ner", "r-drop", 0): {"eval_f1": 0.55, "train_runtime": 19.0},
    ("ner", "r-drop", 1): {"eval_f1": 0.59, "train_runtime": 21.0},
    ("mt", "baseline", 0): {"eval_bleu": 20.0, "train_runtime": 5.0},
    ("mt", "r-drop", 0): {"eval_bleu": 19.0, "train_runtime": 9.0},
}
METRICS = {"ner": "eval_f1", "mt": "eval_bleu"}


def test_figures_are_paired_by_seed_and_losses_are_shown():
    ner, mt = make_rows(RESULTS, METRICS, ["r-drop"])
    assert ner.seeds == [0, 1] and ner.baseline == pytest.approx([50, 60]) and ner.gains == pytest.approx([5, -1])
    assert ner.seconds_ratio == pytest.approx(2.0)
    assert mt.gains == [-1.0] and mt.baseline == [20.0]  # BLEU is in points already
    table = markdown_table([ner, mt])
    # mean 55, std sqrt(50) = 7.07; gains 5 and -1: mean 2, std sqrt(18) = 4.24
    assert "| ner | f1 | 55.00 ± 7.07 | r-drop | 57.00 ± 2.83 | +2.00 ± 4.24 | 2.00x | 2 |" in table
    assert "| mt | bleu | 20.00 | r-drop | 19.00 | -1.00 | 1.80x | 1 |" in table
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table([ner, mt]))
    text = console.file.getvalue()
    assert "55.00 ± 7.07" in text and "+2.00 ± 4.24" in text and "…" not in text
    assert as_json([ner])[0]["mean_gain"] == pytest.approx(2.0)


def test_plot_is_written(tmp_path):
    plot(make_rows(RESULTS, METRICS, ["r-drop"]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "either --demo, or --script"),
        (["--demo", "--script", "run_ner.py"], "either --demo, or --script"),
        (["--script", "run_ner.py"], "also needs --metric"),
        (["--demo", "--rdrop_alpha", "-1"], "rdrop_alpha must be"),
        (["--demo", "--rdrop_alpha", "0"], "is the baseline itself"),
        (["--demo", "--seeds", "1", "1"], "all be different"),
        (["--demo", "--jobs", "0"], "--jobs at least 1"),
        (["--demo", "--", "--do_train"], "--demo brings its own"),
        (
            ["--script", "run_ner.py", "--metric", "eval_f1", "--output_dir", "x", "--", "--seed", "1"],
            "--seed is set for each run",
        ),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        compare.main(line)
    assert os.listdir(tmp_path) == []


def test_arms_of_a_seed_run_beside_each_other_and_differ_in_alpha_only():
    task = compare.Task("ner", "run_ner.py", "eval_f1", 2.0, ("--do_train",))
    runs = compare.plan([task], [4, 5], Path("out"))
    assert [(run.seed, run.arm) for run in runs] == [(4, "baseline"), (4, "r-drop"), (5, "baseline"), (5, "r-drop")]
    base, ours = (run.arguments for run in runs[:2])
    assert base == ("--do_train", "--rdrop_alpha", "0") and ours == ("--do_train", "--rdrop_alpha", "2.0")


@pytest.mark.slow
def test_demo_with_one_seed(tmp_path):
    folder = tmp_path / "demo"
    line = ["--demo", "--seeds", "0", "--output_dir", str(folder)]
    rows = compare.main(line)
    assert [row["task"] for row in rows] == ["classification", "ner", "translation"]
    # well above chance and well below perfect, or the demo shows nothing
    for row, (low, high) in zip(rows, ((60, 90), (40, 90), (25, 90)), strict=True):
        assert low < row["baseline_scores"][0] < high
        assert row["train_seconds_ratio"] > 1.1 and row["scores"] != row["baseline_scores"]
    assert {path.name for path in folder.glob("comparison.*")} == {
        f"comparison.{end}" for end in ("md", "json", "png")
    }
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/*/output/all_results.json")}
    assert compare.main(line) == rows  # everything is finished: nothing runs again
    assert len(stamps) == 6 and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
