"""`cuda.bindings.runtime` as a program that checks its user: device memory is memory of the host.

What is enqueued is done when someone waits for it, as late as a GPU might, so what was overwritten
or freed too early shows. Fresh memory holds garbage. Whatever a GPU would answer with wrong numbers
or a crash raises `Fault`, or is kept in `faults` where nobody could catch it.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from threading import RLock
from types import SimpleNamespace
from typing import Any

import numpy as np

ALIGNMENT = 256
GARBAGE = 0xCB
DEVICE, PINNED = "device", "pinned"


class Fault(AssertionError):
    """Call that a correct program never makes."""


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNotReady = 600
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


OK = cudaError_t.cudaSuccess
_SIDES = {
    cudaMemcpyKind.cudaMemcpyHostToDevice: (DEVICE, PINNED),
    cudaMemcpyKind.cudaMemcpyDeviceToHost: (PINNED, DEVICE),
    cudaMemcpyKind.cudaMemcpyDeviceToDevice: (DEVICE, DEVICE),
}


@dataclass
class Allocation:
    kind: str
    array: np.ndarray
    pointer: int
    size: int


@dataclass
class Stream:
    waiting: list[Callable[[], None]] = field(default_factory=list)
    recording: list[Callable[[], None]] | None = None
    spoiled: bool = False
    busy: bool = False


class FakeCuda:
    """One GPU of `capacity` bytes and compute capability (major, minor); `devices` of its kind,
    or of the `others`' after it. driver, bindings: their CUDA versions, as 13020. occupied: bytes
    that other programs hold."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1

    def __init__(
        self,
        capacity: int = 1 << 34,
        capability: tuple[int, int] = (8, 9),
        devices: int = 1,
        others: tuple[tuple[int, int], ...] = (),
        driver: int = 13020,
        bindings: int = 13050,
        occupied: int = 0,
    ) -> None:
        self.capacity, self.devices = capacity, devices + len(others)
        self.capabilities = [*[capability] * devices, *others]
        self.driver, self.bindings, self.occupied = driver, bindings, occupied
        self.live: dict[int, Allocation] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.events: dict[int, float | None] = {}
        self._recorded_on: dict[int, int] = {}
        self.faults: list[str] = []
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.launches = 0
        self.accounted = self.recording_bytes = 0
        self.lock = RLock()
        self._handles = iter(range(0x1000, 1 << 30, 0x10))

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not callable(found) or isinstance(found, type):
            return found

        def logged(*arguments: Any) -> Any:
            with self.lock:  # CUDA's calls are safe from several threads
                self.calls.append((name, arguments))
                return found(*arguments)

        return logged

    # What a test asks.

    def held(self, kind: str = DEVICE) -> int:
        """Bytes that are allocated."""
        return sum(block.size for block in self.live.values() if block.kind == kind)

    @property
    def beside(self) -> int:
        """Bytes of the device that contexts and recordings take, which nobody allocates."""
        return self.accounted + self.recording_bytes * len(self.graphs)

    def find(self, pointer: int, size: int, kind: str) -> np.ndarray:
        """The bytes at an address, which must be live memory of that kind."""
        for block in self.live.values():
            if block.pointer <= pointer and pointer + size <= block.pointer + block.size:
                if block.kind != kind:
                    raise Fault(f"{block.kind} memory where {kind} memory is wanted")
                first = pointer - block.pointer
                return block.array[first : first + size]
        raise Fault(f"{size} bytes at {pointer:#x} are not allocated memory")

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        """For the fake TensorRT: `work` runs when its turn on the stream has come."""
        with self.lock:
            place = self.stream(stream)
            (place.waiting if place.recording is None else place.recording).append(work)

    def stream(self, handle: int) -> Stream:
        if int(handle) not in self.streams:
            raise Fault(f"{handle} is not a stream")
        return self.streams[int(handle)]

    @property
    def recording(self) -> bool:
        return any(stream.recording is not None for stream in self.streams.values())

    # Memory.

    def _allocate(self, kind: str, size: int) -> tuple[cudaError_t, int | None]:
        if self.recording:
            raise Fault("memory is allocated while a graph is recorded")
        if kind == DEVICE and self.held() + size > self.capacity - self.occupied:
            return cudaError_t.cudaErrorMemoryAllocation, None
        whole = np.full(size + ALIGNMENT, GARBAGE, np.uint8)
        skip = -whole.ctypes.data % ALIGNMENT
        pointer = whole.ctypes.data + skip
        self.live[pointer] = Allocation(kind, whole[skip : skip + size], pointer, size)
        return OK, pointer

    def _free(self, kind: str, pointer: int) -> tuple[cudaError_t]:
        if self.recording:
            self.faults.append("memory is freed while a graph is recorded")
        if pointer not in self.live or self.live[pointer].kind != kind:
            self.faults.append(f"{pointer:#x} is freed, and is not {kind} memory")
            return (cudaError_t.cudaErrorInvalidValue,)
        for stream in self.streams.values():
            self._drain(stream)  # so does cudaFree
        busy = [stream for stream in self.streams.values() if stream.busy]
        if busy:  # python frees in the midst of what this thread waits for
            busy[0].waiting.append(lambda: self._release(pointer))
        else:
            self._release(pointer)
        return (OK,)

    def _release(self, pointer: int) -> None:
        self.live.pop(pointer).array[...] = GARBAGE

    def cudaMalloc(self, size: int) -> tuple[cudaError_t, int | None]:
        return self._allocate(DEVICE, size)

    def cudaFree(self, devPtr: int) -> tuple[cudaError_t]:
        return self._free(DEVICE, devPtr)

    def cudaMallocHost(self, size: int) -> tuple[cudaError_t, int | None]:
        return self._allocate(PINNED, size)

    def cudaFreeHost(self, ptr: int) -> tuple[cudaError_t]:
        return self._free(PINNED, ptr)

    def cudaMemcpyAsync(
        self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: int
    ) -> tuple[cudaError_t]:
        to, of = _SIDES[kind]

        def copy() -> None:
            self.find(dst, count, to)
            self.find(src, count, of)
            ctypes.memmove(dst, src, count)

        self.find(dst, count, to)
        self.find(src, count, of)
        if abs(dst - src) < count:
            raise Fault("a copy overlaps itself")
        self.enqueue(stream, copy)
        return (OK,)

    def cudaMemsetAsync(
        self, devPtr: int, value: int, count: int, stream: int
    ) -> tuple[cudaError_t]:
        def fill() -> None:
            self.find(devPtr, count, DEVICE)[...] = value

        self.find(devPtr, count, DEVICE)
        self.enqueue(stream, fill)
        return (OK,)

    def cudaMemGetInfo(self) -> tuple[cudaError_t, int, int]:
        return OK, self.capacity - self.occupied - self.held(), self.capacity

    # Device.

    def cudaGetDeviceCount(self) -> tuple[cudaError_t, int | None]:
        if not self.devices:
            return cudaError_t.cudaErrorInsufficientDriver, None
        return OK, self.devices

    def cudaSetDevice(self, device: int) -> tuple[cudaError_t]:
        return (OK if 0 <= device < self.devices else cudaError_t.cudaErrorInvalidValue,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[cudaError_t, Any]:
        major, minor = self.capabilities[device]
        return OK, SimpleNamespace(name=b"Fake GPU\0\0", major=major, minor=minor)

    def cudaDriverGetVersion(self) -> tuple[cudaError_t, int]:
        return OK, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[cudaError_t, int]:
        return OK, self.bindings

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[cudaError_t, bytes]:
        return OK, error.name.encode()

    def cudaGetLastError(self) -> tuple[cudaError_t]:
        return (OK,)

    # Streams.

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[cudaError_t, int]:
        handle = next(self._handles)
        self.streams[handle] = Stream()
        return OK, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[cudaError_t]:
        self._drain(self.streams.pop(stream))
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[cudaError_t]:
        place = self.stream(stream)
        if place.recording is not None:
            place.spoiled = True
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        self._drain(place)
        return (OK,)

    def _drain(self, stream: Stream) -> None:
        if stream.busy:
            return
        stream.busy = True
        try:
            while stream.waiting:
                stream.waiting.pop(0)()
        finally:
            stream.busy = False

    # Events.

    def cudaEventCreate(self) -> tuple[cudaError_t, int]:
        handle = next(self._handles)
        self.events[handle] = None
        return OK, handle

    def cudaEventRecord(self, event: int, stream: int) -> tuple[cudaError_t]:
        if self.stream(stream).recording is not None:
            raise Fault("an event is recorded into a graph")

        def passed() -> None:
            self.events[event] = time.perf_counter()

        self.events[event] = None
        self._recorded_on[event] = stream
        self.enqueue(stream, passed)
        return (OK,)

    def cudaEventSynchronize(self, event: int) -> tuple[cudaError_t]:
        place = self.stream(self._recorded_on[event])
        while self.events[event] is None and not place.busy:
            place.busy = True
            try:
                place.waiting.pop(0)()
            finally:
                place.busy = False
        return (OK,)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[cudaError_t, float | None]:
        first, last = self.events[start], self.events[end]
        if first is None or last is None:
            return cudaError_t.cudaErrorNotReady, None
        return OK, (last - first) * 1000

    # Recording.

    def cudaStreamBeginCapture(
        self, stream: int, mode: cudaStreamCaptureMode
    ) -> tuple[cudaError_t]:
        if self.recording:
            raise Fault("a graph is recorded already")
        self.stream(stream).recording = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[cudaError_t, int | None]:
        place = self.stream(stream)
        if place.recording is None:
            raise Fault("nothing is recorded")
        work, spoiled = place.recording, place.spoiled
        place.recording, place.spoiled = None, False
        if spoiled:
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        return OK, self._keep(work)

    def _keep(self, work: list[Callable[[], None]]) -> int:
        handle = next(self._handles)
        self.graphs[handle] = work
        return handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[cudaError_t, int]:
        return OK, self._keep(list(self.graphs[graph]))

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> tuple[cudaError_t]:
        if graphExec not in self.graphs:
            raise Fault("a graph is launched that was destroyed")
        if self.recording:
            raise Fault("a graph is launched while another is recorded")
        for work in self.graphs[graphExec]:
            getattr(work, "launched", lambda: None)()
        self.stream(stream).waiting.extend(self.graphs[graphExec])
        self.launches += 1
        return (OK,)

    def cudaGraphDestroy(self, graph: int) -> tuple[cudaError_t]:
        if self.graphs.pop(graph, None) is None:
            raise Fault("a graph is destroyed twice")
        return (OK,)

    cudaGraphExecDestroy = cudaGraphDestroy
