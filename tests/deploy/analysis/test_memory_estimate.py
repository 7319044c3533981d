"""Memory estimate: weights as the recipes store them, workspaces, and the recipe that fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from exports import Exported
from mmi_deploy.analysis.gpu_specs import GB, GPUS
from mmi_deploy.analysis.memory_estimate import (
    Model,
    parse_bytes,
    recipe_for,
    weight_bytes,
    workspace,
)
from mmi_deploy.analysis.shapes import read_graph, sized
from mmi_deploy.analysis.stored_bytes import as_in_file, storage_of
from mmi_deploy.cli.app import run
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.memory_plan import SHALLOW
from mmi_deploy.spec.backends import CPU, TENSORRT
from mmi_deploy.spec.graphs import Graph, Tensor, chosen_sizes
from mmi_deploy.targets.precision import RECIPES, rewrite
from mmi_deploy.targets.tensorrt_plan import weights_of

ON = {TENSORRT: ("fp32", "fp16", "int8", "int4", "int4-128", "fp8", "mixed"), CPU: ("int8", "int4")}


@pytest.fixture(scope="module")
def exported(exported_once: Callable[[str], Exported]) -> Exported:
    return exported_once("paper")


@pytest.fixture(scope="module")
def model(exported: Exported) -> Model:
    bundle = exported.bundle
    files = {name: bundle.graph_file(name) for name in bundle.graphs}
    limits = replace(bundle.limits, batch=1, images=4)
    return Model(bundle.config, files, bundle.limits.context, limits)


@pytest.mark.parametrize("graph", ["llm", "denoise_step"])
@pytest.mark.parametrize(
    ("runtime", "precision"), [(runtime, name) for runtime in ON for name in ON[runtime]]
)
def test_weights_take_what_the_rewritten_graph_stores(
    exported: Exported, tmp_path: Path, graph: str, runtime: str, precision: str
) -> None:
    """The arithmetic of `storage_of` beside the bytes that the recipe writes, scales included. A
    handful of numbers outside matrix products may stay in float32."""
    contract, source = exported.bundle.graphs[graph], exported.bundle.graph_file(graph)
    sizes = chosen_sizes(contract, {})
    portable = sized(read_graph(source), contract, sizes)
    out = tmp_path / f"{graph}.onnx"
    typed = rewrite(RECIPES[precision], contract, source, out, runtime=runtime)
    written = sized(read_graph(out), typed, sizes)
    planned = storage_of(portable, contract, RECIPES[precision], runtime)
    stored = weight_bytes(written, as_in_file(written))
    if runtime == TENSORRT:  # what a build plans with, from names and sizes alone
        planned_build = weights_of(exported.bundle, RECIPES[precision], graph)
        assert planned_build == pytest.approx(stored, rel=0.05)
    assert weight_bytes(portable, planned) == pytest.approx(stored, rel=1e-3)
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir() if path != out)
    assert stored == pytest.approx(on_disk, rel=0.05)


def test_the_workspace_is_what_lives_at_once() -> None:
    """a -> b -> c -> sum of a and c: at the end of c all three are there, b is not needed after.

    Elements of float32: a, b and c 100 each. While c is made: a, b, c. The reshape of c is c."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Sigmoid", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Reshape", ["c", "shape"], ["d"]),
        helper.make_node("Add", ["a", "d"], ["y"]),
    ]
    floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [10, 10]) for name in "xy"]
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [10, 10])
    whole = helper.make_graph(nodes, "one", floats[:1], floats[1:], [shape])
    proto = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 24)])
    contract = Graph("one", (Tensor("x", "float32", (10, 10)),), (), {})
    graph = sized(proto, contract, {})
    assert workspace(graph, as_in_file(graph)) == 3 * 400


def test_a_cache_written_in_place_needs_no_workspace() -> None:
    """Nor does what it is renamed to; what is computed from it does."""
    nodes = [
        helper.make_node("TensorScatter", ["past", "new", "at"], ["present"], axis=2),
        helper.make_node("Squeeze", ["present", "axis"], ["rows"]),
        helper.make_node("ReduceSum", ["rows", "axis"], ["sums"], keepdims=0),
        helper.make_node("Relu", ["sums"], ["y"]),
    ]
    shapes = {"past": (1, 3, 100, 4), "new": (1, 3, 1, 4), "at": (1,)}
    inputs = [
        helper.make_tensor_value_info(
            name, TensorProto.INT64 if name == "at" else TensorProto.FLOAT, shape
        )
        for name, shape in shapes.items()
    ]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("present", "y")]
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [0])
    whole = helper.make_graph(nodes, "one", inputs, outputs, [axis])
    proto = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 24)])
    tensors = (Tensor(name, "float32", shape) for name, shape in shapes.items())
    graph = sized(proto, Graph("one", tuple(tensors), (), {}), {})
    assert workspace(graph, as_in_file(graph)) == 4 * 100 * 4  # the sums alone


def test_the_whole_is_the_sum_of_its_parts(model: Model) -> None:
    memory = model.memory(RECIPES["fp16"])
    weights = sum(graph.weights for graph in memory.graphs)
    rest = memory.workspace + memory.overhead + sum(memory.documents.values())
    assert memory.total == weights + rest
    assert SHALLOW not in {graph.graph for graph in memory.graphs}
    parameters = sum(p.numel() for p in model_parameters(model))
    assert weights == pytest.approx(2 * parameters, rel=0.35)


def model_parameters(model: Model):  # type: ignore[no-untyped-def]
    from mmi_train.model.mm_interleaved import MMInterleaved

    return MMInterleaved(model.config).parameters()


