"""References to a folder on the Hugging Face Hub: `hf://org/name[@revision][/folder]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike, fspath

from mmi_deploy.errors import ConfigError

FORM = "hf://org/name[@revision][/folder]"

# `pathlib` reads `hf://org/name` as the path `hf:/org/name`.
_SCHEME = re.compile(r"hf:/+")

# Types of repositories other than models, as they begin a reference of the Hub's own tools.
_OTHER_TYPES = ("datasets", "spaces", "buckets", "kernels")

_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
# A revision has no slash, except references of pull requests and conversions.
_REVISION = r"refs/(?:pr|convert)/[^/@]+|[^/@]+"
_WHOLE = re.compile(rf"({_PART}/{_PART})(?:@({_REVISION}))?(?:/(.*))?", re.ASCII)


@dataclass(frozen=True)
class Reference:
    """A folder, or a file, of a model repository.

    repository: `org/name`. revision: a branch, tag or commit; None for the default branch. folder:
    path in the repository; empty for its root.
    """

    repository: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repository}{revision}{f'/{self.folder}' if self.folder else ''}"

    @property
    def name(self) -> str:
        """Name for people and requests: the reference without scheme and revision."""
        return f"{self.repository}/{self.folder}" if self.folder else self.repository

    def path(self, file: str) -> str:
        """Path in the repository of a file of the folder."""
        return f"{self.folder}/{file}" if self.folder else file


def is_reference(given: str | PathLike[str]) -> bool:
    """True if `given` begins like a reference, also where `pathlib` has read it as a path."""
    return bool(_SCHEME.match(fspath(given)))


def parse(given: str | PathLike[str]) -> Reference:
    """Read a reference. Raises `ConfigError` for one that is malformed."""
    text = fspath(given)
    rest = _SCHEME.sub("", text, count=1).rstrip("/")
    if rest.startswith(tuple(f"{kind}/" for kind in _OTHER_TYPES)):
        raise ConfigError(
            f"{text} is no model repository", expected=FORM, got=rest.partition("/")[0]
        )
    if rest.count("/") >= 2:
        rest = rest.removeprefix("models/")
    found = _WHOLE.fullmatch(rest)
    folder = (found[3] or "") if found else ""
    bad = any(part in ("", ".", "..") for part in folder.split("/")) if folder else False
    if found is None or bad or "\\" in folder:
        raise ConfigError(f"the reference {text} is malformed", expected=FORM)
    return Reference(found[1], found[2], folder)
