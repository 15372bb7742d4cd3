"""What the tests' Hub stores, and the part of the Hub's HTTP API that `huggingface_hub` uses, without the HTTP.

Repositories (models and data sets) live in memory: one history of commits a branch, content by its SHA-256. Behaviour
follows the client's source and the public API: a token that is not known is refused everywhere (401), a private
repository does not exist for someone without a token, a token without write access gets 403, and the reason stands in
the `X-Error-*` headers. `hub_server.py` serves it.
"""

import base64
import fnmatch
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LFS = ["*.bin", "*.h5", "*.model", "*.onnx", "*.parquet", "*.pt", "*.pth", "*.safetensors", "*.zip", "*tfevents*"]
REGULAR_LIMIT = 10_000_000  # bytes: a larger file is LFS whatever its name
KINDS = {"model": "models", "dataset": "datasets"}


class File(NamedTuple):
    """One file of a commit; `oid` is what the client compares: the SHA-256 of LFS files, git's SHA-1 of others."""

    sha256: str
    oid: str
    size: int
    lfs: bool


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    kind: str  # models or datasets
    id: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        """The commit that a branch's name or a commit's SHA means."""
        if revision in self.branches:
            return self.branches[revision][-1]
        for commit in (commit for history in self.branches.values() for commit in history):
            if commit.oid == revision:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass
