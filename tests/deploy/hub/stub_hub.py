"""Stub of the Hub on loopback: the routes by which `huggingface_hub` reads and writes models.

Repositories are in memory. Written after the requests of the library and the Hub's OpenAPI; files
whose names end as in `LFS` are stored as large files are, the others as Git stores them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LFS = (".safetensors", ".onnx", ".bin", ".npz", ".gguf", ".model")

MESSAGES = {
    "RepoNotFound": (404, "Repository not found"),
    "Unauthorized": (401, "Invalid username or password."),
    "GatedRepo": (403, "Access to this model is restricted"),
    "RevisionNotFound": (404, "Invalid rev id"),
    "EntryNotFound": (404, "Entry not found"),
    "Forbidden": (403, "You do not have the rights to write here"),
    "Conflict": (412, "A commit has happened since"),
    "WrongHash": (400, "An object is missing, or is another one"),
}

# The token that may write.
TOKEN = "hf_of_the_stub"

Files = dict[str, bytes]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """Commits by hash, and the commit of each branch and tag. refuses: an error of `MESSAGES` for
    all. ignored: paths that a commit leaves out, as by .gitignore. messages: of commits that were
    uploaded."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    refuses: str | None = None
    private: bool = False
    ignored: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Files, branch: str = "main") -> str:
        """Add a commit of exactly these files."""
        about = f"{branch} {len(self.commits)} {sorted((n, sha256(d)) for n, d in files.items())}"
        name = hashlib.sha1(about.encode()).hexdigest()
        self.commits[name] = dict(files)
        self.branches[branch] = name
        return name

    def files(self, revision: str = "main") -> Files | None:
        return self.commits.get(self.resolved(revision))

    def resolved(self, revision: str) -> str:
        """The commit of a branch or tag; else the revision itself."""
        return self.branches.get(revision) or self.tags.get(revision, revision)


