"""ONNX Runtime engine on an NVIDIA GPU: buffers in device memory, our stream, CUDA graphs.

The CUDA provider computes; the CPU provider computes shapes beside it, which ONNX Runtime decides
when it loads a graph. Any other node on the CPU would cost two copies in every run, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.buffers import Array, Buffer
from mmi_deploy.runtime.device_memory import DeviceMemory
from mmi_deploy.runtime.engine import Engine
from mmi_deploy.runtime.onnxruntime.engine import (
    OnnxOptions,
    OnnxRuntimeEngine,
    open_session,
    session_options,
)
from mmi_deploy.runtime.onnxruntime.module import ort
from mmi_deploy.runtime.staging import Staging
from mmi_deploy.spec.graphs import Graph

PROVIDER = "CUDAExecutionProvider"

# Operators that ONNX Runtime places on the CPU where they compute shapes: their inputs and outputs
# are a few integers in host memory. So `session.disable_cpu_ep_fallback` would refuse every graph.
SHAPE_OPERATORS = frozenset(
    "Add Cast Concat ConstantOfShape Div Equal Gather LessOrEqual Max Min Mul Range ReduceProd "
    "Reshape Shape Size Slice Squeeze Sub Unsqueeze Where".split()
)

# Kernels load 16 bytes at once, from addresses that are multiples of them.
VECTOR = 16

# Recordings of one engine: a session keeps them until it ends. Further runs are not recorded.
MAX_RECORDINGS = 64

# Keys remembered as having run once, after which the set is cleared.
MAX_SEEN = 1024

# Rewrites of ONNX Runtime that undo ours (`mmi_deploy.targets.cuda_rewrites`): it would make one
# Split of the slices, which copies from the host.
_DISABLED = ("GatherSliceToSplitFusion",)

# Number of a run that is not recorded.
_PLAIN = -1


class CudaEngine(OnnxRuntimeEngine):
    """One graph in a session of the CUDA provider. Runs are asynchronous.

    The first run with some shapes and addresses is an ordinary one; the second is recorded as a
    CUDA graph, for which ONNX Runtime runs it up to three times, and later ones launch the
    recording. That is exact: no graph reads what it writes, and a KV cache gets the same tokens in
    the same slots again.
    """

    memory: DeviceMemory

    def __init__(
        self,
        path: Path,
        graph: Graph,
        options: OnnxOptions,
        memory: DeviceMemory,
        *,
        record: bool = True,
        may_copy: bool = False,
        module: Any = ort,
    ) -> None:
        """Load `path`. record: launch repeated runs as CUDA graphs. may_copy: accept a graph that
        copies between GPU and CPU, which cannot be recorded. module: `onnxruntime`.

        Raises `EngineError` if the file cannot be loaded, does not match `graph`, or has a node
        that the CUDA provider does not run.
        """
        Engine.__init__(self, graph, memory)
        self._lock = memory.lock  # of the stream: engines that share it must not interleave
        self._module, self._record, self._may_copy = module, record and not may_copy, may_copy
        self._staging = Staging(memory)
        self._in_place = frozenset(graph.in_place.values())
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, int] = {}
        self._run_options: dict[int, Any] = {}
        self.launches: int = 0
        settings = session_options(options)
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        with memory.lock:
            session = open_session(
                path,
                settings,
                [(PROVIDER, self._provider_options())],
                module,
                _DISABLED,
            )
        check_placement(session, path)
        self._open(path, session)

    def _provider_options(self) -> dict[str, str]:
        return {
            "device_id": str(self.memory.gpu.number),
            "user_compute_stream": str(self.memory.stream),
            # The default doubles its block each time, and keeps all of it.
            "arena_extend_strategy": "kSameAsRequested",
            # The default times all algorithms of a convolution at each new shape.
            "cudnn_conv_algo_search": "HEURISTIC",
            # TF32 has the ten bits of float16: float32 would only be a name.
            "use_tf32": "0",
            # A graph that copies between GPU and CPU is refused with it when it is loaded.
            "enable_cuda_graph": str(int(not self._may_copy)),
        }

    def close(self) -> None:
        """Unload the engine after its enqueued runs."""
        with self.memory.lock:
            self.memory.wait()
            self._session = self._binding = None
            self._bound.clear()
            self._staging.clear()

    def _to_buffer(self, name: str, array: Array) -> Buffer:
        return self._staging.write(name, array, overwritten=name in self._in_place)

    def _prepare(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        # Views of the caller's memory, made once: they show what is written between runs.
        arrays = {n: b.read() for n, b in inputs.items() if b.memory is not self.memory}

        def start() -> None:
            staged = {name: self._to_buffer(name, array) for name, array in arrays.items()}
            self._execute({**inputs, **staged}, outputs)

        return start

    def _execute(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        read = {name: self._readable(name, buffer) for name, buffer in inputs.items()}
        written = {
            name: read[self.graph.in_place[name]]
            if name in self.graph.in_place
            else self._writable(name, buffer)
            for name, buffer in outputs.items()
        }
        key = tuple([(name, b.pointer, b.shape) for name, b in sorted((read | written).items())])
        number, launched = self._recording(key)
        if not launched:  # a recording has its addresses
            self._bind(read, written, "cuda", self.memory.gpu.number)
        try:
            self._run(self._options(number))
        except EngineError as error:
            if launched or number == _PLAIN:
                raise
            # It could not be recorded: run it as it is, and record no more.
            del self._recorded[key]
            self._record, self.refusal = False, str(error)
            self._bind(read, written, "cuda", self.memory.gpu.number)
            self._run(self._options(_PLAIN))
        self.launches += launched
        for name, buffer in outputs.items():
            if written[name].pointer != buffer.pointer:
                self.memory.copy(written[name], buffer)

    def _recording(self, key: Hashable) -> tuple[int, bool]:
        """Number of the recording that a run with `key` launches or makes, and whether it was made
        before."""
        if key in self._recorded:
            return self._recorded[key], True
        if not self._record:
            return _PLAIN, False
        if key not in self._seen:
            if len(self._seen) == MAX_SEEN:
                self._seen.clear()
            self._seen.add(key)
            return _PLAIN, False
        if len(self._recorded) == MAX_RECORDINGS:
            self.refusal = f"it has {MAX_RECORDINGS} recordings, the most that one session keeps"
            return _PLAIN, False
        self._recorded[key] = len(self._recorded) + 1
        return self._recorded[key], False

    def _options(self, number: int) -> Any:
        """`RunOptions` of a run that is recorded, or launched, as `number`."""
        if number not in self._run_options:
            options = self._module.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(number))
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            self._run_options[number] = options
        return self._run_options[number]

    def _readable(self, name: str, buffer: Buffer) -> Buffer:
        if buffer.memory is not self.memory:
            return self._to_buffer(name, buffer.read())
        if buffer.pointer % VECTOR == 0:
            return buffer
        aligned = self._staging.reserve(name, buffer.shape, buffer.dtype)
        self.memory.copy(buffer, aligned)
        return aligned

    def _writable(self, name: str, buffer: Buffer) -> Buffer:
        if buffer.pointer % VECTOR == 0:
            return buffer
        return self._staging.reserve(name, buffer.shape, buffer.dtype)


def check_placement(session: Any, path: Path) -> None:
    """Raise `EngineError` for a session without the CUDA provider, and for the first node that runs
    on the CPU and computes no shape."""
    if PROVIDER not in session.get_providers():
        raise EngineError(
            "ONNX Runtime cannot start its CUDA provider, and would run on the CPU",
            fix='see its reason with `python -c "import onnxruntime as o; o.preload_dlls(); '
            f"o.InferenceSession('{path}', providers=['{PROVIDER}'])\"`",
        )
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name == PROVIDER:
            continue
        for node in part.get_nodes():
            if node.domain or node.op_type not in SHAPE_OPERATORS:
                name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
                raise EngineError(
                    f"ONNX Runtime's CUDA provider does not run the node {node.name!r} ({name}) of "
                    f"{path}",
                    fix="build the target again with `mmi build --target cuda`, and compile our "
                    "kernels with `mmi plugins build onnxruntime --cuda`",
                )
