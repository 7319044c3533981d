"""The kernel library in ONNX Runtime on the CPU, as an implementation under test."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from mmi_deploy.errors import MmiError
from mmi_deploy.spec.graphs import IR_VERSION, OPSET
from mmi_plugins.compile.launch_plan import device_arrays, widen
from mmi_plugins.onnxruntime import library
from mmi_plugins.operator import (
    DOMAIN,
    INDEX_INPUTS,
    INPUT_SHAPES,
    NAME,
    NARROW_INPUTS,
    VERSION,
    Call,
)
from mmi_plugins.reference import rows_of

# ONNX's element types.
_ELEMENTS = {"float32": 1, "int32": 6, "float16": 10, "bfloat16": 16}


def element_of(call: Call, name: str) -> int:
    """ONNX's element type of an input of the call, or of its `output`."""
    if name in INDEX_INPUTS:
        return _ELEMENTS["int32"]
    return _ELEMENTS[call.dtype if name in (*NARROW_INPUTS, "output") else "float32"]


def one_node_model(call: Call, function: Any = None) -> bytes:
    """ONNX model of one operator node with the call's shapes; `function`: its FunctionProto."""
    import onnx.helper as oh

    inputs = [
        oh.make_tensor_value_info(name, element_of(call, name), list(call[name].shape))
        for name in INPUT_SHAPES
    ]
    sizes = call.sizes
    shape = [sizes["b"], sizes["q"], sizes["h"] * sizes["d"]]
    output = oh.make_tensor_value_info("output", element_of(call, "output"), shape)
    node = oh.make_node(
        NAME,
        list(INPUT_SHAPES),
        ["output"],
        domain=DOMAIN,
        level_heights=call.level_heights,
        level_widths=call.level_widths,
        base_grid=call.base_grid,
        null_slot=int(call.null_slot),
    )
    model = oh.make_model(
        oh.make_graph([node], "one_node", inputs, [output]),
        functions=[] if function is None else [function],
        opset_imports=[oh.make_opsetid("", OPSET), oh.make_opsetid(DOMAIN, VERSION)],
        ir_version=IR_VERSION,
    )
    return bytes(model.SerializeToString())


def run_session(session: Any, call: Call) -> np.ndarray:
    """The output [b, q, h*d] of a session of `one_node_model(call)`, as float32."""
    from mmi_deploy.runtime.onnxruntime.module import ort

    binding = session.io_binding()
    for name, array in device_arrays(call).items():
        value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            np.ascontiguousarray(array), element_of(call, name)
        )
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("output")
    session.run_with_iobinding(binding)
    value = binding.get_outputs()[0]
    if call.dtype != "bfloat16":
        return np.asarray(value.numpy(), np.float32)
    # NumPy has no bfloat16: read the bits.
    pointer = ctypes.cast(value.data_ptr(), ctypes.POINTER(ctypes.c_uint16))
    return widen(np.ctypeslib.as_array(pointer, tuple(value.shape())), call.dtype)


class OnnxRuntimeKernel:
    """The library that `mmi_plugins.onnxruntime.library` compiles, or another one."""

    name = "onnxruntime"
    most_rows = None

    def __init__(self, library: Path | None = None, threads: int = 2) -> None:
        self._library, self._threads = library, threads

    @property
    def library(self) -> Path:
        """The library; call `missing()` first."""
        assert self._library is not None, "call missing() first"
        return self._library

    def missing(self) -> str | None:
        """Reason why it cannot run here, or None. Compiles the library if there is none yet."""
        try:
            import onnx  # noqa: F401

            import mmi_deploy.runtime.onnxruntime.module  # noqa: F401
        except ImportError as error:
            return f"{error.name} is not installed"
        if self._library is None:
            try:
                self._library = library.find() or library.build()
            except MmiError as error:
                return str(error)
        return None

    def run(self, call: Call, rows: np.ndarray) -> np.ndarray:
        """Outputs [rows, d] of `rows` (b, q, h), [rows, 3]; all rows are computed."""
        from mmi_deploy.runtime.onnxruntime.module import ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 4
        options.register_custom_ops_library(str(self._library))
        session = ort.InferenceSession(
            one_node_model(call), options, providers=["CPUExecutionProvider"]
        )
        return rows_of(run_session(session, call), call, rows)


ONNXRUNTIME = OnnxRuntimeKernel()
