"""The MMFS operator as an ONNX function: against float64 loops and against the PyTorch
definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime as ort
import pytest
import torch

from mmi_deploy.spec.graphs import IR_VERSION, MMFS_DOMAIN, MMFS_OPERATOR, MMFS_VERSION, OPSET
from mmi_plugins.onnx_function import ATTRIBUTES, INPUTS, MAX_GATHERED, mmfs_function
from mmi_train.model.deformable import multi_image_deformable_attention
from oracles.mmfs_float64 import operator

BRANCHES = {"gather": MAX_GATHERED, "grid_sample": 0}
INDICES = ("image_slot", "image_position")
NARROW = ("value", "offsets", "logits")

Case = tuple[dict[str, np.ndarray], dict[str, Any]]


def one_node(
    case: Case, most_gathered: int, dtype: int = onnx.TensorProto.FLOAT
) -> onnx.ModelProto:
    """A model of the operator alone; batch, queries, images and pool are dynamic."""
    inputs, attributes = case
    dynamic = {
        "value": {0: "n"},
        "image_slot": {0: "b", 1: "m"},
        "offsets": {0: "b", 1: "q"},
        "logits": {0: "b", 1: "q"},
        "image_position": {0: "b", 1: "q1", 2: "m"},
        "reference": {0: "r1"},
    }
    values = []
    for name in INPUTS:
        shape = [
            dynamic.get(name, {}).get(axis, side) for axis, side in enumerate(inputs[name].shape)
        ]
        kind = onnx.TensorProto.INT32 if name in INDICES else onnx.TensorProto.FLOAT
        values.append(oh.make_tensor_value_info(name, dtype if name in NARROW else kind, shape))
    node = oh.make_node(MMFS_OPERATOR, INPUTS, ["output"], domain=MMFS_DOMAIN, **attributes)
    heads, width = inputs["null_value"].shape
    output = oh.make_tensor_value_info("output", dtype, ["b", "q", heads * width])
    return oh.make_model(
        oh.make_graph([node], "one_node", values, [output]),
        functions=[mmfs_function(len(attributes["level_heights"]), most_gathered)],
        opset_imports=[oh.make_opsetid("", OPSET), oh.make_opsetid(MMFS_DOMAIN, MMFS_VERSION)],
        ir_version=IR_VERSION,
    )


def run(case: Case, branch: str, dtype: int = onnx.TensorProto.FLOAT) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = one_node(case, BRANCHES[branch], dtype)
    session = ort.InferenceSession(model.SerializeToString(), options)
    return session.run(None, case[0])[0]


def random_case(seed: int, **sizes: int) -> Case:
    """Sizes drawn too, where not given; some images hidden, some rows seeing none at all."""
    draw = np.random.default_rng(seed)

    def size(name: str, most: int) -> int:
        return sizes.get(name, int(draw.integers(1, most + 1)))

    b, q, m, n = size("b", 3), size("q", 4), size("m", 8), size("n", 3)
    h, d, p, levels, r = size("h", 3), size("d", 5), size("p", 16), size("l", 4), size("r", 9) + 1
    heights, widths = draw.integers(1, 7, (2, levels))
    positions = 1 if draw.random() < 0.5 else q
    position = draw.integers(0, r, (b, positions, m))
    position[draw.random((b, positions)) < 0.2] = 0
    inputs = {
        "value": draw.standard_normal((n, int(heights @ widths), h, d)),
        "image_slot": draw.integers(0, n, (b, m)),
        "offsets": draw.standard_normal((b, q, h, p, 2)) * 2,
        "logits": draw.standard_normal((b, q, h, levels, p)),
        "offset_table": draw.standard_normal((r, h, p, 2)),
        "logit_table": draw.standard_normal((r, h, levels, p)),
        "image_position": position,
        "reference": draw.random((1 if draw.random() < 0.5 else q, 2)),
        "null_value": draw.standard_normal((h, d)),
    }
    attributes = {
        "level_heights": heights.tolist(),
        "level_widths": widths.tolist(),
        "base_grid": float(draw.integers(1, 17)),
        "null_slot": int(draw.random() < 0.5),
    }
    return typed(inputs), attributes


def typed(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name: value.astype(np.int32 if name in INDICES else np.float32)
        for name, value in inputs.items()
    }


def assert_equals_reference(case: Case, branch: str) -> None:
    np.testing.assert_allclose(
        run(case, branch), operator(*case_arguments(case)[0], **case[1]), atol=2e-5
    )


def case_arguments(case: Case) -> tuple[list[np.ndarray], dict[str, Any]]:
    return [case[0][name] for name in INPUTS], case[1]


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("seed", range(20))
def test_equals_float64_loops_on_random_cases(seed: int, branch: str) -> None:
    assert_equals_reference(random_case(seed), branch)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("null_slot", [0, 1])
def test_a_query_that_sees_nothing_gives_zero_or_the_null_value(
    branch: str, null_slot: int
) -> None:
    inputs, attributes = random_case(1, b=2, q=2, m=3)
    inputs["image_position"][0] = 0
    attributes["null_slot"] = null_slot
    got = run((inputs, attributes), branch)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(
        got[0], np.tile(null_slot * inputs["null_value"].reshape(-1), (2, 1)), atol=1e-6
    )
    assert_equals_reference((inputs, attributes), branch)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("where", ["centres", "borders", "far outside"])
def test_points_at_cell_centres_borders_and_outside(where: str, branch: str) -> None:
    """Centres read one cell, the border blends with the zeros outside (paper: Deformable DETR's
    core)."""
    inputs, attributes = random_case(2, b=1, q=1, m=2, l=1, p=8, h=1)
    height, width = attributes["level_heights"][0], attributes["level_widths"][0]
    draw = np.random.default_rng(0)
    cell = np.stack([draw.integers(0, width, 8), draw.integers(0, height, 8)], 1)
    places = {
        "centres": (cell + 0.5) / (width, height),
        "borders": draw.integers(0, 2, (8, 2)),
        "far outside": draw.choice([-3.0, 5.0, 1e6], (8, 2)),
    }
    inputs["offset_table"][:] = 0
    inputs["reference"] = np.zeros((1, 2), np.float32)
    attributes["base_grid"] = 1.0
    inputs["offsets"] = places[where].astype(np.float32).reshape(inputs["offsets"].shape)
    assert_equals_reference((inputs, attributes), branch)
    if where == "far outside" and not attributes["null_slot"]:
        assert not run((inputs, attributes), branch).any()


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_slot_or_position_out_of_range_counts_as_hidden(branch: str) -> None:
    inputs, attributes = random_case(3, b=1, m=4, n=2, q=1)
    rows = len(inputs["offset_table"])
    inputs["image_slot"] = np.array([[0, 2, -1, 1]], np.int32)
    inputs["image_position"] = np.array([[[1, 1, 1, rows]]], np.int32)
    got = run((inputs, attributes), branch)
    only_first = inputs | {
        "image_slot": np.zeros((1, 4), np.int32),
        "image_position": np.array([[[1, 0, 0, 0]]], np.int32),
    }
    np.testing.assert_array_equal(got, run((only_first, attributes), branch))
    assert_equals_reference((inputs, attributes), branch)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("queries", [1, 70])
def test_equals_the_pytorch_definition_at_real_sizes(branch: str, queries: int) -> None:
    inputs, attributes = random_case(4, b=2, q=queries, m=8, n=5, h=4, d=64, p=8, l=3)
    attributes |= {"level_heights": [16, 8, 4], "level_widths": [16, 8, 4]}
    cells = 16 * 16 + 8 * 8 + 4 * 4
    inputs["value"] = np.random.default_rng(4).standard_normal((5, cells, 4, 64), np.float32)
    arguments = [torch.from_numpy(inputs[name]) for name in INPUTS]
    wanted = multi_image_deformable_attention(
        *arguments, **{**attributes, "null_slot": bool(attributes["null_slot"])}
    )
    np.testing.assert_allclose(run((inputs, attributes), branch), wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize("branch", BRANCHES)
def test_narrow_inputs_are_computed_in_fp32(branch: str) -> None:
    """fp16 in, fp16 out: the only loss is the rounding of the result."""
    inputs, attributes = random_case(5, b=1, q=3, m=4)
    narrow = inputs | {name: inputs[name].astype(np.float16) for name in NARROW}
    got = run((narrow, attributes), branch, onnx.TensorProto.FLOAT16)
    wanted = operator(*case_arguments((narrow, attributes))[0], **attributes)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_the_file_passes_the_strict_checker_and_states_its_shape(levels: int) -> None:
    case = random_case(6, l=levels)
    model = one_node(case, MAX_GATHERED)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert len(inferred.graph.output[0].type.tensor_type.shape.dim) == 3
    function = model.functions[0]
    assert {opset.domain: opset.version for opset in function.opset_import}[""] == OPSET
    named = {attribute for node in function.node for attribute in references(node)}
    assert named == set(ATTRIBUTES) == set(function.attribute)


def references(node: onnx.NodeProto) -> list[str]:
    return [attribute.ref_attr_name for attribute in node.attribute if attribute.ref_attr_name]


def test_the_pool_is_only_read_row_by_row_or_image_by_image() -> None:
    """No operator copies the whole of `value`: it is reshaped (a view), gathered from, or
    measured."""
    function = mmfs_function(3)
    nodes = list(function.node)
    branch = {
        attribute.g.name: attribute.g
        for node in nodes
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.GRAPH
    }
    everywhere = nodes + [node for graph in branch.values() for node in graph.node]
    readers = {node.op_type for node in everywhere if "value" in node.input}
    assert readers == {"Shape", "Reshape", "Gather"}
    reshaped = [node for node in branch["gather"].node if node.op_type == "Reshape"]
    view = next(node.output[0] for node in reshaped if node.input[0] == "value")
    assert {node.op_type for node in everywhere if view in node.input} == {"Gather"}
