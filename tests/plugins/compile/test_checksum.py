"""A compiled library that is damaged is noticed before it is opened."""

from __future__ import annotations

import ctypes
import ctypes.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmi_deploy.errors import ConfigError
from mmi_plugins.compile import checksum
from mmi_plugins.compile.checksum import append_checksum, checksum_error, has_valid_checksum
from mmi_plugins.constants import CSRC
from mmi_plugins.library import kernel_library

FOLDERS = ("/lib/x86_64-linux-gnu", "/lib64", "/usr/lib", "/lib/aarch64-linux-gnu")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A copy of a library that every Linux has."""
    name = ctypes.util.find_library("m")
    found = [Path(folder, name) for folder in FOLDERS if name and Path(folder, name).exists()]
    if not found:
        pytest.skip("there is no system library to copy")
    return Path(shutil.copy(found[0], tmp_path / "lib.so"))


def test_a_library_with_a_checksum_still_loads(library: Path) -> None:
    assert not has_valid_checksum(library) and checksum_error(library) is None
    append_checksum(library)
    assert has_valid_checksum(library) and checksum_error(library) is None
    root = ctypes.CDLL(str(library)).sqrt
    root.restype, root.argtypes = ctypes.c_double, [ctypes.c_double]
    assert root(9.0) == 3.0


def test_a_damaged_library_that_a_user_names_is_refused(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="is damaged: .* bytes are missing .*mmi plugins build"):
        kernel_library("cpu", str(library))


@pytest.mark.parametrize("with_checksum", [False, True])
def test_a_library_cut_short_is_noticed(library: Path, with_checksum: bool) -> None:
    if with_checksum:
        append_checksum(library)
    content = library.read_bytes()
    library.write_bytes(content[: len(content) // 2])
    assert not has_valid_checksum(library)
    assert "bytes are missing" in str(checksum_error(library))


def test_a_changed_byte_before_the_checksum_is_noticed(library: Path) -> None:
    append_checksum(library)
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)
    assert (
        not has_valid_checksum(library)
        and checksum_error(library) == "its content is not what was compiled"
    )


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    assert not has_valid_checksum(tmp_path / "none.so")
    assert "cannot be read" in str(checksum_error(tmp_path / "none.so"))
    (tmp_path / "empty.so").touch()
    assert (
        not has_valid_checksum(tmp_path / "empty.so")
        and checksum_error(tmp_path / "empty.so") == "it is empty"
    )


def test_cmake_runs_this_file_on_what_it_links(library: Path) -> None:
    """The path in CMakeLists.txt is only used where it exists: a moved file would go unnoticed."""
    named = re.search(
        r"set\(MMI_CHECKSUM \$\{CMAKE_CURRENT_SOURCE_DIR\}/(\S+)\)",
        (CSRC / "CMakeLists.txt").read_text(),
    )
    assert named
    script = (CSRC / named[1]).resolve()
    assert script == Path(checksum.__file__).resolve()
    subprocess.run([sys.executable, "-I", str(script), str(library)], check=True)
    assert has_valid_checksum(library)
