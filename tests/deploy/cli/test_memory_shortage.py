"""A lack of memory is one line that says so, whichever library meets it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import typer
from onnx import TensorProto, helper

from mmi_deploy.cli import program
from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions, OnnxRuntimeEngine
from mmi_deploy.runtime.onnxruntime.run_graph import runner
from mmi_deploy.spec.graphs import IR_VERSION, OPSET, Graph, Range, Tensor
from mmi_deploy.system.memory import is_out_of_memory

# More elements than any machine has memory for, even with overcommit.
BEYOND = 2**50

SUM = Graph(
    "sum",
    inputs=(Tensor("count", "int64", (1,)),),
    outputs=(Tensor("total", "float32", ()),),
    ranges={"b": Range(1, 1, 1)},
)


def sum_of_ones(path: Path) -> Path:
    """A graph that sums as many ones as it is told, which it writes down first."""
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("ConstantOfShape", ["count"], ["ones"], value=one),
        helper.make_node("ReduceSum", ["ones"], ["total"], keepdims=0),
    ]
    body = helper.make_graph(
        nodes,
        "sum",
        [helper.make_tensor_value_info("count", TensorProto.INT64, (1,))],
        [helper.make_tensor_value_info("total", TensorProto.FLOAT, ())],
    )
    opset = [helper.make_opsetid("", OPSET)]
    onnx.save(helper.make_model(body, opset_imports=opset, ir_version=IR_VERSION), path)
    return path


def in_onnx_runtime(path: Path) -> object:
    run = runner(sum_of_ones(path / "sum.onnx"), threads=1)
    return run({"count": np.array([BEYOND])})


SHORTAGES: dict[str, Callable[[Path], object]] = {
    "numpy": lambda _: np.zeros(BEYOND),
    "numpy, beyond all addresses": lambda _: np.zeros((BEYOND, BEYOND)),
    "numpy, beyond 64 bits": lambda _: np.zeros(2**63 + 5),
    "torch": lambda _: torch.empty(BEYOND),
    "torch, beyond 64 bits": lambda _: torch.empty(BEYOND, BEYOND),
    "ONNX Runtime": in_onnx_runtime,
    "Python": lambda _: bytes(BEYOND),
}


@pytest.mark.parametrize("library", SHORTAGES)
def test_a_command_that_gets_no_memory_says_so(
    library: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()
    app.command()(lambda: SHORTAGES[library](tmp_path))
    with pytest.raises(Exception) as caught:  # each library has its own
        SHORTAGES[library](tmp_path)
    assert is_out_of_memory(caught.value)
    assert program.run(app, "mmi", []) == 2
    said = capsys.readouterr().err
    assert said.startswith("mmi: there is not enough memory for this command; got ")
    assert "GB free" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        ValueError("cannot reshape array of size 3 into shape (2,)"),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("can't start new thread"),
        KeyError("memory"),
    ],
)
def test_other_errors_are_no_shortage(error: Exception) -> None:
    assert not is_out_of_memory(error)
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise error

    if not isinstance(error, OSError):
        with pytest.raises(type(error)):
            program.run(app, "mmi", [])


def test_an_engine_that_gets_no_memory_says_which_graph_it_ran(tmp_path: Path) -> None:
    engine = OnnxRuntimeEngine(sum_of_ones(tmp_path / "sum.onnx"), SUM, OnnxOptions(threads=1))
    assert engine.run({"count": np.array([7])})["total"].read() == 7
    with pytest.raises(EngineError, match="not enough memory to run sum; got .* GB free"):
        engine.run({"count": np.array([BEYOND])})
    assert engine.run({"count": np.array([7])})["total"].read() == 7


def test_a_graph_that_finds_no_memory_to_be_loaded_into_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's words, recorded under a limit of address space."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: "
            "std::bad_alloc"
        )

    path = sum_of_ones(tmp_path / "sum.onnx")
    monkeypatch.setattr(ort, "InferenceSession", refuse)
    loaders: list[Callable[[], object]] = [
        lambda: OnnxRuntimeEngine(path, SUM),
        lambda: runner(path),
    ]
    for load in loaders:
        with pytest.raises(EngineError, match="not enough memory to load .*sum.onnx") as caught:
            load()
        assert "verify" not in str(caught.value)
