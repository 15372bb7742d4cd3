"""--consistency_samples of the scripts, and consistency.py over several models; tiny models and data."""

import json
import math

import pytest
from PIL import Image

import consistency
import run_glue
import run_ner
import run_translation
from finetuning.command_line import without_folders
from reporting.consistency import choose_score, markdown_table, plot
from support import script_data as made

ARGUMENTS = [
    *("--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no", "--report_to", "none", "--max_steps", "3"),
    *("--learning_rate", "1e-3", "--consistency_samples", "3", "--per_device_eval_batch_size", "16"),
]
CASES = {
    "glue": (run_glue, lambda rows, seed: made.classification_rows("names", rows, seed), "f1_macro"),
    "pairs": (run_glue, lambda rows, seed: made.classification_rows("multi-label", rows, seed), "subset_accuracy"),
    "regression": (run_glue, lambda rows, seed: made.classification_rows("regression", rows, seed), "pearson"),
    "ner": (run_ner, made.ner_rows, "f1"),
    "translation": (run_translation, made.translation_rows, "accuracy"),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"encoder": made.make_encoder(folder / "encoder"), "seq2seq": made.make_seq2seq(folder / "seq2seq")}


def arguments(case, folder, models, *more, output="out", train=True):
    """A command line over made-up files; `more` comes last, and wins."""
    _, rows, _ = CASES[case]
    files = [
        made.write(folder / f"{split}.jsonl", rows(size, seed))
        for seed, (split, size) in enumerate({"train": 24, "validation": 12}.items())
    ]
    model = models["seq2seq" if case == "translation" else "encoder"]
    argv = [f"--validation_file={files[1]}", f"--model_name_or_path={model}", "--do_eval", *ARGUMENTS]
    argv += [f"--train_file={files[0]}", "--do_train"] if train else []
    argv += ["--source_lang=en", "--target_lang=de"] if case == "translation" else []
    return [*argv, f"--output_dir={folder / output}", *more]


def read(file):
    return json.loads(file.read_text())


@pytest.mark.parametrize("case", CASES)
def test_scripts_measure_consistency(tmp_path, models, case):
    script, _, metric = CASES[case]
    returned = script.main(arguments(case, tmp_path, models, "--bf16" if case == "ner" else "--seed=7"))
    results = read(tmp_path / "out" / "eval_results.json")
    names = {name.removeprefix("eval_consistency_") for name in results if "consistency" in name}
    assert {"kl_between", "kl_to_off", "kl_ensemble", "loss_off", "loss_sub", "loss_std", "loss_ensemble"} <= names
    assert {f"{metric}_{form}" for form in ("off", "sub", "std", "ensemble")} <= names
    assert ("accuracy_off" in names) == (case != "regression")
    assert all(math.isfinite(results[f"eval_consistency_{name}"]) for name in names)
    assert results["eval_consistency_kl_between"] > 1e-6
    # with dropout off it is the evaluation itself
    assert results["eval_consistency_loss_off"] == pytest.approx(
        results["eval_loss"], rel=1e-2 if case == "ner" else 1e-5
    )
    if f"eval_{metric}" in results:
        assert results[f"eval_consistency_{metric}_off"] == pytest.approx(results[f"eval_{metric}"])
    curves = read(tmp_path / "out" / "consistency.json")["validation"]
    assert curves["num_samples"] == 3 and len(curves["ensembles_to_dropout_off"]) == 3
    assert curves["scores"][metric]["ensembles"][-1] == results[f"eval_consistency_{metric}_ensemble"]
    assert returned["eval_consistency_kl_between"] == curves["between_sub_models"]


def test_saved_model_measures_as_at_the_end_of_its_training(tmp_path, models):
    """Also after training with economies: none of their hooks is left at work."""
    economies = ["--rdrop_shared_layers", "1", "--rdrop_interval", "2", "--rdrop_dropout", "0.3"]
    at_end = run_ner.main(arguments("ner", tmp_path, models, *economies))
    again = run_ner.main(
        arguments("ner", tmp_path, models, "--model_name_or_path", str(tmp_path / "out"), output="again", train=False)
    )
    found = {name: value for name, value in at_end.items() if "consistency" in name}
    assert len(found) > 10 and found == pytest.approx({name: again[name] for name in found}, rel=1e-5)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--consistency_samples", "1"], "--consistency_samples must be 0 or at least 2"),
        (["--consistency_samples", "-4"], "--consistency_samples must be 0 or at least 2"),
        (["--do_eval", "false"], "give --do_eval too"),
        (["--rdrop_dropout", "0", "--rdrop_alpha", "0"], "has no dropout"),
    ],
)
def test_refused_before_training(tmp_path, models, more, message):
    with pytest.raises(ValueError, match=message):
        run_glue.main(arguments("glue", tmp_path, models, *more))
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(tmp_path, models, monkeypatch):
    start = run_glue.GlueTrainer.__init__

    def start_as_one_of_two(self, *, args, **rest):
        monkeypatch.setattr(type(args), "world_size", 2)
        start(self, args=args, **rest)

    monkeypatch.setattr(run_glue.GlueTrainer, "__init__", start_as_one_of_two)
    with pytest.raises(ValueError, match=r"was given to 2 processes.*measure the saved model in one process"):
        run_glue.main(arguments("glue", tmp_path, models))
    assert not (tmp_path / "out").exists()


# ---- consistency.py ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory, models):
    """A folder with baseline, r-drop and dev.jsonl, of text classification."""
    folder = tmp_path_factory.mktemp("trained")
    for name, alpha in (("baseline", "0"), ("r-drop", "1")):
        off = ["--consistency_samples", "0"]
        run_glue.main(arguments("glue", folder, models, "--rdrop_alpha", alpha, *off, output=name))
    assert not (folder / "baseline" / "consistency.json").exists()
    return folder


