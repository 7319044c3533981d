"""Weight-only quantisation: numbers and scales against their definition, and ONNX Runtime's results
against float64 products with the dequantised weight."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from deploy.targets.precision.graphs import contract, hidden, product, write
from mmi_deploy.errors import BundleError, ConfigError
from mmi_deploy.runtime.onnxruntime.run_graph import runner
from mmi_deploy.spec.backends import CPU, TENSORRT
from mmi_deploy.spec.graphs import Graph, Tensor
from mmi_deploy.targets.precision import check_possible, recipe, rewrite
from mmi_deploy.targets.precision.quantise import pack_blocks, quantise, scheme_for_rows
from mmi_deploy.targets.precision.recipes import FP8, INT4, INT8, RECIPES, Scheme


def weight_of(rows: int = 64, columns: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("block", [0, 16, 32])
def test_int8_is_off_by_half_a_step_at_most(block: int) -> None:
    """A step is a 127th of the greatest number that shares the scale."""
    weight = weight_of()
    made = quantise(weight, Scheme(INT8, block))
    groups = np.abs(weight).reshape(-1, block or 64, 48)
    step = np.repeat(groups.max(1) / 127, block or 64, 0)
    assert (np.abs(made.dequantised() - weight) <= step * 0.5001).all()
    assert made.scales.shape == ((64 // block, 48) if block else (48,))


def test_int4_takes_the_best_of_the_cuts_that_it_tries() -> None:
    """No block is further off than with the whole range, most are nearer."""
    weight = weight_of(256, 64)
    made = quantise(weight, Scheme(INT4, 32))
    blocks = weight.reshape(8, 32, 64)
    scales = np.abs(blocks).max(1, keepdims=True) / 7
    plain = np.clip(np.rint(blocks / scales), -8, 7) * scales
    error = ((made.dequantised() - weight).reshape(8, 32, 64) ** 2).sum(1)
    plain_error = ((plain - blocks) ** 2).sum(1)
    assert (error <= plain_error * 1.0001).all()
    assert (error < plain_error * 0.999).mean() > 0.5
    assert made.numbers.min() >= -8 and made.numbers.max() <= 7


def test_float8_has_three_bits_of_fraction() -> None:
    weight = weight_of()
    made = quantise(weight, Scheme(FP8))
    assert made.numbers.dtype == ml_dtypes.float8_e4m3fn
    smallest = np.abs(weight).max(0) / 448 * 2.0**-6  # below it float8 has no more fraction bits
    allowed = np.maximum(np.abs(weight) * 2.0**-4, smallest * 2.0**-3)
    assert (np.abs(made.dequantised() - weight) <= allowed * 1.001).all()


def test_a_block_of_zeros_is_restored_as_zeros() -> None:
    weight = weight_of()
    weight[:32] = 0
    for dtype in (INT8, INT4):
        assert not quantise(weight, Scheme(dtype, 32), np.float16).dequantised()[:32].any()


def test_scales_are_those_that_are_stored() -> None:
    """Numbers are rounded for the scale in its stored type, not for the exact one."""
    weight = weight_of()
    made = quantise(weight, Scheme(INT8), np.float16)
    assert made.scales.dtype == np.float16
    best = np.rint(weight / made.scales.astype(np.float32))
    np.testing.assert_array_equal(made.numbers, np.clip(best, -127, 127))


@pytest.mark.parametrize(
    ("rows", "wanted", "got"),
    [
        (256, Scheme(INT4, 128), Scheme(INT4, 128)),
        (192, Scheme(INT4, 128), Scheme(INT4, 64)),
        (48, Scheme(INT4, 32), Scheme(INT4, 16)),
        (50, Scheme(INT4, 32), Scheme(INT8)),
        (50, Scheme(INT8), Scheme(INT8)),
    ],
)
def test_blocks_are_halved_until_they_divide_the_rows(
    rows: int, wanted: Scheme, got: Scheme
) -> None:
    assert scheme_for_rows(wanted, rows) == got


def test_two_int4_share_a_byte_the_first_in_its_low_half() -> None:
    """The layout is the one that ONNX Runtime documents for MatMulNBits."""
    weight = np.zeros((32, 1), np.float32)
    weight[0], weight[1], weight[2] = 7, -7, 3
    numbers, scales = pack_blocks(quantise(weight, Scheme(INT4, 32)), 4)
    step = round(7 / float(scales[0]))
    assert numbers.shape == (1, 1, 16)
    assert numbers[0, 0, 0] == (8 + step) | ((8 - step) << 4)
    assert numbers[0, 0, 1] & 15 == 8 + round(3 / float(scales[0]))


def ran(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return runner(path)(inputs)["logits"]


def normed(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True))


@pytest.mark.parametrize("stored", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("runtime", "name", "scheme"),
    [
        (CPU, "int8", Scheme(INT8, 32)),
        (CPU, "int4", Scheme(INT4, 32)),
        (TENSORRT, "int8", Scheme(INT8)),
        (TENSORRT, "int4", Scheme(INT4, 32)),
        (TENSORRT, "fp8", Scheme(FP8)),
    ],
)
def test_onnx_runtime_multiplies_by_the_restored_weight(
    runtime: str, name: str, scheme: Scheme, stored: type, tmp_path: Path
) -> None:
    """Within what activations lose: to int8 on the CPU, to float16 for TensorRT."""
    path, graph, weight = product(tmp_path / "llm.onnx", stored=stored)
    out = tmp_path / "target" / "llm.onnx"
    out.parent.mkdir()
    typed = rewrite(recipe(name), graph, path, out, runtime=runtime)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(typed["x"].dtype)
    restored = quantise(weight, scheme, typed["x"].dtype).dequantised()
    expected = normed(x) @ restored.astype(np.float64) + 1
    error = np.abs(ran(out, {"x": x}) - expected).max() / np.abs(expected).max()
    assert error < (1e-2 if runtime == CPU else 2e-3)
    assert np.abs(restored - weight).max() > 0  # nothing would be left to prove


def test_a_weight_that_is_stored_turned_round_is_quantised_along_its_inputs(
    tmp_path: Path,
) -> None:
    """Exported from linked files a product is MatMul(x, Transpose(weight [out, in]))."""
    weight = weight_of(64, 80)
    graph = contract([hidden("x", 64)], [Tensor("logits", "float32", ("b", 80))])
    nodes = [
        helper.make_node("Transpose", ["weight"], ["turned"], perm=[1, 0], name="turn"),
        helper.make_node("MatMul", ["x", "turned"], ["logits"], name="node"),
    ]
    path = write(tmp_path / "llm.onnx", nodes, {"weight": weight.T.copy()}, graph)
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    for runtime in (CPU, TENSORRT):
        out = tmp_path / runtime / "llm.onnx"
        out.parent.mkdir()
        typed = rewrite(recipe("int4"), graph, path, out, runtime=runtime)
        restored = quantise(weight, Scheme(INT4, 32)).dequantised()
        got = ran(out, {"x": x.astype(typed["x"].dtype)})
        expected = x @ restored
        assert np.abs(got - expected).max() / np.abs(expected).max() < 2e-2
        names = {
            tensor.name for tensor in onnx.load(out, load_external_data=False).graph.initializer
        }
        assert "weight" not in names  # no second copy


def large(path: Path, count: int, rows: int, columns: int) -> Graph:
    """A chain of `count` products."""
    assert rows == columns
    graph = contract([hidden("x", rows)], [Tensor("logits", "float32", ("b", columns))])
    names = ["x", *(f"h{i}" for i in range(count - 1)), "logits"]
    nodes = [
        helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], name=f"n{i}")
        for i in range(count)
    ]
    write(path, nodes, {f"w{i}": weight_of(rows, columns, i) for i in range(count)}, graph)
    return graph


@pytest.mark.parametrize(
    ("runtime", "name"), [(TENSORRT, "fp16"), (TENSORRT, "int4"), (CPU, "int8")]
)
def test_weights_pass_through_memory_one_at_a_time(runtime: str, name: str, tmp_path: Path) -> None:
    """16 weights of 1 MB each: what is held at once does not grow with their number."""
    graph = large(tmp_path / "llm.onnx", 16, 512, 512)
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    try:
        rewrite(
            recipe(name), graph, tmp_path / "llm.onnx", tmp_path / "out/llm.onnx", runtime=runtime
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 13e6  # float64-free work on one weight and its blocks, not 16 MB of them


def test_sensitive_weights_keep_more_bits(tmp_path: Path) -> None:
    """The head int8, the products that place MMFS's points float16, small ones float16."""
    draw = np.random.default_rng(0)
    widths = {
        "llm.layers.0.mlp.gate_up_weight": 128,
        "llm.layers.0.look_back.mmfs.query_weight": 40,
        "llm.small": 8,
        "head_weight": 112,
    }
    outputs = [Tensor(f"y{i}", "float32", ("b", width)) for i, width in enumerate(widths.values())]
    graph = contract([hidden("x", 128)], outputs)
    nodes = [
        helper.make_node("MatMul", ["x", name], [f"y{i}"], name=f"n{i}")
        for i, name in enumerate(widths)
    ]
    weights = {n: draw.standard_normal((128, w)).astype(np.float32) for n, w in widths.items()}
    path = write(tmp_path / "llm.onnx", nodes, weights, graph)
    (tmp_path / "out").mkdir()
    rewrite(recipe("int4"), graph, path, tmp_path / "out/llm.onnx", runtime=TENSORRT)
    stored = onnx.load(tmp_path / "out/llm.onnx").graph.initializer
    kinds = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in stored}
    assert {name: kind for name, kind in kinds.items() if not name.endswith("scales")} == {
        "llm.layers.0.mlp.gate_up_weight.int4": "INT4",
        "llm.layers.0.look_back.mmfs.query_weight.float16": "FLOAT16",
        "llm.small.float16": "FLOAT16",
        "head_weight.int8": "INT8",
    }
    head = next(numpy_helper.to_array(t) for t in stored if t.name == "head_weight.int8.scales")
    assert head.shape == (112,) and head.dtype == np.float16


