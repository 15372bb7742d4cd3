"""compare.py and what it is made of: the queue of runs, the statistics, the report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import compare
from comparison.arms import BUILT_IN, Task, candidates, make_arms, run_arguments, split_line
from comparison.config import parse
from comparison.history import as_columns, as_lines
from comparison.queue import SCRIPTS, Run, run_all
from comparison.runs import check_folder, take_runs
from comparison.tuning import choose, plan_trials
from reporting.folder import sole_user

# A stand-in for a training script: writes its arguments as results, or fails.
SCRIPT = """
import json, pathlib, sys, time
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(args["--output_dir"])
out.mkdir(parents=True)  # fails if a killed run's folder is still there
if args.get("--fail") == args["--seed"]:
    sys.exit("error: no such file")
time.sleep(float(args.get("--sleep", 0)))
if "--weights" in args:
    (out / "model.safetensors").touch()
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
        "from pathlib import Path\nfrom comparison.queue import Run, run_all\n"
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


def test_the_run_of_a_comparison_that_was_killed_is_ended_before_it_starts_anew(script, tmp_path):
    run = make_run(script, tmp_path / "runs", 1, "--sleep", "1")
    (tmp_path / "runs" / "seed-1").mkdir(parents=True)
    orphan = subprocess.Popen([*run.command, "--sleep", "60"])
    record = {"command": orphan.args[1:], "pid": orphan.pid}
    (run.folder / "run.json").write_text(json.dumps(record))
    deadline = time.monotonic() + 30
    while not run.output.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert run_all([run], 1, lambda run: "") == {}
    orphan.wait(5)  # raises while it lives
    assert run.results()
    (run.folder / "run.json").write_text(json.dumps({"command": ["other"], "pid": os.getpid()}))
    (run.output / "all_results.json").unlink()
    assert run_all([run], 1, lambda run: "") == {}  # the pid is somebody else's now, ours: we live


def test_a_folder_is_used_by_one_process_at_a_time(tmp_path):
    with sole_user(tmp_path):
        code = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\nfrom pathlib import Path\n"
        code += f"from reporting.folder import sole_user\nwith sole_user(Path({str(tmp_path)!r})): print('in')"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another process is at work" in other.stderr and not other.stdout
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "in\n"


def test_several_gpus_are_divided_among_the_runs(tmp_path, monkeypatch):
    path = tmp_path / "which.py"
    path.write_text(
        SCRIPT.replace(
            '{"eval_f1": float(args["--value"])', '{"gpu": __import__("os").environ["CUDA_VISIBLE_DEVICES"]'
        )
    )
    monkeypatch.setattr("comparison.queue.visible_gpus", lambda: ["3", "5"])
    runs = [make_run(str(path), tmp_path / "runs", seed, "--sleep", "1") for seed in range(4)]
    assert run_all(runs, 2, lambda run: "") == {}
    assert sorted(run.results()["gpu"] for run in runs) == ["3", "3", "5", "5"]


