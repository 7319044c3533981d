"""CUDA graphs of an engine's runs: one launch in place of one per kernel.

A recording fixes shapes and addresses; the contents of memory may change. Decode and denoising read
their small inputs (token, position, write index, step) from staging buffers at fixed addresses,
which copies on the same stream fill before each launch. So one recording serves all tokens or
steps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.device_memory import DeviceMemory

# Recordings kept per context; the least recently used one is destroyed.
MAX_RECORDINGS = 16

# Keys remembered as having run once, after which the set is cleared: those runs then need one more
# repetition before they are recorded.
MAX_SEEN = 1024


class CudaGraphs:
    """LRU cache of the recordings of one execution context.

    The key holds everything that the launched kernels depend on, except the contents of memory and
    the context's shapes and workspace. A change of these invalidates all recordings: call `clear`.

    The first run with a key is an ordinary one, the warm-up: TensorRT updates shapes and allocates
    in it, which must not be captured. The second is captured; later ones launch the recording.
    """

    def __init__(self, memory: DeviceMemory, capacity: int = MAX_RECORDINGS) -> None:
        self._cuda, self._stream, self._lock = memory.cuda, memory.stream, memory.lock
        self._capacity = capacity
        self._seen: set[Hashable] = set()
        self._recorded: OrderedDict[Hashable, object | None] = OrderedDict()
        # Reason why the last capture failed; that run is enqueued kernel by kernel each time.
        self.refusal = ""

    def launch(self, key: Hashable) -> bool:
        """Launch the recording of `key`; False if there is none."""
        graph = self._recorded.get(key)
        if graph is None:
            return False
        self._recorded.move_to_end(key)
        self._cuda("cudaGraphLaunch", graph, self._stream)
        return True

    def enqueue(self, key: Hashable, run: Callable[[], None], may_record: bool) -> bool:
        """Run for a key without a recording: capture `run` and launch the recording, or call it.

        Returns True if it was launched from a recording. Raises what `run` raises.
        """
        if may_record and key in self._seen and key not in self._recorded:
            # A failed capture is kept as None, so that it is not repeated at every run.
            with self._lock.recording():
                self._recorded[key] = self._record(run)
            if len(self._recorded) > self._capacity:
                self._destroy(self._recorded.popitem(last=False)[1])
            if self.launch(key):
                return True
        run()  # before the key is added: a run that raised was no warm-up
        if len(self._seen) == MAX_SEEN:
            self._seen.clear()
        self._seen.add(key)
        return False

    def clear(self) -> None:
        """Destroy all recordings."""
        while self._recorded:
            self._destroy(self._recorded.popitem()[1])
        self._seen.clear()

    def _record(self, run: Callable[[], None]) -> object | None:
        """Capture `run`; None if it does what cannot be captured."""
        runtime, refusal = self._cuda.runtime, ""
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        # Until EndCapture the stream executes nothing: calls on it are recorded. The capture must
        # end whatever happens in between, or every later call on the stream would fail.
        self._cuda("cudaStreamBeginCapture", self._stream, mode)
        try:
            run()
        except EngineError as error:
            refusal = str(error)
        except BaseException:  # Ctrl-C
            self._cuda.unchecked("cudaStreamEndCapture", self._stream)
            raise
        try:
            graph = self._cuda("cudaStreamEndCapture", self._stream)
        except EngineError as error:
            self.refusal = refusal or str(error)
            # CUDA keeps the error until it is read; the next caller would take it for its own.
            self._cuda.unchecked("cudaGetLastError")
            return None
        try:
            if not refusal:
                return self._cuda("cudaGraphInstantiate", graph, 0)
            self.refusal = refusal
            return None
        finally:
            self._cuda("cudaGraphDestroy", graph)  # the executable graph is independent of it

    def _destroy(self, graph: object | None) -> None:
        if graph is not None:
            self._cuda("cudaStreamSynchronize", self._stream)  # it may still be running
            self._cuda("cudaGraphExecDestroy", graph)
