"""Files that are written tensor by tensor: what any safetensors reader and any file system sees."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray
from safetensors.numpy import load_file

from mmi_deploy.system.safetensors_writer import ALIGNMENT, Stored, write_safetensors_file

NAMES = {"float32": "F32", "float16": "F16", "uint8": "U8"}


def numbers(seed: int, *shape: int, dtype: DTypeLike = np.float32) -> NDArray:
    return np.random.default_rng(seed).integers(1, 100, shape).astype(dtype)


def stored(value: NDArray) -> Stored:
    return Stored(NAMES[str(value.dtype)], value.shape, value.nbytes, lambda: [value])


def test_every_tensor_lies_at_a_multiple_of_its_type_and_whole_rows_of_64_bytes_at_those(
    tmp_path: Path,
) -> None:
    values = {
        "odd": numbers(0, 3, dtype=np.uint8),
        "halves": numbers(1, 5, dtype=np.float16),
        "scalar": numbers(2),
        "large": numbers(3, 16, 40),
        "some": numbers(4, 7, 9),
        "turned": numbers(5, 32, 8).T,
        "none": numbers(6, 0, 4),
    }
    path = tmp_path / "x.safetensors"
    places = write_safetensors_file(path, {name: stored(value) for name, value in values.items()})
    found = load_file(path)
    assert found.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], value)
        assert places[name] % (ALIGNMENT if value.nbytes % ALIGNMENT == 0 else value.itemsize) == 0
        at_its_place = path.read_bytes()[places[name] : places[name] + value.nbytes]
        assert at_its_place == value.tobytes()
    assert min(places.values()) % ALIGNMENT == 0


def test_zeros_take_no_disk(tmp_path: Path) -> None:
    size = 2**26
    zeros = np.zeros(size // 4, np.float32)
    write_safetensors_file(
        tmp_path / "x.safetensors",
        {
            "read": stored(zeros),
            "known": Stored("F32", zeros.shape, size),
            "one": stored(zeros + 1),
        },
    )
    found = (tmp_path / "x.safetensors").stat()
    assert found.st_size > 3 * size and found.st_blocks * 512 < 2 * size
    one = load_file(tmp_path / "x.safetensors")["one"]
    assert one.shape == zeros.shape and (one == 1).all()


@pytest.mark.parametrize("unnamed", [True, False])
def test_what_lay_there_is_replaced_and_not_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool
) -> None:
    """The name may be a hard link to somebody's weights."""
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    mine, theirs = tmp_path / "mine.safetensors", tmp_path / "theirs.safetensors"
    theirs.write_bytes(b"weights")
    os.link(theirs, mine)

    def fails() -> list[NDArray]:
        raise ValueError("no contents")

    with pytest.raises(ValueError, match="no contents"):
        write_safetensors_file(mine, {"a": Stored("F32", [1], 4, fails)})
    assert mine.read_bytes() == theirs.read_bytes() == b"weights"
    write_safetensors_file(mine, {"a": stored(numbers(0, 4))})
    np.testing.assert_array_equal(load_file(mine)["a"], numbers(0, 4))
    assert theirs.read_bytes() == b"weights"
    assert sorted(os.listdir(tmp_path)) == ["mine.safetensors", "theirs.safetensors"]
