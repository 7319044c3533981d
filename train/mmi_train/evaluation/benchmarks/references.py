"""Questions of evaluation sets, with what is right, and the files that say it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmi_deploy.errors import MmiError
from mmi_train.evaluation.metrics.boxes import Box


class AnnotationError(MmiError):
    """Annotations of a data set that are missing or not understood."""


@dataclass(frozen=True)
class Reference:
    """One question.

    id: the set's own. other_ids: further names by which predictions may call it. answers: right
    answers or captions; none if they are not published. group: part of the set whose score is
    given apart. box, size: in pixels, with the picture's width and height. relevance: of each
    answer option. picture: the real picture, or the map of labels. fields: values that the official
    submission repeats.
    """

    id: str
    other_ids: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    group: str = ""
    box: Box | None = None
    size: tuple[float, float] | None = None
    relevance: tuple[float, ...] = ()
    picture: Path | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answered(self) -> bool:
        """True if the annotations say what is right."""
        return bool(self.answers or self.box or self.relevance or self.picture)


@dataclass(frozen=True)
class Source:
    """Data folder of one set, and the address where its files are to be had."""

    folder: Path
    address: str

    def find(self, *names: str) -> Path:
        """The first of `names` that exists: paths in the folder, or in a folder directly below it.

        Raises `AnnotationError`, which says where the file is to be had.
        """
        found = self.find_if_there(*names)
        if found is None:
            raise AnnotationError(
                f"{self.folder} holds no {names[0]}",
                fix=f"get it from {self.address} and put it there, or into a folder below",
            )
        return found

    def find_if_there(self, *names: str) -> Path | None:
        """As `find`; None if none of `names` exists."""
        if not self.folder.is_dir():
            raise AnnotationError(
                f"there is no folder {self.folder}",
                fix=f"give the folder of the data set; its files are at {self.address}",
            )
        below = sorted(path for path in self.folder.iterdir() if path.is_dir())
        for name in names:
            for folder in (self.folder, *below):
                if (folder / name).is_file():
                    return folder / name
        return None


def read_json(path: Path) -> Any:
    """Contents of a JSON file. Raises `AnnotationError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise AnnotationError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path} is no JSON: {error}", fix="download it again") from None


def read_json_lines(path: Path) -> Iterator[Any]:
    """Values of a JSONL file, one by one. Raises `AnnotationError`."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise AnnotationError(
                            f"line {number} of {path} is no JSON: {error}", fix="download it again"
                        ) from None
    except OSError as error:
        raise AnnotationError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise AnnotationError(f"{path} is not UTF-8 text", fix="download it again") from None


def check_ids(references: Sequence[Reference], path: Path) -> None:
    """Raise `AnnotationError` if two questions have the same id."""
    seen: set[str] = set()
    for reference in references:
        if reference.id in seen:
            raise AnnotationError(f"{path} has two questions of the id {reference.id}")
        seen.add(reference.id)
