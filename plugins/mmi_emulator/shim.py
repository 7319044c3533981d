"""Compile the CUDA kernels with g++ and run them on this CPU: `csrc/shim.cpp`.

Each CUDA thread is a fiber, and fibers synchronise at every barrier, shuffle, vote and tensor-core
product. The library is built at first use, into the user's cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from mmi_deploy.errors import EngineError
from mmi_deploy.system.files import cache_folder
from mmi_deploy.system.temporary_folder import temporary_folder
from mmi_plugins.compile.launch_plan import (
    Launch,
    device_arrays,
    launch_plan,
    output_array,
    widen,
    workspace_shape,
)
from mmi_plugins.constants import CSRC
from mmi_plugins.gemv.launch_plan import GemvLaunch
from mmi_plugins.operator import Call
from mmi_plugins.reference import rows_of

CPP = Path(__file__).parent / "csrc"

# Without contraction: the kernel's error-free sums rely on separate roundings.
OPTIONS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-DMMI_SHIM")

# With these, the process must have been started with `sanitizer_library()` preloaded.
SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def compiler() -> str | None:
    """The C++ compiler, $CXX or g++, or None."""
    return shutil.which(os.environ.get("CXX") or "g++")


def sanitizer_library() -> str:
    """AddressSanitizer's library, for LD_PRELOAD."""
    command = [compiler() or "g++", "-print-file-name=libasan.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def build(csrc: Path = CSRC, *further: str) -> Path:
    """Compile the shim of the kernels in `csrc`, or find it in the cache. Raises `EngineError`."""
    program = compiler()
    if program is None:
        raise EngineError("the shim needs a C++17 compiler", fix="install g++, or set CXX")
    sources = sorted([path for path in (*csrc.iterdir(), *CPP.iterdir()) if path.is_file()])
    words = [program, *OPTIONS, *further]
    key = hashlib.sha256("\0".join(words).encode())
    for source in sources:
        key.update(source.read_bytes())
    library = cache_folder(writes=True) / "shim" / f"{key.hexdigest()[:24]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(library.parent, ".building-") as folder:
        made = folder / "shim.so"
        command = [*words, f"-I{csrc}", f"-I{CPP}", str(CPP / "shim.cpp"), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise EngineError("the shim does not compile", got=done.stderr.strip()[:2000])
        os.replace(made, library)
    return library


@cache
def load(library: Path) -> ctypes.CDLL:
    """Load a compiled shim."""
    loaded = ctypes.CDLL(str(library))
    loaded.mmi_shim_launch.restype = ctypes.c_char_p
    loaded.mmi_shim_plan.restype = ctypes.c_char_p
    loaded.mmi_shim_gemv_plan.restype = ctypes.c_char_p
    return loaded


@dataclass(frozen=True)
class Shim:
    """A compiled shim and options of a run. `backwards`: run the threads of a block from last to
    first. `without`: line of the kernel's file whose barrier is skipped (0: none)."""

    library: Path = field(default_factory=build)
    backwards: bool = False
    without: int = 0

    def launch(self, launch: Launch | GemvLaunch, blocks: np.ndarray) -> None:
        """Run the blocks (x, y, z), [blocks, 3], of one launch with addresses of this process.
        Raises `EngineError` where threads do not synchronise as they should."""
        blocks = np.ascontiguousarray(blocks, np.uint32)
        failure = load(self.library).mmi_shim_launch(
            launch.variant.name.encode(),
            launch.parameter,
            blocks.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_long(len(blocks)),
            ctypes.c_uint(launch.variant.threads),
            ctypes.c_bool(self.backwards),
            ctypes.c_int(self.without),
        )
        if failure:
            raise EngineError(f"{launch.variant.name}: {failure.decode()}")

    def run(self, call: Call, rows: np.ndarray, parts: int | None = None) -> np.ndarray:
        """Outputs [rows, d] of `rows` (b, q, h), [rows, 3]; `parts` as in `launch_plan`."""
        arrays = {name: aligned(array) for name, array in device_arrays(call).items()}
        arrays["output"] = aligned(output_array(call))
        arrays["workspace"] = aligned(np.full(workspace_shape(call, parts), np.nan, np.float32))
        addresses = {name: array.ctypes.data for name, array in arrays.items()}
        for launch in launch_plan(call, addresses, parts):
            self.launch(launch, launch.blocks(rows))
        return rows_of(widen(arrays["output"], call.dtype), call, rows)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 16 bytes."""
    copy = np.array(array, order="C")
    if copy.ctypes.data % 16:  # malloc aligns to 16 bytes on every common platform
        room = np.empty(array.nbytes + 16, np.uint8)
        place = room[-room.ctypes.data % 16 :][: array.nbytes]
        copy = place.view(array.dtype).reshape(array.shape)
        copy[...] = array
    return copy


class _Implementation:
    name = "shim"
    most_rows: int | None = 128

    def missing(self) -> str | None:
        """Reason why the shim cannot run here, or None."""
        return None if compiler() else "there is no C++ compiler: install g++, or set CXX"

    def run(self, call: Call, rows: np.ndarray) -> np.ndarray:
        """Outputs [rows, d] of `rows` [rows, 3], by the kernels that the library would choose."""
        return Shim().run(call, rows)


SHIM = _Implementation()
