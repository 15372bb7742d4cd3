"""GLUE's files as they were first distributed."""

import pytest

import run_glue
from support import script_data as made
from support.script_runs import arguments
from tasks.glue import GLUE_TASKS
from tasks.glue_files import FOLDERS

HEADERS = {
    "sst2": "sentence label",
    "mrpc": "Quality,#1 ID,#2 ID,#1 String,#2 String",
    "stsb": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
    "qqp": "id qid1 qid2 question1 question2 is_duplicate",
    "mnli": "index promptID pairID sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label",
    "qnli": "index question sentence label",
    "rte": "index sentence1 sentence2 label",
    "wnli": "index sentence1 sentence2 label",
}
TEXTS = {"sentence", "sentence1", "sentence2", "#1 String", "#2 String", "question1", "question2", "question"}


def write_task(folder, task, test=False):
    """A folder with train.tsv, dev.tsv and test.tsv in the task's own layout."""
    folder.mkdir(parents=True)
    names = GLUE_TASKS[task][1]
    labels = names if task in ("mnli", "qnli", "rte") else ["0", "1"] if names else ["1.25", "4.5"]
    suffixes = ("_matched", "_mismatched") if task == "mnli" else ("",)
    for split in ("train", "dev", "test"):
        for suffix in suffixes if split != "train" else ("",):
            rows = made.sentences(12, len(split + suffix))
            lines = []
            if task == "cola" and split != "test":
                lines = [f'gj04\t{label}\t{"" if label else "*"}\t"{text}' for text, label in rows]
            elif task == "cola":
                lines = ["index\tsentence", *(f"{i}\t{text}" for i, (text, _) in enumerate(rows))]
            else:
                header = HEADERS[task].split("," if "," in HEADERS[task] else " ")
                header = [h for h in header if split != "test" or h not in ("label", "score", "gold_label", "Quality",
                                                                            "is_duplicate", "label1")]  # fmt: skip
                lines = ["\t".join(header)]
                for i, (text, _) in enumerate(rows):
                    label = labels[i % len(labels)]
                    gold = ("label", "label1", "gold_label", "score", "Quality", "is_duplicate")
                    lines.append("\t".join(text if h in TEXTS else label if h in gold else f"{i}" for h in header))
            (folder / f"{split}{suffix}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("task", list(FOLDERS))
def test_original_folders(tmp_path, encoder, caplog, task):
    write_task(tmp_path / "glue" / FOLDERS[task], task)
    more = ("--task_name", task, "--glue_dir", tmp_path / "glue", "--max_steps", 1)
    returned = run_glue.main(arguments(tmp_path, [], encoder, *more))
    assert returned["train_samples"] == returned["eval_samples"] == returned["predict_samples"] == 12
    assert ("eval_accuracy_mm" in returned) == (task == "mnli")
    assert "Read as text: " + " + ".join(GLUE_TASKS[task][0]) in caplog.text


@pytest.mark.parametrize("task", ["cola", "mrpc", "stsb"])
def test_single_files_are_known_by_the_task(tmp_path, encoder, task):
    folder = write_task(tmp_path / "files", task)
    files = [str(folder / f"{split}.tsv") for split in ("train", "dev", "test")]
    returned = run_glue.main(arguments(tmp_path, files, encoder, "--task_name", task, "--max_steps", 1))
    assert returned["eval_samples"] == returned["predict_samples"] == 12


def test_what_does_not_fit_is_named(tmp_path, encoder):
    folder = write_task(tmp_path / "CoLA", "cola")
    lines = (folder / "train.tsv").read_text().splitlines()
    (folder / "train.tsv").write_text("\n".join([*lines[:4], "gj04\t1", *lines[4:]]))
    more = ["--task_name", "cola", "--glue_dir"]
    with pytest.raises(ValueError, match=r"train.tsv, line 5: 2 fields, but CoLA's lines have 4"):
        run_glue.main(arguments(tmp_path, [], encoder, *more, folder))
    with pytest.raises(ValueError, match=r"holds no CoLA/train.tsv and no train.tsv"):
        run_glue.main(arguments(tmp_path, [], encoder, *more, tmp_path / "none"))
    with pytest.raises(ValueError, match="--glue_dir holds the data of --task_name"):
        run_glue.main(arguments(tmp_path, [], encoder, "--glue_dir", folder))
    qqp = write_task(tmp_path / "QQP", "qqp")
    text = (qqp / "train.tsv").read_text().splitlines()
    (qqp / "train.tsv").write_text("\n".join([*text, "12\t1\t2\tonly one question"]))
    with pytest.raises(ValueError, match=r"line 14: 4 fields, but the header has 6.*parted by tabs"):
        run_glue.main(arguments(tmp_path, [], encoder, "--task_name", "qqp", "--glue_dir", qqp))
