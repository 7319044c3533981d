"""TensorRT-RTX builds our graphs with the plugin inside, on a machine without a GPU: through the
build-only plugin always, and through the library where it can be compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from exports import SHIPPED, Exported
from mmi_deploy.errors import BundleError, EngineError
from mmi_deploy.spec.graphs import Graph
from mmi_plugins.tensorrt.build_only_plugin import (
    FIELDS,
    BuildOnlyPlugin,
    register_build_only_plugin,
)
from mmi_plugins.tensorrt.graph import (
    DECOMPOSABLE,
    PLUGIN_NAMESPACE,
    check_plugin_layers,
    with_decomposable_attention,
    with_plugin,
)
from mmi_plugins.tensorrt.plugin_library import PluginLibrary, load_tensorrt_plugin, plugin_creator
from oracles.tensorrt_builds import ATTRIBUTES, add_function, build, one_node, profile_of

ARCHITECTURES = ("SM80", "SM89", "SM120")
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


@pytest.fixture(params=["build-only", pytest.param("library", marks=pytest.mark.slow)])
def plugin(request: pytest.FixtureRequest, rtx: Any) -> Iterator[BuildOnlyPlugin | PluginLibrary]:
    """Our plugin in RTX's registry, in either form."""
    made: BuildOnlyPlugin | PluginLibrary
    if request.param == "library":
        made = load_tensorrt_plugin(request.getfixturevalue("library"), rtx)
    else:
        made = register_build_only_plugin(rtx)
    yield made
    made.unregister()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", list(TYPES))
def test_the_operator_alone_is_built(rtx: Any, plugin: Any, dtype: str, architecture: str) -> None:
    done = build(rtx, one_node(TYPES[dtype]), architecture=architecture)
    assert done.layers == ["PLUGIN_V3"]
    assert done.engine, done.errors()
    output = done.network.get_output(0)
    assert tuple(output.shape) == (1, -1, 64)
    assert output.dtype == getattr(rtx, dtype)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"types": {"offsets": TensorProto.FLOAT}}, "wrong type of offsets"),
        ({"types": {"image_slot": TensorProto.INT64}}, "wrong type of image_slot"),
        ({"types": {"null_value": TensorProto.FLOAT16}}, "wrong type of null_value"),
        ({"shapes": {"null_value": [3, 32]}}, "null_value and value differ in h"),
        ({"shapes": {"value": [3, 20, 2, 36], "null_value": [2, 36]}}, "head size"),
        ({"attributes": {"level_heights": [4, 3]}}, "differ in s"),
        ({"attributes": {"level_heights": None}}, "level_heights"),
        ({"attributes": {"base_grid": None}}, "base_grid"),
        ({"attributes": {"base_grid": 16}}, "base_grid"),
    ],
)
def test_a_graph_that_is_wrong_is_refused_in_one_line(
    rtx: Any, plugin: Any, changed: dict[str, Any], reason: str
) -> None:
    done = build(rtx, one_node(**changed))
    assert not done.engine and not done.layers
    report = plugin.last_report()
    assert reason in report and len(report.splitlines()) == 1


def test_a_missing_profile_is_refused(rtx: Any, plugin: Any) -> None:
    done = build(rtx, one_node(), profile=None)
    assert not done.engine
    assert "no optimization profile has been defined" in done.errors()


def test_the_plugin_wins_over_the_function(rtx: Any, plugin: Any) -> None:
    model = add_function(one_node())
    done = build(rtx, model)
    assert done.layers == ["PLUGIN_V3"]
    check_plugin_layers(done.network, model)


@pytest.mark.parametrize("namespace", ["other", ""])
def test_another_namespace_would_silently_take_the_function(
    rtx: Any, plugin: Any, namespace: str
) -> None:
    """TensorRT says nothing; the check does."""
    model = add_function(one_node(namespace=namespace))
    done = build(rtx, model)
    assert "PLUGIN_V3" not in done.layers
    with pytest.raises(EngineError, match="expected 1 PLUGIN_V3 layers; got 0.*with_plugin"):
        check_plugin_layers(done.network, model)


