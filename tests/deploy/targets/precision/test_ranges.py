"""Range check: measured ranges, tensors kept in float32, and the overflow that it prevents."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploy.targets.precision.graphs import attention, contract, hidden, product, write
from mmi_deploy.errors import BundleError, EngineError
from mmi_deploy.parity import PRECISION_TOLERANCES, Proof
from mmi_deploy.runtime.onnxruntime.run_graph import model_runner, runner
from mmi_deploy.spec.backends import TENSORRT
from mmi_deploy.spec.graphs import Graph, Tensor
from mmi_deploy.targets.precision import Ranges, measure_ranges, recipe, rewrite
from mmi_deploy.targets.precision.emulation import emulated
from mmi_deploy.targets.precision.rewrite import read_model
from mmi_deploy.targets.sample_inputs import Sample
from mmi_deploy.targets.verify_target import prove

# Factor on queries and keys that takes the logits beyond 65504.
OVERFLOWING = 500.0


def ranges_of(path: Path, graph: Graph, x: np.ndarray) -> Ranges:
    return measure_ranges(read_model(path, graph), path.parent, [{"x": x}])


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def test_peaks_are_the_greatest_magnitudes_of_all_runs(tmp_path: Path) -> None:
    path, graph, weight = product(tmp_path / "llm.onnx")
    runs = [noise(2, 64), 5 * noise(3, 64)]
    found = measure_ranges(read_model(path, graph), tmp_path, [{"x": x} for x in runs])
    normed = [x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) for x in runs]
    assert found.runs == 2
    assert found.peaks["x"] == pytest.approx(max(np.abs(x).max() for x in runs))
    products = [np.abs(n @ weight).max() for n in normed]
    assert found.peaks["product"] == pytest.approx(max(products), rel=1e-4)


def test_the_bound_of_attention_holds_and_is_near(tmp_path: Path) -> None:
    """No logit passes the scaled product of the longest query and the longest key."""
    path, graph = attention(tmp_path / "denoise_step.onnx", 1.0)
    x = noise(2, 48, 32)
    run = model_runner(_with_outputs(read_model(path, graph), "query", "key"), tmp_path)
    outputs = run({"x": x})
    true = np.abs(np.einsum("bhqd,bhkd->bhqk", outputs["query"], outputs["key"])).max()
    true *= outputs["query"].shape[-1] ** -0.5
    bound = ranges_of(path, graph, x).scaled_logits["attended"]
    assert true <= bound <= 4 * true


def _with_outputs(model: object, *names: str) -> object:
    for node in model.graph:  # type: ignore[attr-defined]
        for value in node.outputs:
            if value.name in names:
                model.graph.outputs.append(value)  # type: ignore[attr-defined]
    return model


def proof(tmp_path: Path, loudness: float, checked: bool) -> Proof:
    path, graph = attention(tmp_path / "denoise_step.onnx", loudness)
    x = noise(2, 48, 32)
    ranges = ranges_of(path, graph, x) if checked else None
    out = tmp_path / "out" / "denoise_step.onnx"
    out.parent.mkdir(exist_ok=True)
    rewrite(recipe("fp16"), graph, path, out, runtime=TENSORRT, ranges=ranges)
    return prove(recipe("fp16"), graph, path, out, TENSORRT, [Sample({"x": x}, True)])


def test_attention_that_overflows_float16_is_fixed_by_the_range_check(tmp_path: Path) -> None:
    """Logits beyond 65504 are what turns pictures of Stable Diffusion 2.1 black. Without the check
    the result is not finite; with it the attention computes in bfloat16."""
    assert proof(tmp_path, OVERFLOWING, checked=False).error == float("inf")
    fixed = proof(tmp_path, OVERFLOWING, checked=True)
    model = onnx.load(tmp_path / "out/denoise_step.onnx", load_external_data=False)
    kinds = {
        info.name: info.type.tensor_type.elem_type
        for info in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    assert {kinds[name] for name in node.input} == {TensorProto.BFLOAT16}
    assert kinds["query_flat"] == TensorProto.FLOAT16  # no more than needed
    assert fixed.error <= PRECISION_TOLERANCES["fp16"].relative


def test_attention_within_range_stays_in_float16(tmp_path: Path) -> None:
    checked = proof(tmp_path, 1.0, checked=True)
    first = onnx.load(tmp_path / "out/denoise_step.onnx", load_external_data=False)
    unchecked = proof(tmp_path, 1.0, checked=False)
    second = onnx.load(tmp_path / "out/denoise_step.onnx", load_external_data=False)
    assert first.graph.node == second.graph.node
    assert checked.error == unchecked.error <= PRECISION_TOLERANCES["fp16"].relative


def test_numbers_too_great_for_float16_are_made_and_read_in_float32(tmp_path: Path) -> None:
    """y = norm(1e6 x): the product and the norm that reads it are islands."""
    graph = contract([hidden("x", 16)], [hidden("y", 16)])
    nodes = [
        helper.make_node("MatMul", ["x", "large"], ["great"], name="product"),
        helper.make_node("RMSNormalization", ["great", "ones"], ["y"], name="norm"),
    ]
    weights = {
        "large": (np.eye(16) * 3e4).astype(np.float32),
        "ones": np.ones(16, np.float32),
    }
    path = write(tmp_path / "llm.onnx", nodes, weights, graph)
    x = 100 * noise(2, 16)
    sample = [Sample({"x": x}, True)]
    out = tmp_path / "out" / "llm.onnx"
    out.parent.mkdir()
    for ranges, finite in ((None, False), (ranges_of(path, graph, x), True)):
        rewrite(recipe("fp16"), graph, path, out, runtime=TENSORRT, ranges=ranges)
        error = prove(recipe("fp16"), graph, path, out, TENSORRT, sample).error
        assert np.isfinite(error) == finite
    assert error <= PRECISION_TOLERANCES["fp16"].relative


def test_a_contract_that_float16_cannot_keep_is_refused(tmp_path: Path) -> None:
    graph = contract([hidden("x", 16)], [hidden("y", 16)])
    nodes = [helper.make_node("Mul", ["x", "x"], ["y"], name="square")]
    path = write(tmp_path / "llm.onnx", nodes, {}, graph)
    ranges = ranges_of(path, graph, np.full((1, 16), 300, np.float32))
    with pytest.raises(
        BundleError, match="llm gives or takes numbers that float16 cannot hold in y.*bf16"
    ):
        rewrite(recipe("fp16"), graph, path, tmp_path / "o.onnx", runtime=TENSORRT, ranges=ranges)
    rewrite(recipe("bf16"), graph, path, tmp_path / "o.onnx", runtime=TENSORRT, ranges=ranges)


def test_ranges_are_kept_as_they_are(tmp_path: Path) -> None:
    ranges = Ranges({"a": 2.0, "b": float("inf")}, {"c": 1e5}, 3)
    ranges.save(tmp_path / "ranges.json")
    assert Ranges.load(tmp_path / "ranges.json") == ranges
    assert ranges.beyond(65504, 4) == {"b", "c"}
    for text in ("{", "[]", '{"peaks": {}}'):
        (tmp_path / "ranges.json").write_text(text)
        with pytest.raises(BundleError, match="holds no ranges"):
            Ranges.load(tmp_path / "ranges.json")


def test_ranges_need_inputs(tmp_path: Path) -> None:
    path, graph, _ = product(tmp_path / "llm.onnx")
    with pytest.raises(EngineError, match="llm has no inputs"):
        measure_ranges(read_model(path, graph), tmp_path, [])


@pytest.mark.parametrize(("name", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_emulation_rounds_after_every_operator(name: str, dtype: type, tmp_path: Path) -> None:
    """y = (x + x) * 1/3 with each of the three numbers in it rounded."""
    graph = contract([hidden("x", 32)], [hidden("y", 32)])
    nodes = [
        helper.make_node("Mul", ["x", "third"], ["scaled"], name="scale"),
        helper.make_node("Add", ["scaled", "x"], ["y"], name="sum"),
    ]
    third = np.full(32, 1 / 3, np.float32)
    path = write(tmp_path / "llm.onnx", nodes, {"third": third}, graph)
    rewrite(recipe(name), graph, path, tmp_path / "out.onnx", runtime=TENSORRT)
    x = noise(3, 32)
    got = model_runner(emulated(tmp_path / "out.onnx"), tmp_path)({"x": x})["y"]

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.astype(dtype).astype(np.float32)

    expected = rounded(rounded(rounded(x) * rounded(third)) + rounded(x))
    np.testing.assert_array_equal(got, expected)
    assert np.abs(got - runner(path)({"x": x})["y"]).max() > 0


def test_emulated_attention_is_attention_where_nothing_overflows(tmp_path: Path) -> None:
    """Four heads share two keys and values, and a mask hides some: against ONNX Runtime's own
    operator on numbers that float16 holds exactly."""
    tensors = [
        Tensor("query", "float32", ("b", 4, 3, 8), activation=True),
        Tensor("key", "float32", ("b", 2, 5, 8), activation=True),
        Tensor("value", "float32", ("b", 2, 5, 8), activation=True),
    ]
    graph = contract(tensors, [Tensor("y", "float32", ("b", 4, 3, 8), activation=True)])
    nodes = [helper.make_node("Attention", ["query", "key", "value", "mask"], ["y"], name="a")]
    mask = np.tril(np.ones((1, 1, 3, 5), bool), 2)
    path = write(tmp_path / "llm.onnx", nodes, {"mask": mask}, graph)
    rewrite(recipe("fp16"), graph, path, tmp_path / "out.onnx", runtime=TENSORRT)
    draw = np.random.default_rng(3)
    inputs = {
        tensor.name: draw.integers(-8, 9, tensor.resolve(b=2)).astype(np.float32) / 4
        for tensor in tensors
    }
    got = model_runner(emulated(tmp_path / "out.onnx", False), tmp_path)(inputs)["y"]
    expected = runner(path)(inputs)["y"].astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(got, expected, rtol=2.0**-10, atol=1e-6)