def _command_line(pid):
    try:
        return Path("/proc", pid, "cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def test_finished_models_are_dropped_unless_they_are_to_be_kept(script, tmp_path):
    runs = [make_run(script, tmp_path / "runs", seed, "--weights", "yes") for seed in (1, 2)]
    run_all(runs[:1], 1, lambda run: "")
    run_all(runs[1:], 1, lambda run: "", keep_models=True)
    assert [(run.output / "model.safetensors").exists() for run in runs] == [False, True]


def test_a_run_with_other_arguments_is_not_mixed_in(script, tmp_path):
    run_all([make_run(script, tmp_path / "runs", 1)], 1, lambda run: "")
    make_run(script, tmp_path / "runs", 1).check()
    with pytest.raises(ValueError, match="other arguments"):
        make_run(script, tmp_path / "runs", 1, "--learning_rate", "1").check()


def test_variables_are_replaced_when_a_run_starts(monkeypatch, tmp_path):
    monkeypatch.setenv("WHERE", "/somewhere")
    run = Run("task", "arm", 0, "run_ner.py", ("--train_file", "$WHERE/train.csv"), tmp_path)
    assert "/somewhere/train.csv" in run.command and run.arguments[1] == "$WHERE/train.csv"
    assert split_line("--train_file '${WHERE}/a b.csv'") == ["--train_file", "${WHERE}/a b.csv"]
    with pytest.raises(ValueError, match="is not set"):
        split_line("--train_file $NOWHERE_AT_ALL/train.csv")


def test_a_folder_holds_one_comparison(tmp_path):
    check_folder(tmp_path / "new")
    check_folder(tmp_path / "new")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds other files"):
        check_folder(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


# ---- Arms and tuning ----

TASK = Task("ner", "run_ner.py", "eval_f1", ("--num_train_epochs", "3", "--model_name_or_path=m-{seed}"), 2.0)
GRID = {"learning_rate": [1e-5, 1e-4], "rdrop_dropout": [0.1, 0.2, 0.3]}


def arguments_of(name, settings=None, task=TASK, own=None):
    arm = next(arm for arm in make_arms([name], own or {}) if arm.name == name)
    return list(run_arguments(task, arm, settings or {}, seed=7))


def test_built_in_arms():
    fixed = ["--num_train_epochs", "3", "--model_name_or_path=m-7"]
    assert arguments_of("baseline") == [*fixed, "--rdrop_alpha", "0"]
    assert arguments_of("baseline-2x") == [*fixed, "--rdrop_alpha", "0", "--num_train_epochs", "6"]
    assert arguments_of("doubled") == [*fixed, "--rdrop_alpha", "1e-12"]
    assert arguments_of("rdrop") == [*fixed, "--rdrop_alpha", "2.0"]
    assert arguments_of("rdrop-2x") == [*fixed, "--rdrop_alpha", "2.0", "--num_train_epochs", "6"]
    assert arguments_of("rdrop-interval") == [*fixed, "--rdrop_alpha", "2.0", "--rdrop_interval", "2"]
    assert arguments_of("rdrop-shared")[-2:] == ["--rdrop_shared_layers", "0.75"]


@pytest.mark.parametrize(
    ("arguments", "settings", "longer"),
    [
        ((), {}, ["--num_train_epochs", "6"]),  # the Trainer's default is 3
        (("--num_train_epochs=2.5",), {}, ["--num_train_epochs", "5"]),
        (("--num_train_epochs", "3"), {"num_train_epochs": 5}, ["--num_train_epochs", "10"]),
        (("--max_steps", "40", "--num_train_epochs", "3"), {}, ["--max_steps", "80"]),
        (("--max-steps=40",), {}, ["--max_steps", "80"]),  # the scripts' other spelling
        (("--max_steps=-1",), {}, ["--num_train_epochs", "6"]),
    ],
)
def test_twice_as_long(arguments, settings, longer):
    task = Task("ner", "run_ner.py", "eval_f1", arguments)
    for arm in ("baseline-2x", "rdrop-2x"):
        assert arguments_of(arm, settings, task)[-2:] == longer


def test_own_arms_are_lines_of_arguments():
    lines = {
        "smooth": "--label_smoothing_factor 0.1",
        "trunk": "rdrop --rdrop_shared_layers 4",
        "r1": "--rdrop_alpha=1",
        "r2": "--rdrop-alpha=2",  # the scripts' other spelling
    }
    arms = {arm.name: arm for arm in make_arms(["rdrop", *lines], lines)}
    assert list(arms) == ["baseline", "rdrop", "smooth", "trunk", "r1", "r2"]  # never without the baseline
    assert [arms[name].settings_of for name in lines] == ["smooth", "rdrop", "r1", "r2"]
    settings = {"rdrop_alpha": 5, "learning_rate": 0.1}
    assert arguments_of("trunk", settings, own=lines)[-6:] == [
        *("--rdrop_alpha", "5", "--learning_rate", "0.1", "--rdrop_shared_layers", "4")
    ]
    assert arguments_of("r1", settings, own=lines)[-3:] == ["--learning_rate", "0.1", "--rdrop_alpha=1"]
    assert arguments_of("r2", settings, own=lines)[-3:] == ["--learning_rate", "0.1", "--rdrop-alpha=2"]


def test_settings_of_which_an_arm_has_its_own_are_not_tuned_nor_said_to_be_chosen(tmp_path):
    own = {"more": "baseline --rdrop_dropout 0.3", "apart": "--rdrop_dropout=0.3 --rdrop_alpha 0"}
    task = Task("ner", "run_ner.py", "eval_f1", (), 1.0, {**GRID, "rdrop_alpha": [1, 5]})
    arms = make_arms(own, own)
    more, apart = arms[1:]
    assert more.without_own({"rdrop_dropout": 0.1, "learning_rate": 1e-5}) == {"learning_rate": 1e-5}
    assert candidates(task, apart, 100) == [{"learning_rate": 1e-5}, {"learning_rate": 1e-4}]
    words = run_arguments(task, more, {"rdrop_dropout": 0.1, "learning_rate": 1e-5}, seed=7)
    assert words == ("--learning_rate", "1e-05", "--rdrop_alpha", "0", "--rdrop_dropout", "0.3")
    extra = ("--own_arm", f"more={own['more']}", "--arms", "more", "--tune", "rdrop_dropout=0.1,0.2")
    comparison = comparison_of(tmp_path, *extra, "--tuned_arms", "baseline")
    choices = choose(comparison, plan_trials(comparison), guess=True)
    assert [choice["settings"] for choice in choices.values()] == [{"rdrop_dropout": 0.1}, {}]


def test_tuned_arms_can_be_shared():
    arms = {arm.name: arm.settings_of for arm in make_arms(BUILT_IN, {}, ["baseline", "rdrop"])}
    assert arms["doubled"] == arms["baseline-2x"] == "baseline" and arms["rdrop-interval"] == "rdrop"
    with pytest.raises(ValueError, match="untuned baseline"):
        make_arms(BUILT_IN, {}, ["rdrop"])
    with pytest.raises(ValueError, match="no arm here"):
        make_arms(BUILT_IN, {}, ["baseline", "rdrop-shared"])


def test_every_arm_has_the_same_number_of_trials():
    task = Task("ner", "run_ner.py", "eval_f1", (), 1.0, {**GRID, "rdrop_alpha": [1, 5]})
    for trials in (1, 2, 4, 6):
        plain, ours = (candidates(task, BUILT_IN[name], trials) for name in ("baseline", "rdrop"))
        assert len(plain) == len(ours) == trials
        without = [{k: v for k, v in settings.items() if k != "rdrop_alpha"} for settings in ours]
        assert sorted(map(str, plain)) == sorted(map(str, without))
        if trials > 1:
            assert {settings["rdrop_alpha"] for settings in ours} == {1, 5}
    assert len(candidates(task, BUILT_IN["baseline"], 100)) == 6  # all there are
    everything = candidates(task, BUILT_IN["rdrop"], 100)
    assert len({json.dumps(settings) for settings in everything}) == 12
    assert len({json.dumps(settings) for settings in candidates(task, BUILT_IN["rdrop"], 9)}) == 9


def comparison_of(tmp_path, *extra):
    line = ["--script", "run_ner.py", "--metric", "eval_f1", "--output_dir", str(tmp_path / "out"), *extra]
    return parse([*line, "--", "--do_train"])


def test_settings_are_chosen_by_their_mean_on_the_training_split(tmp_path):
    extra = ("--rdrop_alpha", "1", "5", "--tune", "learning_rate=1e-5,1e-4", "--tuning_seeds", "8", "9")
    comparison = comparison_of(
        tmp_path, *extra, "--arms", "rdrop", "rdrop-shared", "--tuned_arms", "baseline", "rdrop"
    )
    trials = plan_trials(comparison)
    assert len(trials) == 2 * 2 + 4 * 2  # baseline: 2 rates; R-Drop: 2 rates x 2 alphas; 2 seeds each
    for run, trial in trials.items():
        assert run.arguments[-2:] == ("--validation_from_train", "0.2") and run.seed in (8, 9)
        settings = trial["settings"]
        score = 10 * settings["learning_rate"] + settings.get("rdrop_alpha", 0) / 100
        if settings == {"learning_rate": 1e-4, "rdrop_alpha": 5} and run.seed == 9:
            continue  # the best one failed with a seed
        score += 0.3 * (run.seed == 8 and settings.get("rdrop_alpha") == 1 and settings["learning_rate"] == 1e-5)
        run.output.mkdir(parents=True)
        (run.output / "all_results.json").write_text(json.dumps({"eval_f1": score}))
    choices = choose(comparison, trials)
    assert choices["ner", "baseline"]["settings"] == {"learning_rate": 1e-4}
    assert choices["ner", "rdrop"]["settings"] == {"learning_rate": 1e-5, "rdrop_alpha": 1}  # mean of .01 and .31
    assert len(choices["ner", "rdrop"]["trials"]) == 8
    shared = choices["ner", "rdrop-shared"]
    assert shared["settings"] == choices["ner", "rdrop"]["settings"] and shared["taken_from"] == "rdrop"
    runs = compare.plan(comparison, choices)
    assert [(run.seed, run.arm) for run in runs[:4]] == [
        (0, "baseline"), (0, "rdrop"), (0, "rdrop-shared"), (1, "baseline")
    ]  # fmt: skip
    assert not any("--validation_from_train" in run.arguments for run in runs)


def test_the_lowest_loss_is_chosen(tmp_path):
    comparison = comparison_of(tmp_path, "--rdrop_alpha", "1", "5", "--arms", "rdrop")
    for metric, alpha in (("eval_f1", 5), ("eval_loss", 1)):
        (task,) = comparison.tasks
        one = replace(comparison, tasks=[replace(task, metric=metric)], folder=tmp_path / metric)
        trials = plan_trials(one)
        for run, trial in trials.items():
            run.output.mkdir(parents=True)
            (run.output / "all_results.json").write_text(json.dumps({metric: trial["settings"]["rdrop_alpha"] / 10}))
        assert choose(one, trials)["ner", "rdrop"]["settings"] == {"rdrop_alpha": alpha}


def test_an_arm_without_any_finished_trial_is_left_out(tmp_path):
    comparison = comparison_of(tmp_path, "--rdrop_alpha", "1", "5", "--arms", "rdrop", "rdrop-shared")
    assert list(choose(comparison, plan_trials(comparison))) == [("ner", "baseline")]


CONFIG = """
seeds: [3, 4]
tune: {learning_rate: [1e-5, 0.001]}
trials: 2
arms: [baseline, doubled]
own_arms: {trunk: rdrop --rdrop_shared_layers 1}
arguments: --do_train
tasks:
  tags: {script: run_ner.py, metric: eval_f1, arguments: --train_file a.csv, rdrop_alpha: 3}
  texts: {script: run_glue.py, metric: eval_accuracy, arguments: --task_name sst2, tune: {rdrop_alpha: [1, 2]}}
"""


def test_config_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    comparison = parse(["--config", str(path), "--output_dir", str(tmp_path / "out"), "--jobs", "3"])
    tags, texts = comparison.tasks
    assert tags.arguments == ("--do_train", "--train_file", "a.csv") and tags.rdrop_alpha == 3
    assert texts.tune == {"learning_rate": [1e-5, 0.001], "rdrop_alpha": [1, 2]}
    assert [arm.name for arm in comparison.arms] == ["baseline", "doubled", "trunk"]
    assert (comparison.seeds, comparison.trials, comparison.jobs) == ([3, 4], 2, 3)
    fixed = ["--config", str(path), "--output_dir", str(tmp_path / "out")]
    part = parse([*fixed, "--tasks", "texts", "--arms", "trunk", "--seeds", "9", "--own_arm", "x=--do_eval"])
    assert [task.name for task in part.tasks] == ["texts"] and part.seeds == [9]
    assert [arm.name for arm in part.arms] == ["baseline", "trunk", "x"]
    with pytest.raises(ValueError, match="has only tags, texts"):
        parse([*fixed, "--tasks", "images"])
    with pytest.raises(ValueError, match="say it there"):
        parse([*fixed, "--rdrop_alpha", "2"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [", "no valid YAML"),
        ("seeds: [1]", "must hold `tasks:`"),
        ("tasks: {a: {script: run_ner.py}}", "needs script, metric and arguments"),
        (CONFIG + "trails: 5", "unknown key 'trails'.*trials"),
        (CONFIG.replace("run_ner", "run_x"), "script must be one of"),
        (CONFIG.replace("[3, 4]", "[3, 3]"), "all be different"),
        (CONFIG.replace("[3, 4]", "3"), "must be a list"),
        (CONFIG.replace("doubled", "tripled"), "no arm 'tripled'"),
        (CONFIG.replace("rdrop_alpha: 3", "rdrop_alpha: -3"), "rdrop_alpha must be"),
        (CONFIG.replace("[1, 2]", "[0, 2]"), "is the baseline itself"),
        (CONFIG.replace("trunk:", "doubled:"), "a name of its own"),
        (CONFIG.replace("--train_file a.csv", "--train_file $NOWHERE_AT_ALL"), "is not set"),
        (CONFIG.replace("--train_file a.csv", "--seed 1"), "--seed is set for each run"),
        (CONFIG.replace("[1e-5, 0.001]", "0.1"), "needs a list"),
        (CONFIG.replace("trials: 2", "trials: two"), "must be a whole number"),
        (CONFIG.replace("trials: 2", "trials: 0"), "must be at least 1"),
        (CONFIG.replace("rdrop_alpha: 3", "rdrop_alpha: high"), "rdrop_alpha must be a number"),
        (CONFIG.replace("--task_name sst2", "[--task_name, sst2]"), "arguments must be text"),
        (CONFIG.replace("{trunk: rdrop --rdrop_shared_layers 1}", "[trunk]"), "own_arms must be a mapping"),
        (CONFIG.replace("rdrop --rdrop_shared_layers 1", "[1]"), "must be a line of arguments"),
    ],
)
def test_bad_config_is_refused_before_anything_is_written(text, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        compare.main(["--config", str(path), "--output_dir", str(tmp_path / "out")])
    assert os.listdir(tmp_path) == ["c.yaml"]


ONE_TASK = ["--script", "run_ner.py", "--metric", "eval_f1", "--output_dir", "x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "either --demo, or --config, or --script"),
        (["--demo", "--script", "run_ner.py"], "either --demo, or"),
        (["--script", "run_ner.py"], "also needs --metric"),
        (["--demo", "--rdrop_alpha", "-1"], "rdrop_alpha must be"),
        (["--demo", "--rdrop_alpha", "0"], "is the baseline itself"),
        (["--demo", "--rdrop_alpha", "1", "2"], "tunes nothing"),
        (["--demo", "--seeds", "1", "1"], "all be different"),
        (["--demo", "--jobs", "0"], "--jobs and --trials must be at least 1"),
        (["--demo", "--trials", "0"], "--jobs and --trials must be at least 1"),
        (["--demo", "--", "--do_train"], "--demo brings its own"),
        (["--demo", "--tasks", "ner"], "tasks of --config"),
        (["--config", "missing.yaml", "--output_dir", "x"], "cannot be read"),
        ([*ONE_TASK, "--", "--seed", "1"], "--seed is set for each run"),
        ([*ONE_TASK, "--", "--validation_from_train=0.5"], "--validation_from_train is set for each run"),
        ([*ONE_TASK, "--", "--validation-from-train=0.5"], "--validation_from_train is set for each run"),
        ([*ONE_TASK, "--tune", "learning_rate", "--", "--do_train"], "NAME=VALUE"),
        ([*ONE_TASK, "--tune", "learning_rate=1,1", "--", "--do_train"], "different values"),
        ([*ONE_TASK, "--tuning_seeds", "0", "--", "--do_train"], "must not be among --seeds"),
        ([*ONE_TASK, "--tuning_share", "1", "--", "--do_train"], "between 0 and 1"),
        ([*ONE_TASK, "--own_arm", "a b=--do_train", "--", "--do_train"], "a name of its own"),
        ([*ONE_TASK, "--own_arm", "a b", "--", "--do_train"], "NAME=LINE"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        compare.main(line)
    assert os.listdir(tmp_path) == []


def test_runs_made_elsewhere_are_taken_over_when_their_arguments_are_the_same(script, tmp_path):
    runs = [make_run(script, tmp_path / "runs", seed) for seed in (1, 2, 3)]
    made = [
        {"task": "task", "arm": "arm", "seed": 1, "arguments": list(runs[0].arguments)},
        {"task": "task", "arm": "arm", "seed": 2, "arguments": [*runs[1].arguments, "--more"]},
    ]
    for number, run in enumerate(made):
        run |= {"metrics": {"eval_f1": number}, "history": {"step": [1], "loss": [0.5]}}
    (tmp_path / "comparison.json").write_text(json.dumps({"runs": made, "trials": []}))
    take_runs(runs, [tmp_path / "comparison.json"])
    assert runs[0].results() == {"eval_f1": 0} and runs[0].history() == [{"step": 1, "loss": 0.5}]
    assert not runs[1].results() and not runs[2].results()


def test_histories_are_kept_as_columns():
    lines = [{"step": 1, "epoch": 0.5, "loss": 1 / 3, "lr": 1.0}, {"step": 2, "epoch": 1.0, "eval_loss": 4.0}]
    columns = as_columns(lines)
    assert columns == {"step": [1, 2], "epoch": [0.5, 1.0], "loss": [0.333333, None]}
    kept = [{"step": 1, "epoch": 0.5, "loss": 0.333333}, {"step": 2, "epoch": 1.0}]
    assert as_lines(columns) == kept and as_lines(as_columns(kept)) == kept
    assert as_columns([]) == {} and as_lines({}) == []


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"runs": [], "trials": 3}',
        *(
            json.dumps({"runs": [{"task": "t", "arm": "a", "seed": 1, "arguments": [], "history": h}], "trials": []})
            for h in ([{"step": 1}], {"step": [1], "loss": []})
        ),
    ],
)
def test_a_broken_comparison_is_not_taken_over(tmp_path, content):
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(ValueError, match=r"broken\.json is no comparison\.json"):
        take_runs([], [tmp_path / "broken.json"])


def test_dry_run_lists_the_runs_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = [*ONE_TASK, "--rdrop_alpha", "1", "5", "--seeds", "0", "1", "--dry_run", "--", "--do_train"]
    assert compare.main(line) == [] and os.listdir(tmp_path) == []
    shown = capsys.readouterr().out
    assert "6 of 6 runs would start" in shown and "ner / rdrop / seed 1" in shown  # 2 trials of R-Drop's, 4 runs


# What the script of `script` returns in every run, by arm: an R-Drop run takes twice the time.
REAL = """
import json, pathlib, sys
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, alpha, seed = pathlib.Path(args["--output_dir"]), float(args["--rdrop_alpha"]), int(args["--seed"])
if args.get("--fail") == f"{alpha:g}-{seed}":
    sys.exit("error: it was to fail")
out.mkdir(parents=True)
log = [{"step": step, "epoch": step / 2, "loss": 1 / step, "ce_loss": 1 / step, "kl_loss": 0.0} for step in (1, 2)]
(out / "trainer_state.json").write_text(json.dumps({"log_history": log}))
score = 0.5 + (alpha > 0) * 0.05 + 0.01 * seed - 0.001 * abs(alpha - 5) * (alpha > 0)
seconds = 20.0 if alpha else 10.0
metrics = {"eval_f1": score, "train_runtime": seconds, "train_cpu_seconds": seconds, "train_samples_per_second": 1.0}
(out / "all_results.json").write_text(json.dumps(metrics))
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """compare.py with a stand-in for run_ner.py."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "run_ner.py").write_text(REAL)
    monkeypatch.setattr("comparison.queue.SCRIPTS", tmp_path / "scripts")
    return ["--script", "run_ner.py", "--metric", "eval_f1", "--output_dir", str(tmp_path / "out"), "--jobs", "2"]


def test_whole_comparison(stub, tmp_path, capsys):
    line = [*stub, "--rdrop_alpha", "1", "5", "--seeds", "0", "1", "2", "--", "--use_cpu", "1"]
    base, ours = compare.main(line)
    assert (base["mean"], ours["mean"]) == pytest.approx((51, 56)) and ours["cost"]["time"] == pytest.approx(2)
    folder = tmp_path / "out"
    result = json.loads((folder / "comparison.json").read_text())
    chosen = {choice["arm"]: choice["settings"] for choice in result["choices"]}
    assert chosen == {"baseline": {}, "rdrop": {"rdrop_alpha": 5.0}}
    assert len(result["runs"]) == 6 and result["runs"][1]["arguments"][-2:] == ["--rdrop_alpha", "5.0"]
    logged = {"step": [1, 2], "epoch": [0.5, 1.0], "loss": [1.0, 0.5], "ce_loss": [1.0, 0.5], "kl_loss": [0.0, 0.0]}
    assert result["runs"][0]["history"] == logged
    assert result["about"]["setup"]["torch"] and result["failed"] == {}
    assert str(tmp_path) not in (folder / "comparison.json").read_text() + (folder / "comparison.md").read_text()
    assert {path.name for path in folder.glob("*.png")} == {"gains.png", "curves.png", "pareto.png", "alphas.png"}
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*/**/all_results.json")}
    assert len(stamps) == 6 + 2

    at = line.index("--")
    more = compare.main([*line[:at], "3", *line[at:]])  # one more seed
    assert len(more[0]["scores"]) == 4
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    with pytest.raises(ValueError, match="other arguments"):
        compare.main([*line, "--learning_rate", "1"])

    other = ["--take_from", str(folder / "comparison.json"), *line]
    other[other.index("--output_dir") + 1] = str(tmp_path / "other")
    capsys.readouterr()
    assert compare.main(["--dry_run", *other]) == []  # which cannot know that R-Drop's alpha will be 5, not 1
    shown = capsys.readouterr().out
    assert "3 of 8 runs would start" in shown and "ner / rdrop / seed 2" in shown and "baseline" not in shown
    assert [row["mean"] for row in compare.main(other)] == pytest.approx([51, 56])
    assert not list((tmp_path / "other").glob("**/log.txt"))  # nothing was run


def test_a_failed_run_is_reported_and_the_rest_is_kept(stub, tmp_path):
    line = [*stub, "--seeds", "0", "1", "2", "--", "--fail", "1-1"]
    with pytest.raises(ValueError, match=r"1 of 6 runs failed(.|\n)*it was to fail"):
        compare.main(line)
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(result["failed"]) == ["ner / rdrop / seed 1"] and len(result["runs"]) == 5
    assert "it was to fail" in (tmp_path / "out" / "comparison.md").read_text()
    rows = compare.main(["--report_only", *line])
    assert [len(row["scores"]) for row in rows] == [3, 2]


def test_trials_alone_are_kept_too(stub, tmp_path):
    line = [*stub, "--rdrop_alpha", "1", "5", "--", "--x", "1"]
    compare.main(line)
    for folder in (tmp_path / "out" / "runs").iterdir():
        shutil.rmtree(folder)
    assert compare.main(["--report_only", *line]) == []
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert len(result["trials"]) == 2 and result["runs"] == [] and result["choices"][1]["settings"]


def test_report_of_nothing(stub):
    with pytest.raises(ValueError, match="nothing to report"):
        compare.main([*stub, "--report_only", "--", "--x", "1"])


@pytest.mark.slow
def test_demo_with_one_seed(tmp_path):
    folder = tmp_path / "demo"
    line = ["--demo", "--seeds", "0", "--output_dir", str(folder)]
    rows = compare.main(line)
    assert [(row["task"], row["arm"]) for row in rows] == [
        (task, arm) for task in ("classification", "ner", "translation", "digits") for arm in ("baseline", "rdrop")
    ]
    # well above chance and well below perfect, or the demo shows nothing
    for row, (low, high) in zip(rows[::2], ((60, 90), (40, 90), (25, 90), (60, 95)), strict=True):
        assert low < row["mean"] < high
    for base, ours in zip(rows[::2], rows[1::2], strict=True):
        assert ours["cost"]["time"] > 1.1 and ours["scores"] != base["scores"]
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/*/output/all_results.json")}
    assert compare.main(line) == rows  # everything is finished: nothing runs again
    assert len(stamps) == 8 and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