def test_without_the_plugin_the_parser_names_what_is_missing(rtx: Any) -> None:
    done = build(rtx, one_node())
    assert not done.layers
    assert "Plugin not found" in done.errors() and "namespace" in done.errors()


def test_a_second_plugin_of_that_name_is_refused(rtx: Any, plugin: Any) -> None:
    with pytest.raises(EngineError, match="has a plugin mmi::.* already"):
        register_build_only_plugin(rtx)


def test_the_build_only_plugin_stores_what_the_library_stores(rtx: Any) -> None:
    """Names, types and values equal those of test_tensorrt_library, so that an engine built with
    one plugin is read by the other."""
    kinds = {np.int32: rtx.PluginFieldType.INT32, np.float32: rtx.PluginFieldType.FLOAT32}
    given = [
        rtx.PluginField(name, np.atleast_1d(np.array(ATTRIBUTES[name], kind)), kinds[kind])
        for name, kind in FIELDS.items()
    ]
    build_only = register_build_only_plugin(rtx)
    try:
        made = plugin_creator(rtx).create_plugin(
            "", rtx.PluginFieldCollection(given), rtx.TensorRTPhase.BUILD
        )
        fields = list(made.get_fields_to_serialize())
        stored = {field.name: np.array(field.data).tolist() for field in fields}
        expected = {name: np.atleast_1d(value).tolist() for name, value in ATTRIBUTES.items()}
        assert stored == {**expected, "plugin_version": [1]}
        types = {field.name: field.type for field in fields}
        assert types == {name: kinds[kind] for name, kind in FIELDS.items()} | {
            "plugin_version": rtx.PluginFieldType.INT32
        }
    finally:
        build_only.unregister()


# --- the exported graphs ------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[
        ("paper", "llm"),
        ("paper", "denoise_step"),
        # With the null slot, and MMFS on the skips.
        pytest.param(("released", "denoise_step"), marks=pytest.mark.slow),
        pytest.param((SHIPPED, "llm"), marks=pytest.mark.slow),
        pytest.param((SHIPPED, "denoise_step"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def a_graph(
    request: pytest.FixtureRequest, rtx: Any, exported_once: Callable[[str], Exported]
) -> tuple[Path, Graph]:
    model, name = request.param
    bundle = exported_once(model).bundle
    return bundle.graph_file(name), bundle.graphs[name]


def attention_nodes(model: onnx.ModelProto) -> int:
    return sum(node.domain == "mmi" for node in model.graph.node)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_exported_graph_is_built_with_the_plugin_inside(
    rtx: Any, plugin: Any, a_graph: tuple[Path, Graph], architecture: str
) -> None:
    path, graph = a_graph
    portable = onnx.load(path, load_external_data=False)
    model = with_decomposable_attention(with_plugin(portable))
    done = build(rtx, model, profile=profile_of(graph), architecture=architecture, path=path)
    assert done.engine, done.errors()
    check_plugin_layers(done.network, model)
    assert done.layers.count("PLUGIN_V3") == attention_nodes(portable) > 0
    assert not [line for _, line in done.lines if "Unused Input" in line]


def test_tensorrts_copy_differs_in_two_attributes_alone(a_graph: tuple[Path, Graph]) -> None:
    portable = onnx.load(a_graph[0], load_external_data=False)
    before = portable.SerializeToString()
    model = with_decomposable_attention(with_plugin(portable))
    assert portable.SerializeToString() == before
    marked = 0
    for node in model.graph.node:
        for attribute in list(node.attribute):
            if attribute.name in (PLUGIN_NAMESPACE, DECOMPOSABLE):
                node.attribute.remove(attribute)
                marked += node.domain == "mmi"
    assert marked == attention_nodes(portable)
    assert model == portable


def test_a_graph_without_the_operator_is_refused() -> None:
    model = one_node()
    del model.graph.node[:]
    with pytest.raises(BundleError, match="'one_node' has no node mmi::"):
        with_plugin(model)
