"""Finding what the TensorRT plugin is built from and with, or saying what to get."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmi_deploy.errors import EngineError
from mmi_plugins.compile import checksum, compilers
from mmi_plugins.compile.checksum import has_valid_checksum
from mmi_plugins.compile.compilers import (
    ARCHITECTURES,
    find_cmake,
    find_nvcc,
    portable,
    supported_architectures,
)
from mmi_plugins.tensorrt.build_plugin import TARGETS, build_tensorrt_plugin, find_tensorrt_headers

ENTERPRISE = "#define TRT_MAJOR_ENTERPRISE {}\n#define TRT_MINOR_ENTERPRISE {}\n"
OLD = "#define NV_TENSORRT_MAJOR {} //!< major\n#define NV_TENSORRT_MINOR {}\n"
RTX = "#define TRT_MAJOR_RTX {}\n#define TRT_MINOR_RTX {}\n"

# What cmake leaves in its folder, as shell.
LIBRARIES_WITH_CHECKSUM = f"""if [ "$1" = --build ]; then
for library in {" ".join(TARGETS)}; do
touch $2/lib$library.so && {sys.executable} -I {checksum.__file__} $2/lib$library.so
done; fi"""


def headers(folder: Path, form: str, major: int, minor: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "NvInferRuntime.h").touch()
    (folder / "NvInferVersion.h").write_text(form.format(major, minor))
    return folder


def tool(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tools that do as little as possible; each run of cmake is a line in `runs`."""
    folder = tmp_path / "tools"
    knows = "".join(f"compute_{name}\\n" for name in (75, *ARCHITECTURES))
    nvcc = tool(folder / "nvcc", f'printf "{knows}"')
    tool(folder / "cmake", f'echo "$@" >> {tmp_path}/runs; {LIBRARIES_WITH_CHECKSUM}')
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_headers_are_found_by_argument_then_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = headers(tmp_path / "a", ENTERPRISE, 11, 1)
    second = headers(tmp_path / "b", OLD, 10, 12)
    monkeypatch.setenv("TENSORRT_INCLUDE", str(second))
    assert find_tensorrt_headers(first) == (first, "11.1")
    assert find_tensorrt_headers() == (second, "10.12")
    assert find_tensorrt_headers(headers(tmp_path / "c", RTX, 1, 7))[1] == "rtx1.7"


def test_missing_headers_are_named_with_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="NvInferRuntime.h.*libnvinfer-headers-dev"):
        find_tensorrt_headers(tmp_path)


def test_old_headers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="expected 10.12 or newer; got 10.9"):
        find_tensorrt_headers(headers(tmp_path, ENTERPRISE, 10, 9))


def test_headers_without_a_version_are_refused(tmp_path: Path) -> None:
    (headers(tmp_path, ENTERPRISE, 11, 1) / "NvInferVersion.h").unlink()
    with pytest.raises(EngineError, match="incomplete: NvInferVersion.h: No such file"):
        find_tensorrt_headers(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tools: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(EngineError, match="plugin cannot be written to .*/out: File exists"):
        build_tensorrt_plugin(headers(tmp_path / "include", ENTERPRISE, 11, 1), tmp_path / "out")


def test_missing_compilers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compilers, "STANDARD_CUDA", tmp_path)
    monkeypatch.setattr(compilers.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(EngineError, match="nvcc was not found.*CUDA toolkit.*ahead_of_time"):
        find_nvcc()
    with pytest.raises(EngineError, match="pip install cmake"):
        find_cmake()


def test_only_architectures_that_the_compiler_knows_are_built(tmp_path: Path) -> None:
    nvcc = tool(tmp_path / "nvcc", 'printf "compute_80\\ncompute_90\\n"')
    assert supported_architectures(nvcc, ("80", "90", "120")) == ("80", "90")
    with pytest.raises(EngineError, match="expected 120; got 80, 90"):
        supported_architectures(nvcc, ("120",))
    with pytest.raises(EngineError, match="not a compute capability"):
        supported_architectures(nvcc, ("sm_80",))


def test_gpus_without_machine_code_of_their_own_have_ptx_that_serves_thor_too() -> None:
    assert portable(ARCHITECTURES) == "100" and portable(("80", "90")) == "90"


def test_the_build_is_for_every_architecture_and_ptx_and_is_kept(
    tools: Path, tmp_path: Path
) -> None:
    include, out = headers(tmp_path / "include", ENTERPRISE, 11, 1), tmp_path / "out"
    built = build_tensorrt_plugin(include, out)
    runs = (tmp_path / "runs").read_text()
    assert "80-real;86-real;87-real;89-real;90-real;100;120-real" in runs  # 100: and its PTX
    assert sorted(out.iterdir()) == sorted(
        {built, out / built.name.replace("rt-", "rt_registered-")}
    )
    assert build_tensorrt_plugin(include, out) == built
    assert (tmp_path / "runs").read_text() == runs
    assert build_tensorrt_plugin(include, out, ("89",)) != built
    assert build_tensorrt_plugin(headers(tmp_path / "new", ENTERPRISE, 11, 2), out) != built


def test_a_damaged_library_is_built_again(tools: Path, tmp_path: Path) -> None:
    include, out = headers(tmp_path / "include", ENTERPRISE, 11, 1), tmp_path / "out"
    built = build_tensorrt_plugin(include, out)
    whole = built.read_bytes()
    built.write_bytes(whole[:-1])
    assert build_tensorrt_plugin(include, out) == built
    assert built.read_bytes() == whole


def test_two_builds_at_once_do_not_disturb_each_other(tools: Path, tmp_path: Path) -> None:
    tool(tools / "cmake", f"sleep 0.2; {LIBRARIES_WITH_CHECKSUM}")
    include, out = headers(tmp_path / "include", ENTERPRISE, 11, 1), tmp_path / "out"
    with ThreadPoolExecutor(3) as pool:
        builds = [pool.submit(build_tensorrt_plugin, include, out) for _ in range(3)]
    (built,) = {build.result() for build in builds}
    assert has_valid_checksum(built) and len(list(out.iterdir())) == len(TARGETS)


def test_a_failed_build_leaves_nothing_and_shows_the_compilers_words(
    tools: Path, tmp_path: Path
) -> None:
    tool(tools / "cmake", "echo working; echo 'x.cu(3): error: no such type'; exit 2")
    include, out = headers(tmp_path / "include", ENTERPRISE, 11, 1), tmp_path / "out"
    with pytest.raises(EngineError, match=r"^cmake failed: x.cu\(3\): error: no such type$"):
        build_tensorrt_plugin(include, out)
    assert not list(out.iterdir())
