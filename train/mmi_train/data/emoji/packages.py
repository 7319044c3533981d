"""Reading the two npm packages that an emoji set is made from.

`@iconify-json/fluent-emoji-flat` (MIT) holds Microsoft's Fluent emoji as SVG, by name, with groups
and code points; `emojilib` (MIT) holds English keywords by character. A package is the `.tgz` file
that `npm pack NAME` writes: it is read in place, and nothing of it is executed.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmi_deploy.errors import DocumentError

ICONS = "@iconify-json/fluent-emoji-flat"
KEYWORDS = "emojilib"

# The largest file that is read from a package, in bytes; the icons take 7 MB.
_MOST = 64 * 2**20


@dataclass(frozen=True)
class Icon:
    """One emoji: its name in words, its group, its keywords and its SVG elements in a square of
    `side` units."""

    name: str
    group: str
    keywords: tuple[str, ...]
    body: str
    side: float


def read_icons(icons: Path, keywords: Path) -> list[Icon]:
    """All emoji of the icon package that are in a group, in its order. Raises `DocumentError` for
    files that are not these packages."""
    drawn = _json(icons, ICONS, "icons.json")
    groups = _json(icons, ICONS, "metadata.json")
    characters = _json(icons, ICONS, "chars.json")
    words = _json(keywords, KEYWORDS, "dist/emoji-en-US.json")
    try:
        character = {name: _character(code) for code, name in characters.items()}
        side = float(drawn.get("width", 16))
        return [
            Icon(
                name.replace("-", " "),
                group,
                tuple(
                    dict.fromkeys(_plain(word) for word in words.get(character.get(name, ""), ()))
                ),
                drawn["icons"][name]["body"],
                side,
            )
            for group, names in groups["categories"].items()
            for name in names
            if name in drawn["icons"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DocumentError(
            f"{icons} or {keywords} is laid out in another way",
            got=f"{type(error).__name__}: {error}",
            fix=f"npm pack {ICONS}@1.2.6 {KEYWORDS}@4.0.3",
        ) from error


def _character(code: str) -> str:
    """Character of "1f436-200d-1f9ba"; variation selectors are left out, as keywords have some."""
    points = [int(point, 16) for point in code.split("-")]
    return "".join(chr(point) for point in points if point != 0xFE0F)


def _plain(word: str) -> str:
    return word.replace("_", " ").replace("-", " ").lower()


def _json(package: Path, name: str, member: str) -> dict[str, Any]:
    """A JSON file of a package."""
    wrong = DocumentError(
        f"{package} is not the package {name}: no readable {member}", fix=f"npm pack {name}"
    )
    try:
        with tarfile.open(package, "r:gz") as archive:
            found = archive.getmember(f"package/{member}")
            if not found.isfile() or found.size > _MOST:
                raise wrong
            stream = archive.extractfile(found)
            assert stream is not None
            read = json.loads(stream.read())
    except (OSError, KeyError, EOFError, tarfile.TarError, ValueError) as error:
        raise wrong from error
    if not isinstance(read, dict):
        raise wrong
    return read
