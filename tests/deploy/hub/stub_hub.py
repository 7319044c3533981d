"""Stub of the Hub on loopback: the routes that `huggingface_hub` uses to read models.

Repositories are in memory. Written after the requests of the library and the Hub's OpenAPI; files
whose names end as in `LFS` are stored as large files are, the others as Git stores them.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
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
}

Files = dict[str, bytes]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """Commits by hash, and the commit of each branch. refuses: an error of `MESSAGES` for all."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    refuses: str | None = None

    def commit(self, files: Files, branch: str = "main") -> str:
        """Add a commit of exactly these files."""
        about = f"{branch} {len(self.commits)} {sorted((n, sha256(d)) for n, d in files.items())}"
        name = hashlib.sha1(about.encode()).hexdigest()
        self.commits[name] = dict(files)
        self.branches[branch] = name
        return name

    def files(self, revision: str = "main") -> Files | None:
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Hub:
    """The state of the stub. requests: count of each `METHOD route`. damaged: paths whose content
    arrives with its first byte changed. cut: path -> bytes after which its first transfer breaks.
    pause: path -> event that its transfer waits for behind its first byte. paused: it waits."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    pause: dict[str, threading.Event] = field(default_factory=dict)
    paused: threading.Event = field(default_factory=threading.Event)

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

    do_HEAD = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        try:
            for route, pattern in _ROUTES.items():
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

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

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
        return repository.branches.get(revision or "main", revision or ""), files

    def _info(self, name: str, revision: str | None) -> None:
        commit, files = self._files_of(name, revision)
        self._json({"id": name, "sha": commit, "siblings": [{"rfilename": n} for n in files]})

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
    "info": rf"/api/models/{_NAME}(?:/revision/(.+))?",
    "resolve": rf"/{_NAME}/resolve/([^/]+)/(.+)",
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
