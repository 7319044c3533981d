"""Custom-op library for ONNX Runtime: compiled once on the user's machine, and kept in the cache.

A session that loads it (`SessionOptions.register_custom_ops_library`) runs the kernels; a session
that does not runs the function in the model file. So the library is never required, and the wheel
contains no machine code.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.system.files import CACHE, cache_folder
from mmi_deploy.system.progress import Progress, silent
from mmi_deploy.system.temporary_folder import temporary_folder
from mmi_plugins.compile.checksum import (
    append_checksum,
    checksum_error,
    has_valid_checksum,
)
from mmi_plugins.compile.compilers import (
    ARCHITECTURES,
    find_nvcc,
    portable,
    supported_architectures,
)
from mmi_plugins.constants import CSRC

log = logging.getLogger(__name__)

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
# Instruction sets that the CPU kernel is compiled for; the library chooses one at run time.
_VARIANTS: dict[str, tuple[str, ...]] = {
    "base": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
}

_FILES = (
    "constants.def",
    "constants.h",
    "data_type.h",
    "gemv.h",
    "gemv_cpu.h",
    "gemv_cpu.cpp",
    "gemv_sizes.h",
    "half.h",
    "mmfs.h",
    "mmfs_cpu.h",
    "mmfs_cpu.cpp",
    "mmfs_cpu_kernel.cpp",
    "mmfs_cpu_points.h",
    "mmfs_cpu_vector.h",
    "onnxruntime_abi.h",
    "onnxruntime_gemv.cpp",
    "onnxruntime_kernel.h",
    "onnxruntime_library.cpp",
    "sizes.h",
)
_CUDA_FILES = ("*.cu", "*.cuh", "*launch.h", "*plan.h", "*_parameters.h")
_SECONDS = 900

_INSTALL = "Install one, as with `apt install g++`."
_SLOWER = "the MMFS kernel is missing, and ONNX Runtime runs standard operators, which are slower"


def compiler() -> str | None:
    """The C++ compiler: `$CXX`, or the first found of c++, g++ and clang++; or None."""
    named = os.environ.get("CXX")
    return next(
        filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None
    )


@cache
def _fingerprint(cuda: bool) -> str:
    """Hash of sources, options and C library: what is linked with a newer one does not load with an
    older one. The compiler does not count: any version will do."""
    system = (platform.machine(), platform.libc_ver())
    settings = (_FLAGS, _LINK, _VARIANTS, system, cuda and ARCHITECTURES)
    digest = hashlib.sha256(repr(settings).encode())
    for pattern in (*_FILES, *(_CUDA_FILES if cuda else ())):
        for path in sorted(CSRC.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def location(cuda: bool = False) -> Path:
    """Path of the library of these sources in the cache, whether it exists or not."""
    kind = f"onnxruntime{'-cuda' * cuda}-{platform.machine()}-{_fingerprint(cuda)}"
    return cache_folder() / kind / NAME


def find(cuda: bool = False) -> Path | None:
    """The compiled library in the cache, if it exists and its checksum matches."""
    path = location(cuda)
    return path if has_valid_checksum(path) else None


def build(
    out: Path | None = None,
    *,
    cuda: bool = False,
    architectures: Sequence[str] = ARCHITECTURES,
    progress: Progress = silent,
) -> Path:
    """Compile the library (about 20 seconds) into the folder `out`, or the cache.

    `cuda`: also compile the kernels for ONNX Runtime's CUDA provider and these `architectures`,
    which takes nvcc. The file appears complete or not at all. Raises `EngineError` where a compiler
    is missing or fails, `ConfigError` where `$MMI_CACHE` cannot be written.
    """
    if out is None:
        cache_folder(writes=True)
    path = location(cuda) if out is None else out / NAME
    if out is not None and os.path.lexists(path) and not has_valid_checksum(path):
        raise EngineError(
            f"{path} is there already, and mmi did not write it",
            fix="remove it, or give another output folder",
        )
    if os.name != "posix":
        raise EngineError(
            "the kernel library can be compiled on Linux and macOS only",
            got=platform.system(),
            fix="Without it ONNX Runtime runs the operator's function: equal results, but slower.",
        )
    program = compiler()
    if program is None:
        raise EngineError(
            "no C++ compiler was found (c++, g++, clang++ or $CXX)",
            fix=_INSTALL,
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path.parent, ".building-") as scratch:
            gpu = _Cuda(find_nvcc(), architectures) if cuda else None
            made = _compile(program, gpu, scratch, progress)
            append_checksum(made)
            os.replace(made, path)
    except OSError as error:
        raise EngineError(
            f"the kernel library cannot be written to {path.parent}: {error.strerror}",
            fix=f"Name another folder in the environment variable {CACHE}." if out is None else "",
        ) from None
    return path


def ensure(cuda: bool = False) -> Path | None:
    """The library, compiled if it is missing or damaged; None, with a warning, where that fails.

    cuda: that with CUDA kernels, which takes nvcc. Without nvcc None is returned and nothing is
    logged: the caller knows what runs instead.
    """
    try:
        path = find(cuda)
    except ConfigError as error:
        log.warning("%s: %s", _SLOWER, error)
        return None
    if path is not None:
        return path
    if compiler() is None:
        log.warning("%s: no C++ compiler was found. %s", _SLOWER, _INSTALL)
        return None
    if cuda:
        try:
            find_nvcc()
        except EngineError:
            return None
    if location(cuda).is_file():
        log.warning(
            "the compiled kernel library is damaged: %s",
            checksum_error(location(cuda)) or "no checksum",
        )
    time = "some minutes" if cuda else "about 20 seconds"
    log.warning("compiling the MMFS kernel for ONNX Runtime, once, %s", time)
    try:
        return build(cuda=cuda)
    except EngineError as error:
        log.warning("%s: %s", _SLOWER, error)
        return None


@dataclass(frozen=True)
class _Cuda:
    """CUDA's compiler and the architectures to compile for."""

    nvcc: Path
    architectures: Sequence[str]

    @property
    def codes(self) -> list[str]:
        """Options for machine code of each architecture, and PTX of one."""
        known = supported_architectures(self.nvcc, self.architectures)
        ptx = portable(known)
        codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in known]
        return [*codes, f"-gencode=arch=compute_{ptx},code=compute_{ptx}"]


