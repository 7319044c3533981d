"""Pickles and NumPy object arrays of data sets, read without running code that they may hold.

Numbers, texts, lists, tuples, sets and dictionaries need no imports; of NumPy, arrays and numbers
are rebuilt. Anything else that a pickle names is refused before it is imported.
"""

from __future__ import annotations

import _codecs
import math
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmi_deploy.errors import DocumentError
from mmi_deploy.system.files import open_regular

# Largest file, in bytes: the largest published one, descriptions.npy or refs.p, has some 100 MB.
MOST_BYTES = 2**30

_NUMPY = {"numpy.core.multiarray", "numpy._core.multiarray"}


class _Refused(pickle.UnpicklingError):
    """A pickle that names something other than data."""


def _empty_array(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """NumPy's `_reconstruct`, for the empty arrays that its pickles begin with alone."""
    if kind is not np.ndarray or shape != (0,) or len(code) != 1:
        raise _Refused("an array of another kind")
    return np.empty(0, np.int8)


def _scalar(dtype: np.dtype, content: bytes) -> Any:
    """NumPy's `scalar`, for numbers alone."""
    if dtype.hasobject:
        raise _Refused("a number that holds objects")
    return np.frombuffer(content, dtype, 1)[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Bytes as pickles of protocol 2 write them."""
    if encoding != "latin1":
        raise _Refused(f"the encoding {encoding}")
    return _codecs.latin_1_encode(text)[0]


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler in place of the one in C, for which a few bytes that name the memo's
    entry 2**31 allocate tens of gigabytes. It takes seconds for refs.p."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _NUMPY and name == "_reconstruct":
            return _empty_array
        if module in _NUMPY and name == "scalar":
            return _scalar
        if module == "_codecs" and name == "encode":
            return _encode
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset"):
            return {"set": set, "frozenset": frozenset}[name]
        raise _Refused(f"{module}.{name}")


def read_pickle(path: Path) -> Any:
    """Value of a pickle file. Raises `DocumentError`; runs no code."""
    try:
        with _opened(path) as file:
            return _load(file, path)
    except OSError as error:
        raise DocumentError(f"cannot read {path}: {error.strerror}") from None


def read_npy(path: Path) -> np.ndarray:
    """Array of an .npy file, of objects too. Raises `DocumentError`; runs no code."""
    try:
        with _opened(path) as file:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(file)
            if not dtype.hasobject:
                size = os.fstat(file.fileno()).st_size - file.tell()
                if math.prod(shape) * dtype.itemsize != size:  # before so much is allocated
                    raise DocumentError(f"{path} is cut off, or not what its header says")
                file.seek(0)
                return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
            found = _load(file, path)
    except OSError as error:
        raise DocumentError(f"cannot read {path}: {error.strerror}") from None
    except DocumentError:
        raise
    except Exception as error:  # a damaged header is parsed as Python and raises many types
        raise DocumentError(f"{path} is not an .npy file: {error}") from None
    if not isinstance(found, np.ndarray):
        raise DocumentError(f"{path} holds no array", got=type(found).__name__)
    return found


def _opened(path: Path) -> BinaryIO:
    file = open_regular(path)
    if (size := os.fstat(file.fileno()).st_size) > MOST_BYTES:
        file.close()
        raise DocumentError(
            f"{path} is too large",
            expected=f"at most {MOST_BYTES >> 20} MB",
            got=f"{size >> 20} MB",
        )
    return file


def _load(file: BinaryIO, path: Path) -> Any:
    try:
        return _Unpickler(file, encoding="latin1").load()
    except _Refused as error:
        raise DocumentError(
            f"{path} holds more than data: {error}; it is code, and was not run",
            fix="download the file again from its official source",
        ) from None
    except Exception as error:  # damaged pickles raise many types
        raise DocumentError(f"{path} is damaged ({type(error).__name__}: {error})") from None