def command(folder, *more, models=("baseline", "r-drop")):
    given = [f"{name}={folder / name}" for name in models]
    script = ["--script", "run_glue.py", "--models", *given, "--num_samples", "3"]
    data = [f"--validation_file={folder / 'validation.jsonl'}", "--use_cpu", "--disable_tqdm", "true"]
    return [*script, *more, "--", *data]


def test_models_side_by_side(tmp_path, trained, capsys):
    output = tmp_path / "out"
    returned = consistency.main(command(trained, "--output_dir", str(output), "--score", "f1_macro"))
    results = read(output / "consistency.json")
    assert results == json.loads(json.dumps(returned)) and list(returned["models"]) == ["baseline", "r-drop"]
    assert results["score"] == "f1_macro" and results["num_samples"] == 3
    table = (output / "consistency.md").read_text()
    assert table in capsys.readouterr().out
    assert "Data: validation, 12 items." in table and "| f1_macro: ensemble of 3 |" in table
    for name in ("baseline", "r-drop"):
        measured = results["models"][name]["validation"]
        assert measured == read(output / name / "consistency.json")["validation"]
        assert measured["scores"]["loss"]["dropout_off"] == pytest.approx(
            read(trained / name / "eval_results.json")["eval_loss"], rel=1e-5
        )
        (row,) = (line.split(" | ") for line in table.splitlines() if line.startswith(f"| {name} "))
        assert row[3] == f"{measured['scores']['loss']['ensembles'][-1]:.4f}"
        assert float(row[7]) == pytest.approx(measured["between_sub_models"], rel=1e-2)
    with Image.open(output / "consistency.png") as picture:
        assert picture.size[0] > 1000 and len(picture.convert("RGB").getcolors(1_000_000)) > 10
    consistency.main(command(trained, "--output_dir", str(output)))  # once more, into the same folder
    assert read(output / "consistency.json")["score"] == "accuracy"


def test_plot_of_several_validation_sets(tmp_path, trained, monkeypatch):
    measured = {"num_samples": 2, "items": 4, "between_sub_models": 0.2, "to_dropout_off": 0.1}
    measured["ensembles_to_dropout_off"] = [0.1, 0.05]
    score = {"dropout_off": 0.5, "mean": 0.6, "std": 0.1, "sub_models": [0.5, 0.7], "ensembles": [0.5, 0.4]}
    measured["scores"] = {"loss": score, "pearson": score}
    models = {name: {"matched": measured, "mismatched": measured} for name in "abcdefgh"}
    figures = []
    monkeypatch.setattr("reporting.consistency.save", lambda figure, path: figures.append(figure))
    plot(models, choose_score(models["a"], None), tmp_path / "x.png")
    axes = figures[0].axes
    titles = [axis.get_title() for axis in axes]
    assert len(axes) == 6 and titles[1] == "pearson (matched)" and titles[3] == "loss (mismatched)"
    # of each model the ensembles, the mean of sub-models and, in panels of scores, dropout off
    assert [len(axis.lines) for axis in axes[:3]] == [24, 24, 16]
    assert [list(line.get_ydata()) for line in axes[2].lines[:2]] == [[0.1, 0.1], [0.1, 0.05]]
    table = markdown_table(models, "pearson")
    assert "KL" not in table and titles[2] == "squared difference to dropout off (matched)"
    assert table.count("\n| a |") == 2 and "Data: mismatched" in table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--num_samples", "1"], "--num_samples must be at least 2"),
        (["--models", "outputs/x"], "give NAME=FOLDER"),
        (["--models", "../x=y"], "give NAME=FOLDER"),
        (["--models", "a=nowhere"], "nowhere is no folder of a saved model"),
        (["--", "--seed", "1"], "no data"),
        (["--", "--task_name", "mrpc", "--do_train"], "--do_train is set for each model"),
        (["--", "--task_name", "mrpc", "--output_dir=x"], "--output_dir is set for each model"),
        (["--", "--task-name", "mrpc", "--output-dir=x"], "--output_dir is set for each model"),
    ],
)
def test_command_lines_that_are_refused(tmp_path, trained, change, message):
    argv = command(trained, "--output_dir", str(tmp_path / "out"))
    if change[0] == "--":
        argv = [*argv[: argv.index("--")], *change]
    else:
        argv[argv.index("--") : argv.index("--")] = change
    with pytest.raises(ValueError, match=message):
        consistency.main(argv)
    assert not (tmp_path / "out").exists()


def test_results_can_be_shown_without_the_folders_of_this_machine(tmp_path):
    (tmp_path / "dev.csv").touch()
    given = ["--task_name", "mrpc", f"--validation_file={tmp_path / 'dev.csv'}", str(tmp_path / "dev.csv"), "--bf16"]
    shown = ["--task_name", "mrpc", "--validation_file=dev.csv", "dev.csv", "--bf16"]
    assert [without_folders(argument) for argument in given] == shown


def test_same_name_twice_and_folders_of_others(tmp_path, trained):
    with pytest.raises(ValueError, match="names 'baseline' twice"):
        consistency.main(command(trained, "--output_dir", str(tmp_path), models=("baseline", "baseline")))
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.tex\)"):
        consistency.main(command(trained, "--output_dir", str(tmp_path)))
    with pytest.raises(ValueError, match="is a file"):
        consistency.main(command(trained, "--output_dir", str(tmp_path / "thesis.tex")))
    with pytest.raises(ValueError, match=r"--score f1macro was not measured \(did you mean 'f1_macro'\?\)"):
        consistency.main(command(trained, "--output_dir", str(tmp_path / "out"), "--score", "f1macro"))
