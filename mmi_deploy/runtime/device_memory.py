"""Memory of an NVIDIA GPU, by CUDA's runtime API (`cuda.bindings.runtime`).

All work of a `DeviceMemory` (copies, engines, CUDA graphs) runs in order on one stream. So only the
host ever waits, and users of shared memory (the engines' workspace, staging buffers) need no
further synchronisation.
"""

from __future__ import annotations

import ctypes
import importlib
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from threading import RLock
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.buffers import Array, Buffer, check_alike, element_type

# Alignment in bytes that TensorRT requires of addresses, and `cudaMalloc` guarantees.
ALIGNMENT = 256

# Initial bytes of the pinned host memory through which copies between host and device pass.
STAGING = 1 << 20

INSTALL = "install it with: pip install cuda-bindings"


def import_cuda() -> Any:
    """Import `cuda.bindings.runtime`; raises `EngineError` if it is not installed."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EngineError(
            f"CUDA's Python bindings cannot be imported: {error}", fix=INSTALL
        ) from None


class Cuda:
    """CUDA's runtime API with checked calls: `cuda("cudaMalloc", 256)` returns the result without
    the error code, and raises `EngineError` for an error."""

    def __init__(self, runtime: ModuleType | Any) -> None:
        self.runtime = runtime

    def __call__(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self.runtime, name)(*arguments)
        if error != self.runtime.cudaError_t.cudaSuccess:
            raise self._failure(name, error)
        return results[0] if len(results) == 1 else tuple(results) or None

    def unchecked(self, name: str, *arguments: Any) -> None:
        """Call without a check, for clean-up, where no caller could handle an error."""
        getattr(self.runtime, name)(*arguments)

    def _failure(self, name: str, error: Any) -> EngineError:
        if error == self.runtime.cudaError_t.cudaErrorMemoryAllocation:
            # CUDA keeps the error until it is read; the next caller would take it for its own.
            self.unchecked("cudaGetLastError")
            return EngineError(
                "the GPU's memory is full",
                fix="keep fewer engines resident with --resident, or build smaller ones with "
                "`mmi build --precision int8`",
            )
        return EngineError(f"CUDA's {name} failed: {self.error_string(error)}")

    def error_string(self, error: Any) -> str:
        """CUDA's description of an error code."""
        return str(self.runtime.cudaGetErrorString(error)[1].decode())


class Device:
    """One GPU: its name and its architecture, such as `sm89`."""

    def __init__(self, cuda: Cuda, number: int) -> None:
        """Select GPU `number`, from 0; raises `EngineError` if there is none."""
        error, count = cuda.runtime.cudaGetDeviceCount()
        if error != cuda.runtime.cudaError_t.cudaSuccess:
            raise EngineError(f"there is no usable NVIDIA GPU: {cuda.error_string(error)}")
        if not 0 <= number < count:
            raise EngineError(f"there is no GPU {number}", expected=f"0 to {count - 1}", got=number)
        self.cuda, self.number = cuda, number
        self.choose()
        properties = cuda("cudaGetDeviceProperties", number)
        self.name = properties.name.decode().rstrip("\0")
        self.architecture = f"sm{properties.major}{properties.minor}"

    def find_other(self, architecture: str) -> int | None:
        """Number of another GPU of this machine with `architecture`, or None."""
        for number in range(self.cuda("cudaGetDeviceCount")):
            properties = self.cuda("cudaGetDeviceProperties", number)
            if f"sm{properties.major}{properties.minor}" == architecture:
                return number
        return None

    def choose(self) -> None:
        """Make it the current device of the calling thread."""
        self.cuda("cudaSetDevice", self.number)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        free, total = self.cuda("cudaMemGetInfo")
        return free, total


