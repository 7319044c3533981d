"""Folders of data sets: annotation files under their published names, pictures, readable errors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from mmi_deploy.errors import DocumentError
from mmi_deploy.system.files import open_regular
from mmi_train.data.readers.pictures import FilePicture
from mmi_train.data.readers.sample import Skipped

# Largest annotation file and longest line, in bytes: LLaVA-665K has 1 GB, DVQA 0.5 GB.
MOST_BYTES = 2**33
MOST_LINE = 2**26

# Folder of annotation files, which is looked into first.
_ANNOTATIONS = "annotations"

MISSING, BROKEN, OUTSIDE = "picture is missing", "picture is broken", "picture lies outside"


class Folder:
    """The folder of the data set `name`; `source` tells where its files come from.

    Files are looked for in the folder, and in those directly below it: sets unpack to
    `annotations`, or to a folder that holds all of the set.
    """

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.path, self.source = name, path, source
        self._roots = [""]  # folders below which pictures are looked for
        if not path.is_dir():
            raise DocumentError(
                f"there is no folder {path} of the data set {name}", fix=f"Get it from {source}"
            )

    @cached_property
    def places(self) -> list[str]:
        """The folder itself, `annotations`, and the other folders directly below it, by name."""
        with os.scandir(self.path) as found:
            below = {entry.name for entry in found if entry.is_dir()}
        first = [_ANNOTATIONS] if _ANNOTATIONS in below else []
        return ["", *first, *sorted(below - {_ANNOTATIONS})]

    def find(self, *names: str) -> Path | None:
        """First file of these names, `*` in them allowed, in the folder or one directly below."""
        for name in names:
            for place in self.places:
                folder = self.path / place
                if "*" in name:
                    path = min(folder.glob(name), default=folder / name)
                else:
                    path = folder / name
                if path.is_file():
                    self._also_below(place)
                    return path
        return None

    def folder(self, *names: str) -> str | None:
        """First folder of these names in the folder or one directly below: its path from the
        folder."""
        for name in names:
            for place in self.places:
                if (self.path / place / name).is_dir():
                    self._also_below(place)
                    return f"{place}/{name}" if place else name
        return None

    def _also_below(self, place: str) -> None:
        """Look for pictures below a folder in which a file of the set was found."""
        if place not in ("", _ANNOTATIONS, *self._roots):
            self._roots.append(place)

    def file(self, *names: str) -> Path:
        """Find a file as `find` does; raises `DocumentError` with the first name and the source."""
        found = self.find(*names)
        if found is None:
            raise self.lacks(*names)
        return found

    def lacks(self, *names: str) -> DocumentError:
        """Error for missing files: any of `names` would do."""
        others = f" (or {', '.join(names[1:])})" if names[1:] else ""
        return DocumentError(
            f"{self.path} lacks {names[0]}{others} of the data set {self.name}",
            fix=f"Get it from {self.source}",
        )

    def picture(self, *names: str) -> FilePicture:
        """Picture at the first of these paths below the folder that exists, else at the first.

        If files of the set lie in a folder directly below, pictures may lie below that too. Raises
        `Skipped` for paths that lead out of the folder; symbolic links are followed.
        """
        root = str(self.path)
        pictures = [
            FilePicture(root, f"{place}/{name}" if place else name)
            for place in self._roots
            for name in map(_inside, names)
        ]
        return next((one for one in pictures if one.exists()), pictures[0])


def _inside(name: str) -> str:
    if not name or name[0] == "/" or "\0" in name or ".." in name.split("/"):
        raise Skipped(OUTSIDE, name[:200])
    return name


def read_json(path: Path) -> Any:
    """Value of a JSON file; raises `DocumentError`."""
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MOST_BYTES:
                raise DocumentError(f"{path} is too large", got=f"{size >> 30} GB")
            return json.loads(file.read().decode("utf-8-sig"))
    except OSError as error:
        raise DocumentError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DocumentError(
            f"{path} is not whole JSON: {error}", fix="download the file again"
        ) from None


def listed(path: Path, value: Any, key: str | None = None) -> list[Any]:
    """The list under `key` of a file's value (None: the value itself); raises `DocumentError`."""
    found = value if key is None else value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        what = "a list" if key is None else f"an object with a list `{key}`"
        raise DocumentError(
            f"{path} is not what the data set publishes",
            expected=what,
            got=type(value).__name__,
            fix="it may be of another version of the set: compare it with docs/data.md",
        )
    return found


def by_id(values: Any) -> dict[int | str, dict[str, Any]]:
    """Objects of a list by their `id`; what is none, or has none, is left out."""
    return {
        one["id"]: one
        for one in (values if isinstance(values, list) else [])
        if isinstance(one, dict) and isinstance(one.get("id"), int | str)
    }


def entries(path: Path, key: str | None = None) -> list[Any]:
    """The list in a JSON file."""
    return listed(path, read_json(path), key)


def json_lines(path: Path) -> Iterator[Any]:
    """Values of the lines of a file; a line that is not JSON is None. Raises `DocumentError`."""
    try:
        with open_regular(path) as file:
            while line := file.readline(MOST_LINE + 1):
                if line.strip():
                    yield line_value(line)
    except OSError as error:
        raise DocumentError(f"cannot read {path}: {error.strerror}") from None


def line_value(line: bytes) -> Any:
    """Value of a line of JSON; None if it is none."""
    try:
        return json.loads(line.decode("utf-8-sig")) if len(line) <= MOST_LINE else None
    except (ValueError, RecursionError):
        return None


def texts(values: Iterable[Any]) -> tuple[str, ...]:
    """The values that are texts or numbers, as texts."""
    return tuple(
        str(value)
        for value in values
        if isinstance(value, str) or (isinstance(value, int | float) and value is not True)
    )
