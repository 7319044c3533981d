"""Build engines with TensorRT-RTX, which takes no GPU to build, for the plugin tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from mmi_deploy.spec.graphs import Graph
from mmi_plugins.operator import DOMAIN, INDEX_INPUTS, INPUT_SHAPES, NAME, NARROW_INPUTS

# Input name -> (min, opt, max) shape.
Profile = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]

SIZES = {"b": 1, "m": 2, "h": 2, "l": 2, "p": 4, "d": 32, "n": 3, "s": 20, "r": 8, "2": 2}
ATTRIBUTES = {"level_heights": [4, 2], "level_widths": [4, 2], "base_grid": 16.0, "null_slot": 1}


def one_node(
    narrow: int = TensorProto.FLOAT16,
    *,
    types: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    attributes: Mapping[str, object] | None = None,
    namespace: str = DOMAIN,
) -> onnx.ModelProto:
    """A graph of the operator alone with q dynamic; `types`, `shapes` and `attributes` (None drops
    one) replace parts of it, right or wrong."""
    kinds = {
        name: TensorProto.INT32
        if name in INDEX_INPUTS
        else narrow
        if name in NARROW_INPUTS
        else TensorProto.FLOAT
        for name in INPUT_SHAPES
    } | dict(types or {})
    sides: dict[str, Sequence[int | str]] = {
        name: [
            "q" if letter == "q" or (letter == "*" and name == "image_position") else
            SIZES.get(letter, 1)
            for letter in axes
        ]
        for name, axes in INPUT_SHAPES.items()
    } | dict(shapes or {})  # fmt: skip
    given = {**ATTRIBUTES, **(attributes or {})}
    kept = {name: value for name, value in given.items() if value is not None}
    node = helper.make_node(
        NAME, list(INPUT_SHAPES), ["output"], domain=DOMAIN, plugin_namespace=namespace, **kept
    )
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info(name, kinds[name], sides[name]) for name in INPUT_SHAPES],
        [helper.make_tensor_value_info("output", kinds["value"], None)],
    )
    versions = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=10)


def add_function(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with a local function of the operator's name, as every exported graph has one."""
    body = [helper.make_node("Identity", ["value"], ["output"])]
    model.functions.append(
        helper.make_function(
            DOMAIN,
            NAME,
            list(INPUT_SHAPES),
            ["output"],
            body,
            [helper.make_opsetid("", 24)],
            list(ATTRIBUTES),
        )
    )
    return model


# The ranges of `one_node`.
QUERIES: Profile = {
    "offsets": tuple([1, q, 2, 4, 2] for q in (1, 64, 512)),
    "logits": tuple([1, q, 2, 2, 4] for q in (1, 64, 512)),
    "image_position": tuple([1, q, 2] for q in (1, 64, 512)),
}


def profile_of(graph: Graph) -> Profile:
    """The ranges that the contract gives a graph's inputs."""
    return {
        tensor.name: tuple(
            tensor.resolve(**{letter: getattr(of, end) for letter, of in graph.ranges.items()})
            for end in ("min", "opt", "max")
        )
        for tensor in graph.inputs
        if any(isinstance(side, str) for side in tensor.shape)
    }


@dataclass
class Build:
    """Result of a build: the engine's bytes, the layers of the parsed network, the last step that
    succeeded, and all logged lines."""

    engine: bytes = b""
    layers: list[str] = field(default_factory=list)
    network: Any = None
    lines: list[tuple[str, str]] = field(default_factory=list)

    def errors(self) -> str:
        """Everything logged as an error."""
        return "\n".join(line for severity, line in self.lines if severity == "ERROR")


def build(
    trt: Any,
    model: onnx.ModelProto,
    *,
    profile: Profile | None = QUERIES,
    architecture: str = "SM89",
    path: Path | None = None,
) -> Build:
    """Parse `model` (its weights beside `path`) and build it for an architecture."""
    done = Build()

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, line: str) -> None:
            done.lines.append((severity.name, line))

    builder = trt.Builder(Log())
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse(model.SerializeToString(), *([] if path is None else [str(path)])):
        return done
    done.network = network
    done.layers = [network.get_layer(index).type.name for index in range(network.num_layers)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, architecture), 0)
    if profile is not None:
        ranges = builder.create_optimization_profile()
        for name, shapes in profile.items():
            ranges.set_shape(name, *shapes)
        config.add_optimization_profile(ranges)
    engine = builder.build_serialized_network(network, config)
    done.engine = b"" if engine is None else bytes(engine)
    return done
