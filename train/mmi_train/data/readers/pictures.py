"""Pictures of data sets: files, members of tars, frames of strips and clips, label maps.

Each has a name for messages and is decoded when it is asked for; `load` raises `DocumentError`.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from mmi_deploy.documents.images import (
    FORMATS,
    MAX_BYTES,
    Rgb,
    as_rgb,
    read_rgb,
    without_long_texts,
)
from mmi_deploy.errors import DocumentError
from mmi_deploy.system.files import open_regular
from mmi_train.data.readers.restricted_pickle import read_npy
from mmi_train.data.readers.shard_index import Arrays, indexed


class Picture(Protocol):
    """A picture of a data set. `name`: its path below the set's folder."""

    @property
    def name(self) -> str: ...

    def exists(self) -> bool: ...

    def load(self) -> Rgb: ...


@dataclass(frozen=True)
class FilePicture:
    """The picture file `name` below the folder `root`; it may lead through symbolic links. Both are
    texts, because sets of millions look for their pictures."""

    root: str
    name: str

    @property
    def path(self) -> Path:
        return Path(self.root, self.name)

    def exists(self) -> bool:
        return os.path.isfile(os.path.join(self.root, self.name))

    def load(self) -> Rgb:
        return read_rgb(self.path)


@dataclass(frozen=True)
class TarPicture:
    """A member of a tar at a byte offset; nothing is extracted to the disk. `name`: the tar's and
    the member's."""

    tar: Path
    name: str
    offset: int
    size: int

    def exists(self) -> bool:
        return True

    def load(self) -> Rgb:
        if self.size > MAX_BYTES:
            raise DocumentError(f"the picture {self.name} is too large")
        with open_regular(self.tar) as file:
            file.seek(self.offset)
            content = file.read(self.size)
        return decoded(content, self.name)


@dataclass(frozen=True)
class Frame:
    """One of the square frames of a strip, a picture of frames below one another. `draw`: number of
    a frame from the number of frames."""

    strip: Picture
    draw: Callable[[int], int]

    @property
    def name(self) -> str:
        return self.strip.name

    def exists(self) -> bool:
        return self.strip.exists()

    def load(self) -> Rgb:
        strip = self.strip.load()
        side = strip.shape[1]
        if strip.shape[0] < side:
            raise DocumentError(f"the strip {self.name} is lower than one frame")
        top = self.draw(strip.shape[0] // side) * side
        return strip[top : top + side]


@dataclass(frozen=True)
class Clip:
    """Frames of a video in an .npy file, uint8 [frames, height, width, 3], as one strip."""

    path: Path
    name: str

    def exists(self) -> bool:
        return self.path.is_file()

    def load(self) -> Rgb:
        frames = read_npy(self.path)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
            raise DocumentError(
                f"{self.path} is not a clip",
                expected="uint8 [frames, height, width, 3]",
                got=f"{frames.dtype} {list(frames.shape)}",
            )
        return np.concatenate(list(frames))


@dataclass(frozen=True)
class LabelMap:
    """A map of labels, a PNG of numbers, in colours: `colours` is uint8 [labels, 3]."""

    path: Path
    name: str
    colours: np.ndarray

    def exists(self) -> bool:
        return self.path.is_file()

    def load(self) -> Rgb:
        labels = self.labels()
        if labels.max(initial=0) >= len(self.colours):
            raise DocumentError(
                f"the map {self.path} holds the label {labels.max()}",
                expected=f"at most {len(self.colours) - 1}",
            )
        return np.asarray(self.colours[labels])

    def labels(self) -> np.ndarray:
        """Labels as they are stored, uint8 [height, width]."""
        read_rgb(self.path)  # refuses what is too large, cut off or no picture
        with Image.open(self.path, formats=("PNG",)) as image:
            if image.mode not in ("L", "P"):
                raise DocumentError(f"the map {self.path} holds colours", expected="one label each")
            return np.asarray(image)


def decoded(content: bytes, name: str) -> Rgb:
    """Decode a picture in memory; raises `DocumentError` with its `name`."""
    try:
        return as_rgb(Image.open(without_long_texts(io.BytesIO(content)), formats=FORMATS))
    except Exception as error:  # decoders raise many types for damaged files
        raise DocumentError(f"the picture {name} cannot be read: {error}") from None


def tar_members(path: Path) -> list[tuple[str, int, int]]:
    """Name, byte offset and size of every regular file of a tar; raises `DocumentError`."""
    found = indexed(path, partial(_tar_index, path))
    columns = (found[name].tolist() for name in ("names", "offsets", "sizes"))
    return list(zip(*columns, strict=True))


def _tar_index(path: Path) -> Arrays:
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = [one for one in tar if one.isreg()]
    except (OSError, tarfile.TarError) as error:
        raise DocumentError(f"the shard {path} is damaged: {error}") from None
    return {
        "names": np.array([one.name for one in members], str),
        "offsets": np.array([one.offset_data for one in members], np.int64),
        "sizes": np.array([one.size for one in members], np.int64),
    }
