"""TensorRT's own copy of a graph: what its parser needs beyond the portable file.

A node of the operator's domain has both a local function and a plugin. Parsers differ in which they
take, so the copy names the plugin's namespace on the node: then it is the plugin everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import onnx

from mmi_deploy.errors import BundleError, EngineError
from mmi_plugins.operator import DOMAIN, NAME

PLUGIN_NAMESPACE = "plugin_namespace"
DECOMPOSABLE = "TRT_decomposable"


def with_plugin(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` whose MMFS nodes name the plugin; nothing else differs.

    Weights are not read: load the model with `load_external_data=False`. Raises `BundleError` for a
    graph without such a node, which would pass for one whose plugin was found.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = _attention_nodes(copy)
    if not nodes:
        raise BundleError(
            f"the graph {model.graph.name!r} has no node {DOMAIN}::{NAME}",
            fix="Export it again with `mmi export`",
        )
    for node in nodes:
        _set(node, PLUGIN_NAMESPACE, DOMAIN)
    return copy


def check_plugin_layers(network: Any, model: onnx.ModelProto) -> None:
    """Raise `EngineError` unless TensorRT's `network`, parsed from `model`, has a plugin layer for
    each of its MMFS nodes. Where no plugin of that name was registered the parser says nothing and
    takes the local function: slower, and on TensorRT not proved right."""
    expected = len(_attention_nodes(model))
    layers = [network.get_layer(index).type.name for index in range(network.num_layers)]
    if (found := layers.count("PLUGIN_V3")) != expected:
        raise EngineError(
            f"TensorRT did not take the plugin {DOMAIN}::{NAME} for every node",
            expected=f"{expected} PLUGIN_V3 layers",
            got=found,
            fix="Load the plugin before the graph is parsed, and parse the copy that "
            "`with_plugin` makes",
        )


def with_decomposable_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` whose Attention nodes TensorRT may take apart where it has no fused kernel
    (float32, and head sizes other than those it knows); without it the build fails there."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in _nodes(copy):
        if node.op_type == "Attention" and not node.domain:
            _set(node, DECOMPOSABLE, 1)
    return copy


def _set(node: onnx.NodeProto, name: str, value: str | int) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def _attention_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in _nodes(model) if (node.domain, node.op_type) == (DOMAIN, NAME)]


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of the graph, of its branches, and of the local functions."""
    yield from _inside(model.graph.node)
    for function in model.functions:
        yield from _inside(function.node)


def _inside(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _inside(attribute.g.node)
            for graph in attribute.graphs:
                yield from _inside(graph.node)
