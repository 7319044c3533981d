"""Segmenters: networks of the user's that find ADE20K's classes in drawn pictures.

A segmenter is `FILE.onnx`, or `module:function` of Python.

* ONNX: one input, RGB from 0 to 255, float32 or uint8 [1, 3, height, width] (the scaling of its
  network is part of the graph); a fixed height and width are scaled to. The first output is a class
  of each pixel, integers [1, height, width], or a score of each class, [1, classes, height, width].
  Its size may be another than the input's.
* `module:function` is called with a picture, uint8 [height, width, 3], and returns the class of
  each pixel, integers [height, width], of any size.

Classes count from 0, in the order of ADE20K's 150; other numbers are no class. Modules are those
that Python finds where it is installed: code in the folder of the data is refused.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmi_deploy.errors import ConfigError, WeightsError

Rgb = np.ndarray
Segmenter = Callable[[Rgb], np.ndarray]

_ENDING = ".onnx"


def open_segmenter(named: str, data: Path) -> Segmenter:
    """The segmenter of a name. data: folder whose code is not run. Raises `MmiError`."""
    if named.endswith(_ENDING):
        return _OnnxSegmenter(Path(named))
    module, colon, function = named.partition(":")
    if not colon or not module or not function.isidentifier():
        raise ConfigError(
            "--segmenter cannot be read",
            expected="FILE.onnx or module:function",
            got=named,
        )
    found = getattr(_module(module, data), function, None)
    if not callable(found):
        raise ConfigError(f"the module {module} has no function {function}")

    def segment(rgb: Rgb) -> np.ndarray:
        return _classes(found(rgb), named)

    return segment


def _module(name: str, data: Path) -> Any:
    """Import a module, unless Python found it in `data`."""
    top = name.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)  # imports nothing yet
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise ConfigError(
            f"there is no Python module {top} for --segmenter",
            fix="install it, or name its folder in PYTHONPATH",
        )
    places = [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.origin else ())]
    root = data.resolve()
    if any(Path(place).resolve().is_relative_to(root) for place in places):
        raise ConfigError(
            f"the module {top} lies in the data folder {data}, whose code is not run",
            fix="move it elsewhere",
        )
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"cannot import {name} for --segmenter: {error}") from None


def _classes(value: Any, named: str) -> np.ndarray:
    found = np.asarray(value)
    if found.ndim != 2 or not np.issubdtype(found.dtype, np.integer) or not found.size:
        raise WeightsError(
            f"the segmenter {named} gives no map of classes",
            expected="integers [height, width]",
            got=f"{found.dtype} {list(found.shape)}",
        )
    return found.astype(np.int64)


class _OnnxSegmenter:
    """A segmenter in an ONNX file, run on the CPU."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise WeightsError(f"there is no file {path} for --segmenter")
        from mmi_deploy.runtime.onnxruntime.module import ort

        self._path = path
        try:
            self._session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # raises types of its own for damaged files
            reason = " ".join(str(error).split())[:200]
            raise WeightsError(f"{path} is no graph that ONNX Runtime takes: {reason}") from None
        inputs = self._session.get_inputs()
        fits = len(inputs) == 1 and len(inputs[0].shape) == 4
        if not fits or inputs[0].type not in ("tensor(float)", "tensor(uint8)"):
            raise WeightsError(
                f"{path} is no segmenter",
                expected="one input, float32 or uint8 [1, 3, height, width]",
                got=", ".join(f"{one.name}: {one.type} {one.shape}" for one in inputs),
            )
        self._input = inputs[0]

    def __call__(self, rgb: Rgb) -> np.ndarray:
        height, width = self._input.shape[2:]
        if isinstance(height, int) and isinstance(width, int):
            image = Image.fromarray(rgb)
            rgb = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        kind = np.float32 if self._input.type == "tensor(float)" else np.uint8
        pixels = np.ascontiguousarray(rgb.transpose(2, 0, 1)[None].astype(kind))
        try:
            found = self._session.run(None, {self._input.name: pixels})[0]
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise WeightsError(f"the segmenter {self._path} failed: {reason}") from None
        if found.ndim == 4:
            found = found.argmax(axis=1)
        return _classes(found[0] if found.ndim == 3 else found, str(self._path))


def scaled(classes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Classes [height, width] of another size, by nearest neighbours."""
    rows, columns = classes.shape
    return classes[
        ((np.arange(height) + 0.5) * rows / height).astype(int)[:, None],
        ((np.arange(width) + 0.5) * columns / width).astype(int)[None],
    ]
