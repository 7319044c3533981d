"""Valid inputs of the graphs of a bundle, for Polygraphy and for any program with numpy.

    polygraphy run graphs/llm.onnx --onnxrt --data-loader-script polygraphy/load_data.py:llm_decode

Beside this file lies one NAME.npz for each graph, or for each profile of a graph that has several;
the function NAME of this module yields its inputs. Arrays are read without pickle, so the files
execute nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent

# Prefix of an array that describes a tensor which is drawn instead of stored: the standard
# deviation of its values, then its shape.
DRAWN = "drawn:"


def read_inputs(path: Path) -> dict[str, NDArray[Any]]:
    """Read the inputs of one graph. Tensors stored in float16 to save space become float32; large
    tensors are drawn, always with the same numbers."""
    inputs = {}
    with np.load(path, allow_pickle=False) as stored:
        for key in stored.files:
            array, name = stored[key], key.removeprefix(DRAWN)
            if name != key:
                deviation, shape = np.float32(array[0]), tuple(array[1:].astype(int))
                draw = np.random.default_rng(crc32(name.encode()))
                array = draw.standard_normal(shape, np.float32) * deviation
            inputs[name] = array.astype(np.float32) if array.dtype == np.float16 else array
    return inputs


def __getattr__(name: str) -> Callable[[], Iterator[dict[str, NDArray[Any]]]]:
    path = FOLDER / f"{name}.npz"
    if name.startswith("_") or not path.is_file():
        names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.npz")))
        raise AttributeError(f"there are no inputs {name!r}; expected {names}")
    return lambda: iter([read_inputs(path)])


# Python has just written a compiled copy of this file beside it. A bundle holds the files of its
# manifest and no others.
with suppress(OSError):
    _compiled = Path(cache_from_source(__file__))
    _compiled.unlink(missing_ok=True)
    _compiled.parent.rmdir()
