"""NVIDIA's driver, through its library `libcuda`: CUDA version, GPUs and their free memory.

It takes neither CUDA's Python bindings nor TensorRT, so that both can be checked against it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}
_MAJOR, _MINOR = 75, 76

# Longest name of a GPU that is read, in bytes.
_NAME = 256


@dataclass(frozen=True)
class Gpu:
    """One GPU of this machine. architecture: such as `sm89`."""

    index: int
    name: str
    architecture: str

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name}, {self.architecture})"


class NvidiaDriver:
    """Driver calls; a call that fails gives None, or no GPU."""

    def __init__(self, library: Any) -> None:
        """library: `libcuda`, or a fake of it."""
        self._library = library

    def cuda_version(self) -> tuple[int, int] | None:
        """Newest CUDA version that the driver supports, as (13, 0)."""
        number = ctypes.c_int()
        if self._library.cuDriverGetVersion(ctypes.byref(number)) or not number.value:
            return None
        return number.value // 1000, number.value % 1000 // 10

    def gpus(self) -> list[Gpu]:
        """All GPUs that this process may use, in the order of `--device`."""
        count = ctypes.c_int()
        if self._library.cuInit(0) or self._library.cuDeviceGetCount(ctypes.byref(count)):
            return []
        found = (self._gpu(index) for index in range(count.value))
        return [gpu for gpu in found if gpu is not None]

    def memory(self, index: int) -> tuple[int, int] | None:
        """Free and total bytes of a GPU."""
        call, device, context = self._library, ctypes.c_int(), ctypes.c_void_p()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        if call.cuInit(0) or call.cuDeviceGet(ctypes.byref(device), index):
            return None
        if call.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
            return None  # so it is where another process has the GPU for itself
        try:
            if call.cuCtxPushCurrent_v2(context):
                return None
            failed = call.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
            call.cuCtxPopCurrent_v2(ctypes.byref(context))
            return None if failed else (free.value, total.value)
        finally:
            call.cuDevicePrimaryCtxRelease_v2(device)

    def _gpu(self, index: int) -> Gpu | None:
        device, name = ctypes.c_int(), ctypes.create_string_buffer(_NAME)
        if self._library.cuDeviceGet(ctypes.byref(device), index):
            return None
        if self._library.cuDeviceGetName(name, _NAME, device):
            return None
        numbers = [ctypes.c_int(), ctypes.c_int()]
        for number, attribute in zip(numbers, (_MAJOR, _MINOR), strict=True):
            if self._library.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
                return None
        architecture = f"sm{numbers[0].value}{numbers[1].value}"
        return Gpu(index, name.value.decode(errors="replace"), architecture)


def nvidia_driver() -> NvidiaDriver | None:
    """The driver of this machine, or None."""
    with suppress(OSError):
        return NvidiaDriver(_open_library())
    return None


def _open_library() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def gpus_here() -> list[Gpu]:
    """All GPUs of this machine, in the order of `--device`."""
    driver = nvidia_driver()
    return driver.gpus() if driver else []


def visible_device(visible: str | None, index: int) -> str:
    """Value of CUDA_VISIBLE_DEVICES that leaves GPU `index` alone. visible: its present value.

    The variable counts the machine's GPUs, `index` those that the present value leaves.
    """
    named: Sequence[str] = [name.strip() for name in visible.split(",")] if visible else ()
    return named[index] if index < len(named) else str(index)
