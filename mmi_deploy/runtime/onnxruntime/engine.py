"""ONNX Runtime engine: a graph with buffers bound by address, on the CPU by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.buffers import HOST, Buffer
from mmi_deploy.runtime.engine import Engine
from mmi_deploy.runtime.onnxruntime.module import ort
from mmi_deploy.spec.graphs import Graph, Tensor
from mmi_deploy.system.memory import is_out_of_memory, out_of_memory


@dataclass(frozen=True)
class OnnxOptions:
    """Options of an ONNX Runtime session.

    threads: CPU threads; 0 lets ONNX Runtime choose. library: kernel library for our operators;
    None runs the ONNX functions inside the model files.
    """

    threads: int = 0
    library: Path | None = None


class OnnxRuntimeEngine(Engine):
    """One graph in an ONNX Runtime session.

    Buffers are bound by address (I/O binding): inputs and outputs are not copied, and the KV cache
    is updated in place.
    """

    def __init__(self, path: Path, graph: Graph, options: OnnxOptions = OnnxOptions()) -> None:
        """Load `path`; raises `EngineError` if it cannot be loaded or does not match `graph`."""
        super().__init__(graph, HOST)
        self._open(path, open_session(path, session_options(options)))

    def _open(self, path: Path, session: Any) -> None:
        check_interface(path, self.graph, session)
        self._session, self._binding = session, session.io_binding()
        # Address and shape that each tensor is bound to. Not the buffer: a reference would keep the
        # memory of a document alive after its session.
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}

    def _execute(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        self._bind(inputs, outputs, "cpu", 0)
        self._run()

    def _bind(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        device: str,
        number: int,
    ) -> None:
        """Bind the addresses that changed. device, number: where they are, as `("cuda", 0)`."""
        for named, bind in (
            (inputs, self._binding.bind_input),
            (outputs, self._binding.bind_output),
        ):
            for name, buffer in named.items():
                # Binding costs microseconds per tensor, and most addresses repeat from run to run.
                place = (buffer.pointer, buffer.shape)
                if self._bound.get(name) != place:
                    bind(name, device, number, buffer.dtype, buffer.shape, buffer.pointer)
                    self._bound[name] = place

    def _run(self, options: Any = None) -> None:
        """Run on the bound buffers. options: `RunOptions`. Raises `EngineError`."""
        try:
            self._session.run_with_iobinding(self._binding, options)
        except Exception as error:
            self._bound.clear()  # bind everything again: the state of the binding is unknown
            if is_out_of_memory(error):
                raise out_of_memory(f"to run {self.graph.name}") from error
            raise EngineError(f"{self.graph.name} failed: {str(error).splitlines()[0]}") from error


def open_session(
    model: Path,
    settings: Any,
    providers: Sequence[object] = ("CPUExecutionProvider",),
    module: Any = ort,
    disabled_optimizers: Sequence[str] = (),
) -> Any:
    """Load an ONNX file with ONNX Runtime's `SessionOptions` and providers, the first one first.

    module: the Python module `onnxruntime`. disabled_optimizers: names of its graph rewrites to
    leave out. Raises `EngineError`, with a fix for a lack of memory.
    """
    try:
        # ONNX Runtime must not open the file once more with other providers.
        return module.InferenceSession(
            model,
            settings,
            providers=[*providers],
            enable_fallback=0,
            disabled_optimizers=[*disabled_optimizers],
        )
    except Exception as error:  # ONNX Runtime's exceptions share no narrower class
        if is_out_of_memory(error):
            raise out_of_memory(f"to load {model}") from None
        reason = str(error).splitlines()[0]
        raise EngineError(
            f"ONNX Runtime cannot load {model}: {reason}", fix="check it with `mmi verify`"
        ) from None


def session_options(options: OnnxOptions) -> Any:
    """ONNX Runtime's `SessionOptions` of an engine. Raises `EngineError` for a kernel library that
    cannot be loaded."""
    session = ort.SessionOptions()
    session.intra_op_num_threads = options.threads
    session.log_severity_level = 4  # errors are raised as exceptions
    # The memory pattern keeps a plan for each set of shapes, and every document adds new ones.
    session.enable_mem_pattern = False
    # An arena keeps the peak of all documents, per engine and in blocks that fit no other shapes.
    # The system's allocator returns memory, at the same latency.
    session.enable_cpu_mem_arena = False
    # Engines run one after another: idle threads of one must not spin while another runs.
    session.add_session_config_entry("session.force_spinning_stop", "1")
    if options.library is not None:
        register_library(session, options.library)
    return session


def register_library(session: ort.SessionOptions, library: Path) -> None:
    """Register the kernels of `library` with a session; raises `EngineError` if that fails."""
    try:
        session.register_custom_ops_library(str(library))
    except Exception as error:  # as above
        reason = str(error).splitlines()[0]
        raise EngineError(
            f"ONNX Runtime cannot load the kernel library {library}: {reason}",
            fix="compile it again with `mmi plugins build onnxruntime`, or run without kernels: "
            "--kernels none",
        ) from None


def check_library(library: Path) -> None:
    """Raise `EngineError` if ONNX Runtime cannot load the kernel library: it was built for another
    system, lies on a file system mounted noexec, or is another file."""
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
                f"{path} is not a {graph.name} graph: its {kind} differ in {', '.join(wrong)}",
                fix="write it again with `mmi export`",
            )
        for name, tensor in expected.items():
            if not _same(tensor, got[name]):
                raise EngineError(
                    f"{path} is not a {graph.name} graph: {name} differs",
                    expected=f"{tensor.dtype} {tensor.shape}",
                    got=f"{got[name].type} {tuple(got[name].shape)}",
                    fix="write it again with `mmi export`",
                )


# dtype of the contract -> type name in ONNX Runtime.
_ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
}


def _same(tensor: Tensor, argument: ort.NodeArg) -> bool:
    """Test that types and ranks are equal, and all dimensions that are fixed in both."""
    if argument.type != _ORT_TYPES[tensor.dtype] or len(argument.shape) != len(tensor.shape):
        return False
    pairs = zip(tensor.shape, argument.shape, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
