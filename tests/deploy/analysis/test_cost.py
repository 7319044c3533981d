"""Cost of graphs: counted from the ONNX file, and by independent counters."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from exports import Exported
from mmi_deploy.analysis.cost import GraphCost, cost, cost_of_file
from mmi_deploy.analysis.flop_rules import RULES, VIEWS
from mmi_deploy.analysis.gpu_specs import GPUS
from mmi_deploy.analysis.shapes import read_graph, sized
from mmi_deploy.analysis.stored_bytes import as_in_file
from mmi_deploy.cli.app import run
from mmi_deploy.errors import BundleError, ConfigError
from mmi_deploy.spec.graphs import MMFS_DOMAIN, MMFS_OPERATOR, Graph, Tensor
from mmi_deploy.targets.precision.recipes import RECIPES, quantised_bytes
from mmi_export.export import MODULES

SIZES = (
    {"b": 1, "t": 1, "w": 1, "v": 4, "n": 1, "m": 1, "x": 5, "steps": 3},
    {"b": 2, "t": 7, "w": 3, "v": 9, "n": 3, "m": 2, "x": 11, "steps": 5},
)


@pytest.fixture(scope="module")
def exported(exported_once: Callable[[str], Exported]) -> Exported:
    return exported_once("paper")


def counted(exported: Exported, graph: str, sizes: Mapping[str, int]) -> GraphCost:
    contract = exported.bundle.graphs[graph]
    given = {letter: sizes[letter] for letter in contract.ranges}
    if "m" in given:
        given["m"] = min(given["m"], contract.ranges["m"].max)
    return cost_of_file(exported.bundle.graph_file(graph), contract, given)


def counted_by_torch(exported: Exported, graph: Graph, sizes: Mapping[str, int]) -> int:
    """FLOPs of matrix products, convolutions and attention while the module runs."""
    module = MODULES[graph.name](exported.model, graph).requires_grad_(False)
    inputs = {
        tensor.name: torch.full(
            tensor.resolve(**sizes), tensor.min, dtype=getattr(torch, tensor.dtype)
        )
        for tensor in graph.inputs
    }
    # Written out: torch knows no count for its fused attention on a CPU.
    attends = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), attends, FlopCounterMode(display=False) as counter:
        module(inputs)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("sizes", SIZES, ids=["one", "several"])
@pytest.mark.parametrize("graph", MODULES)
def test_matrix_flops_are_those_that_torch_counts(
    exported: Exported, graph: str, sizes: dict[str, int]
) -> None:
    """Every product, convolution and attention of the module is in the file, and no other."""
    found = counted(exported, graph, sizes)
    contract = exported.bundle.graphs[graph]
    assert found.total.matrix == counted_by_torch(exported, contract, found.sizes)


class Counted(float):
    """A number that counts what is done with it."""

    operations = 0

    @classmethod
    def _made(cls, value: float) -> Counted:
        Counted.operations += 1
        return Counted(value)

    def __add__(self, other: float) -> Counted:
        return self._made(float(self) + float(other))

    def __sub__(self, other: float) -> Counted:
        return self._made(float(self) - float(other))

    def __mul__(self, other: float) -> Counted:
        return self._made(float(self) * float(other))

    def __truediv__(self, other: float) -> Counted:
        return self._made(float(self) / float(other))


def exponential(x: Counted) -> Counted:
    return Counted._made(float(np.exp(float(x))))


def floor(x: Counted) -> Counted:
    return Counted._made(float(np.floor(float(x))))


def greatest(x: Counted, y: Counted) -> Counted:
    return Counted._made(max(float(x), float(y)))


def mmfs_operations(
    queries: int, images: int, levels: int, heads: int, points: int, channels: int, null_slot: bool
) -> int:
    """Operations of the operator's definition, written down number by number for one batch row."""
    number = Counted(0.3)
    Counted.operations = 0
    for _ in range(queries * heads):
        scores = []
        best, total = Counted(-9.0), Counted(0.0)
        places = {}
        for image, point in itertools.product(range(images), range(points)):
            places[image, point] = [
                number + (number + number) / 16.0 for _axis in range(2)
            ]  # reference + (offset + row of the table) / base grid
        for _ in range(images * levels * points):
            scores.append(number + number)  # logit + row of the table
            best = greatest(best, scores[-1])
        weights = []
        for score in scores:
            weights.append(exponential(score - best))
            total = total + weights[-1]
        weights = [weight / total for weight in weights]
        sums = [Counted(0.0)] * channels
        for (image, point), level in itertools.product(places, range(levels)):
            x, y = (place * 8.0 - 0.5 for place in places[image, point])
            left, top = floor(x), floor(y)
            across, down = x - left, y - top
            across_too, down_too = Counted(1.0) - across, Counted(1.0) - down
            corners = [across * down, across * down_too, across_too * down, across_too * down_too]
            for corner in corners:
                share = corner * weights[level]
                sums = [total_ + share * number for total_ in sums]
        if null_slot:
            sums = [total_ + number * number for total_ in sums]
    return Counted.operations


