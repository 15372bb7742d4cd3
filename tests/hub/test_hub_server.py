"""The tests' Hub against the real client alone: what the tests of the trainer rely on."""

import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from support.hub_server import Hub, run_program, use_hub

WEIGHTS = os.urandom(300_000)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub() as hub:
        hub.waits = use_hub(hub, tmp_path / "home", monkeypatch)
        yield hub


@pytest.fixture
def api(hub):
    return HfApi()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text('{"a": 1}')
    (tmp_path / "model" / "empty.txt").write_text("")
    (tmp_path / "model" / "deep" / "mit Umlaut ü.txt").write_text("content")
    (tmp_path / "model" / "model.safetensors").write_bytes(WEIGHTS)
    return tmp_path / "model"


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def push(api, folder, **kwargs):
    api.create_repo("model", exist_ok=True)
    return api.upload_folder(repo_id="tester/model", folder_path=folder, **kwargs)


def test_a_folder_arrives_and_comes_back(hub, api, folder, tmp_path):
    info = push(api, folder)
    assert hub.files("tester/model") == content(folder)
    files = hub.repos["models", "tester/model"].at("main").files
    assert {path for path, file in files.items() if file.lfs} == {"model.safetensors"}
    assert hub.count("POST .*/objects/batch 200") == hub.count("PUT /lfs/.* 200") == hub.count("POST /lfs/verify") == 1

    facts = api.model_info("tester/model", files_metadata=True)
    assert facts.sha == info.oid
    assert facts.private is False
    api.auth_check("tester/model", write=True)
    assert {file.rfilename: file.size for file in facts.siblings}["model.safetensors"] == len(WEIGHTS)
    assert set(api.list_repo_files("tester/model")) == {".gitattributes", *content(folder)}
    assert {entry.path for entry in api.list_repo_tree("tester/model")} >= {"deep", "config.json"}
    assert [entry.path for entry in api.list_repo_tree("tester/model", "deep")] == ["deep/mit Umlaut ü.txt"]
    assert api.whoami()["name"] == "tester"

    path = huggingface_hub.hf_hub_download("tester/model", "model.safetensors")
    assert Path(path).read_bytes() == WEIGHTS
    assert str(tmp_path) in path
    here = huggingface_hub.snapshot_download("tester/model", local_dir=tmp_path / "back", ignore_patterns=".git*")
    back = {path: data for path, data in content(tmp_path / "back").items() if not path.startswith(".cache")}
    assert here == str(tmp_path / "back")
    assert back == content(folder)


def test_an_unchanged_folder_makes_no_commit_and_no_upload(hub, api, folder):
    first = push(api, folder)
    assert push(api, folder).oid == first.oid
    assert hub.count("PUT") == 1
    assert hub.titles("tester/model") == ["initial commit", "Upload folder using huggingface_hub"]


def test_files_are_copied_and_deleted(hub, api, folder):
    push(api, folder)
    operations = [
        CommitOperationCopy("model.safetensors", "copy.safetensors"),
        CommitOperationCopy("config.json", "copy.json"),
        CommitOperationDelete("config.json"),
        CommitOperationDelete("deep/"),
    ]
    api.create_commit("tester/model", operations, commit_message="move")
    files = hub.files("tester/model")
    assert set(files) == {"copy.json", "copy.safetensors", "empty.txt", "model.safetensors"}
    assert files["copy.safetensors"] == WEIGHTS


def test_ignored_files_stay_away(hub, api, folder):
    (folder / ".gitignore").write_text("# not these\n*.txt\ndeep/\n")
    push(api, folder)
    assert set(hub.files("tester/model")) == {".gitignore", "config.json", "model.safetensors"}
    add = [CommitOperationAdd("later.txt", b"text"), CommitOperationAdd("later.json", b"{}")]
    api.create_commit("tester/model", add, commit_message="the .gitignore of the repository counts")
    assert set(hub.files("tester/model")) == {".gitignore", "config.json", "later.json", "model.safetensors"}


def test_branches(hub, api, folder):
    push(api, folder)
    with pytest.raises(RevisionNotFoundError):
        push(api, folder, revision="exp/1")
    api.create_branch("tester/model", branch="exp/1")
    api.create_branch("tester/model", branch="exp/1", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch("tester/model", branch="exp/1")
    (folder / "config.json").write_text('{"a": 2}')
    oid = push(api, folder, revision="exp/1").oid
    assert hub.files("tester/model")["config.json"] == b'{"a": 1}'
    assert hub.files("tester/model", "exp/1")["config.json"] == b'{"a": 2}'
    assert {branch.name for branch in api.list_repo_refs("tester/model").branches} == {"main", "exp/1"}
    for revision in ("exp/1", oid):
        path = huggingface_hub.hf_hub_download("tester/model", "config.json", revision=revision)
        assert Path(path).read_text() == '{"a": 2}'
    with pytest.raises(HfHubHTTPError, match="412"):
        first = hub.repos["models", "tester/model"].branches["main"][0].oid
        operations = [CommitOperationAdd("late.txt", b"")]
        api.create_commit("tester/model", operations, commit_message="late", parent_commit=first)


def test_what_is_missing_is_named(hub, api, folder):
    push(api, folder)
    with pytest.raises(RepositoryNotFoundError):
        huggingface_hub.hf_hub_download("tester/other", "config.json")
    with pytest.raises(RevisionNotFoundError):
        huggingface_hub.hf_hub_download("tester/model", "config.json", revision="none")
    with pytest.raises(EntryNotFoundError):
        huggingface_hub.hf_hub_download("tester/model", "none.json")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("tester/model", "none"))
    with pytest.raises(RepositoryNotFoundError):
        HfApi().upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id="tester/other")