def test_documents_take_twice_as_much_in_float32_and_each_its_own(model: Model) -> None:
    half, single = model.memory(RECIPES["fp16"]), model.memory(RECIPES["fp32"])
    assert single.documents["KV cache"] == 2 * half.documents["KV cache"]
    two = Model(
        model.config, model.files, model.exported.context, replace(model.limits, batch=2)
    ).memory(RECIPES["fp16"])
    assert two.documents["image values"] == 2 * half.documents["image values"]
    assert two.weights == half.weights


def test_engines_in_turns_take_no_more_than_the_largest(model: Model) -> None:
    everything = model.memory(RECIPES["fp16"])
    in_turns = model.memory(RECIPES["fp16"], ())
    by_graph = {graph.graph: graph.weights for graph in in_turns.graphs}
    encoder = by_graph["vision_encoder"] + by_graph["llm_values"]
    assert in_turns.weights == max(encoder, by_graph["denoise_step"], by_graph["llm"])
    keeping = model.memory(RECIPES["fp16"], ("llm",))
    assert in_turns.weights < keeping.weights < everything.weights
    assert model.memory(RECIPES["fp16"], ("llm", "llm")) == keeping
    with pytest.raises(ConfigError, match="no engines are called 'lm'; expected encoder"):
        model.memory(RECIPES["fp16"], ("lm",))


def test_the_most_faithful_recipe_that_fits_is_chosen(model: Model) -> None:
    totals = {name: model.memory(RECIPES[name]).total for name in ("fp16", "int8", "int4")}
    assert totals["fp16"] > totals["int8"] > totals["int4"]
    assert model.recipe_for(totals["fp16"]).recipe == "fp16"
    choice = model.recipe_for(totals["fp16"] - 1)
    assert choice.recipe == "int8" and choice.resident is None
    assert choice.spare == totals["fp16"] - 1 - totals["int8"]
    less = model.recipe_for(totals["int4"] - 1)
    assert less.resident is not None and less.memory.total < totals["int4"]
    smallest = min(model.memory(RECIPES[name], ()).total for name in totals)
    with pytest.raises(ConfigError, match="no recipe fits paper_reading into"):
        model.recipe_for(smallest - 1)


def test_asking_once_is_asking_the_model(model: Model) -> None:
    once = recipe_for(GB, model.config, model.files, model.exported.context, model.limits)
    assert once == model.recipe_for(GB)


def test_more_slots_than_were_exported_are_refused(model: Model) -> None:
    more = replace(model.limits, context=model.exported.context + 1)
    with pytest.raises(ConfigError, match="smaller KV cache; expected at most 64 tokens; got 65"):
        Model(model.config, model.files, model.exported.context, more)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * GB), ("512 MB", 512 * 10**6), ("1.5g", 1_500_000_000), ("8GiB", 2**33)],
)
def test_amounts_of_memory_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["lots", "", "GB", "12 apples", "1e400GB", "nan", "-5GB", "0GB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an amount of memory"):
        parse_bytes(text)


def test_shared_memory_leaves_room_for_the_system() -> None:
    assert GPUS["orin-64"].room == 59 * GB and GPUS["l4"].room == 23 * GB


def test_the_command_tells_what_the_model_does(
    exported: Exported, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(exported.bundle.folder)
    assert run(["inspect", "memory", folder, "--json", "--gpu", "l4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["batch"] == 1 and report["images"] == 4
    by_recipe = {row["recipe"]: row for row in report["recipes"]}
    assert by_recipe.keys() == RECIPES.keys()
    assert by_recipe["int8"]["bytes"] == model.memory(RECIPES["int8"]).total
    assert by_recipe["int8"]["holds"]["8 GB"] and by_recipe["int8"]["holds"]["l4"]
    budget = f"{by_recipe['int8']['bytes'] / 1e6:.6f}MB"
    assert run(["inspect", "memory", folder, "--fit", budget]) == 0
    assert "--precision int8 and keep all engines" in capsys.readouterr().out


def test_every_card_gets_what_fits_it_and_floors(
    exported: Exported, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture is 20 steps and what is done once; twice the bandwidth is half the time of what
    memory bounds."""
    assert run(["inspect", "gpus", str(exported.bundle.folder), "--json"]) == 0
    rows = {row["gpu"]: row for row in json.loads(capsys.readouterr().out)["gpus"]}
    assert rows.keys() == GPUS.keys()
    for row in rows.values():
        assert row["recipe"] == "fp16" and row["resident"] is None
        assert row["bytes"] == model.memory(RECIPES["fp16"]).total
        assert row["seconds"]["picture"] > 20 * row["seconds"]["step"]
    token = {name: row["seconds"]["token"] for name, row in rows.items()}
    faster = GPUS["h200"].bandwidth / GPUS["h100"].bandwidth
    assert token["h100"] / token["h200"] == pytest.approx(faster)
    assert run(["inspect", "gpus", str(exported.bundle.folder), "--gpu", "l4"]) == 0
    assert "not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--resident", "everything"], "no engines are called 'everything'"),
        (["--context", "9999"], "the graphs have a smaller KV cache"),
        (["--cpu", "--precision", "fp16"], "precision fp16 is not for the CPU"),
        (["--fit", "24GB", "--precision", "int8"], "--fit chooses precision and residency"),
        (["--fit", "12 apples"], "is not an amount of memory"),
        (["--fit", "1kB"], "no recipe fits paper_reading into 1.0 kB"),
    ],
)
def test_wrong_questions_get_one_line(
    exported: Exported, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", "memory", str(exported.bundle.folder), *arguments]) == 2
    assert line in capsys.readouterr().err
