"""A Hugging Face Hub on loopback, for the real client with Xet off: repositories of models and Spaces, LFS, commits,
tags, pull requests and faults on request."""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

WRITER, READER = "hf_writer", "hf_reader"  # tokens: of the owner of everything, and of someone who may only read
USERS = {WRITER: "owner", READER: "visitor"}
CHUNK = 1024
LARGE = 10_000_000  # bytes from which on a file is kept in LFS
TEMPLATE = {"README.md": b"---\nsdk: static\n---\n", "index.html": b"Welcome", "style.css": b""}  # of a static Space


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Fault:
    """What happens to a request whose "METHOD path" matches `where`."""

    where: str
    status: int = 0  # answer this status
    headers: dict[str, str] = field(default_factory=dict)
    drop: int = -1  # close the connection after so many bytes of a body
    alter: Callable[[bytes], bytes] | None = None  # of a file's bytes
    slow: float = 0.0  # seconds before the answer, and for each kilobyte of a file
    lost: bool = False  # the request is done, and its answer is lost
    meanwhile: Callable[[], object] = lambda: None  # what else happens to the Hub before the answer
    times: int = 10**9


class Repo:
    """Commits are whole maps from path to bytes; the newest one of a branch is its head."""

    def __init__(self, private: bool = False, template: dict[str, bytes] | None = None) -> None:
        self.private, self.gated, self.sdk = private, False, ""
        self.commits: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.pulls: list[dict[str, Any]] = []
        attributes = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        self.add("main", attributes | (template or {}), "initial commit")

    def add(self, branch: str, files: dict[str, bytes], message: str = "change") -> str:
        commit = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.messages.append(message)
        self.branches[branch] = commit
        return commit

    def commit_of(self, revision: str) -> str | None:
        named = self.branches | self.tags
        return named.get(revision) or (revision if revision in self.commits else None)


class Answer(Exception):
    """A response that ends the handling of a request."""

    def __init__(self, status: int, body: Any = None, code: str = "", message: str = "", **headers: str) -> None:
        self.status, self.headers = status, {name.replace("_", "-"): text for name, text in headers.items()}
        self.body = {"error": message} if body is None and message else body
        self.headers |= {"X-Error-Code": code} if code else {}
        self.headers |= {"X-Error-Message": message} if message else {}


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.storage = self.address.replace("127.0.0.1", "localhost")  # another host, as that of the real Hub
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by sha256
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.changing = threading.RLock()

    def put(self, name: str, files: dict[str, bytes], tag: str = "") -> str:
        """A commit in a repository, which is made if it is new."""
        repo = self.repos.setdefault(name, Repo())
        commit = repo.add("main", repo.commits[repo.branches["main"]] | files)
        if tag:
            repo.tags[tag] = commit
        return commit

    def fail(self, where: str, status: int = 0, **more: Any) -> Fault:
        self.faults.append(Fault(where, status, **more))
        return self.faults[-1]

    def seen(self, where: str) -> list[str]:
        return [line for line in self.log if re.search(where, line)]

    def wait_for(self, where: str, seconds: float = 30.0) -> None:
        end = monotonic() + seconds
        while not self.seen(where):
            assert monotonic() < end, f"no request for {where}: {self.log}"
            sleep(0.01)

    def fault_at(self, line: str) -> Fault:
        with self.changing:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.where, line):
                    fault.times -= 1
                    return fault
        return Fault("")

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients are killed in the middle of a request


def point_to(address: str, home: Path, patch: pytest.MonkeyPatch) -> None:
    """The client of this process as HF_ENDPOINT and HF_HOME would set it up, without waits between its tries."""
    values = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in values.items():
        patch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        patch.delenv(name, raising=False)
    patch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)


def environment(address: str, home: Path, **more: str) -> dict[str, str]:
    """Of another process whose client is to use this Hub."""
    own = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    return {name: text for name, text in os.environ.items() if not name.startswith(("HF_", "HUGGING"))} | own | more