def test_a_private_repository_does_not_exist_for_others(hub, api, folder):
    api.create_repo("model", private=True)
    push(api, folder)
    assert api.model_info("tester/model").private is True
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("tester/model")
    with pytest.raises(RepositoryNotFoundError):
        huggingface_hub.snapshot_download("tester/model", token=False)
    path = huggingface_hub.hf_hub_download("tester/model", "config.json", token=hub.read_token)
    assert Path(path).read_text() == '{"a": 1}'


@pytest.mark.parametrize(
    ("token", "status", "reason"),
    [("hf_wrong", 401, "Invalid credentials"), (False, 401, "Invalid username"), ("read", 403, "write token")],
)
def test_writing_needs_a_token_that_may_write(hub, api, folder, token, status, reason):
    push(api, folder)
    stranger = HfApi(token=hub.read_token if token == "read" else token)
    (folder / "config.json").write_text("changed")
    for write in (
        lambda: stranger.auth_check("tester/model", write=True),
        lambda: stranger.create_repo("other"),
        lambda: stranger.create_branch("tester/model", branch="other"),
        lambda: stranger.upload_folder(repo_id="tester/model", folder_path=folder),
    ):
        with pytest.raises(HfHubHTTPError, match=reason) as raised:
            write()
        assert raised.value.response.status_code == status
    assert hub.files("tester/model")["config.json"] == b'{"a": 1}'


def test_a_repository_of_somebody_else_is_refused(hub, api):
    with pytest.raises(HfHubHTTPError, match=r"403.*|rights"):
        api.create_repo("somebody/model")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("model")
        api.create_repo("model")


@pytest.mark.parametrize(("status", "retry_after", "waits"), [(429, 7, [8, 8]), (500, None, [1, 2]), (503, 0, [1, 1])])
@pytest.mark.parametrize("step", ["POST .*/preupload", "POST .*/objects/batch", "PUT /lfs", "POST /lfs/verify"])
def test_the_client_tries_again(hub, api, folder, step, status, retry_after, waits):
    hub.fault(step, times=2, status=status, retry_after=retry_after)
    push(api, folder)
    assert hub.files("tester/model") == content(folder)
    assert hub.count(f"{step}.* {status}") == 2
    assert hub.waits == waits  # Retry-After and a second, or doubled each time


def test_the_client_gives_up_and_a_second_push_completes(hub, api, folder):
    hub.fault("PUT /lfs", times=6, status=500)
    with pytest.raises(RuntimeError, match=r"model\.safetensors") as raised:
        push(api, folder)
    assert isinstance(raised.value.__cause__, HfHubHTTPError)
    assert hub.files("tester/model") == {}
    push(api, folder)
    assert hub.files("tester/model") == content(folder)


def test_a_refused_commit_is_not_sent_twice_and_a_second_push_does_not_upload_again(hub, api, folder):
    hub.fault("POST .*/commit/", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        push(api, folder)
    push(api, folder)
    assert hub.files("tester/model") == content(folder)
    assert hub.count("POST .*/commit/.* 500") == hub.count("POST .*/commit/.* 200") == 1
    assert hub.count("PUT /lfs") == 1


@pytest.mark.parametrize("times", [1, 6])
def test_a_connection_cut_in_an_upload(hub, api, folder, times):
    hub.fault("PUT /lfs", times=times, cut_after=100_000)
    if times > 5:  # the client's number of retries
        with pytest.raises(RuntimeError, match=r"model\.safetensors"):
            push(api, folder)
        assert hub.files("tester/model") == {}
        assert WEIGHTS not in hub.contents.values()
    push(api, folder)
    assert hub.files("tester/model") == content(folder)
    assert hub.count("PUT /lfs.* 0") == times


def test_a_connection_cut_in_a_download(hub, api, folder):
    push(api, folder)
    hub.fault("GET .*/model.safetensors", cut_after=100_000)
    path = huggingface_hub.hf_hub_download("tester/model", "model.safetensors")
    assert Path(path).read_bytes() == WEIGHTS
    assert [hub.count(f"GET .*/model.safetensors {status}") for status in (0, 200)] == [1, 1]


def test_ranges(hub, api, folder):
    push(api, folder)
    files = huggingface_hub.HfFileSystem(endpoint=hub.url)
    with files.open("tester/model/model.safetensors", block_size=1000) as file:
        file.seek(1234)
        assert file.read(10) == WEIGHTS[1234:1244]
    assert hub.count("GET .*/model.safetensors 206") == 1


def test_without_a_server_a_cached_file_serves(hub, api, folder):
    push(api, folder)
    path = huggingface_hub.hf_hub_download("tester/model", "config.json")
    hub.fault(".", times=100, status=503)
    assert huggingface_hub.hf_hub_download("tester/model", "config.json") == path
    with pytest.raises(LocalEntryNotFoundError):
        huggingface_hub.hf_hub_download("tester/model", "empty.txt")


def test_a_new_process_and_a_data_set_by_name(hub, api, tmp_path):
    api.create_repo("rows", repo_type="dataset")
    rows = b"text,label\ngood film,1\nbad film,0\n"
    for split in ("train", "test"):
        api.upload_file(path_or_fileobj=rows, path_in_repo=f"{split}.csv", repo_id="tester/rows", repo_type="dataset")
    assert set(hub.files("tester/rows", kind="datasets")) == {"train.csv", "test.csv"}
    program = """
from datasets import load_dataset
rows = load_dataset("tester/rows")
assert {split: rows[split].num_rows for split in rows} == {"train": 2, "test": 2}, rows
assert rows["train"][0] == {"text": "good film", "label": 1}, rows["train"][0]
"""
    run_program(hub, tmp_path, program)
    assert hub.count("GET /datasets/tester/rows/resolve/.*/train.csv 200") == 1