def test_a_graph_without_products_has_nothing_to_quantise(tmp_path: Path) -> None:
    graph = contract([hidden("x", 8)], [hidden("y", 8)])
    nodes = [helper.make_node("Neg", ["x"], ["y"])]
    path = write(tmp_path / "llm.onnx", nodes, {}, graph)
    with pytest.raises(BundleError, match="llm has no matrix product to quantise.*fp32 on the CPU"):
        rewrite(recipe("int8"), graph, path, tmp_path / "out.onnx", runtime=CPU)


def test_an_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no precision 'int3'.*fp32, fp16, bf16.*or mixed"):
        recipe("int3")


@pytest.mark.parametrize(
    ("name", "runtime", "architecture", "graphs", "message"),
    [
        ("fp8", TENSORRT, "sm80", None, r"fp8 cannot be built for sm80; expected sm89 or later"),
        ("fp16", CPU, None, None, r"fp16 is not for the CPU: .*choose int8, int4"),
        ("int4", TENSORRT, "sm89", ["vision_encoder"], r"weights of llm alone.*--precision fp16"),
        ("int8", "npu", None, None, r"no backend 'npu'; expected cpu or cuda or tensorrt"),
    ],
)
def test_recipes_that_a_target_cannot_have_are_refused_in_one_line(
    name: str, runtime: str, architecture: str | None, graphs: list[str] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        check_possible(recipe(name), runtime, architecture, graphs)
    assert "\n" not in str(refused.value)


def test_every_recipe_suits_some_target() -> None:
    for made in RECIPES.values():
        check_possible(made, TENSORRT, "sm120", ["llm"])
