"""Activation-aware int4: exact in full precision, nearer to the model where channels are loud."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from deploy.targets.precision.graphs import contract, write
from exports import SHIPPED, Exported
from mmi_deploy.errors import BundleError, ConfigError
from mmi_deploy.runtime.onnxruntime.run_graph import model_runner, runner
from mmi_deploy.spec.backends import CPU, TENSORRT
from mmi_deploy.spec.graphs import Graph, Tensor
from mmi_deploy.targets.calibration import Calibration, moments_key, moments_of
from mmi_deploy.targets.precision import Moments, recipe, rewrite
from mmi_deploy.targets.precision.activation_aware import (
    Scaling,
    best_scales,
    fold_input_scales,
    scales_of,
)
from mmi_deploy.targets.precision.constants import Constants
from mmi_deploy.targets.precision.moments import measure_moments
from mmi_deploy.targets.precision.quantise import quantise
from mmi_deploy.targets.precision.recipes import INT4, Scheme, Weights
from mmi_deploy.targets.precision.rewrite import read_model
from mmi_deploy.targets.precision.weights_file import write_weights
from mmi_deploy.targets.sample_inputs import inputs_at

WIDTH, INNER = 64, 96
BLOCKS_OF_32 = Weights(Scheme(INT4, 32))


def layer(path: Path, norm: str = "RMSNormalization", further: str = "") -> tuple[Path, Graph]:
    """y = x + down(silu(gate(n)) up(n) + 0), n a norm of x with two loud channels, gate and up
    columns of one product, with a bias under LayerNormalization. further: another reader of n."""
    draw = np.random.default_rng(0)
    loud = np.ones(WIDTH, np.float32)
    loud[[3, 40]] = 30
    weights: dict[str, Any] = {
        "scale": loud,
        "gate_up": draw.standard_normal((WIDTH, 2 * INNER)).astype(np.float32) / 8,
        "down": draw.standard_normal((INNER, WIDTH)).astype(np.float32) / 10,
    }
    inputs, product = ["x", "scale"], "both"
    nodes = []
    if norm == "LayerNormalization":
        weights["shift"] = draw.standard_normal(WIDTH).astype(np.float32)
        weights["bias"] = draw.standard_normal(2 * INNER).astype(np.float32)
        inputs.append("shift")
        nodes = [helper.make_node("Add", ["both", "bias"], ["biased"], name="bias_node")]
        product = "biased"
    nodes = [
        helper.make_node(norm, inputs, ["normed"], name="norm"),
        helper.make_node("MatMul", ["normed", "gate_up"], ["both"], name="gate_up_node"),
        *nodes,
        helper.make_node("Split", [product], ["gate", "up"], axis=-1, num_outputs=2, name="apart"),
        helper.make_node("Sigmoid", ["gate"], ["open"], name="sigmoid"),
        helper.make_node("Mul", ["gate", "open"], ["silu"], name="silu_node"),
        helper.make_node("Mul", ["silu", "up"], ["inner"], name="gated"),
        helper.make_node("MatMul", ["inner", "down"], ["result"], name="down_node"),
        helper.make_node("Add", ["x", "result"], ["y"], name="residual"),
    ]
    x, y = (Tensor(name, "float32", ("b", WIDTH), activation=True) for name in "xy")
    outputs = [y]
    if further:
        nodes.append(helper.make_node("Neg", [further], ["z"], name="negative"))
        width = {"normed": WIDTH, "up": INNER}[further]
        outputs.append(Tensor("z", "float32", ("b", width), activation=True))
    graph = contract([x], outputs)
    return write(path / "portable.onnx", nodes, weights, graph), graph


def inputs(rows: int = 4, seed: int = 1) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {"x": draw.standard_normal((rows, WIDTH)).astype(np.float32)}


def moments(path: Path, graph: Graph) -> Moments:
    return measure_moments(read_model(path, graph), path.parent, [inputs(), inputs(3, 2)])


def folded(
    path: Path, graph: Graph, of: Moments, **options: Any
) -> tuple[ir.Model, Scaling, Callable[..., dict[str, np.ndarray]]]:
    """The graph with its scales folded and not quantised, what was scaled, and a run of it."""
    model = read_model(path, graph)
    done = fold_input_scales(
        model.graph, Constants(model.graph), BLOCKS_OF_32, of, TENSORRT, **options
    )
    write_weights(model.graph, path.parent / "folded.safetensors")
    return model, done, model_runner(model, path.parent)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


@pytest.mark.parametrize("norm", ["RMSNormalization", "LayerNormalization"])
def test_folded_scales_change_no_node_and_no_output(norm: str, tmp_path: Path) -> None:
    path, graph = layer(tmp_path, norm)
    model, done, run = folded(path, graph, moments(path, graph))
    assert set(done.powers) == {"gate_up", "down"} and all(done.powers.values())
    before = onnx.load(path, load_external_data=False).graph.node
    assert [(node.op_type, node.name) for node in model.graph] == [
        (node.op_type, node.name) for node in before
    ]
    given = inputs(8, 5)
    found, expected = run(given)["y"], runner(path)(given)["y"]
    assert relative(found - given["x"], expected - given["x"]) < 2e-6
    scaled = {str(value.name) for value in model.graph.initializers.values()}
    wanted = {"scale.scaled", "gate_up.scaled.scaled", "down.scaled"}
    extra = {"shift.scaled", "bias.scaled"} if norm == "LayerNormalization" else set()
    assert wanted | extra <= scaled


def error(path: Path, graph: Graph, precision: str, runtime: str, of: Moments) -> float:
    """Error of the layer, without the residual, on inputs that the moments have not seen."""
    out = path.parent / f"{precision}.onnx"
    rewrite(recipe(precision), graph, path, out, runtime=runtime, moments=of)
    given = inputs(64, 9)
    found, expected = (runner(file)(given)["y"] - given["x"] for file in (out, path))
    return relative(found, expected)


def test_loud_channels_are_kept_and_the_error_falls(tmp_path: Path) -> None:
    path, graph = layer(tmp_path)
    of = moments(path, graph)
    nearest = error(path, graph, "int4", CPU, of)
    aware = error(path, graph, "int4-awq", CPU, of)
    assert 0.03 < nearest < 0.3
    assert aware < 0.7 * nearest


def test_recorded_moments_are_those_of_numpy(tmp_path: Path) -> None:
    path, graph = layer(tmp_path)
    found = moments(path, graph)
    x = np.concatenate([inputs()["x"], inputs(3, 2)["x"]]).astype(np.float64)
    normed = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5)
    normed[:, [3, 40]] *= 30
    assert found.rows == 7 and set(found.squares) == {"normed", "inner"}
    np.testing.assert_allclose(found.squares["normed"], (normed**2).mean(0), rtol=1e-4)
    found.save(tmp_path / "moments.json")
    assert Moments.load(tmp_path / "moments.json") == found
    (tmp_path / "moments.json").write_text("{}")
    with pytest.raises(BundleError, match="holds no moments"):
        Moments.load(tmp_path / "moments.json")


@pytest.mark.parametrize(("further", "left"), [("normed", {"down"}), ("up", {"gate_up"})])
def test_nothing_is_folded_into_what_is_read_elsewhere(
    further: str, left: set[str], tmp_path: Path
) -> None:
    path, graph = layer(tmp_path, further=further)
    _, done, run = folded(path, graph, moments(path, graph))
    assert set(done.powers) == left and len(done.importance) == 2
    given = inputs()
    found, expected = run(given), runner(path)(given)
    assert relative(found["y"], expected["y"]) < 2e-6 and relative(found["z"], expected["z"]) < 2e-6


def test_scales_that_could_overflow_are_not_folded(tmp_path: Path) -> None:
    path, graph = layer(tmp_path)
    of = moments(path, graph)
    _, done, _ = folded(path, graph, of, peaks={"normed": 60.0, "up": 1e5}, greatest=16376.0)
    assert done.powers["gate_up"] > 0 and done.powers["down"] == 0


def test_other_types_stay_as_they_are(tmp_path: Path) -> None:
    path, graph = layer(tmp_path)
    model, of = read_model(path, graph), moments(path, graph)
    mixed = Weights(Scheme(INT4, 32), overrides=((r"down", Scheme("int8")), (r"gate", None)))
    done = fold_input_scales(model.graph, Constants(model.graph), mixed, of, TENSORRT)
    assert not done.powers and not done.importance


def test_a_recipe_without_recorded_activations_is_refused(tmp_path: Path) -> None:
    path, graph = layer(tmp_path)
    chosen, out = recipe("int4-awq"), tmp_path / "out.onnx"
    with pytest.raises(ConfigError, match="int4-awq needs recorded activations of llm.*unproved"):
        rewrite(chosen, graph, path, out, runtime=CPU)
    other = Moments({"normed": [1.0] * WIDTH, "inner": [1.0]}, 1)
    with pytest.raises(BundleError, match="no activations of down; expected .* 96 .*; got 1"):
        rewrite(chosen, graph, path, out, runtime=CPU, moments=other)


def test_clipping_follows_the_activations() -> None:
    """With one loud channel a block, its weight is kept and the error of the output falls."""
    draw = np.random.default_rng(0)
    weight = draw.standard_normal((64, 40)).astype(np.float32)
    squares = np.ones(64)
    squares[[5, 40]] = 1000
    scheme = Scheme(INT4, 32)

    def loss(importance: np.ndarray | None) -> float:
        rest = quantise(weight, scheme, np.float16, importance).dequantised() - weight
        return float(squares @ (rest**2).sum(1))

    assert loss(squares) < 0.9 * loss(None)
    plain = quantise(weight, scheme)
    even = quantise(weight, scheme, importance=np.full(64, 2.0))
    np.testing.assert_array_equal(plain.numbers, even.numbers)


def test_the_search_is_never_worse_than_plain_rounding() -> None:
    draw = np.random.default_rng(1)
    weight = draw.standard_normal((128, 700)).astype(np.float32)
    power, scales = best_scales(weight, np.ones(128), Scheme(INT4, 32))
    assert power == 0 and (scales == 1).all()
    squares = np.ones(128)
    squares[::32] = 400
    power, scales = best_scales(weight, squares, Scheme(INT4, 32))
    assert power > 0 and (scales[::32] > scales[1]).all()


def test_scales_are_centred_and_finite() -> None:
    squares = np.array([0.0, 1e-30, 1.0, 400.0])
    for power in (0.0, 0.5, 1.0):
        scales = scales_of(squares, power)
        assert np.isfinite(scales).all() and scales.min() > 0
        assert scales.max() * scales.min() == pytest.approx(1, rel=1e-5)
    assert scales_of(squares, 1.0)[3] / scales_of(squares, 1.0)[2] == pytest.approx(20, rel=1e-5)
    assert (scales_of(np.zeros(3), 0.7) == 1).all()


@pytest.mark.slow
def test_the_language_model_stays_the_same_and_is_kept_for_its_bundle(
    exported_once: Callable[[str], Exported], tmp_path: Path
) -> None:
    """All norms before q, k and v and before MLPs, and all gated products: 18 of tiny's 27."""
    bundle = exported_once(SHIPPED).bundle
    graph, path = bundle.graphs["llm"], bundle.graph_file("llm")
    said: list[str] = []
    calibration = Calibration(bundle, tmp_path / "ranges", said.append)
    assert calibration.moments("llm", recipe("int4")) is None
    assert calibration.moments("vae_decoder", recipe("int4-awq")) is None and not said
    of = calibration.moments("llm", recipe("int4-awq"))
    assert of is not None and of == moments_of(bundle, "llm", calibration.samples["llm"])
    assert said == ["recording inputs", "measuring activations of llm"]
    again = Calibration(bundle, tmp_path / "ranges", said.append)
    assert again.moments("llm", recipe("int4-awq-128")) == of and len(said) == 2
    assert moments_key(of) and not moments_key(None)

    model, weights = read_model(path, graph), recipe("int4-awq").weights["llm"]
    done = fold_input_scales(model.graph, Constants(model.graph), weights, of, TENSORRT)
    assert len(done.powers) == 3 * bundle.config.llama.layers and all(done.powers.values())
    write_weights(model.graph, tmp_path / "folded.safetensors")
    given = inputs_at(
        graph, {"b": 1, "n": 1, "t": 9, "w": 1, "v": 8, "m": 1}, np.random.default_rng(0)
    )
    found, expected = model_runner(model, tmp_path)(given), runner(path)(given)
    for name in found:
        assert relative(found[name], expected[name]) < 1e-4, name
