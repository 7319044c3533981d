"""Rewritten graphs: the floats of every node agree in type, the types of the contract hold, and
what must stay in float32 does. The checks walk over the ONNX with rules of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.targets.precision.graphs import contract, hidden, product, write
from mmi_deploy.errors import BundleError, WeightsError
from mmi_deploy.spec.backends import TENSORRT
from mmi_deploy.spec.graphs import MMFS_OPERATOR, Tensor
from mmi_deploy.targets.precision import recipe, rewrite

if TYPE_CHECKING:
    from exports import Exported

KINDS = {
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
}
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}

# Inputs that may have another type than the rest, by definition of the operator.
OTHER_TYPES = {
    MMFS_OPERATOR: {4, 5, 7, 8},
    "Resize": {1, 2},
    "Cast": {0},
    "Shape": {0},
}


def kinds_of(model: onnx.ModelProto) -> dict[str, int]:
    """The type of every tensor, from what is stored and from ONNX's own inference."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    found = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for info in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
        found[info.name] = info.type.tensor_type.elem_type
    return found


def rewritten(
    path: Path, graph: object, name: str, out: Path, **options: object
) -> onnx.ModelProto:
    rewrite(recipe(name), graph, path, out, runtime=TENSORRT, **options)  # type: ignore[arg-type]
    return onnx.load(out, load_external_data=False)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("which", ["paper", "released"])
def test_all_floats_of_a_node_agree_and_the_contract_is_kept(
    exported_once: Callable[[str], Exported], which: str, name: str, tmp_path: Path
) -> None:
    """TensorRT is strongly typed: it refuses a node whose inputs differ."""
    bundle = exported_once(which).bundle
    for graph in bundle.graphs.values():
        out = tmp_path / f"{graph.name}.onnx"
        model = rewritten(bundle.graph_file(graph.name), graph, name, out)
        kinds = kinds_of(model)
        for node in model.graph.node:
            free = OTHER_TYPES.get(node.op_type, set())
            agreeing = {
                kinds[value]
                for position, value in enumerate(node.input)
                if value and position not in free and kinds[value] in FLOATS
            }
            assert len(agreeing) <= 1, (graph.name, node.name, node.op_type)
            if node.op_type == MMFS_OPERATOR:
                tables = {kinds[node.input[position]] for position in OTHER_TYPES[MMFS_OPERATOR]}
                assert tables == {TensorProto.FLOAT}
        typed = graph.typed(recipe(name).activations)
        for tensor in (*typed.inputs, *typed.outputs):
            assert kinds[tensor.name] == KINDS[tensor.dtype], (graph.name, tensor.name)


def test_softmax_places_and_the_sampler_stay_in_float32(
    exported_once: Callable[[str], Exported], tmp_path: Path
) -> None:
    bundle = exported_once("paper").bundle
    seen = {}
    for name in ("vision_encoder", "denoise_step"):
        graph = bundle.graphs[name]
        model = rewritten(bundle.graph_file(name), graph, "fp16", tmp_path / f"{name}.onnx")
        kinds = kinds_of(model)
        seen[name] = {
            (node.op_type, kinds[value])
            for node in model.graph.node
            for value in node.input
            if value and kinds[value] in FLOATS
        }
        if name == "denoise_step":
            update = next(n for n in model.graph.node if "coefficients" in _ancestors(model, n))
            assert kinds[update.output[0]] == TensorProto.FLOAT
    low = TensorProto.FLOAT16
    assert ("GridSample", low) not in seen["vision_encoder"]
    assert ("Softmax", low) not in seen["vision_encoder"]
    for operator in ("Conv", "Attention", "GroupNormalization"):
        assert (operator, low) in seen["denoise_step"]
        assert (operator, TensorProto.FLOAT) not in seen["denoise_step"]


def _ancestors(model: onnx.ModelProto, node: onnx.NodeProto) -> set[str]:
    """Names of the graph inputs that a matrix product without weights is made from."""
    if node.op_type != "MatMul" or {t.name for t in model.graph.initializer} & set(node.input):
        return set()
    makers = {value: maker for maker in model.graph.node for value in maker.output}
    names: set[str] = set()
    waiting = list(node.input)
    while waiting:
        name = waiting.pop()
        if name not in names:
            names.add(name)
            waiting += list(makers[name].input) if name in makers else []
    return names


