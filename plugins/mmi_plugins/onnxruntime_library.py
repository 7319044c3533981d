"""ONNX Runtime's library of our operators: compiled once on the user's machine, found from then on.

A session that loads it (`SessionOptions.register_custom_ops_library`) runs our kernels; one that
does not runs the function inside the model file. So the library is never required, and no wheel of
ours carries machine code.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from mmi_deploy.errors import EngineError

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
NAME = "libmmi_onnxruntime.so"

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
)
_LINK = ("-shared", "-static-libgcc", "-static-libstdc++")
_VARIANTS: dict[str, tuple[str, ...]] = {
    "base": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
}
"""Instruction sets that the kernel is compiled for; the library picks one when it runs."""

_FILES = (
    "attention.h",
    "attention_cpu.h",
    "attention_cpu.cpp",
    "attention_cpu_kernel.cpp",
    "onnxruntime_abi.h",
    "onnxruntime_library.cpp",
    "sizes.h",
)
_SECONDS = 300


def compiler() -> str | None:
    """The C++ compiler: `$CXX`, or the first of the usual ones; None where there is none."""
    named = os.environ.get("CXX")
    return next(
        filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None
    )


def cache_folder() -> Path:
    """Where compiled kernels are kept: `$MMI_CACHE`, or `mmi_deploy` in the user's cache folder."""
    if named := os.environ.get("MMI_CACHE"):
        return Path(named)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mmi_deploy"


@cache
def _fingerprint() -> str:
    """Of all that decides what is compiled, the compiler aside: a newer one makes nothing wrong."""
    digest = hashlib.sha256(repr((_FLAGS, _LINK, _VARIANTS, platform.machine())).encode())
    for name in _FILES:
        digest.update((SOURCES / name).read_bytes())
    return digest.hexdigest()[:16]


def location() -> Path:
    """Where the library of these sources is, or will be."""
    return cache_folder() / f"onnxruntime-{platform.machine()}-{_fingerprint()}" / NAME


def find() -> Path | None:
    """The compiled library, if there is one."""
    path = location()
    return path if path.is_file() else None


def build(out: Path | None = None) -> Path:
    """Compile the library, about 20 seconds, and put it into `out` (a folder) or the cache.

    It appears whole or not at all. Raises `EngineError` where there is no compiler, or it fails.
    """
    path = location() if out is None else out / NAME
    if os.name != "posix":
        raise EngineError(
            "the kernel library can be compiled on Linux and macOS only",
            got=platform.system(),
            fix="Without it ONNX Runtime runs the operator's function: right, but slower.",
        )
    program = compiler()
    if program is None:
        raise EngineError(
            "no C++ compiler was found (c++, g++, clang++ or $CXX)",
            fix="Install one, as with `apt install g++`.",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as scratch:
            made = _compile(program, Path(scratch))
            os.replace(made, path)
    except OSError as error:
        raise EngineError(
            f"the kernel library cannot be written to {path.parent}: {error}"
        ) from None
    return path


def ensure() -> Path | None:
    """The library, compiled now if it never was; None, with a remark, where that fails."""
    if (path := find()) is not None:
        return path
    if compiler() is None:
        log.info("no C++ compiler: ONNX Runtime runs MMFS as standard operators, which is slower")
        return None
    log.warning("compiling the MMFS kernel for ONNX Runtime, once, about 20 seconds")
    try:
        return build()
    except EngineError as error:
        log.warning("%s ONNX Runtime runs MMFS as standard operators, which is slower", error)
        return None


def _compile(program: str, scratch: Path) -> Path:
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    host = ("-DMMI_X86",) if on_x86 else ()
    jobs: list[tuple[str, Sequence[str], str]] = [
        ("attention_cpu.cpp", host, "attention_cpu.o"),
        ("onnxruntime_library.cpp", (), "onnxruntime_library.o"),
    ]
    for variant, flags in _VARIANTS.items():
        if on_x86 or not flags:
            named = (f"-DMMI_VARIANT={variant}", *flags)
            jobs.append(("attention_cpu_kernel.cpp", named, f"kernel_{variant}.o"))
    commands = [
        [program, *_FLAGS, *flags, "-c", str(SOURCES / source), "-o", str(scratch / made)]
        for source, flags, made in jobs
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    library = scratch / NAME
    link = _LINK if platform.system() == "Linux" else _LINK[:1]
    _run([program, *link, *(str(scratch / made) for _, _, made in jobs), "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise EngineError(f"{command[0]} took more than {_SECONDS} s and was stopped") from None
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "it said nothing").strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[0])
        raise EngineError(
            f"{command[0]} cannot compile the kernel library: {first}",
            fix="Set CXX to another compiler: GCC 10 or Clang 14, or newer.",
        ) from None