def _compile(program: str, gpu: _Cuda | None, scratch: Path, progress: Progress) -> Path:
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    jobs = [_job(program, scratch, "mmfs_cpu", ("-DMMI_X86",) if on_x86 else ())]
    for variant, flags in _VARIANTS.items():
        if on_x86 or not flags:
            named = (f"-DMMI_VARIANT={variant}", *flags)
            jobs.append(_job(program, scratch, "mmfs_cpu_kernel", named, variant))
    jobs.append(_job(program, scratch, "gemv_cpu", ()))
    operators = ("onnxruntime_library", "onnxruntime_gemv")
    if gpu is None:
        jobs += [_job(program, scratch, name, ()) for name in operators]
        link = [program, *(_LINK if platform.system() == "Linux" else _LINK[:1])]
    else:
        host = ["-Xcompiler", ",".join(_FLAGS[1:])]
        nvcc = [str(gpu.nvcc), "-ccbin", program, "-std=c++17", *host, "-c", "-o"]
        for name in operators:
            made, source = str(scratch / f"{name}.o"), str(CSRC / f"{name}.cpp")
            jobs.append([*nvcc, made, "-DMMI_CUDA", source])
        for name in ("mmfs", "gemv"):
            made, source = str(scratch / f"{name}.o"), str(CSRC / f"{name}.cu")
            jobs.append([*nvcc, made, *gpu.codes, source])
        link = [str(gpu.nvcc), "-ccbin", program, "-cudart", "static", "-shared"]
        link += ["-Xlinker", "--exclude-libs,ALL"]
    _run(jobs, progress)
    library = scratch / NAME
    _run([[*link, *map(str, sorted(scratch.glob("*.o"))), "-o", str(library)]])
    return library


def _job(
    program: str, scratch: Path, source: str, flags: Sequence[str], variant: str = ""
) -> list[str]:
    """Command that compiles one source, for one instruction set."""
    made = scratch / f"{source}{variant}.o"
    return [program, *_FLAGS, *flags, "-c", str(CSRC / f"{source}.cpp"), "-o", str(made)]


def _run(commands: Sequence[list[str]], progress: Progress = silent) -> None:
    """Run compilers, at most one for each core; `progress` gets the number of those done. When one
    fails, or this process is interrupted, all are killed, so that none is left running."""
    waiting, running = list(reversed(commands)), deque[subprocess.Popen[str]]()
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                running.append(
                    subprocess.Popen(
                        waiting.pop(),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.PIPE,
                        text=True,
                        start_new_session=True,  # so that killpg reaches all its processes
                    )
                )
            progress(
                "compiling the MMFS kernel",
                len(commands) - len(waiting) - len(running),
                len(commands),
            )
            _finish(running[0])
            running.popleft()
    finally:
        for process in running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _finish(process: subprocess.Popen[str]) -> None:
    """Wait for a compiler. Raises `EngineError` when it fails or times out."""
    assert isinstance(process.args, list)
    program = process.args[0]
    try:
        said = process.communicate(timeout=_SECONDS)[1]
    except subprocess.TimeoutExpired:
        raise EngineError(f"{program} took more than {_SECONDS} s and was stopped") from None
    if process.returncode:
        lines = said.strip().splitlines() or ["no error output"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise EngineError(
            f"{program} cannot compile the kernel library: {first}",
            fix="Set CXX to another compiler: GCC 10 or Clang 14, or newer.",
        )
