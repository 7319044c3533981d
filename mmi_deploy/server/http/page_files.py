"""Files of the page, read once, with the headers that keep it to itself."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from mmi_deploy.server.api.errors import ApiError

TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webmanifest": "application/manifest+json",
}

POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)

INDEX = "index.html"


class PageFiles:
    """The files beside the package, by name."""

    def __init__(self) -> None:
        folder = files("mmi_deploy.server") / "page"
        self._files: dict[str, tuple[bytes, str, str]] = {}
        for file in folder.iterdir() if folder.is_dir() else ():
            suffix = "." + file.name.rpartition(".")[2]
            if file.is_file() and suffix in TYPES:
                data = file.read_bytes()
                etag = f'"{sha256(data).hexdigest()[:16]}"'
                self._files[file.name] = (data, TYPES[suffix], etag)

    def response(self, request: Request, name: str) -> Response:
        """A file, or 304 if the browser has it. Raises `ApiError` 404."""
        if name not in self._files:
            raise ApiError(404, "not_found", "there is no such file")
        data, kind, etag = self._files[name]
        headers = {
            "content-security-policy": POLICY,
            "cache-control": "no-cache",
            "etag": etag,
            "cross-origin-opener-policy": "same-origin",
        }
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=kind, headers=headers)
