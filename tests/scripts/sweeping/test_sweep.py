"""sweep.py: what a trial trains with, pruning, failures, resuming after a kill, refusals, the report."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback, default_data_collator
from transformers.utils import logging

import run_glue
import sweep
from hf_rdrop import RDropTrainer, RDropTrainingArguments, inspect_dropout
from support import script_data as made
from support.training import make_model, make_rows
from sweeping.report import Sweep, Trial, markdown, plot, terminal_table
from sweeping.search import STARTUP_TRIALS, draw_parameters, run_trials, trial_seed

RANGES = {"rdrop_alpha": (0.1, 5.0), "rdrop_dropout": (0.05, 0.3), "learning_rate": (1e-4, 1e-1)}
QUICK = ["--use_cpu", "--report_to", "none", "--num_train_epochs", "2", "--per_device_train_batch_size", "16"]


@pytest.fixture(scope="module", autouse=True)
def own_log_levels():
    """Other tests get their log levels back."""
    verbosity, level = logging.get_verbosity(), logging.get_logger("hf_rdrop").level
    yield
    logging.set_verbosity(verbosity)
    logging.get_logger("hf_rdrop").setLevel(level)


# ---- A whole sweep, by its command line ----


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    train = made.write(folder / "train.jsonl", made.classification_rows("names", 60, 0))
    return ["--train_file", train, "--model_name_or_path", made.make_encoder(folder / "encoder"), *QUICK]


def line(folder, script_arguments, *options, num_trials=9):
    options = ["--script", "run_glue.py", "--metric", "eval_loss", *options, "--output_dir", folder]
    return [
        *map(str, options),
        "--num_trials",
        str(num_trials),
        "--learning_rate",
        "1e-4",
        "1e-1",
        "--",
        *script_arguments,
    ]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, inputs):
    folder = tmp_path_factory.mktemp("sweep") / "out"
    return folder, sweep.main(line(folder, inputs)), json.loads((folder / "sweep.json").read_text())


def test_trials_and_their_report(swept):
    folder, best, report = swept
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        *("settings.json", "trials.db", "sweep.json", "sweep.md", "sweep.png"),
    }
    trials = report["trials"]
    assert [trial["number"] for trial in trials] == list(range(9))
    for trial in trials:
        assert all(low <= trial["parameters"][name] <= high for name, (low, high) in RANGES.items())
        assert trial["score"] == trial["evaluations"][-1][1] and trial["seconds"] > 0
    complete = [trial for trial in trials if trial["state"] == "complete"]
    assert all([step for step, _ in trial["evaluations"]] == [3, 6] for trial in complete)  # 48 of 60 rows, 2 epochs
    assert best == min(complete, key=lambda trial: trial["score"]) | {
        "evaluations": [tuple(pair) for pair in best["evaluations"]]
    }
    assert report["best"] == best["number"] and report["judged_on"] == "12 held-out training rows"
    assert f"--learning_rate {best['parameters']['learning_rate']:g}" in report["command"]
    assert "validation_from_train" not in report["command"] and report["command"] in (folder / "sweep.md").read_text()


def test_what_is_pruned_is_what_the_median_rule_says(swept):
    trials, pruned = swept[2]["trials"], []
    for trial in trials:
        complete = [dict(t["evaluations"]) for t in trials[: trial["number"]] if t["state"] == "complete"]
        loss = dict(trial["evaluations"])[3]  # in the middle; at the end, at step 6, there is nothing to save
        if len(complete) >= STARTUP_TRIALS and loss > statistics.median(scores[3] for scores in complete):
            pruned.append(trial["number"])
            assert [step for step, _ in trial["evaluations"]] == [3]
    assert pruned and [trial["number"] for trial in trials if trial["state"] == "pruned"] == pruned


def test_a_trial_is_what_the_script_trains_with_its_parameters(swept, inputs, tmp_path):
    _, best, _ = swept
    values = [f"--{name}={value}" for name, value in best["parameters"].items()]
    fixed = ["--do_train", "--do_eval", "--validation_from_train", "0.2", "--eval_strategy", "epoch"]
    metrics = run_glue.main([*inputs, *fixed, *values, "--save_strategy", "no", "--output_dir", str(tmp_path / "out")])
    assert metrics["eval_loss"] == pytest.approx(best["score"], rel=1e-6)


def test_killed_and_started_again_it_ends_where_it_would_have(swept, inputs, tmp_path):
    folder, arguments = tmp_path / "out", line(tmp_path / "out", inputs, num_trials=5)
    command = [sys.executable, sweep.__file__, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (len(states := _states(folder)) >= 3 and states[-1] == "RUNNING"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = _study(folder).trials
    killed = [trial.number for trial in before if trial.state.name == "RUNNING"]  # none if it ended just before
    finished = len(before) - len(killed)
    assert 2 <= finished < 5

    sweep.main(arguments)
    trials = json.loads((folder / "sweep.json").read_text())["trials"]
    assert [trial["number"] for trial in trials if trial["state"] == "interrupted"] == killed
    for old, new in zip(before[:finished], _study(folder).trials, strict=False):
        assert old.datetime_complete == new.datetime_complete  # not run again
    counted = [trial for trial in trials if trial["state"] != "interrupted"]
    for trial, other in zip(counted, swept[2]["trials"][:5], strict=True):
        assert (trial["parameters"], trial["state"]) == (other["parameters"], other["state"])
        assert trial["score"] == pytest.approx(other["score"], rel=1e-6)


def _study(folder):
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder}/trials.db")


def _states(folder):
    if not (folder / "sweep.json").exists():  # the database is being made
        return []
    return [trial.state.name for trial in _study(folder).trials]


def test_finished_trials_are_kept_more_can_be_added_and_other_settings_are_refused(inputs, tmp_path):
    folder = tmp_path / "out"
    sweep.main(line(folder, inputs, "--rdrop_alpha", "0", "--rdrop_dropout", "0.1", num_trials=1))
    first = json.loads((folder / "sweep.json").read_text())["trials"]
    assert list(first[0]["parameters"]) == ["learning_rate"]
    sweep.main(line(folder, inputs, "--rdrop_alpha", "0", "--rdrop_dropout", "0.1", num_trials=2))
    report = json.loads((folder / "sweep.json").read_text())
    assert report["trials"][:1] == first and len(report["trials"]) == 2
    assert "--rdrop_alpha 0 --rdrop_dropout 0.1" in report["command"]
    files = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="holds another comparison"):
        sweep.main(line(folder, inputs, "--rdrop_alpha", "0", "--rdrop_dropout", "0.2"))
    assert files == {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("script", "metric"), [("run_ner.py", "eval_f1"), ("run_translation.py", "eval_bleu")])
def test_other_scripts(tmp_path, script, metric):
    if script == "run_ner.py":
        train, model = made.ner_rows(40, 0), made.make_encoder(tmp_path / "model", dropout=0.0)
    else:
        train, model = made.translation_rows(40, 0), made.make_seq2seq(tmp_path / "model")
    arguments = ["--train_file", made.write(tmp_path / "t.jsonl", train), "--model_name_or_path", model, *QUICK]
    if script == "run_translation.py":
        arguments += ["--source_lang", "en", "--target_lang", "de", "--predict_with_generate"]
        arguments += ["--val_max_target_length", "12"]
    options = ["--script", script, "--metric", metric, "--num_trials", "2", "--learning_rate", "1e-4", "1e-2"]
    best = sweep.main([*options, "--output_dir", str(tmp_path / "out"), "--", *arguments])
    report = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [trial["state"] for trial in report["trials"]] == ["complete"] * 2 and not report["minimize"]
    assert best["score"] == max(trial["score"] for trial in report["trials"])


# ---- The trials themselves ----


class Recorder(TrainerCallback):
    """What each training begins with."""

    def __init__(self, fail=None):
        self.seen, self.fail = [], fail or {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step:
            return
        rates = {source.rate for source in inspect_dropout(model)}
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        self.seen.append((args.rdrop_alpha, rates, args.learning_rate, weights))

    def on_step_end(self, args, state, control, **kwargs):
        if (error := self.fail.get(len(self.seen))) is not None:
            raise error


def make_trainer(folder, recorder=None, **args):
    fixed = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "epoch"}
    trainer = RDropTrainer(
        model=make_model("single"),
        args=RDropTrainingArguments(str(folder / "unused"), num_train_epochs=2, **fixed, **args),
        train_dataset=make_rows("single", 16),
        eval_dataset=make_rows("single", 11, seed=1),
        data_collator=default_data_collator,
        callbacks=[recorder or Recorder()],
    )
    return trainer


def run(trainer, folder, num_trials, metric="eval_loss", reports=None):
    return run_trials(
        trainer,
        RANGES,
        metric,
        minimize=True,
        num_trials=num_trials,
        seed=3,
        storage=folder / "trials.db",
        console=Console(quiet=True),
        report=(reports if reports is not None else []).append,
    )


def test_each_trial_begins_with_its_own_parameters_and_the_same_weights(tmp_path):
    recorder, reports = Recorder(), []
    trials = run(make_trainer(tmp_path, recorder), tmp_path, 3, reports=reports)
    assert [len(report) for report in reports] == [1, 2, 3] and reports[-1] == trials
    assert len({trial.parameters["rdrop_dropout"] for trial in trials}) == 3
    for trial, (alpha, rates, learning_rate, weights) in zip(trials, recorder.seen, strict=True):
        assert (alpha, learning_rate) == (trial.parameters["rdrop_alpha"], trial.parameters["learning_rate"])
        assert rates == {trial.parameters["rdrop_dropout"]}  # in the modules, and not that of the trial before
        assert weights.equal(recorder.seen[0][3])


def test_a_trial_that_fails_is_reported_and_does_not_sink_the_rest(tmp_path):
    recorder = Recorder({2: torch.OutOfMemoryError("CUDA out of memory")})
    trials = run(make_trainer(tmp_path, recorder), tmp_path, 3)
    assert [trial.state for trial in trials] == ["complete", "failed", "complete"]
    assert trials[1].error == "OutOfMemoryError: CUDA out of memory" and trials[1].score is None
    again = Recorder()
    assert run(make_trainer(tmp_path, again), tmp_path, 3) == trials and again.seen == []  # nor repeated
    assert "failed" in trials[1].describe("eval_loss").lower()


def test_a_diverged_trial_fails(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.compute_metrics = lambda p: {"accuracy": math.nan}
    (trial,) = run(trainer, tmp_path, 1, metric="eval_accuracy")
    assert trial.state == "failed" and trial.error.startswith("FloatingPointError: eval_accuracy is nan")


def test_an_interrupted_trial_is_drawn_again(tmp_path):
    recorder = Recorder({2: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run(make_trainer(tmp_path, recorder), tmp_path, 3)
    trials = run(make_trainer(tmp_path), tmp_path, 3)
    assert [trial.state for trial in trials] == ["complete", "interrupted", "complete", "complete"]
    assert trials[2].parameters == trials[1].parameters != trials[3].parameters


def test_drawn_parameters():
    def draw(seed, number):
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=trial_seed(seed, number)))
        trial = study.ask()
        drawn = draw_parameters(trial, RANGES)
        assert draw_parameters(trial, RANGES) == drawn
        return drawn

    assert draw(0, 1) == draw(0, 1)
    assert draw(0, 1) != draw(1, 0) and draw(0, 1) != draw(0, 2)
    drawn = [draw(seed, 0) for seed in range(60)]
    assert all(float(f"{value:.3g}") == value for row in drawn for value in row.values())
    # on a log scale half of the values lie below the geometric mean, sqrt(1e-4 * 1e-1) = 3.2e-3
    assert 15 < sum(row["learning_rate"] < 3.2e-3 for row in drawn) < 45
    assert 15 < sum(row["rdrop_dropout"] < 0.175 for row in drawn) < 45


# ---- Command line ----


@pytest.mark.parametrize(
    ("options", "after", "message"),
    [
        (["--num_trials", "0"], [], "num_trials must be at least 1"),
        (["--rdrop_alpha", "0", "5"], [], "a log scale has no 0"),
        (["--rdrop_alpha", "-1"], [], "rdrop_alpha must be"),
        (["--rdrop_alpha", "1", "nan"], [], "low before high"),
        (["--rdrop_dropout", "0.3", "0.1"], [], "low before high"),
        (["--rdrop_dropout", "0.1", "0.2", "0.3"], [], "low before high"),
        (["--rdrop_dropout", "0.1", "1"], [], r"lies in \[0, 1\)"),
        (["--learning_rate", "0"], [], "is above 0"),
        (["--rdrop_alpha", "1", "--rdrop_dropout", "0.1", "--learning_rate", "1e-5"], [], "nothing to search"),
        (["--validation_from_train", "1"], [], "less than 1"),
        ([], ["--rdrop_alpha", "1"], "--rdrop_alpha is set .* before the --"),
        ([], ["--output-dir=x"], "--output_dir is set .* before the --"),
        ([], ["--validation_from_train", "0"], "--validation_from_train is set .* before the --"),
        ([], ["--eval_strategy", "steps"], "--eval_strategy is set .* leave it out"),
        ([], ["--do_predict"], "no place in a search"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(options, after, message, tmp_path):
    fixed = ["--script", "run_glue.py", "--metric", "eval_loss", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=message):
        sweep.main([*fixed, *options, "--", *after])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "after", "message"),
    [
        (["--metric", "eval_acuracy"], [], "is not among the results of run_glue.py: .*eval_accuracy"),
        (["--validation_from_train", "0"], [], "--do_eval needs data: give --validation_file"),
        (["--rdrop_dropout", "0"], [], "Nothing in this model is stochastic"),
        ([], ["--model_name_or_path", "nowhere"], "nowhere"),
    ],
)
def test_what_the_data_or_the_model_rule_out_leaves_nothing_behind(options, after, message, inputs, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep.main(line(tmp_path / "out", [*inputs, *after], *options))
    assert os.listdir(tmp_path) == []


def test_given_validation_data_are_judged_on_only_when_asked_for(inputs, tmp_path):
    validation = made.write(tmp_path / "validation.jsonl", made.classification_rows("names", 7, 1))
    both = [*inputs, "--validation_file", validation]
    for share, judged_on in (("0.25", "15 held-out training rows"), ("0", "7 validation rows")):
        folder = tmp_path / share
        sweep.main(line(folder, both, "--validation_from_train", share, num_trials=1))
        report = json.loads((folder / "sweep.json").read_text())
        assert report["judged_on"] == judged_on and "--do_eval" in report["command"]


def test_without_validation_data_the_final_command_does_not_evaluate(swept, inputs):
    assert "--do_eval" not in swept[2]["command"]
    assert "--do_eval" in sweep.final_command(sweep.parse(line("x", ["--task_name", "mrpc"])), {})


# ---- Report ----


def example(minimize=False):
    """Six trials, of which 2 is the best by score, and 4 was pruned with a better one."""
    scores = [0.5, 0.7, 0.8, None, 0.9, 0.6]
    states = ["complete", "complete", "complete", "failed", "pruned", "complete"]
    return Sweep(
        "run_glue.py",
        "eval_accuracy",
        minimize,
        "200 held-out training rows",
        [
            Trial(
                number,
                state,
                {"rdrop_alpha": 0.1 * 2**number, "learning_rate": 1e-5 * (number + 1)},
                score,
                [] if score is None else [(10, score)],
                60.0,
                "ValueError: a | b" if state == "failed" else None,
            )
            for number, (score, state) in enumerate(zip(scores, states, strict=True))
        ],
    )


def test_ranking_and_table():
    assert [trial.number for trial in example().ranked] == [
        2,
        1,
        5,
        0,
    ]  # 4 was not trained to the end
    assert [trial.number for trial in example(minimize=True).ranked] == [0, 5, 1, 2]
    text = markdown(example(), "python x")
    rows = [row for row in text.splitlines() if row.startswith("| ")][2:]
    assert rows[0] == "| 2 | 0.8000 | 0.4 | 3e-05 | complete | 60.0 |" and rows[-1].startswith("| 3 |  | 0.8 |")
    assert [row.split(" | ")[0] for row in rows] == ["| 2", "| 1", "| 5", "| 0", "| 4", "| 3"]
    assert "4 complete, 1 failed, 1 pruned" in text and "- trial 3: ValueError: a | b" in text and "python x" in text
    console = Console(record=True, width=80, quiet=True)
    assert len(terminal_table(example(), rows=3).rows) == 3
    console.print(terminal_table(example()))


def test_plot_shows_the_score_over_every_parameter_and_the_best_so_far(tmp_path, monkeypatch):
    from sweeping import report

    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    plot(example(), Path(tmp_path / "plot.png"), ["rdrop_alpha", "learning_rate"])
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    (figure,) = figures
    assert [axis.get_xlabel() for axis in figure.axes] == ["alpha", "learning rate", "trial"]
    assert [axis.get_xscale() for axis in figure.axes] == ["log", "log", "linear"]
    (best_so_far,) = figure.axes[-1].lines
    assert list(best_so_far.get_ydata()) == [0.5, 0.7, 0.8, 0.8, 0.8]
    points = sorted(y for dots in figure.axes[0].collections for _, y in dots.get_offsets())
    assert points == [0.5, 0.6, 0.7, 0.8, 0.9]
