"""Small trees of data sets in their published formats, for tests."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmi_deploy.cli.app import run
from mmi_train.data.document import TextPart
from mmi_train.data.readers.data_set import DataSet, Settings
from mmi_train.data.readers.registry import open_set
from mmi_train.data.readers.sample import Sample

# Size of the pictures, width and height.
WIDTH, HEIGHT = 12, 8


def png(shade: int = 100, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """A grey picture as PNG; readers go by contents, not by the file's ending."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def put(folder: Path, files: dict[str, Any]) -> Path:
    """Write files below `folder`: bytes and texts as they are, numbers as pictures of that shade,
    other values as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            content = png(content)
        elif isinstance(content, list | dict):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def lines(*entries: Any) -> str:
    """JSON, one value a line."""
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def opened(name: str, folder: Path, **settings: Any) -> DataSet[Any]:
    return open_set(name, folder, Settings(**settings))


def shown(sample: Sample) -> list[Any]:
    """Parts of a sample: texts, in a list if they are learned; names of pictures, in a tuple if
    they are drawn."""
    found: list[Any] = []
    for part in sample.parts:
        if isinstance(part, TextPart):
            found.append([part.text] if part.learn else part.text)
        else:
            name = part.picture.name
            found.append((name,) if part.learn else f"<{name}>")
    return found


def checked(name: str, folder: Path, capsys: Any, *options: str) -> dict[str, Any]:
    """Result of `mmi data check --json`."""
    code = run(["data", "check", name, str(folder), "--json", *options])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    found = json.loads(printed.out)
    assert list(found) == ["name", "samples", "skipped", "documents"]
    return dict(found)


def npy(value: Any) -> bytes:
    """An .npy file."""
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    return file.getvalue()