@pytest.mark.parametrize("null_slot", [False, True])
def test_mmfs_costs_what_its_definition_does(null_slot: bool) -> None:
    """The rule may divide once at the end where the definition divides every weight; apart from
    that it counts every operation."""
    q, m, levels, h, p, d = 3, 2, 2, 2, 3, 4
    graph = mmfs_graph(q, m, levels, h, p, d, null_slot)
    by_rule = cost(graph, {}, as_in_file(graph)).total
    end = q * h * d
    by_hand = mmfs_operations(q, m, levels, h, p, d, null_slot)
    assert by_rule.vector - end == by_hand
    assert by_rule.matrix == 0


def mmfs_graph(q: int, m: int, levels: int, h: int, p: int, d: int, null_slot: bool):  # type: ignore[no-untyped-def]
    sides = [4, 2][:levels]
    cells = sum(side * side for side in sides)
    shapes = {
        "value": (5, cells, h, d),
        "image_slot": (1, m),
        "offsets": (1, q, h, p, 2),
        "logits": (1, q, h, levels, p),
        "offset_table": (4, h, p, 2),
        "logit_table": (4, h, levels, p),
        "image_position": (1, q, m),
        "reference": (1, 2),
        "null_value": (h, d),
    }
    integers = ("image_slot", "image_position")
    types = {name: TensorProto.INT32 if name in integers else TensorProto.FLOAT for name in shapes}
    node = helper.make_node(
        MMFS_OPERATOR,
        list(shapes),
        ["out"],
        domain=MMFS_DOMAIN,
        level_heights=sides,
        level_widths=sides,
        base_grid=4.0,
        null_slot=int(null_slot),
    )
    return one_node(node, shapes, types, [MMFS_DOMAIN])


