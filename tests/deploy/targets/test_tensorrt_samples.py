"""GridSample for TensorRT: gathers give the results of NumPy, PyTorch and ONNX Runtime; remaining
nodes are checked in the parsed network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from mmi_deploy.errors import BundleError, EngineError
from mmi_deploy.targets.tensorrt_build import check_samples
from mmi_deploy.targets.tensorrt_rewrites import rewrite_for_tensorrt

IMAGE, GRID = ["n", 3, 5, 7], ["n", 4, 6, 2]


def sampling(
    image: list[Any] = IMAGE, grid: list[Any] = GRID, dtype: int = TensorProto.FLOAT, **given: Any
) -> onnx.ModelProto:
    """One GridSample between casts, so that its shapes and types are inferred; twice its result."""
    nodes = [
        helper.make_node("Cast", ["image"], ["typed"], to=dtype),
        helper.make_node("GridSample", ["typed", "grid"], ["sampled"], name="one", **given),
        helper.make_node("Cast", ["sampled"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["wide", "wide"], ["twice"]),
    ]
    shapes = {"image": image, "grid": grid}
    inputs = [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in shapes.items()]
    result = helper.make_tensor_value_info("twice", TensorProto.FLOAT, list("abcd"))
    graph = helper.make_graph(nodes, "sampling", inputs, [result])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def inputs(count: int = 2) -> dict[str, np.ndarray]:
    """Locations within, beyond, far beyond, on the very edges and on the centres of cells."""
    draw = np.random.default_rng(0)
    grid = draw.uniform(-1.6, 1.6, (count, 4, 6, 2)).astype(np.float32)
    grid[0, 0, :, 0] = [-1, 1, 0, -1 + 1 / 7, 1 - 1 / 7, 300]
    grid[0, 0, :, 1] = [-1, 1, 0, -1 + 1 / 5, 1 - 1 / 5, -1e4]
    return {"image": draw.standard_normal((count, 3, 5, 7)).astype(np.float32), "grid": grid}


def run(model: onnx.ModelProto, given: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    result: np.ndarray = session.run(None, given)[0]
    return result


@pytest.mark.parametrize("mode", [{}, {"mode": "linear"}])
@pytest.mark.parametrize("aligned", [0, 1])
@pytest.mark.parametrize("grid", [GRID, ["n", "p", 6, 2], ["n", 4, "q", 2]])
def test_a_bilinear_sample_is_gathered(
    mode: dict[str, str], aligned: int, grid: list[Any], tmp_path: Path
) -> None:
    model = sampling(grid=grid, align_corners=aligned, padding_mode="zeros", **mode)
    new = rewrite_for_tensorrt(model, tmp_path / "x.onnx")
    onnx.checker.check_model(new, full_check=True)
    kinds = [node.op_type for node in new.graph.node]
    assert "GridSample" not in kinds and kinds.count("GatherND") == 1
    given = inputs()
    theirs = torch.nn.functional.grid_sample(
        *(torch.from_numpy(given[name]) for name in ("image", "grid")), align_corners=bool(aligned)
    )
    np.testing.assert_allclose(run(new, given), 2 * theirs.numpy(), rtol=1e-5, atol=1e-5)


def test_locations_stay_float32_where_the_image_is_float16(tmp_path: Path) -> None:
    """Rounded to float16 only as the image is, and at the end."""
    new = rewrite_for_tensorrt(
        sampling(dtype=TensorProto.FLOAT16, mode="linear"), tmp_path / "x.onnx"
    )
    given = inputs()
    narrow = given["image"].astype(np.float16).astype(np.float32)
    expected = torch.nn.functional.grid_sample(
        torch.from_numpy(narrow), torch.from_numpy(given["grid"]), align_corners=False
    ).numpy()
    got = run(new, given)
    np.testing.assert_array_equal(got, got.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(got, 2 * expected, rtol=2**-9, atol=1e-3)


def test_two_samples_of_one_image_do_not_meet(tmp_path: Path) -> None:
    model = sampling(mode="linear")
    second = onnx.NodeProto.FromString(model.graph.node[1].SerializeToString())
    second.name, second.output[0] = "two", "again"
    model.graph.node.insert(2, second)
    model.graph.node[-1].input[1] = "again"
    given = inputs()
    np.testing.assert_allclose(
        run(rewrite_for_tensorrt(model, tmp_path / "x.onnx"), given),
        run(model, given),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"padding_mode": "border"},
        {"image": ["n", 3, 5, "w"]},
        {"image": ["n", "c", 5, 7]},
        {"grid": ["n", "p", "q", 2]},
    ],
)
def test_what_cannot_be_gathered_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="GridSample one cannot be computed by gathers"):
        rewrite_for_tensorrt(sampling(mode="linear", **changed), tmp_path / "x.onnx")


def test_other_modes_stay(tmp_path: Path) -> None:
    for mode in ("nearest", "cubic"):
        model = sampling(mode=mode)
        assert rewrite_for_tensorrt(model, tmp_path / "x.onnx") == model


class Layer(SimpleNamespace):
    """A layer as a network gives it: its type and no more, until it is cast."""


class GridSampleLayer(Layer):
    interpolation_mode = property(lambda self: SimpleNamespace(name=self.held[0]))
    sample_mode = property(lambda self: SimpleNamespace(name=self.held[1]))
    align_corners = property(lambda self: self.held[2])


TENSORRT = SimpleNamespace(IGridSampleLayer=GridSampleLayer)


def network(*held: tuple[str, str, bool]) -> Any:
    """A parsed network with one layer of another type and a GRID_SAMPLE for each of `held`."""
    layers = [Layer(type=SimpleNamespace(name="CAST"))]
    layers += [Layer(type=SimpleNamespace(name="GRID_SAMPLE"), held=one) for one in held]
    return SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ({"mode": "linear"}, ("LINEAR", "FILL", False)),
        ({}, ("LINEAR", "FILL", False)),
        ({"mode": "cubic", "padding_mode": "border"}, ("CUBIC", "CLAMP", False)),
        ({"mode": "nearest", "align_corners": 1}, ("NEAREST", "FILL", True)),
        ({"mode": "linear", "padding_mode": "reflection"}, ("LINEAR", "REFLECT", False)),
    ],
)
def test_a_layer_must_sample_as_its_node_says(
    given: dict[str, Any], right: tuple[str, str, bool]
) -> None:
    model = sampling(**given)
    check_samples(TENSORRT, network(right), model)
    for wrong in (
        [("NEAREST" if right[0] != "NEAREST" else "LINEAR", *right[1:])],
        [(right[0], "WRAP", right[2])],
        [(*right[:2], not right[2])],
        [],
        [right, right],
    ):
        with pytest.raises(EngineError, match="TensorRT misreads GridSample; expected 1 "):
            check_samples(TENSORRT, network(*wrong), model)


def test_a_sample_that_no_node_asks_for_is_refused() -> None:
    model = sampling()
    del model.graph.node[1]
    check_samples(TENSORRT, network(), model)
    with pytest.raises(EngineError, match="expected no GRID_SAMPLE layer; got 1 NEAREST FILL"):
        check_samples(TENSORRT, network(("NEAREST", "FILL", False)), model)
