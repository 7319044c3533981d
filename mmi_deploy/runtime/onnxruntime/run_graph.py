"""Run ONNX graphs on the CPU without a contract, for comparisons and measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from mmi_deploy.errors import EngineError
from mmi_deploy.system.memory import is_out_of_memory, out_of_memory

# All inputs of a graph by name -> all outputs by name.
Run = Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]


def runner(path: Path, threads: int = 0) -> Run:
    """Load an ONNX file; returns a function that runs it. threads: 0 for one per core. Raises
    `EngineError` if ONNX Runtime is missing or cannot load the file."""
    return _session(path, str(path), threads=threads)


def model_runner(model: ir.Model, folder: Path, outputs: Sequence[str] | None = None) -> Run:
    """Load a model in memory whose weights lie in `folder`; returns a function that runs it and
    returns all outputs, or only `outputs`."""
    return _session(
        ir.to_proto(model).SerializeToString(), str(model.graph.name), folder, outputs=outputs
    )


def _session(
    model: Path | bytes,
    what: str,
    folder: Path | None = None,
    threads: int = 0,
    outputs: Sequence[str] | None = None,
) -> Run:
    try:
        from mmi_deploy.runtime.onnxruntime.module import ort
    except ImportError:
        raise EngineError(
            "graphs are run by ONNX Runtime, which is not installed",
            fix="pip install 'mmi_deploy[cpu]'",
        ) from None
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    # Level 1 keeps the activations of quantised products in float32, as TensorRT does.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder.resolve())
        )
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no narrower class
        if is_out_of_memory(error):
            raise out_of_memory(f"to load {what}") from None
        reason = str(error).splitlines()[0]
        raise EngineError(f"ONNX Runtime cannot load {what}: {reason}") from None
    names = outputs or [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))
