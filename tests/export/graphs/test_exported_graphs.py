"""Exported graphs follow the contract and compute nothing twice."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from exports import Exported
from mmi_deploy.errors import BundleError
from mmi_deploy.spec.graphs import (
    GRAPHS,
    IR_VERSION,
    MMFS_DOMAIN,
    MMFS_OPERATOR,
    OPSET,
    Graph,
    level_sides,
)
from mmi_export.parity.receipts import Arrays, onnx_runner, prove

NAMES = [make.__name__ for make in GRAPHS]
TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "int64": onnx.TensorProto.INT64,
    "int32": onnx.TensorProto.INT32,
}

# Operators that move numbers and compute none: rows of the time table, the heads of the condition's
# keys and values, slots and positions repeated for both guidance branches.
LAYOUT = {
    "Cast",
    "Concat",
    "Expand",
    "Gather",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}

# `LAYOUT`, and the operators that compute sizes.
LAYOUT_OF_SIZES = LAYOUT | {"Shape", "Mul", "Add", "Sub", "Div", "Max", "Min"}


def graph_of(exported: Exported, name: str) -> Graph:
    return exported.bundle.graphs[name]


@pytest.mark.parametrize("name", NAMES)
def test_names_types_and_shapes_are_those_of_the_contract(exported: Exported, name: str) -> None:
    contract, model = graph_of(exported, name), exported.graph(name)
    fixed = {letter: span.min for letter, span in contract.ranges.items() if span.min == span.max}
    for values, tensors in (
        (model.graph.input, contract.inputs),
        (model.graph.output, contract.outputs),
    ):
        assert [value.name for value in values] == [tensor.name for tensor in tensors]
        for value, tensor in zip(values, tensors, strict=True):
            found = value.type.tensor_type
            assert found.elem_type == TYPES[tensor.dtype]
            dims = tuple(dim.dim_param or dim.dim_value for dim in found.shape.dim)
            assert dims == tuple(fixed.get(str(side), side) for side in tensor.shape)


@pytest.mark.parametrize("name", NAMES)
def test_files_are_portable_and_pass_the_strict_checks(
    exported: Exported, name: str, tmp_path: Path
) -> None:
    # A copy: the checker refuses weights with a second hard link, which tests of targets make.
    copy = shutil.copytree(exported.bundle.folder, tmp_path / "bundle")
    path = copy / exported.bundle.graph_file(name).relative_to(exported.bundle.folder)
    model = exported.graph(name)
    onnx.checker.check_model(path, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    assert model.ir_version == IR_VERSION and opsets.pop("") == OPSET
    assert {node.domain for node in model.graph.node} == {"", *opsets}
    assert set(opsets) <= {MMFS_DOMAIN}


@pytest.mark.parametrize("name", ["llm", "denoise_step"])
def test_every_mmfs_node_has_its_function_and_the_right_levels(
    exported: Exported, name: str
) -> None:
    model, config = exported.graph(name), exported.model.config
    mmfs = config.llm_mmfs if name == "llm" else config.image_decoder.mmfs
    nodes = [node for node in model.graph.node if node.domain == MMFS_DOMAIN]
    values = graph_of(exported, name).names("llm_value" if name == "llm" else "unet_value")
    assert [node.op_type for node in nodes] == [MMFS_OPERATOR] * len(values)
    assert [(function.domain, function.name) for function in model.functions] == [
        (MMFS_DOMAIN, MMFS_OPERATOR)
    ]
    for node in nodes:
        attributes = {
            entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute
        }
        sides = list(level_sides(config, mmfs))
        assert attributes["level_heights"] == attributes["level_widths"] == sides
        assert attributes["null_slot"] == mmfs.null_slot
        if mmfs.base_grid is not None:
            assert attributes["base_grid"] == mmfs.base_grid


@pytest.mark.parametrize(("name", "prefix"), [("llm", "llm_value"), ("denoise_step", "unet_value")])
def test_no_graph_copies_image_values(exported: Exported, name: str, prefix: str) -> None:
    """Values go straight from the pool into MMFS: guidance branches and rows share them."""
    readers = Counter(
        (entry, node.op_type, index)
        for node in exported.graph(name).graph.node
        for index, entry in enumerate(node.input)
        if entry.startswith(prefix)
    )
    names = graph_of(exported, name).names(prefix)
    assert readers == Counter((value, MMFS_OPERATOR, 0) for value in names)


def test_a_step_computes_nothing_that_does_not_depend_on_the_latents(exported: Exported) -> None:
    """Step-invariant hoisting: apart from `latents` and `noise`, numbers are only moved."""
    model = exported.graph("denoise_step")
    depends = {"latents", "noise", "history"}
    sizes: set[str] = set()
    for node in model.graph.node:
        inputs = set(node.input) - {""}
        if inputs & depends and node.op_type != "Shape":
            depends.update(node.output)
        elif node.op_type == "Shape" or (inputs & sizes and not inputs & depends):
            assert node.op_type in LAYOUT_OF_SIZES, node.name
            sizes.update(node.output)
        else:
            assert node.op_type in LAYOUT | {"Constant"}, f"{node.op_type} {list(node.input)}"
    assert {output.name for output in model.graph.output} <= depends


def test_the_mask_is_built_once_and_the_cache_is_written_in_place(exported: Exported) -> None:
    model, contract = exported.graph("llm"), graph_of(exported, "llm")
    nodes = Counter(node.op_type for node in model.graph.node)
    layers = exported.model.config.llama.layers
    assert nodes["And"] == nodes["LessOrEqual"] == 1
    attention = [node for node in model.graph.node if node.op_type == "Attention"]
    assert len(attention) == layers and len({node.input[3] for node in attention}) == 1
    scatters = {
        node.output[0]: node for node in model.graph.node if node.op_type == "TensorScatter"
    }
    assert {new: scatters[new].input[0] for new in scatters} == dict(contract.in_place)


def test_aliased_caches_give_what_separate_ones_do(exported: Exported) -> None:
    """`present` bound to the buffer of `past`, as the runtimes do it, over prefill and two
    tokens."""
    contract, config = graph_of(exported, "llm"), exported.model.config
    draw = np.random.default_rng(0)
    session = ort.InferenceSession(exported.bundle.graph_file("llm"))
    run = onnx_runner(exported.bundle.graph_file("llm"))
    caches = {
        name: np.zeros(contract[name].resolve(b=2), np.float32)
        for name in contract.in_place.values()
    }
    aliased = {name: ort.OrtValue.ortvalue_from_numpy(cache) for name, cache in caches.items()}
    for first, tokens in ((0, 5), (5, 1), (6, 1)):
        inputs = {}
        for tensor in contract.inputs:
            if tensor.name in caches:
                continue
            shape = tensor.resolve(b=2, t=tokens, w=1, v=4, n=2, m=2)
            if tensor.dtype == "float32":
                inputs[tensor.name] = draw.standard_normal(shape, np.float32)
            else:
                inputs[tensor.name] = np.zeros(shape, tensor.dtype)
        inputs["token_ids"] = draw.integers(5, config.llama.vocab, (2, tokens))
        inputs["visual_index"] -= 1
        inputs["write_index"] += first
        inputs["position"] += first + np.arange(tokens)
        inputs["image_position"] += np.array([2, 1], np.int32)
        inputs["image_slot"] += np.array([0, 1], np.int32)
        separate = run(inputs | caches)
        caches = {old: separate[new] for new, old in contract.in_place.items()}
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for new, old in contract.in_place.items():
            binding.bind_ortvalue_input(old, aliased[old])
            binding.bind_ortvalue_output(new, aliased[old])
        binding.bind_output("logits")
        binding.bind_output("hidden")
        session.run_with_iobinding(binding)
        np.testing.assert_array_equal(binding.get_outputs()[-2].numpy(), separate["logits"])
        for name, cache in caches.items():
            np.testing.assert_array_equal(aliased[name].numpy(), cache)


def test_a_condition_counts_its_distances_from_the_newest_token(exported: Exported) -> None:
    """Padding after the context changes nothing, and a row has as many as its own length."""
    run = onnx_runner(exported.bundle.graph_file("image_condition"))
    draw = np.random.default_rng(0)
    width = exported.model.config.llama.width
    context = draw.standard_normal((2, 9, width), np.float32)
    both = run({"context": context, "context_length": np.array([9, 4])})
    for row, length in enumerate((9, 4)):
        alone = run(
            {"context": context[row : row + 1, :length], "context_length": np.array([length])}
        )
        for name, tensor in alone.items():
            np.testing.assert_allclose(both[name][row], tensor[0], atol=1e-6)
    decoder = exported.model.image_decoder
    with torch.no_grad():
        newest_first = torch.from_numpy(context[1:, :4][:, ::-1].copy())
        wanted = decoder.unet.condition_keys_values(
            decoder.condition(newest_first, torch.tensor([4]))
        )
    for index, (key, value) in enumerate(wanted):
        for kind, tensor in (("key", key), ("value", value)):
            got = both[f"condition_{kind}.{index:02d}"][1]
            np.testing.assert_allclose(got, tensor[0].numpy(), atol=1e-5)


def step_inputs(exported: Exported, name: str, rows: int, draw: np.random.Generator) -> Arrays:
    """Random inputs of a denoising graph, each row with a step, guidance and images of its own."""
    contract = graph_of(exported, name)
    sizes = {"b": rows, "n": 4, "m": min(3, contract.ranges["m"].max), "steps": 9}
    inputs = {
        tensor.name: draw.standard_normal(tensor.resolve(**sizes), np.float32)
        if tensor.dtype == "float32"
        else draw.integers(0, 3, tensor.resolve(**sizes)).astype(tensor.dtype)
        for tensor in contract.inputs
    }
    inputs["step"] = draw.permutation(9)[:rows]
    seen = exported.model.config.image_decoder.mmfs.images_seen
    inputs["image_position"] %= seen + 1
    return inputs


@pytest.mark.parametrize("name", ["denoise_step", "denoise_shallow"])
def test_a_row_of_a_step_is_the_same_whatever_its_neighbours(exported: Exported, name: str) -> None:
    """To the bit: steps, samplers, guidance and images of other rows change nothing."""
    run = onnx_runner(exported.bundle.graph_file(name))
    inputs = step_inputs(exported, name, 8, np.random.default_rng(0))
    rows = {t.name for t in graph_of(exported, name).inputs if t.shape[0] == "b"}
    assert {"step", "guidance", "history", "latents", "noise"} <= rows

    def of(places: list[int]) -> Arrays:
        return run({n: a[places] if n in rows else a for n, a in inputs.items()})

    alone = [of([row]) for row in range(8)]
    for places in ([0, 1], [5, 3, 1], [7, 6, 5, 4, 3, 2, 1, 0]):
        together = of(places)
        for place, row in enumerate(places):
            for output, array in together.items():
                np.testing.assert_array_equal(array[place], alone[row][output][0])


def test_the_guidance_of_a_row_weighs_its_own_two_branches(exported: Exported) -> None:
    """Guidance 0 leaves the unconditional branch alone: the condition does not matter then."""
    run = onnx_runner(exported.bundle.graph_file("denoise_step"))
    draw = np.random.default_rng(1)
    inputs = step_inputs(exported, "denoise_step", 2, draw)
    inputs["guidance"] = np.array([0, 2], np.float32)
    others = {
        name: draw.standard_normal(array.shape, np.float32)
        if name.startswith("condition_")
        else array
        for name, array in inputs.items()
    }
    first, second = run(inputs)["next_latents"], run(others)["next_latents"]
    np.testing.assert_array_equal(first[0], second[0])
    assert (first[1] != second[1]).any()


@pytest.mark.parametrize("name", ["denoise_step", "denoise_shallow"])
@pytest.mark.parametrize("fault", ["history is written", "history is read"])
def test_a_faulty_history_is_found(exported: Exported, name: str, fault: str) -> None:
    """By a thousandth of its own value."""
    contract, limits = graph_of(exported, name), exported.bundle.limits
    run = onnx_runner(exported.bundle.graph_file(name))

    def faulty(inputs: Mapping[str, Any]) -> Arrays:
        if fault == "history is read":
            return run({**inputs, "history": inputs["history"] * np.float32(1.001)})
        outputs = run(inputs)
        return {**outputs, "next_history": outputs["next_history"] * np.float32(1.001)}

    prove(exported.model, contract, limits, run)
    with pytest.raises(BundleError, match="does not compute what the model does"):
        prove(exported.model, contract, limits, faulty)
