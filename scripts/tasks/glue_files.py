"""GLUE's files as they were first distributed: folders, names of columns, and CoLA without a header."""

from pathlib import Path

from datasets import Dataset

from finetuning.files import FORMATS, read_table, read_text

FOLDERS = {"cola": "CoLA", "mnli": "MNLI", "mrpc": "MRPC", "qnli": "QNLI", "qqp": "QQP", "rte": "RTE", "sst2": "SST-2",
           "stsb": "STS-B", "wnli": "WNLI"}  # fmt: skip
# Columns by task: their names there and on the Hub.
RENAMED = {
    "mnli": {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
    "mrpc": {"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"},
    "qqp": {"is_duplicate": "label"},
    "stsb": {"score": "label"},
}
_COLA = ["source", "label", "star", "sentence"]


def read_glue(path: str, task: str, delimiter: str | None = None) -> Dataset:
    """Read a file of a GLUE task; columns with the names of the original files get those of the Hub.

    Raises:
        ValueError: with the file, and the line where the fault is.
    """
    file = Path(path).expanduser()
    if task == "cola" and file.suffix == ".tsv" and file.is_file() and (rows := _cola_rows(file)) is not None:
        return Dataset.from_list(rows)
    dataset = read_table(path, FORMATS, delimiter)
    names = RENAMED.get(task, {})
    if not set(names.values()) <= set(dataset.column_names):
        present = {old: new for old, new in names.items() if old in dataset.column_names}
        clash = [new for new in present.values() if new in dataset.column_names]
        dataset = dataset.remove_columns(clash).rename_columns(present)
    return dataset


def _cola_rows(file: Path) -> list[dict[str, str]] | None:
    """Return the rows of CoLA's file without a header; None for one with a header."""
    lines = [line.rstrip("\r") for line in read_text(file).split("\n")]
    first = lines[0].split("\t")
    if len(first) != len(_COLA) or first[1] not in ("0", "1"):
        return None
    rows = []
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if line and len(fields) != len(_COLA):
            raise ValueError(
                f"{file}, line {number}: {len(fields)} fields, but CoLA's lines have {len(_COLA)}, parted by tabs "
                f"({', '.join(_COLA)}). Correct or remove the line."
            )
        if line:
            rows.append(dict(zip(_COLA, fields, strict=True)))
    return rows


def find_file(folder: str, task: str, split: str) -> str:
    """Return the file of a split in GLUE's folder, or in the task's own folder.

    Raises:
        ValueError: it is not there.
    """
    root = Path(folder).expanduser()
    name = f"{split.replace('validation', 'dev')}.tsv"
    places = [root / FOLDERS[task] / name, root / task / name, root / name]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(
            f"--glue_dir {folder} holds no {FOLDERS[task]}/{name} and no {name}: give the folder that the GLUE data "
            "were unpacked into, or the task's own."
        )
    return str(found)
