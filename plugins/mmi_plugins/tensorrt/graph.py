"""TensorRT's own copy of a graph: attributes that its parser takes and the portable file lacks.

A node of the operator's domain has both a local function and a plugin, and parsers differ in which
one they use. The copy names the plugin's namespace on the node: then every parser uses the plugin.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import onnx

from mmi_deploy.errors import BundleError, EngineError
from mmi_plugins.gemv.operator import NAME as PRODUCT
from mmi_plugins.operator import DOMAIN, NAME

PLUGIN_NAMESPACE = "plugin_namespace"
DECOMPOSABLE = "TRT_decomposable"


def with_plugin(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` whose MMFS nodes name the plugin; nothing else differs.

    Weights are not read: load the model with `load_external_data=False`. Raises `BundleError` for a
    graph without an MMFS node, which would otherwise pass `check_plugin_layers`.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = _mmfs_nodes(copy)
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
    each node of our operators. Without a registered plugin the parser silently uses MMFS's local
    function, which is slower, and not tested on TensorRT."""
    expected = len(_mmfs_nodes(model)) + sum(
        (node.domain, node.op_type) == (DOMAIN, PRODUCT) for node in _nodes(model)
    )
    layers = [network.get_layer(index).type.name for index in range(network.num_layers)]
    if (found := layers.count("PLUGIN_V3")) != expected:
        raise EngineError(
            f"TensorRT did not take our plugin for every node of {DOMAIN}",
            expected=f"{expected} PLUGIN_V3 layers",
            got=found,
            fix="Load the plugin before the graph is parsed, and parse the copy that "
            "`with_plugin` makes",
        )


def with_decomposable_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` whose Attention nodes TensorRT may decompose where it has no fused kernel
    (float32, and unsupported head sizes); the build fails there otherwise."""
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


def _mmfs_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
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