@dataclass
class Hub:
    """The state of the stub. requests: count of each `METHOD route`. damaged: paths whose content
    arrives with its first byte changed. cut: path -> bytes after which its first transfer breaks.
    pause: path -> event that its transfer waits for behind its first byte. paused: it waits.
    denies: organisations in which the token may not write. objects: large files by hash. meanwhile:
    called before a commit is taken."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    pause: dict[str, threading.Event] = field(default_factory=dict)
    paused: threading.Event = field(default_factory=threading.Event)
    denies: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    meanwhile: Callable[[], object] | None = None

    def add(self, name: str, files: Files | None = None, **about: Any) -> Repository:
        found = self.repositories[name] = Repository(**about)
        found.commit(files or {})
        return found

    def downloads(self) -> int:
        """Number of requests for the content of a file."""
        return self.requests["GET resolve"]


class _Refused(Exception):
    """The request is answered with an error of `MESSAGES`."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        return None

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        routes = _ROUTES if self.command in ("GET", "HEAD") else _WRITE_ROUTES
        self._body = self._read()
        try:
            for route, pattern in routes.items():
                if found := re.fullmatch(pattern, path):
                    self.hub.requests[f"{self.command} {route}"] += 1
                    getattr(self, f"_{route}")(*found.groups())
                    return
            raise _Refused("EntryNotFound")
        except _Refused as refused:
            code = str(refused)
            status, message = MESSAGES[code]
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self._send(json.dumps({"error": message}).encode(), status, headers)

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _read(self) -> bytes:
        """Body of the request, of known length or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while length := int(self.rfile.readline(), 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None:
            raise _Refused("RepoNotFound")
        if found.refuses:
            raise _Refused(found.refuses)
        return found

    def _files_of(self, name: str, revision: str | None) -> tuple[str, Files]:
        repository = self._repository(name)
        files = repository.files(revision or "main")
        if files is None:
            raise _Refused("RevisionNotFound")
        return repository.resolved(revision or "main"), files

    def _info(self, name: str, revision: str | None) -> None:
        commit, files = self._files_of(name, revision)
        siblings = [{"rfilename": n} for n in files]
        private = self._repository(name).private
        self._json({"id": name, "sha": commit, "private": private, "siblings": siblings})

    def _refs(self, name: str) -> None:
        repository = self._repository(name)
        kinds = {"branches": repository.branches, "tags": repository.tags, "converts": {}}
        self._json(
            {
                kind: [{"name": n, "ref": n, "targetCommit": c} for n, c in found.items()]
                for kind, found in kinds.items()
            }
        )

    def _may_write(self, name: str) -> None:
        """Refuse a request without the token, or for an organisation that denies it."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refused("Unauthorized")
        if name.partition("/")[0] in self.hub.denies:
            raise _Refused("Forbidden")

    def _create(self) -> None:
        asked = json.loads(self._body)
        name = f"{asked['organization']}/{asked['name']}"
        self._may_write(name)
        there = name in self.hub.repositories
        if not there:
            private = asked.get("visibility") == "private"
            self.hub.add(name, {".gitattributes": b"*.onnx filter=lfs\n"}, private=private)
        self._json({"url": f"{self.hub.endpoint}/{name}"}, 409 if there else 200)

    def _card(self) -> None:
        content = json.loads(self._body)["content"]
        if content.startswith("---\n") and "\n---\n" not in content:
            self._json({"errors": [{"message": "no end"}], "warnings": []}, 400)
            return
        self._json({"errors": [], "warnings": []})

    def _branch(self, name: str, branch: str) -> None:
        self._may_write(name)
        repository = self._repository(name)
        repository.branches[branch] = repository.branches["main"]
        self._json({})

    def _preupload(self, name: str, revision: str) -> None:
        self._may_write(name)
        _, files = self._files_of(name, revision)
        rows = []
        for one in json.loads(self._body)["files"]:
            path, large = one["path"], one["path"].endswith(LFS)
            held = files.get(path)
            oid = None if held is None else sha256(held) if large else git_hash(held)
            mode = "lfs" if large else "regular"
            ignored = path in self._repository(name).ignored
            rows.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        self._json({"files": rows})

    def _batch(self, name: str) -> None:
        self._may_write(name)
        rows = []
        for one in json.loads(self._body)["objects"]:
            row = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.objects:
                href = f"{self.hub.endpoint}/objects/{one['oid']}"
                row["actions"] = {"upload": {"href": href}}
            rows.append(row)
        self._json({"objects": rows, "transfer": "basic"})

    def _object(self, oid: str) -> None:
        if sha256(self._body) != oid:
            raise _Refused("WrongHash")
        self.hub.objects[oid] = self._body
        self._send(b"")

    def _commit(self, name: str, revision: str) -> None:
        self._may_write(name)
        if self.hub.meanwhile:
            self.hub.meanwhile()
        repository = self._repository(name)
        before, files = self._files_of(name, revision)
        files = dict(files)
        for line in self._body.splitlines():
            row = json.loads(line)
            key, value = row["key"], row["value"]
            if key == "header":
                if value.get("parentCommit", before) != before:
                    raise _Refused("Conflict")
                repository.messages.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert key == "lfsFile", f"{key} is not expected of an upload"
                if value["oid"] not in self.hub.objects:
                    raise _Refused("WrongHash")
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = repository.commit(files, revision)
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self._json({"commitOid": commit, "commitUrl": url})

    def _tree(self, name: str, revision: str) -> None:
        _, files = self._files_of(name, revision)
        rows = []
        for path, data in files.items():
            row = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
            if path.endswith(LFS):
                row["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
            rows.append(row)
        self._json(rows)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        commit, files = self._files_of(name, revision)
        if path not in files:
            raise _Refused("EntryNotFound")
        data = files[path]
        etag = sha256(data) if path.endswith(LFS) else git_hash(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path.endswith(LFS):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        if path in self.hub.damaged:
            data = bytes([data[0] ^ 1]) + data[1:]
        status = 200
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, status = int(asked[1]), 206
            self.hub.ranges.append(f"{path} {start}")
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data = data[start:]
        if self.command == "GET" and path in self.hub.cut:
            self._break_off(data, self.hub.cut.pop(path), headers)
        elif self.command == "GET" and path in self.hub.pause:
            self._trickle(data, self.hub.pause[path], headers)
        else:
            self._send(data, status, headers)

    def _begin(self, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _break_off(self, data: bytes, after: int, headers: dict[str, str]) -> None:
        """Send the beginning of a file and close the connection."""
        self._begin(data, headers)
        self.wfile.write(data[:after])
        self.wfile.flush()
        self.close_connection = True

    def _trickle(self, data: bytes, gate: threading.Event, headers: dict[str, str]) -> None:
        """Send the beginning of a file, and the rest when the gate opens."""
        self._begin(data, headers)
        self.wfile.write(data[:1])
        self.wfile.flush()
        self.hub.paused.set()
        gate.wait(20)
        self.wfile.write(data[1:])


_NAME = r"([^/]+/[^/]+)"
_ROUTES = {
    "tree": rf"/api/models/{_NAME}/tree/([^/]+)",
    "refs": rf"/api/models/{_NAME}/refs",
    "info": rf"/api/models/{_NAME}(?:/revision/(.+))?",
    "resolve": rf"/{_NAME}/resolve/([^/]+)/(.+)",
}
_WRITE_ROUTES = {
    "create": r"/api/repos/create",
    "card": r"/api/validate-yaml",
    "branch": rf"/api/models/{_NAME}/branch/(.+)",
    "preupload": rf"/api/models/{_NAME}/preupload/(.+)",
    "batch": rf"/{_NAME}\.git/info/lfs/objects/batch",
    "object": r"/objects/([0-9a-f]{64})",
    "commit": rf"/api/models/{_NAME}/commit/(.+)",
}


def constants() -> Any:
    """The settings of `huggingface_hub`."""
    from huggingface_hub import constants

    return constants


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `huggingface_hub` send nothing."""
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants(), "HF_HUB_OFFLINE", True)
    close_session()


def names(folder: Path) -> set[str]:
    """Files of a folder, hidden ones aside."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {p.relative_to(folder).as_posix() for p in paths if not p.name.startswith(".")}


def contents(folder: Path) -> Files:
    """Contents of the files of a folder, hidden ones aside."""
    return {name: (folder / name).read_bytes() for name in names(folder)}


@contextmanager
def stub_hub() -> Iterator[Hub]:
    """Serve a stub on a free port of loopback."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
