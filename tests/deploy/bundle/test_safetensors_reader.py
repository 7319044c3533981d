"""A file is taken if the safetensors package takes it and no name stands in it twice."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmi_deploy.bundle.safetensors_reader import Entry, read_header
from mmi_deploy.errors import WeightsError


def entry(start: int = 0, end: int = 8, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def write(path: Path, header: object, data: int) -> Path:
    """A file with this header (bytes: as they are) and `data` bytes behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def package_takes(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy"):
            return True
    except SafetensorError:
        return False


def taken(path: Path) -> bool:
    try:
        read_header(path)
    except WeightsError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return False
    return True


ONE = json.dumps(entry()).encode()

FORBIDDEN: dict[str, tuple[object, int]] = {
    "a byte after the last tensor": ({"a": entry()}, 9),
    "a byte too few": ({"a": entry()}, 7),
    "a gap": ({"a": entry(), "b": entry(12, 20)}, 20),
    "a gap in front": ({"a": entry(4, 12)}, 12),
    "an overlap": ({"a": entry(), "b": entry(4, 12)}, 12),
    "two tensors in one place": ({"a": entry(), "b": entry()}, 8),
    "an empty tensor inside another": ({"a": entry(), "b": entry(4, 4, (0,))}, 8),
    "fewer bytes than the shape takes": ({"a": entry(shape=(3,))}, 8),
    "sides below zero": ({"a": entry(shape=(-1, -2))}, 8),
    "a side that is a truth value": ({"a": entry(shape=(True, 2))}, 8),
    "more numbers than 64 bits count": ({"a": entry(0, 0, (2**62, 4))}, 0),
    "a negative place": ({"a": entry(-8, 0), "b": entry()}, 8),
    "a type that does not exist": ({"a": entry(dtype="Q8")}, 8),
    "about, with a number": ({"__metadata__": {"format": 1}, "a": entry()}, 8),
    "about, a list": ({"__metadata__": [], "a": entry()}, 8),
    "a list in place of the header": ([entry()], 8),
    "zeros behind the header": (b'{"a":' + ONE + b"}\0\0", 8),
    "a byte order mark": (b'\xef\xbb\xbf{"a":' + ONE + b"}", 8),
    "UTF-16": (('{"a":' + ONE.decode() + "}").encode("utf-16-le"), 8),
    "half a surrogate": (b'{"\\ud800":' + ONE + b"}", 8),
    "NaN": (b'{"a":' + ONE[:-1] + b',"x":NaN}}', 8),
    "a type twice": (b'{"a":' + ONE[:-1] + b',"dtype":"F32"}}', 8),
    "about, twice": (b'{"__metadata__":{},"__metadata__":{},"a":' + ONE + b"}", 8),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_what_the_package_refuses_is_refused(case: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", *FORBIDDEN[case])
    assert not package_takes(path)
    assert not taken(path)


@pytest.mark.parametrize("length", [0, 100_000_001, 2**63, 2**64 - 1])
def test_header_lengths_that_cannot_be(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a":' + ONE + b"}" + bytes(8))
    assert not package_takes(path)
    assert not taken(path)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 20])
def test_files_that_end_in_the_header(kept: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry()}, 8)
    path.write_bytes(path.read_bytes()[:kept])
    assert not package_takes(path)
    assert not taken(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' + ONE + b',"a":' + ONE + b"}",
        b'{"a":' + json.dumps(entry(shape=(9,))).encode() + b',"a":' + ONE + b"}",
        b'{"__metadata__":{"format":"pt","format":"np"},"a":' + ONE + b"}",
    ],
)
def test_a_name_that_stands_twice_is_refused(header: bytes, tmp_path: Path) -> None:
    """The package keeps the last one; the format forbids duplicate keys."""
    path = write(tmp_path / "x.safetensors", header, 8)
    with pytest.raises(WeightsError, match=r"(a|format) stands in it twice"):
        read_header(path)


ALLOWED: dict[str, tuple[object, int]] = {
    "no tensor": ({}, 0),
    "an empty tensor": ({"a": entry(0, 0, (0, 5)), "b": entry()}, 8),
    "the header in another order": ({"b": entry(8, 16), "a": entry()}, 16),
    "spaces around the header": (b'  {"a":' + ONE + b"}   \n", 8),
    "no metadata": ({"__metadata__": None, "a": entry()}, 8),
    "a field of a later version": ({"a": {**entry(), "later": [1]}}, 8),
    "8-bit floats": ({"a": entry(dtype="F8_E4M3", shape=(8,))}, 8),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_the_package_takes_is_taken(case: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", *ALLOWED[case])
    assert package_takes(path)
    assert taken(path)


def test_entries_say_where_the_bytes_lie(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(7, np.int64)}
    save_file(values, path, {"format": "np"})
    found, data = read_header(path), path.read_bytes()
    assert found.keys() == values.keys()
    for name, value in values.items():
        place = found[name]
        assert data[place.start : place.end] == value.tobytes()
        assert place.shape == value.shape
    assert found["b"] == Entry("I64", (), found["b"].start, found["b"].start + 8)
