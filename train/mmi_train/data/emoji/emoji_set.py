"""An emoji set: pictures in two sizes with names, groups and keywords, in a folder."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mmi_deploy.errors import DocumentError, MmiError
from mmi_deploy.system.files import write_file
from mmi_deploy.system.output_folder import new_folder
from mmi_deploy.system.progress import Progress, silent
from mmi_train.data.corpus import Split

if TYPE_CHECKING:
    from mmi_train.data.emoji.packages import Icon

FOLDER_KIND = "emoji set"
GROUPS = ("Animals & Nature", "Food & Drink")

# Widths of an emoji in a picture of 64 pixels.
WIDTHS = {"small": 36, "large": 56}

HELD_OUT_PERCENT = 10
_INDEX, _PICTURES = "set.json", "pictures.npz"


@dataclass(frozen=True)
class Emoji:
    """Words about one emoji."""

    name: str
    group: str
    keywords: tuple[str, ...]

    @property
    def split(self) -> Split:
        """Split by a stable hash of the name."""
        digest = hashlib.blake2b(self.name.encode(), digest_size=8).digest()
        return "held_out" if int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT else "train"


@dataclass(frozen=True, eq=False)
class EmojiSet:
    """`emoji[i]` has the picture `pictures[size][i]`: uint8
    [width, width, 4], RGBA."""

    emoji: tuple[Emoji, ...]
    pictures: dict[str, np.ndarray]

    def of(self, split: Split) -> list[int]:
        """Indices of the emoji of a split."""
        return [index for index, one in enumerate(self.emoji) if one.split == split]

    @property
    def checksum(self) -> str:
        """Hash of all words and pixels."""
        digest = hashlib.sha256(json.dumps([asdict(one) for one in self.emoji]).encode())
        for size in WIDTHS:
            digest.update(self.pictures[size].tobytes())
        return digest.hexdigest()[:16]


def render(icons: Sequence[Icon], progress: Progress = silent) -> EmojiSet:
    """Draw icons in all sizes. Raises `MmiError` where resvg is not installed or an SVG is
    broken."""
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise MmiError(
            "drawing SVG needs resvg-py, which is not installed",
            fix="install it with: pip install 'mmi_deploy[data]'",
        ) from None
    pictures: dict[str, list[np.ndarray]] = {size: [] for size in WIDTHS}
    for number, icon in enumerate(icons):
        progress("drawing emoji", number, len(icons))
        for size, width in WIDTHS.items():
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {icon.side} {icon.side}" '
                f'width="{width}" height="{width}">{icon.body}</svg>'
            )
            try:
                png = bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))
            except ValueError as error:
                raise DocumentError(f"the SVG of {icon.name!r} cannot be drawn: {error}") from None
            pictures[size].append(np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")))
    emoji = tuple(Emoji(icon.name, icon.group, icon.keywords) for icon in icons)
    return EmojiSet(emoji, {size: np.stack(drawn) for size, drawn in pictures.items()})


def write_set(made: EmojiSet, folder: Path, sources: Sequence[str], force: bool = False) -> None:
    """Write a set into a new folder; `sources`: what it was made from, with licences."""
    with new_folder(folder, force, kind=FOLDER_KIND) as work:
        index = {"sources": list(sources), "emoji": [asdict(one) for one in made.emoji]}
        write_file(work / _INDEX, json.dumps(index, indent=1))
        stream = io.BytesIO()
        np.savez_compressed(stream, allow_pickle=False, **made.pictures)
        write_file(work / _PICTURES, stream.getvalue())


def read_set(folder: Path) -> EmojiSet:
    """Read the folder of a set. Raises `DocumentError`."""
    try:
        index = json.loads((folder / _INDEX).read_text())
        emoji = tuple(
            Emoji(str(one["name"]), str(one["group"]), tuple(map(str, one["keywords"])))
            for one in index["emoji"]
        )
        with np.load(folder / _PICTURES, allow_pickle=False) as stored:
            pictures = {size: stored[size] for size in WIDTHS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DocumentError(
            f"{folder} is no emoji set",
            got=str(error),
            fix=f"make one with `mmi data emoji --icons … --keywords … -o {folder}`",
        ) from None
    for size, width in WIDTHS.items():
        shape = (len(emoji), width, width, 4)
        if pictures[size].shape != shape or pictures[size].dtype != np.uint8:
            raise DocumentError(f"{folder / _PICTURES} is broken: {size} pictures are not {shape}")
    if {one.split for one in emoji} != {"train", "held_out"}:
        raise DocumentError(f"{folder} holds {len(emoji)} emoji, too few for two splits")
    return EmojiSet(emoji, pictures)
