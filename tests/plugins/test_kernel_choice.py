"""`--kernels`: which library a run gets, and what is said where there is none that will do."""

from __future__ import annotations

import _ctypes
import logging
import platform
import pwd
import shutil
from pathlib import Path

import pytest

from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.system.files import cache_folder
from mmi_plugins.compile.checksum import append_checksum
from mmi_plugins.library import kernel_library
from mmi_plugins.onnxruntime import library
from mmi_plugins.onnxruntime.library import ensure, location
from mmi_plugins.tensorrt.plugin import newest_library
from plugins.onnxruntime.test_library import fake_compiler


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path)))
    return tmp_path / "cache"


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id that the system does not know, and no variable that names a folder."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "MMI_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_cached_library_that_does_not_load_is_done_without(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is whole, and the system will not have it: another C library, a disk without execution."""
    path = location()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF\x02\x01 of another system")
    append_checksum(path)
    assert kernel_library("cpu") is None
    (line,) = warnings(caplog)
    assert line.startswith("MMFS runs as standard operators, which is slower: ONNX Runtime cannot")
    assert str(path) in line and "\n" not in line


def test_a_library_that_was_just_compiled_must_load_too(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert kernel_library("cpu") is None and location().is_file()
    assert [line.split(",")[0] for line in warnings(caplog)] == [
        "compiling the MMFS kernel for ONNX Runtime",
        "MMFS runs as standard operators",
    ]


def test_a_library_of_another_c_library_is_another_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set()
    for version in (("glibc", "2.31"), ("glibc", "2.41"), ("", "")):
        monkeypatch.setattr(platform, "libc_ver", lambda version=version: version)
        library._fingerprint.cache_clear()
        found.add(location())
    library._fingerprint.cache_clear()
    assert len(found) == 3


@pytest.mark.parametrize("content", ["no library", "a library of something else"])
def test_a_named_file_that_is_no_kernel_library_is_refused_at_once(
    content: str, tmp_path: Path
) -> None:
    path = tmp_path / "lib.so"
    if content == "no library":
        path.write_text(content)
    else:
        shutil.copy(_ctypes.__file__, path)
    with pytest.raises(EngineError, match=f"cannot load the kernel library {path}: .*--kernels"):
        kernel_library("cpu", str(path))


def test_without_a_compiler_one_line_says_how_to_get_one(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert kernel_library("cpu") is None
    (line,) = warnings(caplog)
    assert "kernel is missing" in line and "`apt install g++`" in line and "\n" not in line


def test_a_user_without_a_home_goes_on_without_a_cache(
    no_home: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert ensure() is None and kernel_library("cpu") is None
    assert kernel_library("tensorrt") is newest_library() is None
    lines = warnings(caplog)
    assert len(lines) == 2 and all("MMI_CACHE" in line for line in lines)


def test_what_needs_a_cache_names_the_variable(
    no_home: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for writes in (False, True):
        with pytest.raises(ConfigError, match="no home folder .*name a folder in .* MMI_CACHE"):
            cache_folder(writes=writes)
    monkeypatch.setenv("MMI_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("MMI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mmi_deploy"


def test_a_gpu_gets_the_library_with_cuda_kernels_or_none(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not that of the CPU, whose kernels would run there, between copies. Without nvcc there is
    none, and the backend says what runs instead."""
    monkeypatch.setattr(library, "find_nvcc", no_nvcc)
    plain = location()
    plain.parent.mkdir(parents=True)
    plain.write_bytes(b"\x7fELF of the CPU")
    append_checksum(plain)
    assert kernel_library("cuda") is None and not warnings(caplog)
    path = location(cuda=True)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF with CUDA")
    append_checksum(path)
    monkeypatch.setattr("mmi_plugins.library._check", lambda path: None)
    assert kernel_library("cuda") == path != plain


def no_nvcc() -> Path:
    raise EngineError("CUDA's compiler nvcc was not found")