class StreamLock:
    """Lock of a stream: one thread at a time enqueues, so two threads' kernels do not interleave.

    It also frees device memory. Python's garbage collector may drop a buffer at any moment and in
    any thread, but memory must not be freed while a CUDA graph is captured: it is then freed after
    the capture.
    """

    def __init__(self, device: Device) -> None:
        self._lock, self._device, self._depth = RLock(), device, 0
        self._recording = False
        self._dropped: deque[tuple[str, int]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._depth == 0:
            try:
                self._device.choose()  # CUDA's current device is per thread
            except BaseException:
                self._lock.release()
                raise
        self._depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        self._lock.release()
        self._give_back()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hold the lock for the capture of a graph, and free no memory meanwhile."""
        with self:
            self._recording = True
            try:
                yield
            finally:
                self._recording = False

    def drop(self, free: str, pointer: int) -> None:
        """Free memory with CUDA's function `free`: now, or once the lock is released."""
        self._dropped.append((free, pointer))
        self._give_back()

    def _give_back(self) -> None:
        # Never blocks: a garbage collector must not. A thread that holds the lock calls this again
        # after its release, so nothing is lost.
        while self._dropped and self._lock.acquire(blocking=False):
            try:
                if self._recording:  # the lock is reentrant: this thread is capturing
                    return
                while self._dropped:
                    self._device.cuda.unchecked(*self._dropped.popleft())
            finally:
                self._lock.release()


class _Block:
    """Block of device or pinned host memory, freed when the last reference to it goes."""

    def __init__(self, cuda: Cuda, lock: StreamLock, allocate: str, free: str, size: int) -> None:
        self.size = size
        self.pointer = int(cuda(allocate, max(size, 1)))
        end = weakref.finalize(self, lock.drop, free, self.pointer)
        end.atexit = False  # the driver frees it when the process exits


class _Mark:
    """CUDA event on the stream of `memory`, from its pool of events."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._events, self._cuda, self._lock = memory.events, memory.cuda, memory.lock
        with self._lock:
            try:
                self._event = self._events.pop()
            except IndexError:
                self._event = int(self._cuda("cudaEventCreate"))
            self._cuda("cudaEventRecord", self._event, memory.stream)

    def __del__(self) -> None:
        if hasattr(self, "_event"):  # not if it could not be created
            self._events.append(self._event)

    def wait(self) -> None:
        with self._lock:
            self._cuda("cudaEventSynchronize", self._event)

    def seconds_since(self, earlier: _Mark) -> float:
        runtime, events = self._cuda.runtime, (earlier._event, self._event)
        error, milliseconds = runtime.cudaEventElapsedTime(*events)
        if error == runtime.cudaError_t.cudaErrorNotReady:
            self.wait()
            milliseconds = self._cuda("cudaEventElapsedTime", *events)
        elif error != runtime.cudaError_t.cudaSuccess:
            raise EngineError(
                f"CUDA's cudaEventElapsedTime failed: {self._cuda.error_string(error)}"
            )
        return float(milliseconds) / 1000


class DeviceMemory:
    """Memory of one GPU, and the stream that all its work runs on."""

    device = "cuda"

    def __init__(self, cuda: Cuda, number: int = 0) -> None:
        """number: index of the GPU. Raises `EngineError` if there is none."""
        self.cuda = cuda
        self.gpu = Device(cuda, number)
        self.lock = StreamLock(self.gpu)
        kind = cuda.runtime.cudaMemcpyKind
        self._to_device = kind.cudaMemcpyHostToDevice
        self._to_host = kind.cudaMemcpyDeviceToHost
        self._within = kind.cudaMemcpyDeviceToDevice
        self.stream = int(cuda("cudaStreamCreateWithFlags", cuda.runtime.cudaStreamNonBlocking))
        weakref.finalize(self, cuda.unchecked, "cudaStreamDestroy", self.stream).atexit = False
        # Events that no mark uses. They are destroyed with the process's context.
        self.events: deque[int] = deque()
        self._staging = self._pinned(STAGING)
        self._staged = 0  # bytes of it in use by copies in flight

    def _pinned(self, size: int) -> _Block:
        return _Block(self.cuda, self.lock, "cudaMallocHost", "cudaFreeHost", size)

    def allocate(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        kind = element_type(dtype)
        buffer = self._allocate(tuple(shape), kind)
        with self.lock:
            self.cuda("cudaMemsetAsync", buffer.pointer, 0, buffer.bytes, self.stream)
        return buffer

    def _allocate(self, shape: tuple[int, ...], kind: np.dtype[Any]) -> Buffer:
        with self.lock:
            block = _Block(
                self.cuda, self.lock, "cudaMalloc", "cudaFree", prod(shape) * kind.itemsize
            )
        return Buffer(self, block.pointer, shape, kind, block)

    def from_array(self, array: Array) -> Buffer:
        buffer = self._allocate(array.shape, array.dtype)
        self.write(buffer, array)
        return buffer

    def write(self, buffer: Buffer, array: Array) -> None:
        check_alike(buffer, array)
        array = np.ascontiguousarray(array)
        with self.lock:
            # Through pinned memory, so that the copy is asynchronous and the caller may change
            # `array` at once.
            place = self._stage(array.nbytes)
            ctypes.memmove(place, array.ctypes.data, array.nbytes)
            self._copy(buffer.pointer, place, array.nbytes, self._to_device)

    def read(self, buffer: Buffer) -> Array:
        with self.lock:
            place = self._stage(buffer.bytes)
            self._copy(place, buffer.pointer, buffer.bytes, self._to_host)
            self.wait()
            array = np.empty(buffer.shape, buffer.dtype)
            ctypes.memmove(array.ctypes.data, place, buffer.bytes)
        return array

    def copy(self, source: Buffer, target: Buffer) -> None:
        check_alike(target, source)
        with self.lock:
            self._copy(target.pointer, source.pointer, source.bytes, self._within)

    def wait(self) -> None:
        with self.lock:
            self.cuda("cudaStreamSynchronize", self.stream)
            self._staged = 0

    def mark(self) -> _Mark:
        return _Mark(self)

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        if size:
            self.cuda("cudaMemcpyAsync", target, source, size, kind, self.stream)

    def _stage(self, size: int) -> int:
        """Reserve pinned memory that no copy in flight uses; returns its address."""
        if self._staged + size > self._staging.size:
            self.wait()
        if size > self._staging.size:  # after the wait: no copy uses the old block any more
            self._staging = self._pinned(1 << (size - 1).bit_length())
        place = self._staging.pointer + self._staged
        self._staged += -(-size // ALIGNMENT) * ALIGNMENT
        return place