@contextmanager
def hub_on_loopback() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one(self) -> None:
        line = f"{self.command} {unquote(self.path)}"
        self.fault = self.server.fault_at(line)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        self.server.log.append(f"{line} {self.headers.get('Range') or ''}".rstrip())
        sleep(self.fault.slow)
        self.fault.meanwhile()
        try:
            if self.fault.status:
                raise Answer(self.fault.status, {"error": "a fault"}, **self.fault.headers)
            with self.server.changing:
                self.route()
            raise Answer(404, message=f"no such page: {line}")
        except Answer as answer:
            self.give(answer)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def give(self, answer: Answer) -> None:
        if self.fault.lost:
            self.close_connection = True
            return
        raw = isinstance(answer.body, bytes)
        data: bytes = answer.body if raw else b"" if answer.body is None else json.dumps(answer.body).encode()
        start = 0
        if raw and self.fault.alter is not None:
            data = self.fault.alter(data)
        if raw and (found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")):
            start = int(found[1])
            answer.status = 206
            answer.headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_response(answer.status)
        for name, text in {"Content-Length": str(len(data) - start), **answer.headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(data)
        if raw and self.fault.drop >= 0:
            end, self.close_connection = min(end, start + self.fault.drop), True
        for at in range(start, end, CHUNK):
            self.wfile.write(data[at : min(end, at + CHUNK)])
            self.wfile.flush()
            sleep(self.fault.slow if raw else 0.0)

    # What the pages do

    def user(self, write: bool = False) -> str | None:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given and given not in USERS:
            raise Answer(401, message="Invalid credentials in Authorization header")
        if write and given != WRITER:
            raise Answer(403 if given else 401, message="You don't have the rights to write here")
        return USERS.get(given)

    def repo(self, name: str, write: bool = False) -> Repo:
        user, found = self.user(write), self.server.repos.get(name)
        if found is None or (found.private and user != "owner"):
            raise Answer(404 if user else 401, code="RepoNotFound", message="Repository not found")
        return found

    def commit(self, repo: Repo, revision: str) -> str:
        if found := repo.commit_of(revision):
            return found
        raise Answer(404, code="RevisionNotFound", message=f"Invalid rev id: {revision}")

    def route(self) -> None:
        parts = urlsplit(self.path)
        path, query = parts.path, parse_qs(parts.query)
        for method, pattern, page in PAGES:
            if self.command in method and (found := re.fullmatch(pattern, path)):
                page(self, *map(unquote, found.groups()), **({"query": query} if page is commit_page else {}))

    def json(self) -> Any:
        return json.loads(self.body)


def resolve(at: Handler, name: str, revision: str, path: str) -> None:
    repo = at.repo(name)
    if repo.gated and at.user() != "owner":
        raise Answer(403 if at.user() else 401, code="GatedRepo", message=f"Access to model {name} is restricted")
    commit = at.commit(repo, revision)
    if path not in repo.commits[commit]:
        raise Answer(404, code="EntryNotFound", message="Entry not found", X_Repo_Commit=commit)
    data = repo.commits[commit][path]
    if not in_lfs(path, len(data)):
        raise Answer(200, data, X_Repo_Commit=commit, ETag=f'"{git_blob(data)}"')
    sha = hashlib.sha256(data).hexdigest()
    at.server.objects[sha] = data
    linked = {"X_Linked_Etag": f'"{sha}"', "X_Linked_Size": str(len(data)), "X_Repo_Commit": commit}
    raise Answer(302, Location=f"{at.server.storage}/lfs/{sha}", **linked)


def info(at: Handler, name: str, revision: str = "main") -> None:
    repo = at.repo(name)
    commit = at.commit(repo, revision)
    siblings = [{"rfilename": path} for path in repo.commits[commit]]
    raise Answer(
        200, {"id": name.removeprefix("spaces/"), "sha": commit, "private": repo.private, "siblings": siblings}
    )


def in_lfs(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size > LARGE


def entry(path: str, data: bytes) -> dict[str, Any]:
    found = {"type": "file", "path": path, "size": len(data), "oid": git_blob(data)}
    if in_lfs(path, len(data)):
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return found


def paths_info(at: Handler, name: str, revision: str) -> None:
    repo = at.repo(name)
    files = repo.commits[at.commit(repo, revision)]
    wanted = parse_qs(at.body.decode())["paths"]
    raise Answer(200, [entry(path, files[path]) for path in wanted if path in files])


def tree(at: Handler, name: str, revision: str) -> None:
    repo = at.repo(name)
    raise Answer(200, [entry(path, data) for path, data in repo.commits[at.commit(repo, revision)].items()])


def refs(at: Handler, name: str) -> None:
    repo = at.repo(name)
    kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
    found = {
        kind: [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": commit} for name, commit in known.items()]
        for kind, (folder, known) in kinds.items()
    }
    raise Answer(200, found | {"converts": []})


def create(at: Handler) -> None:
    at.user(write=True)
    given = at.json()
    space = given.get("type") == "space"
    name = f"{'spaces/' * space}{given['organization']}/{given['name']}"
    if name in at.server.repos:
        raise Answer(409, {"url": f"{at.server.address}/{name}", "error": "You already created this model repo"})
    made = Repo(given.get("visibility") == "private" or bool(given.get("private")), TEMPLATE if space else None)
    made.sdk = given["sdk"] if space else ""
    at.server.repos[name] = made
    raise Answer(200, {"url": f"{at.server.address}/{name}"})


def commits(at: Handler, name: str, revision: str) -> None:
    repo = at.repo(name)
    at.commit(repo, revision)
    more = {"authors": [{"user": "owner"}], "date": "2026-01-01T00:00:00.000Z", "message": ""}
    pairs = zip(repo.commits, repo.messages, strict=True)
    raise Answer(200, [{"id": commit, "title": title} | more for commit, title in pairs][::-1])


def preupload(at: Handler, name: str, revision: str) -> None:
    repo = at.repo(name)
    files = repo.commits[at.commit(repo, revision)]
    found = []
    for file in at.json()["files"]:
        mode = "lfs" if in_lfs(file["path"], file["size"]) else "regular"
        oid = entry(file["path"], files[file["path"]])["oid"] if file["path"] in files else None
        found.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    raise Answer(200, {"files": found})


def batch(at: Handler, name: str) -> None:
    at.repo(name)
    objects = []
    for each in at.json()["objects"]:
        actions = {verb: {"href": f"{at.server.address}/{verb}/{each['oid']}"} for verb in ("upload", "verify")}
        objects.append(each if each["oid"] in at.server.objects else each | {"actions": actions})
    raise Answer(200, {"objects": objects, "transfer": "basic"})


def upload(at: Handler, sha: str) -> None:
    if hashlib.sha256(at.body).hexdigest() != sha:
        raise Answer(400, message="the bytes differ from their sha256")
    at.server.objects[sha] = at.body
    raise Answer(200)


def verify(at: Handler, sha: str) -> None:
    raise Answer(200 if sha in at.server.objects else 404, {})


def lfs(at: Handler, sha: str) -> None:
    raise Answer(200, at.server.objects[sha], ETag=f'"{sha}"')


def commit_page(at: Handler, name: str, revision: str, query: dict[str, list[str]]) -> None:
    propose = "create_pr" in query
    user, repo = at.user(), at.repo(name, write=not (propose or revision.startswith("refs/pr/")))
    base = at.commit(repo, revision)
    lines = [json.loads(line) for line in at.body.splitlines()]
    head, files = lines[0]["value"], dict(repo.commits[base])
    if head.get("parentCommit") not in (None, base):
        raise Answer(412, message="A commit has happened since. Please refresh and try again.")
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in at.server.objects:
                raise Answer(400, message="the object of an LFS pointer was not uploaded")
            files[value["path"]] = at.server.objects[value["oid"]]
        else:
            del files[value["path"]]
    number = len(repo.pulls) + 1
    commit = repo.add(f"refs/pr/{number}" if propose else revision, files, head["summary"])
    found = {"commitUrl": f"{at.server.address}/{name}/commit/{commit}", "commitOid": commit, "success": True}
    if propose:
        pull = {"title": head["summary"], "num": number, "author": {"name": user}, "status": "open"}
        pull |= {"createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": name, "type": "model"}}
        repo.pulls.append(pull | {"isPullRequest": True})
        found["pullRequestUrl"] = f"{at.server.address}/{name}/discussions/{number}"
    raise Answer(200, found)


def tag(at: Handler, name: str, revision: str) -> None:
    repo, new = at.repo(name, write=True), at.json()["tag"]
    if new in repo.tags:
        raise Answer(409, message=f"Tag reference exists already: {new}")
    repo.tags[new] = at.commit(repo, revision)
    raise Answer(200)


def discussions(at: Handler, name: str) -> None:
    pulls = at.repo(name).pulls
    raise Answer(200, {"discussions": pulls, "count": len(pulls), "start": 0})


def whoami(at: Handler) -> None:
    if (user := at.user()) is None:
        raise Answer(401, message="Invalid credentials in Authorization header")
    raise Answer(200, {"name": user, "type": "user"})


def validate(at: Handler) -> None:
    raise Answer(200, {"warnings": [], "errors": []})


REPO = "((?:spaces/)?[^/]+/[^/]+)"
API = f"/api/(?:models/)?{REPO}"
PAGES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("GET", "HEAD"), f"/{REPO}/resolve/([^/]+)/(.+)", resolve),
    (("GET", "HEAD"), "/lfs/(.+)", lfs),
    (("GET",), API, info),
    (("GET",), f"{API}/revision/(.+)", info),
    (("GET",), f"{API}/tree/([^/]+)", tree),
    (("GET",), f"{API}/refs", refs),
    (("GET",), f"{API}/commits/(.+)", commits),
    (("GET",), f"{API}/discussions", discussions),
    (("GET",), "/api/whoami-v2", whoami),
    (("POST",), f"{API}/paths-info/(.+)", paths_info),
    (("POST",), f"{API}/preupload/(.+)", preupload),
    (("POST",), f"{API}/commit/(.+)", commit_page),
    (("POST",), f"{API}/tag/(.+)", tag),
    (("POST",), "/api/repos/create", create),
    (("POST",), "/api/validate-yaml", validate),
    (("POST",), f"/{REPO}[.]git/info/lfs/objects/batch", batch),
    (("PUT",), "/upload/(.+)", upload),
    (("POST",), "/verify/(.+)", verify),
]
