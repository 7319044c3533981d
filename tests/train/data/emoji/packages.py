"""Two small npm packages in the layout of the real ones, with emoji of our own."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

COLOURS = ("red", "green", "blue", "orange", "purple", "brown", "teal", "black")
SHAPES = {
    "ball": '<circle cx="16" cy="16" r="14" fill="{}"/>',
    "box": '<path d="M3 3h26v26H3z" fill="{}"/>',
    "flag": '<path d="M3 3h13v26H3z" fill="{}"/>',
    "hill": '<path d="M2 30L16 3L30 30z" fill="{}"/>',
}


def write_package(path: Path, files: Mapping[str, object]) -> Path:
    """Write JSON files as a package."""
    with tarfile.open(path, "w:gz") as archive:
        for name, value in files.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def icon_files() -> dict[str, dict]:
    """Files of the icon package: 32 emoji of two groups, and one of no group."""
    icons = {
        f"{colour}-{shape}": {"body": drawn.format(colour)}
        for shape, drawn in SHAPES.items()
        for colour in COLOURS
    }
    names = list(icons)
    codes = {f"{0x1F600 + index:x}": name for index, name in enumerate(names)}
    return {
        "icons.json": {"width": 32, "height": 32, "icons": icons | {"lone": {"body": ""}}},
        "metadata.json": {"categories": {"Balls & Boxes": names[:16], "Signs": names[16:]}},
        "chars.json": codes,
    }


def keyword_files() -> dict[str, dict]:
    """Files of the keyword package."""
    words = {
        chr(0x1F600 + index): [name.replace("-", "_"), name.partition("-")[0], "mr. thing"]
        for index, name in enumerate(icon_files()["icons.json"]["icons"])
    }
    return {"dist/emoji-en-US.json": words}


def write_packages(folder: Path) -> tuple[Path, Path]:
    """Both packages in a folder."""
    return (
        write_package(folder / "icons.tgz", icon_files()),
        write_package(folder / "keywords.tgz", keyword_files()),
    )
