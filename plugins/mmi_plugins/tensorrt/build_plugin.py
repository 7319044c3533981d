"""Build the TensorRT plugin library from the sources in `csrc`, with CMake, nvcc and the headers.

TensorRT's wheels contain no headers; with the wheels alone, the plugin goes into engines ahead of
time (`ahead_of_time`), without a compiler.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mmi_deploy.errors import EngineError
from mmi_deploy.system.temporary_folder import temporary_folder
from mmi_plugins.compile.checksum import has_valid_checksum
from mmi_plugins.compile.compilers import (
    ARCHITECTURES,
    find_cmake,
    find_nvcc,
    output_of,
    portable,
    supported_architectures,
)
from mmi_plugins.constants import CSRC

TARGETS = ("mmi_tensorrt", "mmi_tensorrt_registered")
HEADER = "NvInferRuntime.h"
SYSTEM_INCLUDES = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/local/tensorrt/include",
    "/opt/tensorrt/include",
)
LEAST_TENSORRT = (10, 12)


def build_tensorrt_plugin(
    include: Path | None,
    out: Path,
    architectures: Sequence[str] = ARCHITECTURES,
) -> Path:
    """Build the plugin for `architectures` into the folder `out` and return the library's path.

    Beside it, a library with `registered` in its name registers itself when it is opened, as tools
    that only dlopen plugins expect (polygraphy --plugins).

    `include`: the folder of TensorRT's headers; by default $TENSORRT_INCLUDE or one of the usual
    folders. The library's name has a hash of sources, headers, compiler and architectures: an
    existing library with a valid checksum is not built again. A killed build leaves nothing.
    Raises `EngineError` where a header or tool is missing or the compiler fails.
    """
    headers, version = find_tensorrt_headers(include)
    nvcc, cmake = find_nvcc(), find_cmake()
    architectures = supported_architectures(nvcc, architectures)
    key = _key(version, output_of([nvcc, "--version"]), *architectures)
    names = {target: f"lib{target}-{version}-{key}.so" for target in TARGETS}
    if not all(has_valid_checksum(out / name) for name in names.values()):
        try:
            out.mkdir(parents=True, exist_ok=True)
            with temporary_folder(out, ".build-") as folder:
                _compile(cmake, nvcc, headers, architectures, folder)
                for target, name in names.items():
                    (folder / f"lib{target}.so").replace(out / name)
        except OSError as error:
            raise EngineError(
                f"the TensorRT plugin cannot be written to {out}: {error.strerror}"
            ) from error
    return out / names[TARGETS[0]]


def find_tensorrt_headers(include: Path | None = None) -> tuple[Path, str]:
    """Folder of TensorRT's headers and their version, such as "11.1" or "rtx1.7"."""
    if include is None and (named := os.environ.get("TENSORRT_INCLUDE")):
        include = Path(named)
    places = [include] if include is not None else [Path(place) for place in SYSTEM_INCLUDES]
    for place in places:
        if (place / HEADER).is_file():
            return place, _header_version(place)
    raise EngineError(
        "the headers of TensorRT were not found",
        expected=HEADER,
        got=", ".join(map(str, places)),
        fix="pip's TensorRT has no headers: install libnvinfer-headers-dev from NVIDIA's apt "
        "repository, or unpack NVIDIA's TensorRT archive and pass its include folder with "
        "--tensorrt-include",
    )


def _header_version(include: Path) -> str:
    try:
        text = (include / "NvInferVersion.h").read_text()
    except OSError as error:
        raise EngineError(
            f"the TensorRT headers in {include} are incomplete: NvInferVersion.h: {error.strerror}",
            fix="Install them again, or pass --tensorrt-include",
        ) from error
    numbers = {name: int(number) for name, number in re.findall(r"#define (\w+) (\d+)", text)}
    for kind in ("RTX", "ENTERPRISE"):
        if f"TRT_MAJOR_{kind}" in numbers:
            version = (numbers[f"TRT_MAJOR_{kind}"], numbers[f"TRT_MINOR_{kind}"])
            break
    else:
        kind = ""
        version = (numbers.get("NV_TENSORRT_MAJOR", 0), numbers.get("NV_TENSORRT_MINOR", 0))
    name = f"{version[0]}.{version[1]}"
    if kind == "RTX":
        return f"rtx{name}"
    if version < LEAST_TENSORRT:
        raise EngineError(
            f"the TensorRT headers in {include} are too old",
            expected="10.12 or newer",
            got=name,
            fix="Install a newer TensorRT, or pass --tensorrt-include",
        )
    return name


def _compile(
    cmake: Path, nvcc: Path, headers: Path, architectures: Sequence[str], folder: Path
) -> None:
    with_ptx = portable(architectures)
    codes = [name if name == with_ptx else f"{name}-real" for name in architectures]
    configure: list[str | Path] = [
        cmake,
        *("-S", CSRC, "-B", folder),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DPython3_EXECUTABLE={sys.executable}",  # runs checksum.py
        f"-DTENSORRT_INCLUDE={headers.resolve()}",
        f"-DMMI_ARCHITECTURES={';'.join(codes)}",
    ]
    build: list[str | Path] = [cmake, "--build", folder, "--target", *TARGETS, "--parallel"]
    for command in (configure, build):
        output_of(command)


def _key(*parts: str) -> str:
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in sorted(CSRC.iterdir()):
        if source.is_file():
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:12]
