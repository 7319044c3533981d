"""Golden cases as trees of files: what a case says its data set's folder holds."""

from __future__ import annotations

import io
import json
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmi_train.golden.differences import Case

# Side of the frames of a strip.
_FRAME = 128


@contextmanager
def tree(case: Case, names: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Folder with the files and pictures of a case; `names`: other names for some of them."""
    names = names or {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, content in (case.get("files") or {}).items():
            plain, _, remark = name.partition(" (")
            _write(folder, names.get(plain, plain), _content(content, remark))
        width, height = case.get("picture_size", (12, 10))
        for name, shade in (case.get("pictures") or {}).items():
            _write(folder, name, _png(np.full((height, width, 3), shade, np.uint8)))
        for name, shades in (case.get("frame_strips") or {}).items():
            frames = [np.full((_FRAME, _FRAME, 3), shade, np.uint8) for shade in shades]
            _write(folder, name, _png(np.concatenate(frames)))
        for name in case.get("broken_pictures", ()):
            _write(folder, name, b"not a picture")
        yield folder


def _write(folder: Path, name: str, content: bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _content(value: Any, remark: str) -> bytes:
    """Bytes of a file; `remark`: its format, where it is neither JSON nor text."""
    if remark.startswith("pickle"):
        return pickle.dumps(value)
    if "object array" in remark or "strings" in remark:
        if isinstance(value, dict):
            array = np.array(value, object)
        elif "object array" in remark:
            array = np.empty(len(value), object)
            array[:] = value
        else:
            array = np.array(value)
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        return file.getvalue()
    return value.encode() if isinstance(value, str) else json.dumps(value).encode()


def _png(rgb: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG")
    return file.getvalue()
