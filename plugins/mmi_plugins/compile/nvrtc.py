"""Compile the CUDA kernels to PTX or machine code, with NVRTC (no GPU, no driver) or nvcc.

`launch_plan` has the kernels (`Variant`), their parameter and their grids. Besides plain arithmetic
the PTX uses `mma.sync.aligned.m16n8k16.row.col.f32.{f16.f16,bf16.bf16}.f32`,
`shfl.sync.{bfly,idx}.b32`, `vote.sync.ballot.b32`, `bar.warp.sync`, `bar.sync`, `prmt.b32`,
`ex2.approx.ftz.f32`, `rcp.approx.ftz.f32`, `cvt.rn.{f16x2,bf16x2}.f32`, `ld.global.nc.v4`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from mmi_deploy.errors import EngineError
from mmi_plugins.compile.compilers import find_nvcc
from mmi_plugins.compile.launch_plan import Variant
from mmi_plugins.compile.ptx_version import lowered
from mmi_plugins.constants import CSRC

COMPILERS = ("nvrtc", "nvcc")


def missing(compiler: str = "nvrtc") -> str | None:
    """Reason why `compiler` cannot be used here, or None."""
    if compiler == "nvcc":
        return None if _nvcc() else "nvcc is not installed (CUDA toolkit 12.8 or newer)"
    return None if _nvrtc() else "NVRTC is not installed: pip install nvidia-cuda-nvrtc"


@cache
def compile_ptx(variant: Variant, compute: int, compiler: str = "nvrtc") -> str:
    """PTX of one kernel for `compute_<compute>` (80, 90, 100, 120), of the lowest version that its
    instructions need, so that older drivers take it. Raises `EngineError`."""
    if reason := missing(compiler):
        raise EngineError(reason)
    if compiler == "nvcc":
        made = _run_nvcc(variant.source, "-ptx", f"-arch=compute_{compute}")
    else:
        made = _run_nvrtc(variant.source, f"compute_{compute}", "PTX")
    return lowered(made.decode())


def compile_cubin(source: str, architecture: int, compiler: str = "nvrtc") -> bytes:
    """Machine code of a translation unit for `sm_<architecture>`. Raises `EngineError`."""
    if reason := missing(compiler):
        raise EngineError(reason)
    if compiler == "nvcc":
        return _run_nvcc(source, "-cubin", f"-arch=sm_{architecture}")
    return _run_nvrtc(source, f"sm_{architecture}", "CUBIN")


def version() -> str:
    """The version of NVRTC. Raises `EngineError`."""
    if reason := missing():
        raise EngineError(reason)
    library, major, minor = _nvrtc(), ctypes.c_int(), ctypes.c_int()
    assert library
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def _nvcc() -> Path | None:
    try:
        return find_nvcc()
    except EngineError:
        return None


def _run_nvcc(source: str, *options: str) -> bytes:
    nvcc = _nvcc()
    assert nvcc
    with tempfile.TemporaryDirectory() as folder:
        unit, out = Path(folder, "kernel.cu"), Path(folder, "out")
        unit.write_text(source)
        command = [str(nvcc), "-std=c++17", f"-I{CSRC}", *options, str(unit), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise EngineError("nvcc refused the kernels", got=done.stderr.strip())
        return out.read_bytes()


@cache
def _nvrtc() -> ctypes.CDLL | None:
    """NVRTC of the package `nvidia-cuda-nvrtc`, or of the system."""
    package = importlib.util.find_spec("nvidia")
    places = (package.submodule_search_locations or ()) if package else ()
    folders = [Path(place) for place in places]
    packaged = [
        str(path)
        for folder in folders
        for pattern in ("cu*/lib/libnvrtc.so.*", "cuda_nvrtc/lib/libnvrtc.so.*")
        for path in sorted(folder.glob(pattern), reverse=True)
        if "alt" not in path.name
    ]
    for name in (*packaged, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _run_nvrtc(source: str, architecture: str, product: str) -> bytes:
    """`product`: PTX or CUBIN."""
    library = _nvrtc()
    assert library
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    try:
        options = [f"--gpu-architecture={architecture}", "-std=c++17", f"-I{CSRC}"]
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), words):
            log = _fetch(library, program, "ProgramLog").decode(errors="replace").strip("\0\n")
            raise EngineError("NVRTC refused the kernels", got=log)
        data = _fetch(library, program, product)
        return data.rstrip(b"\0") if product == "PTX" else data
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(library: ctypes.CDLL, program: ctypes.c_void_p, product: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{product}Size")(program, ctypes.byref(size))
    data = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{product}")(program, data)
    return data.raw
