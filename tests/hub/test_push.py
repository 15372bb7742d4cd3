"""Pushing to the Hub with the real client, against the tests' own Hub: what arrives, what must not, and what fails."""

import io
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MarianMTModel,
    TrainerCallback,
)

import run_glue
import run_ner
import run_translation
from hf_rdrop import RDropSeq2SeqTrainer, RDropSeq2SeqTrainingArguments, RDropTrainer, RDropTrainingArguments
from support import script_data as made
from support.faults import push_and_wait, start, wait_for
from support.hub_server import Hub, environment, use_hub
from support.training import make_collator, make_model, make_rows

MODEL = "tester/model"
USER, HOST = "leakyuser", "leaky-host"


@pytest.fixture
def home(tmp_path):
    """A home folder with a name to look for."""
    (tmp_path / "home" / USER).mkdir(parents=True)
    return tmp_path / "home" / USER


@pytest.fixture
def hub(home, monkeypatch):
    with Hub() as hub:
        hub.waits = use_hub(hub, home / "cache", monkeypatch)
        yield hub


def build(folder, head="single", model=None, callbacks=None, tokenizer=None, trainer_class=None, **args):
    """A trainer that pushes to MODEL and has not trained yet: four steps, everything in `folder`."""
    seq2seq = head == "seq2seq"
    trainer_class = trainer_class or (RDropSeq2SeqTrainer if seq2seq else RDropTrainer)
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "push_to_hub": True,
        "hub_model_id": MODEL,
        "hub_always_push": True,  # otherwise a push is left out while the one before it runs
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    model = model or make_model(head)
    return trainer_class(
        model=model,
        args=(RDropSeq2SeqTrainingArguments if seq2seq else RDropTrainingArguments)(**{**defaults, **args}),
        train_dataset=make_rows(head, 32),
        eval_dataset=make_rows(head, 8, seed=1),
        data_collator=make_collator(head, model),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def local_files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def assert_same_state(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.equal(two[name]), name


def pushed_weights(hub, path="model.safetensors", revision="main"):
    return load(hub.files(MODEL, revision)[path])


class StopAt(TrainerCallback):
    """Ends the training after a step, as an interruption does, with that step's checkpoint saved."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


# ---- What arrives ----


@pytest.mark.parametrize(
    ("strategy", "folders", "commits"),
    [
        ("end", set(), 1),
        ("every_save", set(), 3),
        ("checkpoint", {"last-checkpoint"}, 5),
        ("all_checkpoints", {"checkpoint-2", "checkpoint-4"}, 5),
    ],
)
def test_hub_strategies(hub, tmp_path, strategy, folders, commits):
    trainer = build(tmp_path / "out", hub_strategy=strategy, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.push_to_hub()
    files = hub.files(MODEL)
    assert {path.split("/")[0] for path in files if "/" in path} == folders
    assert {"config.json", "model.safetensors", "training_args.bin", "README.md"} <= files.keys()
    for folder in folders:
        assert {f"{folder}/{name}" for name in ("optimizer.pt", "trainer_state.json", "rng_state.pth")} <= files.keys()
        step = json.loads(files[f"{folder}/trainer_state.json"])["global_step"]
        assert step == (4 if folder == "last-checkpoint" else int(folder[-1]))
    assert len(hub.titles(MODEL)) == 1 + commits
    assert not folders_left(tmp_path / "out")
    assert_same_state(pushed_weights(hub), trainer.model.state_dict())
    assert_same_state(
        AutoModelForSequenceClassification.from_pretrained(MODEL).state_dict(), trainer.model.state_dict()
    )


def test_save_model_pushes_and_the_folder_names_the_repository(hub, tmp_path):
    trainer = build(tmp_path / "my-run", hub_model_id=None)
    trainer.train()
    trainer.save_model()
    assert hub.titles("tester/my-run")[-1] == "Model save"
    assert_same_state(load(hub.files("tester/my-run")["model.safetensors"]), trainer.model.state_dict())


def test_sequence_to_sequence(hub, tmp_path):
    trainer = build(tmp_path / "out", "seq2seq", hub_strategy="end")
    trainer.train()
    trainer.push_to_hub()
    model = MarianMTModel.from_pretrained(MODEL)
    assert_same_state(model.state_dict(), trainer.model.state_dict())


def test_a_private_repository(hub, tmp_path):
    trainer = build(tmp_path / "out", hub_private_repo=True)
    trainer.train()
    trainer.push_to_hub()
    assert HfApi().model_info(MODEL).private is True
    model = AutoModelForSequenceClassification.from_pretrained(MODEL)
    assert_same_state(model.state_dict(), trainer.model.state_dict())
    with pytest.raises(OSError, match=r"token|private"):
        AutoModelForSequenceClassification.from_pretrained(MODEL, token=False, cache_dir=tmp_path / "other")


@pytest.mark.parametrize("exists", [True, False])
def test_a_branch(hub, tmp_path, exists):
    HfApi().create_repo(MODEL)
    if exists:
        HfApi().create_branch(MODEL, branch="alpha-1")
    trainer = build(
        tmp_path / "out", hub_revision="alpha-1", hub_strategy="checkpoint", save_strategy="steps", save_steps=2
    )
    trainer.train()
    trainer.push_to_hub()
    assert hub.files(MODEL) == {}
    assert any(path.startswith("last-checkpoint/") for path in hub.files(MODEL, "alpha-1"))
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, revision="alpha-1")
    assert_same_state(model.state_dict(), trainer.model.state_dict())


def test_training_goes_on_from_the_last_checkpoint_on_the_hub(hub, tmp_path):
    saving = {"hub_strategy": "checkpoint", "save_strategy": "steps", "save_steps": 2}
    whole = build(tmp_path / "whole", push_to_hub=False, **(saving | {"save_strategy": "no"}))
    whole.train()
    first = build(tmp_path / "first", callbacks=[StopAt(2)], **saving)
    first.train()
    assert first.state.global_step == 2

    folder = snapshot_download(MODEL, allow_patterns="last-checkpoint/*", local_dir=tmp_path / "fetched")
    shutil.rmtree(tmp_path / "first")
    second = build(tmp_path / "second", **saving)
    second.train(resume_from_checkpoint=f"{folder}/last-checkpoint")
    assert second.state.global_step == 4
    assert_same_state(second.model.state_dict(), whole.model.state_dict())
    assert [entry["step"] for entry in second.state.log_history][-1] == 4


def test_an_adapter_alone(hub, tmp_path):
    peft = pytest.importorskip("peft")
    base = str(tmp_path / "base")
    make_model("single").save_pretrained(base)

    def load_base():
        return AutoModelForSequenceClassification.from_pretrained(base)

    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
    trainer = build(
        tmp_path / "out",
        model=peft.get_peft_model(load_base(), lora),
        hub_strategy="checkpoint",
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    trainer.push_to_hub()
    files = hub.files(MODEL)
    assert {"adapter_config.json", "adapter_model.safetensors", "last-checkpoint/adapter_model.safetensors"} <= set(
        files
    )
    assert not [
        path for path in files if path.endswith(("model.safetensors", "pytorch_model.bin")) and "adapter" not in path
    ]
    assert all("lora" in name or "classifier" in name for name in load(files["adapter_model.safetensors"]))
    loaded = peft.PeftModel.from_pretrained(load_base(), MODEL)
    assert_same_state(loaded.state_dict(), trainer.model.state_dict())


# ---- What must not arrive ----


def pieces(content):
    """A file's bytes, and those of its members where it is a zip archive (as files of `torch.save` are)."""
    yield content
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.infolist():
                yield member.filename.encode()
                yield archive.read(member)


def leaks(hub, *words):
    """Where any of the words stands in a stored content, a file's name or a commit's title: `where: word`, sorted."""
    words = [str(word) for word in words]
    found, names = set(), {}
    for repo in hub.repos.values():
        for branch, history in repo.branches.items():
            for commit in history:
                for text in (commit.title, *commit.files):
                    found |= {f"{repo.id}@{branch}, name {text}: {word}" for word in words if word in text}
                for path, file in commit.files.items():
                    names.setdefault(file.sha256, set()).add(path)
    for sha256, content in hub.contents.items():
        where = sorted(names.get(sha256, {"not committed"}))
        found |= {f"{where}: {word}" for word in words for piece in pieces(content) if word.encode() in piece}
    return sorted(found)


@pytest.fixture
def secrets(hub, home, tmp_path, monkeypatch):
    """A user, a host and a folder with names to look for, beside the real ones; returns all there is to hide."""
    real = [f"{Path.home()}/", f"{Path.cwd()}/", f"/{Path.home().name}/", f"{tempfile.gettempdir()}/"]
    real += [socket.gethostname()]
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", USER)
    monkeypatch.setenv("LOGNAME", USER)
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    (home / "work").mkdir()
    monkeypatch.chdir(home / "work")
    real = [word for word in real if len(word) > 3 and word != "localhost"]  # not what stands anywhere
    return [*real, tmp_path, USER, HOST, hub.token]


def test_the_search_for_leaks_finds_them(hub, tmp_path):
    api = HfApi()
    api.create_repo(MODEL)
    assert leaks(hub, USER) == []
    stream = io.BytesIO()
    torch.save({"output_dir": f"/home/{USER}/out"}, stream)
    api.upload_file(path_or_fileobj=stream.getvalue(), path_in_repo="training_args.bin", repo_id=MODEL)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("state.json", f"/home/{USER}/out" * 20)
    api.create_branch(MODEL, branch="other")
    api.upload_file(path_or_fileobj=stream.getvalue(), path_in_repo="a.zip", repo_id=MODEL, revision="other")
    api.upload_file(path_or_fileobj=b"text", path_in_repo=f"runs/{USER}/events", repo_id=MODEL)
    api.delete_file(f"runs/{USER}/events", MODEL, commit_message="away")
    assert leaks(hub, USER) == [
        f"['a.zip']: {USER}",
        f"['training_args.bin']: {USER}",
        f"tester/model@main, name Upload runs/{USER}/events with huggingface_hub: {USER}",
        f"tester/model@main, name runs/{USER}/events: {USER}",
    ]


@pytest.mark.parametrize("token_from", ["argument", "environment"])
@pytest.mark.parametrize("strategy", ["end", "checkpoint"])
def test_nothing_of_this_machine_is_uploaded(hub, secrets, home, monkeypatch, strategy, token_from):
    made.make_encoder(home / "base")
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    model = AutoModelForSequenceClassification.from_pretrained(home / "base", num_labels=3)
    if token_from == "argument":
        monkeypatch.delenv("HF_TOKEN")
    trainer = build(
        home / "out",
        model=model,
        tokenizer=tokenizer,
        hub_token=hub.token if token_from == "argument" else None,
        hub_strategy=strategy,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        hub_revision=None,
    )
    trainer.train()
    assert str(home) in trainer.state.best_model_checkpoint
    log = home / "out" / "runs" / f"Nov21_12-00-00_{HOST}"
    log.mkdir(parents=True)
    (log / f"events.out.tfevents.1763726400.{HOST}.1.0").write_bytes(f"{home}/out".encode())
    (home / "out" / "_notes.txt").write_text(f"{home} {hub.token}")
    trainer.save_state()
    trainer.save_metrics("train", {"train_file": f"{home}/data/train.csv", "loss": 1.0})
    trainer.push_to_hub()

    assert leaks(hub, *secrets) == []
    files = hub.files(MODEL)
    assert not [path for path in files if path.startswith(("runs/", "_", "checkpoint-"))]
    assert {"trainer_state.json", "training_args.bin", "train_results.json", "tokenizer_config.json"} <= files.keys()
    stored = torch.load(io.BytesIO(files["training_args.bin"]), weights_only=False)
    assert (stored.rdrop_alpha, stored.learning_rate, stored.max_steps) == (1.0, 1e-2, 4)
    assert json.loads(files["train_results.json"])["loss"] == 1.0
    # This machine's own files still say where things are.
    assert torch.load(home / "out" / "training_args.bin", weights_only=False).output_dir == str(home / "out")
    state = json.loads((home / "out" / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).is_dir()


def test_an_adapter_of_a_local_model_leaks_nothing(hub, secrets, home):
    peft = pytest.importorskip("peft")
    make_model("single").save_pretrained(home / "base")
    model = AutoModelForSequenceClassification.from_pretrained(home / "base")
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    trainer = build(
        home / "out",
        model=peft.get_peft_model(model, lora),
        hub_strategy="all_checkpoints",
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    trainer.push_to_hub()
    assert json.loads((home / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        home / "base"
    )
    assert leaks(hub, *secrets) == []
    assert peft.PeftModel.from_pretrained(make_model("single"), MODEL)


def test_tensorboard_files_stay_here(hub, secrets, home):
    pytest.importorskip("tensorboard")
    trainer = build(home / "out", report_to=["tensorboard"], logging_steps=1, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.push_to_hub()
    events = list((home / "out").rglob("*tfevents*"))
    assert events and all(HOST in path.name for path in events)
    assert leaks(hub, *secrets) == []


# ---- What goes wrong ----


def trained(folder, **args):
    """A trainer that has trained and saved, and pushed nothing."""
    trainer = build(folder, hub_strategy="end", **args)
    trainer.train()
    trainer.save_model(_internal_call=True)
    return trainer


def folders_left(folder):
    """Folders that are no checkpoints; those of an upload go when its background job has ended."""
    for _ in range(100):
        left = [path.name for path in folder.iterdir() if path.is_dir() and "checkpoint" not in path.name]
        if not left:
            break
        time.sleep(0.05)
    return left


def assert_second_push_completes(hub, trainer, before):
    assert not folders_left(Path(trainer.args.output_dir))
    assert local_files(trainer.args.output_dir).items() >= before.items()
    trainer.push_to_hub()
    assert_same_state(pushed_weights(hub), trainer.model.state_dict())
    assert local_files(trainer.args.output_dir).items() >= before.items()


@pytest.mark.parametrize("role", ["wrong", "read", "none"])
def test_a_token_that_may_not_write_is_refused_before_the_first_step(hub, tmp_path, monkeypatch, role):
    token = {"wrong": "hf_thisTokenIsNotKnown", "read": hub.read_token}.get(role)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises((ValueError, OSError), match=r"(?i)token|credentials|log in|password") as raised:
        build(tmp_path / "out", hub_token=token)
    assert "hf_thisToken" not in str(raised.value)
    assert hub.repos == {}
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_token_that_may_only_read_an_existing_repository_is_refused_before_the_first_step(hub, tmp_path):
    HfApi().create_repo(MODEL)
    with pytest.raises((ValueError, OSError), match=r"(?i)token"):
        build(tmp_path / "out", hub_token=hub.read_token)


def test_a_token_that_stopped_working_leaves_the_model_here(hub, tmp_path):
    trainer = trained(tmp_path / "out")
    before = local_files(tmp_path / "out")
    hub.fault(".", times=100, status=401)
    with pytest.raises((RuntimeError, OSError), match="401"):
        trainer.push_to_hub()
    hub.faults.clear()
    assert_second_push_completes(hub, trainer, before)


@pytest.mark.parametrize(("status", "retry_after", "waits"), [(429, 3, {4}), (500, None, {1, 2})])
@pytest.mark.parametrize("step", ["POST .*/preupload", "PUT /lfs"])
def test_a_busy_hub_is_asked_again(hub, tmp_path, step, status, retry_after, waits):
    trainer = trained(tmp_path / "out")
    del hub.waits[:]
    hub.fault(step, times=2, status=status, retry_after=retry_after)
    trainer.push_to_hub()
    assert len(hub.waits) == 2 and waits.issuperset(hub.waits)  # the second may be another file's first
    assert_same_state(pushed_weights(hub), trainer.model.state_dict())


@pytest.mark.parametrize(
    "fault",
    [
        {"pattern": "PUT /lfs", "times": 20, "cut_after": 1000},
        {"pattern": "PUT /lfs", "times": 20, "status": 500},
        {"pattern": "POST .*/commit/", "status": 500},
        {"pattern": "POST .*/commit/", "status": 429, "retry_after": 1},
    ],
    ids=["cut", "upload-500", "commit-500", "commit-429"],
)
def test_a_failed_push_says_so_and_a_second_one_completes(hub, tmp_path, fault):
    trainer = trained(tmp_path / "out")
    before = local_files(tmp_path / "out")
    hub.fault(**fault)
    with pytest.raises((RuntimeError, OSError), match=r"uploading|500|429"):
        trainer.push_to_hub()
    assert hub.files(MODEL) == {}
    hub.faults.clear()
    assert_second_push_completes(hub, trainer, before)


def test_a_connection_cut_once_is_made_up_for(hub, tmp_path):
    trainer = trained(tmp_path / "out")
    hub.fault("PUT /lfs", cut_after=1000)
    trainer.push_to_hub()
    assert hub.count("PUT .* 0") == 1
    assert_same_state(pushed_weights(hub), trainer.model.state_dict())


def test_a_push_that_fails_while_training_is_reported(hub, tmp_path, caplog):
    """The uploads of checkpoints run in the background: training ends, and the failure has to be heard of."""
    hub.fault("POST .*/commit/", times=100, status=500)
    trainer = build(tmp_path / "out", hub_strategy="every_save", save_strategy="steps", save_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 4
    assert not folders_left(tmp_path / "out")
    assert any("500" in record.getMessage() and record.name.startswith("hf_rdrop") for record in caplog.records)
    hub.faults.clear()
    trainer.push_to_hub()
    assert_same_state(pushed_weights(hub), trainer.model.state_dict())


class HoldUploads(TrainerCallback):
    """A Hub that answers nothing while the training runs: every upload is slower than the steps."""

    def __init__(self, hub):
        self.lock = hub.lock

    def on_train_begin(self, args, state, control, **kwargs):
        self.lock.acquire()

    def on_train_end(self, args, state, control, **kwargs):
        self.lock.release()


def test_a_checkpoint_that_is_deleted_here_still_arrives(hub, tmp_path):
    trainer = build(
        tmp_path / "out",
        hub_strategy="all_checkpoints",
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        callbacks=[HoldUploads(hub)],
    )
    trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-4"]
    files = hub.files(MODEL)
    for step in range(1, 5):
        assert json.loads(files[f"checkpoint-{step}/trainer_state.json"])["global_step"] == step
        assert f"checkpoint-{step}/model.safetensors" in files


class FailingCard(RDropTrainer):
    """Fails on the way to the upload."""

    error: Exception

    def create_model_card(self, *args, **kwargs):
        raise self.error


def test_only_network_errors_are_explained(hub, tmp_path):
    trainer = build(tmp_path / "out", trainer_class=FailingCard)
    out_of_memory = torch.cuda.OutOfMemoryError("memory")
    for error, raised, message in (
        (ConnectionError("refused"), OSError, r"upload to the Hub failed\..* push again\. Check the network"),
        (KeyError("a bug"), KeyError, "^'a bug'$"),
        (out_of_memory, torch.cuda.OutOfMemoryError, "^memory$"),
    ):
        trainer.error = error
        with pytest.raises(raised, match=message):
            trainer.push_to_hub()
        assert not folders_left(tmp_path / "out")


def test_copies_for_uploads_that_died_are_removed(hub, home, tmp_path):
    """When the next trainer of that folder is made; those of a process that lives stay."""
    out = tmp_path / "out"
    process = start(push_and_wait, tmp_path / "log", out, hub.url, hub.token, home / "cache")
    wait_for(lambda: any(out.glob("_upload-*/_lock")), process)
    (out / "_upload-mine").mkdir()  # not known to be ours
    build(out)
    assert len(list(out.glob("_upload-*"))) == 2  # it lives
    process.kill()
    process.join()
    build(out)
    assert [path.name for path in out.glob("_upload-*")] == ["_upload-mine"]


@contextmanager
def read_only(folder):
    """Takes away the right to write in a folder, also from root (who becomes nobody for that time)."""
    user, mode = os.geteuid(), folder.stat().st_mode
    folder.chmod(0o555)
    for path in folder.iterdir():
        path.chmod(0o444)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)
        folder.chmod(mode)
        for path in folder.iterdir():
            path.chmod(0o644)


def test_a_read_only_folder(hub, tmp_path):
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to everybody else
        folder = Path(place)
        trainer = trained(folder)
        before = local_files(folder)
        with read_only(folder), pytest.raises((OSError, RuntimeError), match=r"(?i)permission|denied"):
            trainer.push_to_hub()
        assert local_files(folder) == before
        assert hub.files(MODEL) == {}
        assert_second_push_completes(hub, trainer, before)


# ---- The scripts ----

QUICK = [
    "--use_cpu",
    "--disable_tqdm=true",
    "--save_strategy=no",
    "--max_steps=2",
    "--do_train",
    "--do_eval",
    "--push_to_hub",
]


def script_arguments(home, rows, model):
    files = {
        split: made.write(home / f"{split}.jsonl", rows(12, i)) for i, split in enumerate(("train", "validation"))
    }
    named = {f"{split}_file": file for split, file in files.items()}
    named |= {"model_name_or_path": model, "output_dir": f"{home}/out", "hub_model_id": MODEL}
    return [*(f"--{name}={value}" for name, value in named.items()), *QUICK]


def script_call(home, script):
    if script is run_translation:
        command = script_arguments(home, made.translation_rows, made.make_seq2seq(home / "m"))
        return [*command, "--source_lang=en", "--target_lang=de"]
    rows = made.ner_rows if script is run_ner else lambda n, seed: made.classification_rows("names", n, seed)
    return script_arguments(home, rows, made.make_encoder(home / "m"))


def assert_pushed_by_script(hub, home, secrets):
    files = hub.files(MODEL)
    assert {"model.safetensors", "tokenizer.json", "all_results.json", "README.md"} <= files.keys()
    assert files["model.safetensors"] == (home / "out" / "model.safetensors").read_bytes()
    assert leaks(hub, *secrets) == []
    AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize("script", [run_glue, run_ner, run_translation])
def test_the_scripts_push(hub, home, secrets, script):
    script.main(script_call(home, script))
    assert_pushed_by_script(hub, home, secrets)


@pytest.mark.slow
@pytest.mark.parametrize("script", [run_glue, run_ner, run_translation])
def test_the_scripts_push_from_a_process_of_their_own(hub, home, secrets, script):
    done = subprocess.run(
        [sys.executable, script.__file__, *script_call(home, script)],
        env={**environment(hub, home / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert_pushed_by_script(hub, home, secrets)
