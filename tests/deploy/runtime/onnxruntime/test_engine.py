"""Engines: the contract is checked, buffers are used where they lie, caches are in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploy.runtime.fake_model import fake_runtime
from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.buffers import HOST
from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions, OnnxRuntimeEngine
from mmi_deploy.spec.graphs import IR_VERSION, OPSET, Graph, Range, Tensor

SLOTS = 5
# A small graph with every feature: an in-place cache, a scalar, a product dimension, an index.
CACHE = Graph(
    "cache",
    inputs=(
        Tensor("new", "float32", ("b", 2, "t", 3)),
        Tensor("write_index", "int64", ("b",), below=SLOTS),
        Tensor("scale", "float32", ()),
        Tensor("pair", "float32", ("2*b", 1)),
        Tensor("past", "float32", ("b", 2, SLOTS, 3)),
    ),
    outputs=(
        Tensor("total", "float32", ("b", 2, 3)),
        Tensor("present", "float32", ("b", 2, SLOTS, 3)),
    ),
    ranges={"b": Range(1, 1, 2), "t": Range(1, 1, SLOTS)},
    in_place={"present": "past"},
)

_ELEMENT = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def onnx_file(path: Path, graph: Graph = CACHE) -> Path:
    """TensorScatter into the cache, then scale * sum over its slots."""
    nodes = [
        helper.make_node("TensorScatter", ["past", "new", "write_index"], ["present"], axis=2),
        helper.make_node("ReduceSum", ["present", "axes"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["pair"], ["added"], keepdims=0),
        helper.make_node("Mul", ["sum", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "added"], ["total"]),
    ]

    def described(tensors: tuple[Tensor, ...]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(t.name, _ELEMENT[t.dtype], t.shape) for t in tensors]

    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [2])
    body = helper.make_graph(
        nodes, graph.name, described(graph.inputs), described(graph.outputs), [axes]
    )
    model = helper.make_model(
        body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntimeEngine:
    path = onnx_file(tmp_path_factory.mktemp("onnx") / "cache.onnx")
    return OnnxRuntimeEngine(path, CACHE, OnnxOptions(threads=1))


def inputs(batch: int = 1, count: int = 1, at: int = 0) -> dict:
    generator = np.random.default_rng(batch + count)
    return {
        "new": generator.standard_normal((batch, 2, count, 3)).astype(np.float32),
        "write_index": np.full(batch, at, np.int64),
        "scale": np.array(0.5, np.float32),
        "pair": np.ones((2 * batch, 1), np.float32),
        "past": HOST.allocate((batch, 2, SLOTS, 3), np.float32),
    }


def test_a_cache_is_written_where_it_lies(engine: OnnxRuntimeEngine) -> None:
    """Run after run at one address, with batch 1 and 2; nothing else of the cache changes."""
    for batch in (1, 2):
        past = HOST.allocate((batch, 2, SLOTS, 3), np.float32)
        expected = np.zeros((batch, 2, SLOTS, 3), np.float32)
        for at, count in ((0, 2), (2, 1), (3, 1)):
            given = {**inputs(batch, count, at), "past": past}
            out = engine.run(given)
            expected[:, :, at : at + count] = given["new"]
            assert list(out) == ["total"]
            np.testing.assert_array_equal(past.read(), expected)
            total = 0.5 * expected.sum(axis=2) + 2 * batch
            np.testing.assert_allclose(out["total"].read(), total, rtol=1e-6)


def test_outputs_go_where_the_caller_says(engine: OnnxRuntimeEngine) -> None:
    """Also to rows in the midst of a larger buffer, and to new buffers otherwise."""
    store = HOST.allocate((4, 2, 3), np.float32)
    given = inputs()
    out = engine.run(given, {"total": store.rows(2, 3)})
    assert out["total"].pointer == store.pointer + 2 * 24
    assert store.read()[2].any() and not store.read()[[0, 1, 3]].any()
    first, second = engine.run(given)["total"], engine.run(given)["total"]
    assert first.pointer != second.pointer
    np.testing.assert_array_equal(first.read(), second.read())


def test_inputs_are_read_where_they_lie(engine: OnnxRuntimeEngine) -> None:
    """An array that is changed in place between runs is seen with its new contents."""
    given = inputs()
    before = engine.run(given)["total"].read().copy()
    given["pair"][...] = 4
    np.testing.assert_allclose(engine.run(given)["total"].read(), before + 6, rtol=1e-6)


def test_few_combinations_of_shapes_are_remembered(
    engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmi_deploy.runtime.engine.MAX_SHAPES", 2)
    engine._known_shapes.clear()
    for batch, count in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 1), (1, 1)):
        assert engine.run(inputs(batch, count))["total"].shape == (batch, 2, 3)
        assert len(engine._known_shapes) <= 2


def test_a_pool_that_grows_at_one_address_is_seen_whole(engine: OnnxRuntimeEngine) -> None:
    pool = HOST.from_array(np.array([[1], [2], [4], [8]], np.float32))
    past = HOST.allocate((2, 2, SLOTS, 3), np.float32)
    for batch, expected in ((1, 3), (2, 15), (1, 3)):
        given = {**inputs(batch), "past": past.rows(0, batch), "pair": pool.rows(0, 2 * batch)}
        given["scale"] = np.zeros((), np.float32)
        assert (engine.run(given)["total"].read() == expected).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new": np.zeros((1, 2, 1, 4), np.float32)}, r"new does not fit; expected float32"),
        ({"new": np.zeros((1, 2, 1, 3))}, r"got float64 \(1, 2, 1, 3\)"),
        ({"new": np.zeros((2, 3), np.float32)}, r"new does not fit"),
        (
            {"pair": np.zeros((3, 1), np.float32)},
            r"pair does not fit; expected float32 \(2\*b, 1\)",
        ),
        ({"pair": np.zeros((4, 1), np.float32)}, r"pair does not fit"),
        ({"write_index": np.zeros(2, np.int64)}, r"write_index does not fit; expected int64 \(1\)"),
        (
            {"write_index": np.array([5])},
            r"write_index is out of range; expected 0 to 4; got 5 to 5",
        ),
        ({"write_index": np.array([-1])}, r"write_index is out of range"),
        ({"new": np.zeros((1, 2, 6, 3), np.float32)}, r"dimension t is out of range; .* got 6"),
        ({"surplus": np.zeros(1)}, r"cache has no input surplus"),
    ],
)
def test_what_does_not_fit_the_contract_is_refused(
    engine: OnnxRuntimeEngine, changes: dict, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        engine.run({**inputs(), **changes})


def test_a_missing_input_or_a_wrong_output_buffer_is_refused(engine: OnnxRuntimeEngine) -> None:
    given = inputs()
    with pytest.raises(EngineError, match="the buffer for total does not fit"):
        engine.run(given, {"total": HOST.allocate((1, 2, 4), np.float32)})
    del given["scale"]
    with pytest.raises(EngineError, match="cache lacks the input scale"):
        engine.run(given)


def test_slots_and_positions_out_of_range_are_refused() -> None:
    """system.md section 3: the kernels count them as hidden, the runtime refuses them."""
    runtime, _ = fake_runtime()
    graph, engine = runtime.graphs["llm"], runtime.engine("llm")
    sizes = {"b": 1, "t": 2, "w": 1, "v": 1, "n": 3, "m": 1}
    good = {t.name: np.zeros(t.resolve(**sizes), t.dtype) for t in graph.inputs}
    engine.run(good)
    images = runtime.config.llm_mmfs.images
    for name, wrong in (
        ("image_slot", 3),
        ("image_slot", -1),
        ("image_position", images),
        ("image_position", -1),
        ("visual_index", 1),
        ("visual_index", -2),
        ("logit_index", 2),
        ("token_ids", runtime.config.llama.vocab),
        ("write_index", runtime.limits.context),
        ("position", runtime.limits.context),
    ):
        bad = {**good, name: np.full_like(good[name], wrong)}
        with pytest.raises(EngineError, match=f"llm: {name} is out of range"):
            engine.run(bad)


def test_a_file_that_is_not_the_graph_is_refused(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "cache.onnx")
    renamed = Graph("cache", (*CACHE.inputs, Tensor("more", "float32", ())), CACHE.outputs, {})
    with pytest.raises(EngineError, match="its inputs differ in more"):
        OnnxRuntimeEngine(path, renamed)
    narrower = Graph(
        "cache", (Tensor("new", "float32", ("b", 4, "t", 3)), *CACHE.inputs[1:]), CACHE.outputs, {}
    )
    with pytest.raises(EngineError, match="new differs"):
        OnnxRuntimeEngine(path, narrower)
    with pytest.raises(EngineError, match="cannot load .*absent.onnx"):
        OnnxRuntimeEngine(tmp_path / "absent.onnx", CACHE)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(EngineError, match="cannot load .*broken.onnx"):
        OnnxRuntimeEngine(tmp_path / "broken.onnx", CACHE)


def test_buffers_are_views_of_one_memory() -> None:
    buffer = HOST.from_array(np.arange(12, dtype=np.int32).reshape(4, 3))
    rows = buffer.rows(1, 3)
    np.testing.assert_array_equal(rows.read(), [[3, 4, 5], [6, 7, 8]])
    rows.reshaped((3, 2)).write(np.full((3, 2), 9, np.int32))
    assert buffer.read().tolist() == [[0, 1, 2], [9, 9, 9], [9, 9, 9], [9, 10, 11]]
    assert HOST.from_array(np.float32(3)).shape == ()
    with pytest.raises(IndexError):
        buffer.rows(2, 5)
    with pytest.raises(ValueError, match="cannot reshape"):
        buffer.reshaped((5, 3))
    with pytest.raises(ValueError, match="cannot copy float32"):
        buffer.write(np.zeros((4, 3), np.float32))
    copied = HOST.allocate((4, 3), np.int32)
    HOST.copy(buffer, copied)
    np.testing.assert_array_equal(copied.read(), buffer.read())