def one_node(  # type: ignore[no-untyped-def]
    node: onnx.NodeProto,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, int] | None = None,
    domains: tuple[str, ...] | list[str] = (),
):
    types = types or dict.fromkeys(shapes, TensorProto.FLOAT)
    inputs = [helper.make_tensor_value_info(n, types[n], list(s)) for n, s in shapes.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    opsets = [helper.make_opsetid("", 24), *(helper.make_opsetid(name, 1) for name in domains)]
    model = helper.make_model(
        helper.make_graph([node], "one", inputs, outputs), opset_imports=opsets
    )
    names = {1: "float32", 6: "int32", 7: "int64"}
    contract = Graph(
        "one",
        tuple(Tensor(name, names[types[name]], shape) for name, shape in shapes.items()),
        (),
        {},
    )
    return sized(model, contract, {})


def test_an_operator_without_a_rule_is_named() -> None:
    node = helper.make_node("Selu", ["x"], ["y"], name="the_node")
    graph = one_node(node, {"x": (2, 3)})
    with pytest.raises(BundleError, match="no FLOP rule for operator Selu .*the_node"):
        cost(graph, {}, as_in_file(graph))


def test_an_operator_of_another_domain_is_named() -> None:
    node = helper.make_node("Magic", ["x"], ["y"], name="spell", domain="elsewhere")
    with pytest.raises(BundleError, match=r"cannot size elsewhere\.Magic 'spell'"):
        one_node(node, {"x": (2, 3)}, domains=("elsewhere",))


@pytest.mark.parametrize("graph", MODULES)
def test_every_operator_of_every_graph_has_a_rule(exported: Exported, graph: str) -> None:
    used = {
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        for node in exported.graph(graph).graph.node
    }
    assert used <= {*RULES, *VIEWS}


@pytest.mark.parametrize("graph", MODULES)
def test_sizes_inside_a_graph_are_those_that_it_has_when_it_runs(
    exported: Exported, graph: str
) -> None:
    """Outputs are the contract's at sizes that no export has seen."""
    contract = exported.bundle.graphs[graph]
    sizes = {letter: min(3, allowed.max) for letter, allowed in contract.ranges.items()}
    found = sized(read_graph(exported.bundle.graph_file(graph)), contract, sizes)
    assert {value.name: value.shape for value in found.outputs} == {
        tensor.name: tensor.resolve(**sizes) for tensor in contract.outputs
    }


def test_the_floor_of_a_product_is_its_three_matrices() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = one_node(node, {"x": (3, 5), "w": (5, 7)})
    found = cost(graph, {}, as_in_file(graph))
    assert found.total.matrix == 2 * 3 * 5 * 7
    assert found.input_bytes == 4 * (3 * 5 + 5 * 7) and found.output_bytes == 4 * 3 * 7
    assert found.total.bytes == found.floor_bytes


@pytest.mark.parametrize(("table", "read"), [(1000, 3), (2, 2)])
def test_a_gather_reads_the_rows_that_it_takes(table: int, read: int) -> None:
    """Three rows; of a table that has fewer all of them, once."""
    node = helper.make_node("Gather", ["table", "rows"], ["y"])
    types = {"table": TensorProto.FLOAT, "rows": TensorProto.INT64}
    graph = one_node(node, {"table": (table, 8), "rows": (3,)}, types)
    found = cost(graph, {}, as_in_file(graph))
    assert found.input_bytes == 4 * read * 8 + 8 * 3 and found.output_bytes == 4 * 3 * 8


def test_a_cache_is_written_where_the_new_rows_go() -> None:
    node = helper.make_node("TensorScatter", ["past", "new", "at"], ["present"], axis=2)
    types = {"past": TensorProto.FLOAT, "new": TensorProto.FLOAT, "at": TensorProto.INT64}
    shapes = {"past": (2, 3, 100, 4), "new": (2, 3, 1, 4), "at": (2,)}
    found_graph = one_node(node, shapes, types)
    found = cost(found_graph, {}, as_in_file(found_graph))
    assert found.output_bytes == 4 * 2 * 3 * 4
    assert found.input_bytes == 4 * 2 * 3 * 4 + 8 * 2


def test_a_decode_step_reads_the_weights_and_the_cache_once(exported: Exported) -> None:
    """All weights of the file but the embeddings, of which it takes one row per token, and the
    whole cache: attention runs over all its slots."""
    contract = exported.bundle.graphs["llm"]
    found = counted(exported, "llm", SIZES[0])
    model = exported.graph("llm")
    stored = sum(
        4 * int(np.prod(weight.dims))
        for weight in model.graph.initializer
        if weight.data_type == TensorProto.FLOAT
    )
    llama = exported.model.config.llama
    not_read = 4 * (llama.vocab - 1) * llama.width
    assert found.weight_bytes == pytest.approx(stored - not_read, rel=0.01)
    cache = sum(4 * int(np.prod(contract[past].resolve(**found.sizes))) for past in _past(contract))
    assert found.input_bytes > cache


def _past(contract: Graph) -> list[str]:
    return list(contract.in_place.values())


def test_recipes_change_bytes_and_not_flops(exported: Exported) -> None:
    path, contract = exported.bundle.graph_file("llm"), exported.bundle.graphs["llm"]
    plain = cost_of_file(path, contract, {})
    half = cost_of_file(path, contract, {}, RECIPES["fp16"])
    four = cost_of_file(path, contract, {}, RECIPES["int4"])
    assert half.total.flops == four.total.flops == plain.total.flops
    assert half.weight_bytes == pytest.approx(plain.weight_bytes / 2, rel=0.01)
    assert four.weight_bytes < 0.35 * half.weight_bytes
    assert plain.compute == "float32" and half.compute == "float16"


def test_quantised_weights_bring_their_scales() -> None:
    recipe = RECIPES["int4"].weights["llm"].scheme
    assert quantised_bytes((320, 10), recipe, 16) == 320 * 10 // 2 + 320 // 32 * 10 * 2
    assert quantised_bytes((320, 10), replace(recipe, block=0), 16) == 1600 + 20


def test_sizes_outside_the_contract_are_refused(exported: Exported) -> None:
    path, contract = exported.bundle.graph_file("llm"), exported.bundle.graphs["llm"]
    with pytest.raises(ConfigError, match="llm cannot be run with t=65; expected 1 to 64"):
        cost_of_file(path, contract, {"t": 65})


def test_the_command_says_what_the_count_says(
    exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(exported.bundle.folder)
    asked = ["--graph", "llm", "--sizes", "t=1,m=2,n=2", "--gpu", "l4", "--json"]
    assert run(["inspect", "cost", folder, *asked]) == 0
    (report,) = json.loads(capsys.readouterr().out)["graphs"]
    sizes = {"t": 1, "m": 2, "n": 2}
    found = cost_of_file(exported.bundle.graph_file("llm"), exported.bundle.graphs["llm"], sizes)
    assert report["matrix_flops"] == found.total.matrix == sum(n["matrix"] for n in report["nodes"])
    assert report["roofline"]["l4"]["seconds"] == found.seconds(GPUS["l4"])
    assert run(["inspect", "cost", folder, "--graph", "llm"]) == 0
    assert "MultiImageDeformableAttention" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--sizes", "z=3"], "'z=3' is not a size"),
        (["--sizes", "t=-3"], "'t=-3' is not a size"),
        (["--graph", "nothing"], "there is no graph 'nothing'"),
        (["--gpu", "abacus"], "unknown GPU 'abacus'"),
        (["--precision", "int3"], "no precision 'int3'"),
    ],
)
def test_wrong_questions_get_one_line(
    exported: Exported, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", "cost", str(exported.bundle.folder), *arguments]) == 2
    assert line in capsys.readouterr().err


def test_graphs_of_a_preset_are_those_in_bundles(
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["inspect", "cost", "--preset", "tiny"]
    assert run(asked) == 2
    fix = "`mmi export --preset tiny --sparse-weights -o bundles/tiny`"
    assert fix in capsys.readouterr().err
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "tiny").symlink_to(exported.bundle.folder)
    assert run(asked) == 0
    assert "denoise_step" in capsys.readouterr().out
    assert run(["inspect", "cost"]) == 2
    assert "no graphs were given" in capsys.readouterr().err
    assert run(["inspect", "cost", "--preset", "huge"]) == 2
    assert "there is no preset 'huge'" in capsys.readouterr().err


def test_a_picture_of_the_costs_is_drawn(exported: Exported, tmp_path: Path) -> None:
    folder, picture = str(exported.bundle.folder), tmp_path / "cost.svg"
    assert run(["inspect", "cost", folder, "--plot", str(picture)]) == 0
    assert "<svg" in picture.read_text()
    assert run(["inspect", "cost", folder, "--plot", str(tmp_path / "cost.gif")]) == 2


def test_a_broken_graph_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "llm.onnx").write_bytes(b"no graph at all")
    with pytest.raises(BundleError, match=r"llm\.onnx is not an ONNX file"):
        read_graph(tmp_path / "llm.onnx")
