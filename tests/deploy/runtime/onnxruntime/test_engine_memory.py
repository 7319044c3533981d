"""Memory of ONNX Runtime's engines: what a document took is given back, however many there were."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from mmi_deploy.runtime.buffers import HOST
from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions, OnnxRuntimeEngine
from mmi_deploy.spec.graphs import IR_VERSION, OPSET, Graph, Range, Tensor
from mmi_deploy.system.process_memory import memory_bytes

WIDE = 2048

# Between x [n, 1] and y [n, 1] lie tensors [n, WIDE], as between one and the next of a prefill.
WIDENS = Graph(
    "widens",
    inputs=(Tensor("x", "float32", ("n", 1)),),
    outputs=(Tensor("y", "float32", ("n", 1)),),
    ranges={"n": Range(1, 1, 2**16)},
)

# Bytes that may stay allocated after runs that took ten times as much.
MOST_KEPT = 60e6


def onnx_file(path: Path) -> Path:
    """y = sum over WIDE columns of (2 x) ** 2."""
    nodes = [
        helper.make_node("MatMul", ["x", "row"], ["wide"]),
        helper.make_node("Mul", ["wide", "wide"], ["square"]),
        helper.make_node("ReduceSum", ["square", "axes"], ["y"], keepdims=1),
    ]
    values = [
        helper.make_tensor("row", TensorProto.FLOAT, [1, WIDE], [2.0] * WIDE),
        helper.make_tensor("axes", TensorProto.INT64, [1], [1]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1]) for name in "xy")
    body = helper.make_graph(nodes, WIDENS.name, [x], [y], values)
    opsets = [helper.make_opsetid("", OPSET)]
    onnx.save(helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION), path)
    return path


def memory_after_documents() -> None:
    """In a process of its own: several engines take runs of ever other sizes; prints by how many
    bytes the process has grown since each had its first, small run."""
    path = Path(sys.argv[1])
    engines = [OnnxRuntimeEngine(path, WIDENS, OnnxOptions(threads=1)) for _ in range(3)]

    def run(count: int) -> None:
        x = np.full((count, 1), 0.5, np.float32)
        for engine in engines:
            assert (engine.run({"x": x})["y"].read() == WIDE).all()

    run(1)
    before = memory_bytes()
    for count in (9_000, 20_000, 11_000, 24_000, 15_000, 22_000, 7_000, 24_000):  # 200 MB a tensor
        run(count)
    run(1)
    print(memory_bytes() - before)


def test_engines_give_back_what_a_run_took(tmp_path: Path) -> None:
    program = (
        "from deploy.runtime.onnxruntime.test_engine_memory import memory_after_documents as f; f()"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, str(onnx_file(tmp_path / "widens.onnx"))],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
        check=False,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < MOST_KEPT


def test_an_engine_keeps_no_buffer_of_a_document_that_ended(tmp_path: Path) -> None:
    """Not its inputs, not its outputs, and the next document is read from where it lies."""
    engine = OnnxRuntimeEngine(onnx_file(tmp_path / "widens.onnx"), WIDENS, OnnxOptions(threads=1))
    for value in (0.5, 1.5, 2.5):
        x, y = (HOST.allocate((40, 1), np.float32) for _ in "xy")
        x.write(np.full((40, 1), value, np.float32))
        engine.run({"x": x}, {"y": y})
        np.testing.assert_allclose(y.read(), WIDE * (2 * value) ** 2)
        ended = [weakref.ref(x.owner), weakref.ref(y.owner)]
        del x, y
        assert [owner() for owner in ended] == [None, None]
