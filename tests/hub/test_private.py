"""What a published copy says: no token, no folder of this machine, not its name; and everything else as it was."""

import json
import socket
from pathlib import Path

import pytest

from hf_rdrop import RDropTrainingArguments
from hf_rdrop.hub.private import Private


@pytest.fixture
def private(tmp_path):
    return Private(["hf_secret", None, ""], [tmp_path / "my run", tmp_path])


def test_prose(private, tmp_path):
    run = tmp_path / "my run"
    text = f"Saved in {run}/checkpoint-1 by hf_secret, not in {tmp_path}-old or /x{tmp_path}; see {tmp_path}."
    found = private.clean_text(text)
    assert found == (
        f"Saved in my run/checkpoint-1 by [token], not in {tmp_path}-old or /x{tmp_path}; see {tmp_path.name}."
    )
    assert private.clean_text("and/or, 1/2, root\\n") == "and/or, 1/2, root\\n"


def test_settings(private, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "bert").mkdir(parents=True)
    settings = {
        "model": str(tmp_path / "models" / "bert"),
        "relative": "models/bert",
        "hub": "google-bert/bert-base-cased",
        "missing": "/data/of/somebody/train.csv",
        "logs": f"Nov21_{socket.gethostname()}",
        "nested": [{"token": "hf_secret"}, ("a", 1)],
        "id2label": {"0": "and/or"},
        "rate": 0.1,
        "none": None,
        "long": "word " * 10_000,
    }
    assert private.clean(settings) == {
        **settings,
        "model": "bert",
        "relative": "bert",
        "missing": "train.csv",
        "logs": "Nov21_host",
        "nested": [{"token": "[token]"}, ("a", 1)],
    }


def test_root_is_no_folder_to_hide():
    assert Private([], [Path("/")]).clean_text("a/b and / and /c") == "a/b and / and /c"


def test_arguments(private, tmp_path):
    args = RDropTrainingArguments(
        str(tmp_path / "my run"), hub_token="hf_secret", rdrop_alpha=3.0, use_cpu=True, run_name=str(tmp_path)
    )
    cleaned = private.clean_args(args)
    assert (cleaned.output_dir, cleaned.hub_token, cleaned.run_name) == ("my run", None, tmp_path.name)
    assert (cleaned.rdrop_alpha, cleaned.learning_rate) == (3.0, args.learning_rate)
    assert args.output_dir == str(tmp_path / "my run") and args.hub_token == "hf_secret"


def test_copy_folder(private, tmp_path):
    run, copied = tmp_path / "my run", tmp_path / "copied"
    vocabulary = json.dumps({"model": {"vocab": [[str(tmp_path), 0.5]]}})
    files = {
        "README.md": f"# Card\n{run}\n",
        "config.json": json.dumps({"_name_or_path": str(run), "layers": 2}),
        "plain.json": '{"layers":   2}',
        "broken.json": f'{{"path": "{run}"',
        "tokenizer.json": vocabulary,
        "model.safetensors": "weights",
        "optimizer.pt": "state",
        "training_args.bin": "hf_secret",
        "events.out.tfevents.1.x.2": "logs",
        f"log-{socket.gethostname()}.txt": "a",
        "runs/a/b": "logs",
        "_staging/c": "x",
        "checkpoint-5/model.safetensors": "x",
        "1_Pooling/config.json": json.dumps({"path": str(run)}),
    }
    for name, text in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    private.copy_folder(run, copied)
    found = {str(path.relative_to(copied)): path.read_text() for path in copied.rglob("*") if path.is_file()}
    assert found.pop("README.md") == "# Card\nmy run\n"
    assert json.loads(found.pop("config.json")) == {"_name_or_path": "my run", "layers": 2}
    assert json.loads(found.pop("1_Pooling/config.json")) == {"path": "my run"}
    kept = ("plain.json", "tokenizer.json", "model.safetensors", "optimizer.pt")
    assert found.pop("broken.json") == '{"path": "my run"'
    assert found == {name: files[name] for name in kept}
    assert (copied / "model.safetensors").samefile(run / "model.safetensors")  # no second copy of the weights
    assert {str(path.relative_to(run)): path.read_text() for path in run.rglob("*") if path.is_file()} == files

    private.copy_folder(run, tmp_path / "light", weights=False)
    assert {path.name for path in (tmp_path / "light").iterdir() if path.is_file()} == {
        *("README.md", "config.json", "plain.json", "broken.json", "tokenizer.json")
    }
