"""Every node of every CUDA target has a kernel in ONNX Runtime's CUDA provider, by its registry;
the rewrites that make it so are exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmi_deploy.errors import BundleError
from mmi_deploy.runtime.onnxruntime.cuda_backend import RECORDED
from mmi_deploy.runtime.onnxruntime.run_graph import runner
from mmi_deploy.spec.graphs import IR_VERSION, OPSET
from mmi_deploy.targets.cuda import typed
from mmi_deploy.targets.cuda_rewrites import rewrite_for_cuda
from mmi_deploy.targets.placement import check_placement, registry, unplaced
from mmi_deploy.targets.precision import recipe, rewrite

if TYPE_CHECKING:
    from exports import Exported


@pytest.mark.parametrize("model", ["paper", "released"])
def test_every_node_has_a_kernel_after_the_rewrites(
    exported_once: Callable[[str], Exported], tmp_path: Path, model: str
) -> None:
    """Placement of both readings; without the rewrites the encoder's MaxPool has no kernel."""
    bundle = exported_once(model).bundle
    without = set()
    for name, graph in bundle.graphs.items():
        for precision in ("fp32", "fp16", "int8", "int4", "mixed"):
            if precision not in ("fp32", "fp16") and name != "llm":
                continue
            out = tmp_path / f"{name}-{precision}.onnx"
            rewrite(recipe(precision), graph, bundle.graph_file(name), out, runtime="cuda")
            written = typed(onnx.load(out, load_external_data=False))
            without |= {node.op_type for node, _ in unplaced(written)}
            rewrite_for_cuda(written, name in RECORDED)
            check_placement(typed(written), name)
    assert without == {"MaxPool"}


def model_of(
    *nodes: onnx.NodeProto, kind: int = TensorProto.FLOAT, **shapes: list
) -> onnx.ModelProto:
    """A model from the value `x` to the value `y`."""
    given = [helper.make_tensor_value_info("x", kind, shapes.get("x", ["b", 6, 8, 8]))]
    made = [helper.make_tensor_value_info("y", kind, shapes.get("y"))]
    graph = helper.make_graph(nodes, "graph", given, made)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return typed(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION))


@pytest.mark.parametrize(
    ("node", "kind", "line"),
    [
        (("Det", {}), TensorProto.FLOAT, "the node 'odd' of graph: Det of (float)"),
        (("MaxPool", {"kernel_shape": [2, 2]}), TensorProto.FLOAT, "MaxPool of (float)"),
        (("Abs", {}), TensorProto.BOOL, "Abs of (bool)"),
        (("Nothing", {"domain": "com.microsoft"}), TensorProto.FLOAT, "com.microsoft::Nothing of"),
    ],
)
def test_a_node_without_a_kernel_is_named_in_one_line(
    node: tuple[str, dict], kind: int, line: str
) -> None:
    made = model_of(helper.make_node(node[0], ["x"], ["y"], "odd", **node[1]), kind=kind)
    with pytest.raises(BundleError) as error:
        check_placement(made, "graph")
    assert line in str(error.value) and "\n" not in str(error.value)
    assert f"onnxruntime-gpu {registry()['version']}" in str(error.value)


def test_the_registry_says_what_the_provider_was_seen_to_place() -> None:
    """Attention of opset 24, the cache's TensorScatter, and MatMulNBits in float16; GridSample has
    a kernel for float32 alone, and MaxPool none of opset 22."""
    kernels = registry()["kernels"]
    assert [24, None, {"T1": ["float16"], "T2": ["float16"], "U": ["bool", "float16"]}] in kernels[
        ""
    ]["Attention"]
    assert any("bfloat16" in types["T"] for _, _, types in kernels[""]["TensorScatter"])
    numbers = [types["T1"] for _, _, types in kernels["com.microsoft"]["MatMulNBits"]]
    assert ["float16"] in numbers and ["float"] in numbers
    assert {kind for _, _, t in kernels[""]["GridSample"] for kind in t["T1"]} == {"float"}
    assert {first for first, _, _ in kernels[""]["MaxPool"]} == {12}
    assert "GroupNormalization" not in kernels[""]


@pytest.mark.parametrize(
    ("window", "strides", "pads"),
    [
        ([3, 3], [2, 2], [1, 1, 1, 1]),
        ([2, 2], [2, 2], [0, 0, 0, 0]),
        ([3, 2], [1, 3], [0, 1, 2, 0]),
        ([1, 4], [3, 1], [0, 0, 0, 3]),
    ],
)
@pytest.mark.parametrize("sides", [(8, 8), (7, 9)])
def test_pooling_as_a_maximum_is_exact(
    tmp_path: Path, window: list[int], strides: list[int], pads: list[int], sides: tuple[int, int]
) -> None:
    pool = helper.make_node(
        "MaxPool", ["x"], ["y"], "pool", kernel_shape=window, strides=strides, pads=pads
    )
    same(tmp_path, model_of(pool, x=["b", 6, "height", "width"]), (2, 6, *sides), "MaxPool")


def test_unequal_parts_are_split_and_joined_exactly(tmp_path: Path) -> None:
    """Equal ones stay: they copy nothing from the host."""
    sizes = numpy_helper.from_array(np.array([1, 3, 2], np.int64), "sizes")
    nodes = [
        helper.make_node("Split", ["x", "sizes"], ["a", "b", "c"], "split", axis=1),
        helper.make_node("Concat", ["c", "a", "b"], ["joined"], "join", axis=-3),
        helper.make_node("Split", ["joined"], ["d", "e"], "even", axis=1, num_outputs=2),
        helper.make_node("Concat", ["e", "d"], ["y"], "even_join", axis=1),
    ]
    made = model_of(*nodes)
    made.graph.initializer.append(sizes)
    made = typed(made)
    changed = same(tmp_path, made, (2, 6, 8, 8), None)
    kept = [node.name for node in changed.graph.node if node.op_type in ("Split", "Concat")]
    assert kept == ["even", "even_join"]


def same(
    folder: Path, model: onnx.ModelProto, shape: tuple[int, ...], gone: str | None
) -> onnx.ModelProto:
    """The rewritten model, which gives the same numbers."""
    x = np.random.default_rng(4).standard_normal(shape).astype(np.float32) - 3
    onnx.save(model, folder / "before.onnx")
    before = runner(folder / "before.onnx", 1)({"x": x})["y"]
    rewrite_for_cuda(model, True)
    assert gone not in {node.op_type for node in model.graph.node}
    check_placement(typed(model), "graph")
    onnx.save(model, folder / "after.onnx")
    np.testing.assert_array_equal(runner(folder / "after.onnx", 1)({"x": x})["y"], before)
    return model
