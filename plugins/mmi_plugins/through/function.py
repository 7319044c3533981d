"""Cases through the model-local ONNX function: what a runtime without our kernels computes."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from mmi_plugins.operator import DOMAIN, INDEX_INPUTS, INPUT_SHAPES, NAME, NARROW_INPUTS, Call
from mmi_plugins.operator import VERSION as OPERATOR_VERSION

_OUTPUT = "output"


@dataclass(frozen=True)
class Function:
    """One node of the operator and its function in ONNX Runtime on the CPU.

    `most_gathered`: points times channels up to which the function gathers corners instead of using
    GridSample; None: as in exported files.
    """

    name: str = "function"
    most_rows: int | None = None
    most_gathered: int | None = None

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if not find_spec("mmi_export"):
            return "the package mmi_export, which has the function, is not installed"
        absent = [name for name in ("onnx", "onnx_ir", "onnxruntime") if not find_spec(name)]
        if absent:
            return f"{', '.join(absent)} not installed: pip install 'mmi_deploy[cpu,export]'"
        return None

    def refuses(self, call: Call) -> str | None:
        """Why it does not take `call`, or None: it takes all."""
        return None

    def run(self, call: Call, rows: np.ndarray) -> np.ndarray:
        """Outputs [k, d] of `rows` [k, 3], each a (b, q, h)."""
        import onnxruntime as ort

        model = self._model(call)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        feeds = {
            name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
                _stored(call[name], dtype := _dtype(call, name)), _onnx_type(dtype)
            )
            for name in INPUT_SHAPES
        }
        (output,) = session.run_with_ort_values([_OUTPUT], feeds)
        b, q, h = rows.T
        return output.numpy().reshape(*(call.sizes[x] for x in "bqhd"))[b, q, h]

    def _model(self, call: Call) -> Any:
        """An `onnx.ModelProto`: the node, in fp32 out whatever T is, and its function."""
        import onnx
        import onnx.helper as oh

        from mmi_deploy.graphs import IR_VERSION, OPSET
        from mmi_export.mmfs_function import MOST_GATHERED, mmfs_function

        inputs = [
            oh.make_tensor_value_info(name, _onnx_type(_dtype(call, name)), call[name].shape)
            for name in INPUT_SHAPES
        ]
        attributes = {
            "level_heights": list(call.level_heights),
            "level_widths": list(call.level_widths),
            "base_grid": call.base_grid,
            "null_slot": int(call.null_slot),
        }
        node = oh.make_node(NAME, list(INPUT_SHAPES), ["own"], domain=DOMAIN, **attributes)
        widened = oh.make_node("Cast", ["own"], [_OUTPUT], to=onnx.TensorProto.FLOAT)
        output = oh.make_tensor_value_info(_OUTPUT, onnx.TensorProto.FLOAT, [None, None, None])
        most = MOST_GATHERED if self.most_gathered is None else self.most_gathered
        return oh.make_model(
            oh.make_graph([node, widened], "one_node", inputs, [output]),
            functions=[mmfs_function(call.sizes["l"], most)],
            opset_imports=[oh.make_opsetid("", OPSET), oh.make_opsetid(DOMAIN, OPERATOR_VERSION)],
            ir_version=IR_VERSION,
        )


def _dtype(call: Call, name: str) -> str:
    """The type that the operator takes an input in."""
    if name in INDEX_INPUTS:
        return "int32"
    return call.dtype if name in NARROW_INPUTS else "float32"


def _onnx_type(dtype: str) -> int:
    import onnx

    names = {"int32": "INT32", "float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
    return onnx.TensorProto.DataType.Value(names[dtype])


def _stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """The bits of `array`, which is already rounded to `dtype`; bfloat16 as uint16."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(array, dtype)


FUNCTION = Function()