class Reply:
    body: Any = b""  # bytes as they are, anything else as JSON
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200

    def data(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class HubApi:
    """The state of a Hub with one user, and a method for each end point."""

    def __init__(self) -> None:
        self.url = ""  # where it is served
        self.user, self.token, self.read_token = "tester", "hf_writeTokenOfTheTests", "hf_readTokenOfTheTests"
        self.repos: dict[tuple[str, str], Repo] = {}
        self.contents: dict[str, bytes] = {}  # by SHA-256, uploads that no commit uses included
        self.lock = threading.RLock()

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Every file of a revision with its content, without the .gitattributes that a new repository has."""
        files = self.repos[kind, repo_id].at(revision).files
        return {path: self.contents[file.sha256] for path, file in files.items() if path != ".gitattributes"}

    def titles(self, repo_id: str, branch: str = "main") -> list[str]:
        """The titles of a model's commits, oldest first."""
        return [commit.title for commit in self.repos["models", repo_id].branches[branch]]

    # The API. Every method gets what its route's pattern found, the query, the body, and the token's role.
    def whoami(self, role: str | None, **_: Any) -> Reply:
        if role is None:
            raise Refusal(401, "Invalid username or password.")
        token = {"accessToken": {"displayName": "tests", "role": role}}
        return Reply({"type": "user", "name": self.user, "fullname": "Tester", "orgs": [], "auth": token})

    def validate(self, **_: Any) -> Reply:
        return Reply({"errors": [], "warnings": []})

    def create(self, body: bytes, role: str | None, **_: Any) -> Reply:
        wanted = json.loads(body)
        owner, kind = wanted.get("organization") or self.user, KINDS[wanted.get("type") or "model"]
        self.may_write(role)
        if owner != self.user:
            raise Refusal(403, f"You don't have the rights to create a {kind[:-1]} under the namespace {owner!r}")
        repo_id = f"{owner}/{wanted['name']}"
        url = f"{self.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        if (kind, repo_id) in self.repos:
            return Reply({"error": "You already created this repo", "url": url}, status=409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, bool(private), {"main": []})
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS)
        self.add_commit(repo, "main", "initial commit", {".gitattributes": self.store(attributes.encode())})
        return Reply({"url": url, "id": repo_id, "name": repo_id, "private": repo.private})

    def auth_check(self, role: str | None, write: str | None = None, **_: Any) -> Reply:
        if write:
            self.may_write(role)
        return Reply({})

    def info(self, repo: Repo, query: dict[str, list[str]], revision: str | None = None, **_: Any) -> Reply:
        commit = repo.at(revision or "main")
        siblings = [
            {"rfilename": path, **({"size": file.size, "blobId": file.oid} if "blobs" in query else {})}
            for path, file in commit.files.items()
        ]
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        facts = {"author": repo.id.split("/")[0], "private": repo.private, "gated": False, "disabled": False}
        numbers = {"downloads": 0, "likes": 0, "createdAt": now, "lastModified": now, "tags": []}
        return Reply({"id": repo.id, "sha": commit.oid, "siblings": siblings, **facts, **numbers})

    def entries(self, commit: Commit, below: str = "") -> dict[str, dict[str, Any]]:
        """Files and folders below a folder, in the form of the tree and paths-info end points."""
        found: dict[str, dict[str, Any]] = {}
        for path, file in sorted(commit.files.items()):
            if not path.startswith(below):
                continue
            parents = [path[:i] for i, letter in enumerate(path) if letter == "/" and i >= len(below)]
            for folder in parents:
                found[folder] = {"type": "directory", "path": folder, "size": 0, "oid": sha1(folder.encode())}
            found[path] = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
            if file.lfs:
                found[path]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 127}
        return found

    def tree(self, repo: Repo, revision: str, query: dict[str, list[str]], path: str = "", **_: Any) -> Reply:
        commit = repo.at(revision)
        below = path + "/" if path else ""
        found = self.entries(commit, below)
        if path and not found:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        recursive = query.get("recursive", ["false"])[0].lower() in ("1", "true")
        return Reply([entry for name, entry in found.items() if recursive or "/" not in name[len(below) :]])

    def paths_info(self, repo: Repo, revision: str, body: bytes, headers: Any, **_: Any) -> Reply:
        as_json = "json" in (headers.get("Content-Type") or "")
        wanted = json.loads(body)["paths"] if as_json else parse_qs(body.decode()).get("paths", [])
        entries = self.entries(repo.at(revision))
        return Reply([entries[path] for path in wanted if path in entries])

    def refs(self, repo: Repo, **_: Any) -> Reply:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": history[-1].oid}
            for name, history in repo.branches.items()
        ]
        return Reply({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def branch(self, repo: Repo, revision: str, body: bytes, role: str | None, **_: Any) -> Reply:
        self.may_write(role)
        if revision in repo.branches:
            raise Refusal(409, f"Reference already exists: {revision}")
        start = repo.at(json.loads(body or b"{}").get("startingPoint") or "main")
        history = next(history for history in repo.branches.values() if start in history)
        repo.branches[revision] = history[: history.index(start) + 1]
        return Reply({})

    def preupload(self, repo: Repo, revision: str, body: bytes, role: str | None, **_: Any) -> Reply:
        self.may_write(role)
        present, asked = repo.at(revision).files, json.loads(body)
        ignore = asked.get("gitIgnore")
        if ignore is None:
            ignore = self.contents[present[".gitignore"].sha256].decode() if ".gitignore" in present else ""
        patterns = [line.strip().rstrip("/") for line in ignore.splitlines() if line.strip() and line[0] != "#"]
        answers = []
        for file in asked["files"]:
            path = file["path"]
            large = file["size"] > REGULAR_LIMIT or b"\0" in base64.b64decode(file["sample"])
            lfs = large or any(fnmatch.fnmatch(path.split("/")[-1], pattern) for pattern in LFS)
            parts = [path, *path.split("/")]
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in patterns),
                    "oid": present[path].oid if path in present else None,
                }
            )
        return Reply({"files": answers})

    def lfs_batch(self, body: bytes, role: str | None, **_: Any) -> Reply:
        self.may_write(role)
        objects = []
        for item in json.loads(body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.contents:  # no actions: the content is here
                upload = {"href": f"{self.url}/lfs/{item['oid']}?signed"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/lfs/verify"}}
            objects.append(answer)
        return Reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str, body: bytes, **_: Any) -> Reply:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "The content does not have the SHA-256 of its address")
        self.contents[oid] = body
        return Reply()

    def lfs_verify(self, body: bytes, **_: Any) -> Reply:
        wanted = json.loads(body)
        if len(self.contents.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "The object was not uploaded")
        return Reply({})

    def commit(self, repo: Repo, revision: str, body: bytes, role: str | None, **_: Any) -> Reply:
        self.may_write(role)
        head = repo.at(revision)
        if revision not in repo.branches:
            raise Refusal(400, f"{revision} is not a branch")
        files, title = dict(head.files), ""
        for line in body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head.oid):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = self.store(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.contents:
                    raise Refusal(400, f"LFS pointer of {value['path']} points to a file that was not uploaded")
                files[value["path"]] = self.store(self.contents[value["oid"]], lfs=True)
            elif key in ("deletedFile", "deletedFolder"):
                gone = value["path"].rstrip("/")
                files = {
                    path: file for path, file in files.items() if path != gone and not path.startswith(gone + "/")
                }
            else:
                raise Refusal(400, f"Unknown operation {key}")
        oid = self.add_commit(repo, revision, title, files)
        return Reply({"commitUrl": f"{self.url}/{repo.id}/commit/{oid}", "commitOid": oid, "success": True})

    def resolve(self, repo: Repo, revision: str, path: str, headers: Any, **_: Any) -> Reply:
        commit = repo.at(revision)
        facts = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", **facts)
        file = commit.files[path]
        content = self.contents[file.sha256]
        facts |= {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            facts |= {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"'}
        if not (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range") or "")):
            return Reply(content, facts)
        first, last = int(asked[1]), min(int(asked[2] or file.size), file.size - 1)
        if first > last:
            raise Refusal(416, "Range not satisfiable", **{"Content-Range": f"bytes */{file.size}"})
        facts["Content-Range"] = f"bytes {first}-{last}/{file.size}"
        return Reply(content[first : last + 1], facts, 206)

    def store(self, content: bytes, lfs: bool = False) -> File:
        sha256 = hashlib.sha256(content).hexdigest()
        self.contents[sha256] = content
        return File(sha256, sha256 if lfs else sha1(b"blob %d\0%s" % (len(content), content)), len(content), lfs)

    def add_commit(self, repo: Repo, branch: str, title: str, files: dict[str, File]) -> str:
        history = repo.branches[branch]
        oid = sha1(json.dumps([repo.id, branch, title, len(history), files]).encode())
        history.append(Commit(oid, title, files))
        return oid

    def may_write(self, role: str | None) -> None:
        if role is None:
            raise Refusal(401, "Invalid username or password.")
        if role != "write":
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository")

    def role(self, authorization: str | None) -> str | None:
        """What a request's token may do; None without a token."""
        if authorization is None:
            return None
        roles = {f"Bearer {self.token}": "write", f"Bearer {self.read_token}": "read"}
        if authorization not in roles:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return roles[authorization]

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> Reply:
        """The reply to one request."""
        url = urlsplit(target)
        routes = (
            (re.fullmatch(pattern, url.path), end_point) for methods, pattern, end_point in ROUTES if method in methods
        )
        found, end_point = next((route for route in routes if route[0]), (None, None))
        if found is None or end_point is None:
            raise Refusal(404, f"No such end point: {method} {url.path}")
        given: dict[str, Any] = {
            name: unquote(value) for name, value in found.groupdict().items() if value is not None
        }
        with self.lock:
            role = self.role(headers.get("Authorization"))
            if "id" in given:
                kind, repo_id = (given.pop("kind", None) or "models").rstrip("/"), given.pop("id")
                repo = self.repos.get((kind, repo_id))
                if repo is None or (repo.private and role is None):
                    raise Refusal(404 if role else 401, "Repository not found", "RepoNotFound")
                given["repo"] = repo
            query = parse_qs(url.query, keep_blank_values=True)
            return end_point(self, **given, query=query, headers=headers, body=body, role=role)


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


API = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
PAGE = r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[tuple[str, ...], str, Any]] = [
    (("GET",), "/api/whoami-v2", HubApi.whoami),
    (("POST",), "/api/validate-yaml", HubApi.validate),
    (("POST",), "/api/repos/create", HubApi.create),
    (("GET",), f"{API}(/revision/{REVISION})?", HubApi.info),
    (("GET",), f"{API}/auth-check(?P<write>/write)?", HubApi.auth_check),
    (("GET",), f"{API}/tree/{REVISION}(/(?P<path>.+))?", HubApi.tree),
    (("POST",), f"{API}/paths-info/{REVISION}", HubApi.paths_info),
    (("GET",), f"{API}/refs", HubApi.refs),
    (("POST",), f"{API}/branch/{REVISION}", HubApi.branch),
    (("POST",), f"{API}/preupload/{REVISION}", HubApi.preupload),
    (("POST",), f"{API}/commit/{REVISION}", HubApi.commit),
    (("POST",), rf"{PAGE}\.git/info/lfs/objects/batch", HubApi.lfs_batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", HubApi.lfs_put),
    (("POST",), "/lfs/verify", HubApi.lfs_verify),
    (("GET", "HEAD"), f"{PAGE}/resolve/{REVISION}/(?P<path>.+)", HubApi.resolve),
]
