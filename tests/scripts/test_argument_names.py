"""Arguments that Transformers 5 renamed, and metrics that a run will not have: told before the first step."""

import json

import pytest
import transformers
from packaging.version import Version
from transformers import TrainingArguments

import run_glue
import run_ner
from finetuning.renamed import RENAMED
from support import script_data as made
from support.script_runs import arguments, classification, write_splits


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (["--group_by_length"], "--train_sampling_strategy group_by_length"),
        (["--overwrite_output_dir", "true"], "another --output_dir"),
        (["--logging-dir=x"], "TENSORBOARD_LOGGING_DIR"),
        (["--evaluation_strategy", "epoch"], "--eval_strategy"),
        (["--no_cuda"], "--use_cpu"),
        (["--warmup_ratio", "0.1"], "--warmup_steps"),
    ],
)
def test_renamed_arguments(tmp_path, encoder, given, word):
    name = given[0].removeprefix("--").partition("=")[0].replace("-", "_")
    if name in TrainingArguments.__dataclass_fields__:
        pytest.skip(f"transformers {transformers.__version__} still has {name}")
    with pytest.raises(ValueError, match=f"no argument of Transformers 5 any more: .*{word}"):
        run_glue.main(arguments(tmp_path, ["x"], encoder, *given))
    if "=" not in given[0]:
        file = tmp_path / "arguments.json"
        file.write_text(json.dumps({given[0].removeprefix("--"): True}))
        with pytest.raises(ValueError, match=word):
            run_glue.main([str(file)])


def test_what_is_told_of_is_gone_and_what_took_its_place_is_there():
    known = TrainingArguments.__dataclass_fields__
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("earlier releases still have some of them")
    assert not set(RENAMED) & set(known)
    for told in RENAMED.values():
        for word in told.split():
            name = word.removeprefix("--").rstrip(",:")
            assert not word.startswith("--") or name in known, word


@pytest.mark.parametrize(
    ("kind", "named"), [("names", "f1_macro"), ("regression", "pearson"), ("multi-label", "f1_micro")]
)
def test_metric_that_a_run_of_glue_will_not_have(tmp_path, encoder, kind, named):
    files = write_splits(tmp_path, classification(kind))
    more = ["--eval_strategy", "epoch", "--metric_for_best_model"]
    with pytest.raises(ValueError, match=f"--metric_for_best_model f1: .*no such metric.*{named}"):
        run_glue.main(arguments(tmp_path, files, encoder, *more, "f1"))
    assert not (tmp_path / "out").exists()
    run_glue.main(arguments(tmp_path, files, encoder, *more, f"eval_{named}", steps="do_train do_eval"))


def test_metric_that_a_run_of_tags_will_not_have(tmp_path, encoder):
    files = write_splits(tmp_path, made.ner_rows)
    with pytest.raises(ValueError, match=r"person_f: .*did you mean 'person_f1'.*accuracy"):
        run_ner.main(arguments(tmp_path, files, encoder, "--metric_for_best_model=person_f",
                               "--return_entity_level_metrics"))  # fmt: skip
    words = [{"tokens": ["a", "b"], "ner_tags": ["N", "V"]}] * 4
    with pytest.raises(ValueError, match=r"f1: .*It has: loss, accuracy\."):
        file = made.write(tmp_path / "words.jsonl", words)
        run_ner.main(arguments(tmp_path, [file] * 3, encoder, "--metric_for_best_model=f1"))
