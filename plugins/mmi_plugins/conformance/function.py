"""The model-local ONNX function in ONNX Runtime, as an implementation under test."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from mmi_plugins.conformance.onnxruntime_kernel import one_node_model, run_session
from mmi_plugins.operator import Call
from mmi_plugins.reference import rows_of


@dataclass(frozen=True)
class Function:
    """One operator node with its function, on the CPU.

    `most_gathered`: points times channels up to which the function gathers corners and does not use
    GridSample; None: as in exported files.
    """

    name: str = "function"
    most_rows: int | None = None
    most_gathered: int | None = None

    def missing(self) -> str | None:
        """Reason why it cannot run here, or None."""
        absent = [name for name in ("onnx", "onnx_ir", "onnxruntime") if not find_spec(name)]
        if absent:
            return f"{', '.join(absent)} not installed: pip install 'mmi_deploy[cpu,export]'"
        return None

    def run(self, call: Call, rows: np.ndarray) -> np.ndarray:
        """Outputs [rows, d] of `rows` (b, q, h), [rows, 3]."""
        from mmi_deploy.runtime.onnxruntime.module import ort
        from mmi_plugins.onnx_function import MAX_GATHERED, mmfs_function

        most = MAX_GATHERED if self.most_gathered is None else self.most_gathered
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(
            one_node_model(call, mmfs_function(call.sizes["l"], most)),
            options,
            providers=["CPUExecutionProvider"],
        )
        return rows_of(run_session(session, call), call, rows)


FUNCTION = Function()
