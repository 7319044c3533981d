"""Find the compilers of the kernel libraries, or raise an error that names what to install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mmi_deploy.errors import EngineError

# Compute capabilities whose machine code a library has: A100, A10 and RTX 30, Orin, L4 and RTX 40,
# H100, B100 and B200, RTX 50.
ARCHITECTURES = ("80", "86", "87", "89", "90", "100", "120")

_PORTABLE = "100"

STANDARD_CUDA = Path("/usr/local/cuda")


def find_nvcc() -> Path:
    """CUDA's compiler, from $CUDACXX, $CUDA_HOME, $CUDA_PATH, the PATH or /usr/local/cuda. Raises
    `EngineError`."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home)]
    for candidate in (*candidates, "nvcc", str(STANDARD_CUDA / "bin" / "nvcc")):
        if candidate and (found := shutil.which(candidate)):
            return Path(found)
    raise EngineError(
        "CUDA's compiler nvcc was not found",
        fix="Install the CUDA toolkit (12.8 or newer: cuda-nvcc and cuda-cudart-dev suffice) and "
        "put nvcc on the PATH or set CUDACXX. TensorRT takes the operator without a compiler too, "
        "ahead of time: mmi_plugins.tensorrt.ahead_of_time",
    )


def find_cmake() -> Path:
    """cmake, on the PATH or beside this Python. Raises `EngineError`."""
    beside = Path(sys.executable).parent / "cmake"
    for candidate in ("cmake", str(beside)):
        if found := shutil.which(candidate):
            return Path(found)
    raise EngineError("cmake was not found", fix="Install it: pip install cmake")


def supported_architectures(nvcc: Path, wanted: Sequence[str]) -> tuple[str, ...]:
    """The `wanted` architectures that this compiler supports; at least one, or `EngineError`."""
    listed = output_of([nvcc, "--list-gpu-arch"])
    known = set(re.findall(r"compute_(\w+)", listed))
    if unknown := [name for name in wanted if not re.fullmatch(r"\d{2,3}", name)]:
        raise EngineError("not a compute capability", expected="such as 89", got=unknown[0])
    kept = tuple(name for name in dict.fromkeys(wanted) if name in known)
    if not kept:
        raise EngineError(
            f"{nvcc} supports none of the architectures",
            expected=", ".join(wanted),
            got=", ".join(sorted(known, key=lambda name: (len(name), name))),
            fix="Install a newer CUDA toolkit",
        )
    return kept


def portable(architectures: Sequence[str]) -> str:
    """Architecture whose PTX a library has too, for GPUs without machine code in it: 100, which
    serves Thor (110) and all later ones, or else the last."""
    return _PORTABLE if _PORTABLE in architectures else architectures[-1]


def output_of(command: Sequence[str | Path]) -> str:
    """Run a tool and return its output. Raises `EngineError` with its error lines in one line."""
    try:
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise EngineError(f"{command[0]} could not be started: {error}") from error
    if done.returncode:
        errors = [line.strip() for line in done.stdout.splitlines() if "rror" in line]
        last = " | ".join((errors or done.stdout.splitlines())[:6])
        raise EngineError(f"{Path(command[0]).name} failed: {last}")
    return done.stdout
