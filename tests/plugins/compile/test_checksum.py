"""A compiled library that is damaged is noticed before it is opened."""

from __future__ import annotations

import ctypes
import ctypes.util
import shutil
from pathlib import Path

import pytest

from mmi_deploy.cli.kernels import kernel_library
from mmi_deploy.errors import ConfigError
from mmi_plugins.compile.checksum import damage, is_sealed, seal

FOLDERS = ("/lib/x86_64-linux-gnu", "/lib64", "/usr/lib", "/lib/aarch64-linux-gnu")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A copy of a library that every Linux has."""
    name = ctypes.util.find_library("m")
    found = [Path(folder, name) for folder in FOLDERS if name and Path(folder, name).exists()]
    if not found:
        pytest.skip("there is no system library to copy")
    return Path(shutil.copy(found[0], tmp_path / "lib.so"))


def test_a_sealed_library_is_one_still(library: Path) -> None:
    assert not is_sealed(library) and damage(library) is None
    seal(library)
    assert is_sealed(library) and damage(library) is None
    root = ctypes.CDLL(str(library)).sqrt
    root.restype, root.argtypes = ctypes.c_double, [ctypes.c_double]
    assert root(9.0) == 3.0


def test_a_damaged_library_that_a_user_names_is_refused(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="is damaged: .* bytes are missing .*mmi plugins build"):
        kernel_library(str(library))


@pytest.mark.parametrize("sealed", [False, True])
def test_a_library_cut_short_is_noticed(library: Path, sealed: bool) -> None:
    if sealed:
        seal(library)
    content = library.read_bytes()
    library.write_bytes(content[: len(content) // 2])
    assert not is_sealed(library)
    assert "bytes are missing" in str(damage(library))


def test_a_changed_byte_of_a_sealed_library_is_noticed(library: Path) -> None:
    seal(library)
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)
    assert not is_sealed(library) and damage(library) == "its content is not what was compiled"


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    assert not is_sealed(tmp_path / "none.so")
    assert "cannot be read" in str(damage(tmp_path / "none.so"))
    (tmp_path / "empty.so").touch()
    assert not is_sealed(tmp_path / "empty.so") and damage(tmp_path / "empty.so") == "it is empty"
