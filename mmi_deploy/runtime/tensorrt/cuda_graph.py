"""Runs of an engine recorded as CUDA graphs: repeated without the cost of launching each kernel.

A recorded run reads and writes the addresses, with the shapes, that it was recorded with; what lies
there may change. Decode and denoising read small inputs (token, position, write index, step) from
places that stay, filled by copies on the same stream before each launch, so that one recording
serves all tokens or steps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.tensorrt.device_memory import DeviceMemory

MAX_RECORDINGS = 16
"""Recordings kept for a context. The least recently used one goes."""

MAX_SEEN = 1024
"""Keys remembered that have run once; then they are forgotten, and runs are recorded later."""


class CudaGraphs:
    """Recordings of one context, by key: everything that the launched kernels depend on but the
    contents of memory. When the context is given other shapes they are worth nothing: `clear`.

    The first run with a key is an ordinary one, in which TensorRT does what may not be recorded
    (new shapes, allocations); the second is recorded; later ones are launched from the recording.
    """

    def __init__(self, memory: DeviceMemory, most: int = MAX_RECORDINGS) -> None:
        self._cuda, self._stream, self._lock = memory.cuda, memory.stream, memory.lock
        self._most = most
        self._seen: set[Hashable] = set()
        self._recorded: OrderedDict[Hashable, object | None] = OrderedDict()
        self.refusal = ""
        """Why the last run that could not be recorded could not: it is enqueued each time."""

    def launch(self, key: Hashable) -> bool:
        """Launch the recording with this key; False where there is none."""
        graph = self._recorded.get(key)
        if graph is None:
            return False
        self._recorded.move_to_end(key)
        self._cuda("cudaGraphLaunch", graph, self._stream)
        return True

    def enqueue(self, key: Hashable, run: Callable[[], None], may_record: bool) -> bool:
        """A run that has no recording: make one and launch it, or `run` it, which raises when it
        fails. Whether it was launched."""
        if may_record and key in self._seen and key not in self._recorded:
            with self._lock.recording():
                self._recorded[key] = self._record(run)
            if len(self._recorded) > self._most:
                self._drop(self._recorded.popitem(last=False)[1])
            if self.launch(key):
                return True
        run()
        if len(self._seen) == MAX_SEEN:
            self._seen.clear()
        self._seen.add(key)
        return False

    def clear(self) -> None:
        """Forget all recordings."""
        while self._recorded:
            self._drop(self._recorded.popitem()[1])
        self._seen.clear()

    def _record(self, run: Callable[[], None]) -> object | None:
        """The recording, or None where `run` does what cannot be recorded."""
        runtime, refusal = self._cuda.runtime, ""
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._cuda("cudaStreamBeginCapture", self._stream, mode)
        try:
            run()
        except EngineError as error:
            refusal = str(error)
        except BaseException:  # Ctrl-C: the stream must not go on recording
            self._cuda.unchecked("cudaStreamEndCapture", self._stream)
            raise
        try:
            graph = self._cuda("cudaStreamEndCapture", self._stream)
        except EngineError as error:
            self.refusal = refusal or str(error)
            self._cuda.unchecked("cudaGetLastError")  # it would be found by whoever asks next
            return None
        try:
            if not refusal:
                return self._cuda("cudaGraphInstantiate", graph, 0)
            self.refusal = refusal
            return None
        finally:
            self._cuda("cudaGraphDestroy", graph)

    def _drop(self, graph: object | None) -> None:
        if graph is not None:
            self._cuda("cudaStreamSynchronize", self._stream)
            self._cuda("cudaGraphExecDestroy", graph)
