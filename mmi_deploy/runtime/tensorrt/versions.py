"""Versions that must fit one another: the driver, CUDA's Python bindings and TensorRT.

TensorRT and the bindings are built for a major version of CUDA. The driver must support it, and
both must agree. One error names everything that does not fit and the command that installs what
does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from mmi_deploy.errors import EngineError
from mmi_deploy.spec.backends import BACKENDS

# Number of the first driver of each major version of CUDA.
DRIVERS = {12: "525", 13: "580"}

# Requirement of CUDA's Python bindings for each major version.
BINDINGS = {12: "cuda-bindings>=12.9,<13", 13: "cuda-bindings>=13,<14"}


@dataclass(frozen=True)
class Versions:
    """Versions of one machine; None or empty where a part is missing or unknown.

    driver: newest CUDA version that it supports. bindings: CUDA version of `cuda-bindings`.
    tensorrt: major versions of CUDA that the installed TensorRT packages are built for.
    """

    driver: tuple[int, int] | None = None
    bindings: tuple[int, int] | None = None
    tensorrt: Collection[int] = ()


def check_versions(runtime: str, versions: Versions) -> None:
    """Raise `EngineError` unless all known versions fit one another. runtime: `tensorrt` or
    `tensorrt-rtx`."""
    majors = sorted(versions.tensorrt)
    driver, bindings = versions.driver, versions.bindings
    usable = [major for major in DRIVERS if driver is None or major <= driver[0]]
    if not usable:
        raise EngineError(
            "the NVIDIA driver is too old",
            expected=f"CUDA 12, which driver {DRIVERS[12]} and newer have",
            got=f"CUDA {_text(driver)}",
            fix="Update the driver",
        )
    wanted = max(usable)
    if len(majors) > 1:
        raise EngineError(
            f"TensorRT is installed for several versions of CUDA ({_list(majors)}), "
            "which overwrite each other's files",
            expected=f"one of them, such as CUDA {wanted}",
            fix=_install(runtime, majors, wanted),
        )
    built = majors[0] if majors else None
    if driver is not None and max(built or 0, bindings[0] if bindings else 0) > driver[0]:
        newest = max(built or 0, bindings[0] if bindings else 0)
        raise EngineError(
            f"the NVIDIA driver is older than {_installed(runtime, built, bindings)}",
            expected=f"driver {DRIVERS.get(newest, 'that is newer')} or newer (CUDA {newest})",
            got=f"CUDA {_text(driver)}",
            fix=f"Update the driver, or install what it supports: "
            f"{_install(runtime, majors, wanted)}",
        )
    if built is not None and bindings is not None and bindings[0] != built:
        raise EngineError(
            f"{runtime} and cuda-bindings are of different versions of CUDA",
            expected=f"cuda-bindings for CUDA {built}",
            got=f"{_text(bindings)}",
            fix=f"Run: pip install '{BINDINGS.get(built, f'cuda-bindings=={built}.*')}'",
        )


def installed_versions(runtime: str, cuda: Any = None) -> Versions:
    """Versions of this machine. cuda: `cuda.bindings.runtime`, or None without it."""
    package = BACKENDS[runtime].module.replace("_", "-")
    names = (str(one.metadata["Name"] or "") for one in metadata.distributions())
    return Versions(
        _asked(cuda, "cudaDriverGetVersion"),
        _asked(cuda, "cudaRuntimeGetVersion"),
        cuda_majors(package, names),
    )


def cuda_majors(package: str, names: Iterable[str]) -> frozenset[int]:
    """Major versions of CUDA of the installed packages of `package`: 13 for `tensorrt-cu13-libs`,
    in all spellings of a name."""
    pattern = re.compile(rf"{package}-cu(\d+)(?:-libs|-bindings)?")
    found = (pattern.fullmatch(re.sub(r"[-_.]+", "-", name).lower()) for name in names)
    return frozenset(int(match[1]) for match in found if match)


def _asked(cuda: Any, name: str) -> tuple[int, int] | None:
    """Version that a function of CUDA's runtime returns; None if it fails, and for 0: none."""
    if cuda is None:
        return None
    error, *number = getattr(cuda, name)()
    if error != cuda.cudaError_t.cudaSuccess or not number or not number[0]:
        return None
    return int(number[0]) // 1000, int(number[0]) % 1000 // 10


def _text(version: tuple[int, int] | None) -> str:
    return ".".join(map(str, version)) if version else "unknown"


def _list(majors: Iterable[int]) -> str:
    return ", ".join(map(str, majors))


def _installed(runtime: str, built: int | None, bindings: tuple[int, int] | None) -> str:
    parts = [f"{runtime} (for CUDA {built})"] if built else []
    parts += [f"cuda-bindings {_text(bindings)}"] if bindings else []
    return " and ".join(parts)


def _install(runtime: str, installed: Collection[int], wanted: int) -> str:
    """Command line that replaces the packages of `installed` versions of CUDA by `wanted`."""
    package = BACKENDS[runtime].module.replace("_", "-")
    # Removed first, both versions even: their wheels have files of the same names.
    removed = [package] if installed else []
    for major in sorted(installed):
        removed += [f"{package}-cu{major}{part}" for part in ("", "-libs", "-bindings")]
    uninstall = f"pip uninstall -y {' '.join(removed)} && " if removed else ""
    return f"{uninstall}pip install {package}-cu{wanted} '{BINDINGS[wanted]}'"
