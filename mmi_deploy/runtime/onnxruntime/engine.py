"""ONNX Runtime behind the `Engine` interface, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.buffers import HOST, Buffer
from mmi_deploy.runtime.engine import Engine
from mmi_deploy.runtime.onnxruntime.module import ort
from mmi_deploy.spec.graphs import Graph, Tensor
from mmi_deploy.system.memory import is_out_of_memory, out_of_memory


@dataclass(frozen=True)
class OnnxOptions:
    """threads: 0 lets ONNX Runtime choose. library: a file with kernels for our operators; without
    it the functions inside the model files are run."""

    threads: int = 0
    library: Path | None = None


class OnnxRuntimeEngine(Engine):
    """Binds buffers by address: nothing is copied on the way in or out, and the KV cache is written
    where it lies."""

    def __init__(self, path: Path, graph: Graph, options: OnnxOptions = OnnxOptions()) -> None:
        """Load `path`; raises `EngineError` when it cannot be loaded or is not `graph`."""
        super().__init__(graph, HOST)
        settings = _session_options(options)
        try:
            self._session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no narrower class
            if is_out_of_memory(error):
                raise out_of_memory(f"to load {path}") from None
            reason = str(error).splitlines()[0]
            raise EngineError(
                f"ONNX Runtime cannot load {path}: {reason}", fix="check it with `mmi verify`"
            ) from None
        check_interface(path, graph, self._session)
        self._binding = self._session.io_binding()
        # Where each tensor was bound, and no buffer: a document's memory goes with the document.
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}

    def _execute(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        for named, bind in (
            (inputs, self._binding.bind_input),
            (outputs, self._binding.bind_output),
        ):
            for name, buffer in named.items():
                # Binding costs microseconds a tensor, and most stay where they are from run to run.
                place = (buffer.pointer, buffer.shape)
                if self._bound.get(name) != place:
                    bind(name, "cpu", 0, buffer.dtype, buffer.shape, buffer.pointer)
                    self._bound[name] = place
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            self._bound.clear()
            if is_out_of_memory(error):
                raise out_of_memory(f"to run {self.graph.name}") from error
            raise EngineError(f"{self.graph.name} failed: {str(error).splitlines()[0]}") from error


def _session_options(options: OnnxOptions) -> ort.SessionOptions:
    session = ort.SessionOptions()
    session.intra_op_num_threads = options.threads
    session.log_severity_level = 4  # errors are raised, which is enough
    # It would keep a block of memory for each set of shapes, and documents never stop differing.
    session.enable_mem_pattern = False
    # An arena keeps the most that any document took, once for each engine and in pieces that fit no
    # other shapes. The system's allocator gives memory back, and a run takes as long.
    session.enable_cpu_mem_arena = False
    # Several engines take turns: one whose turn is over must not keep the cores busy.
    session.add_session_config_entry("session.force_spinning_stop", "1")
    if options.library is not None:
        register_library(session, options.library)
    return session


def register_library(session: ort.SessionOptions, library: Path) -> None:
    """Have a session take our kernels from `library`; `EngineError` where that cannot be loaded."""
    try:
        session.register_custom_ops_library(str(library))
    except Exception as error:  # as above
        reason = str(error).splitlines()[0]
        raise EngineError(
            f"ONNX Runtime cannot load the kernel library {library}: {reason}",
            fix="compile it again with `mmi plugins build onnxruntime`, or do without: "
            "--kernels none",
        ) from None


def check_library(library: Path) -> None:
    """Raise `EngineError` where ONNX Runtime cannot load the kernel library, before it is needed:
    it was made for another system, lies on a disk without execution, or is something else."""
    register_library(ort.SessionOptions(), library)


def check_interface(path: Path, graph: Graph, session: ort.InferenceSession) -> None:
    """Raise `EngineError` unless the file's inputs and outputs are those of the contract."""
    for kind, wanted, found in (
        ("inputs", graph.inputs, session.get_inputs()),
        ("outputs", graph.outputs, session.get_outputs()),
    ):
        expected = {tensor.name: tensor for tensor in wanted}
        got = {argument.name: argument for argument in found}
        if wrong := sorted(set(expected) ^ set(got)):
            raise EngineError(
                f"{path} is no {graph.name}: its {kind} differ in {', '.join(wrong)}",
                fix="write it again with `mmi export`",
            )
        for name, tensor in expected.items():
            if not _same(tensor, got[name]):
                raise EngineError(
                    f"{path} is no {graph.name}: {name} differs",
                    expected=f"{tensor.dtype} {tensor.shape}",
                    got=f"{got[name].type} {tuple(got[name].shape)}",
                    fix="write it again with `mmi export`",
                )


_ELEMENT = {"float32": "tensor(float)", "int64": "tensor(int64)", "int32": "tensor(int32)"}


def _same(tensor: Tensor, argument: ort.NodeArg) -> bool:
    """Type and rank agree, and so does every side that both know."""
    if argument.type != _ELEMENT[tensor.dtype] or len(argument.shape) != len(tensor.shape):
        return False
    pairs = zip(tensor.shape, argument.shape, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