def test_what_is_stored_in_16_bits_is_linked_and_its_cast_goes(tmp_path: Path) -> None:
    """No byte of it is copied; the norm's float32 scale becomes float16."""
    path, graph, _ = product(
        tmp_path / "llm.onnx", np.ones((1024, 640), np.float32), stored=np.float16
    )
    out = tmp_path / "target" / "llm.onnx"
    out.parent.mkdir()
    model = rewritten(path, graph, "fp16", out)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "weight")
    place = {entry.key: entry.value for entry in weight.external_data}
    assert os.path.samefile(out.parent / place["location"], tmp_path / "llm.weights")
    casts = [
        (node.input[0], node.attribute[0].i) for node in model.graph.node if node.op_type == "Cast"
    ]
    assert casts == [("product", TensorProto.FLOAT)]  # the logits' bias is added in float32


def test_a_cast_behind_a_table_goes_with_those_behind_weights(tmp_path: Path) -> None:
    """Exported from linked files words are Gather(table in 16 bits), and then a Cast."""
    y, ids = hidden("y", 8), Tensor("ids", "int64", ("b",), below=4)
    graph = contract([ids], [y])
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["words"], name="read"),
        helper.make_node("Cast", ["words"], ["words32"], to=TensorProto.FLOAT, name="cast"),
        helper.make_node("Add", ["words32", "shift"], ["y"], name="shifted"),
    ]
    weights = {"table": np.ones((4, 8), np.float16), "shift": np.ones(8, np.float32)}
    path = write(tmp_path / "llm.onnx", nodes, weights, graph)
    for name, kind in (("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)):
        model = rewritten(path, graph, name, tmp_path / f"{name}.onnx")
        assert [node.op_type for node in model.graph.node] == ["Gather", "Add"]
        assert {tensor.data_type for tensor in model.graph.initializer} == {kind}


def test_weights_of_another_type_are_converted_and_nothing_is_linked(tmp_path: Path) -> None:
    path, graph, weight = product(tmp_path / "llm.onnx", stored=np.float16)
    out = tmp_path / "target" / "llm.onnx"
    out.parent.mkdir()
    rewritten(path, graph, "bf16", out)
    assert sorted(file.name for file in out.parent.iterdir()) == ["llm.onnx", "llm.safetensors"]
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    error = np.abs(stored["weight.bfloat16"].astype(np.float32) - weight)
    assert (error <= np.abs(weight) * 2.0**-8).all()


def test_the_file_is_read_by_onnx_and_ends_with_its_last_tensor(tmp_path: Path) -> None:
    """Zeros are left out when they are written, also where they are last."""
    weight = np.zeros((64, 512), np.float32)
    weight[0] = 1.0
    path, graph, _ = product(tmp_path / "llm.onnx", weight)
    out = tmp_path / "out.onnx"
    rewritten(path, graph, "fp16", out)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    np.testing.assert_array_equal(stored["weight.float16"], weight.astype(np.float16))


def test_a_mask_of_the_least_float32_stays_finite_in_float16(tmp_path: Path) -> None:
    """-3.4e38 would become minus infinity, and a row of those NaN."""
    x, y = hidden("x", 8), hidden("y", 8)
    nodes = [helper.make_node("Add", ["x", "mask"], ["y"], name="masked")]
    mask = np.array([0, np.finfo(np.float32).min] * 4, np.float32)
    path = write(tmp_path / "llm.onnx", nodes, {"mask": mask}, contract([x], [y]))
    model = rewritten(path, contract([x], [y]), "fp16", tmp_path / "out.onnx")
    stored = numpy_helper.to_array(model.graph.initializer[0])
    assert stored.dtype == np.float16 and stored.min() == np.finfo(np.float16).min


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        (np.nan, "weight holds numbers that are not finite"),
        (1e6, "weight does not fit into float16"),
    ],
)
def test_weights_that_cannot_be_stored_are_named(flaw: float, message: str, tmp_path: Path) -> None:
    weight = np.ones((64, 96), np.float32)
    weight[3, 5] = flaw
    path, graph, _ = product(tmp_path / "llm.onnx", weight)
    with pytest.raises(WeightsError, match=message):
        rewritten(path, graph, "fp16", tmp_path / "out.onnx")


def test_another_graph_is_refused_with_the_tensors_that_differ(tmp_path: Path) -> None:
    path, graph, _ = product(tmp_path / "llm.onnx")
    other = contract(graph.inputs, [Tensor("hidden", "float32", ("b", 96))])
    with pytest.raises(
        BundleError, match="is not the portable llm: its outputs differ in hidden, logits"
    ):
        rewritten(path, other, "fp16", tmp_path / "out.onnx")


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    _, graph, _ = product(tmp_path / "llm.onnx")
    (tmp_path / "llm.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"cannot read .*llm\.onnx.*mmi export"):
        rewritten(tmp_path / "llm.onnx", graph, "fp16", tmp_path / "out.onnx")
