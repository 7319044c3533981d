"""Placement: which nodes of a graph ONNX Runtime's CUDA provider has a kernel for.

`cuda_kernels.json` holds the provider's kernel registry, read from the wheel of `onnxruntime-gpu`
by `python -m mmi_emulator.cuda_provider`, so that a graph is judged on a machine without a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from onnx import defs

from mmi_deploy.errors import BundleError
from mmi_deploy.spec.graphs import MMFS_DOMAIN, MMFS_OPERATOR

KERNELS = Path(__file__).with_name("cuda_kernels.json")

# ONNX Runtime replaces an operator that has no kernel by its ONNX function. Of these all nodes have
# kernels; our kernel library has the MMFS operator.
_FUNCTIONS = {("", "GroupNormalization"), (MMFS_DOMAIN, MMFS_OPERATOR)}

# Computed when the graph is loaded.
_FOLDED = {("", "Constant")}

# Name of the parameter that types the first input of an operator whose schema ONNX does not have.
_FIRST = ("T", "T1")


@cache
def registry() -> dict[str, Any]:
    """Contents of `cuda_kernels.json`: the version of ONNX Runtime, and domain -> operator ->
    kernels, each [first version, last version or None, parameter -> types]."""
    found: dict[str, Any] = json.loads(KERNELS.read_bytes())
    return found


def check_placement(model: onnx.ModelProto, what: str) -> None:
    """Raise `BundleError` for the first node that the CUDA provider has no kernel for.

    model: a graph whose values have types (`infer_shapes`). what: name of the graph.
    """
    for node, types in unplaced(model):
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        raise BundleError(
            f"ONNX Runtime's CUDA provider has no kernel for the node {node.name!r} of {what}: "
            f"{name} of ({', '.join(types)})",
            expected=f"an operator of onnxruntime-gpu {registry()['version']}",
            fix="choose another precision, or a TensorRT target",
        )


def unplaced(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, list[str]]]:
    """Nodes without a kernel, and the types of their inputs ("" where unknown)."""
    kinds = _types(model.graph)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    for node in model.graph.node:
        key = (node.domain, node.op_type)
        types = [kinds.get(name, "") for name in node.input]
        if key in _FUNCTIONS | _FOLDED:
            continue
        kernels = registry()["kernels"].get(node.domain, {}).get(node.op_type, [])
        if not any(_matches(node, types, kernel, opsets[node.domain]) for kernel in kernels):
            yield node, types


def _types(graph: onnx.GraphProto) -> dict[str, str]:
    name_of = onnx.TensorProto.DataType.Name
    found = {tensor.name: name_of(tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        found[value.name] = name_of(value.type.tensor_type.elem_type)
    return {name: kind.lower() for name, kind in found.items()}


def _matches(node: onnx.NodeProto, types: list[str], kernel: list[Any], opset: int) -> bool:
    first, last, constraints = kernel
    parameters = {name: types[0] for name in _FIRST} if types else {}
    if not node.domain:
        schema = defs.get_schema(node.op_type, opset)
        since = schema.since_version
        # ONNX Runtime takes an open range for the versions that it was written for alone.
        if first != since and not (last is not None and first < since <= last):
            return False
        parameters = {}
        for index, kind in enumerate(types):
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]
            parameters.setdefault(formal.type_str, kind)
            parameters.setdefault(formal.name, kind)
    return all(
        not parameters.get(name) or parameters[name] in allowed
        for name, allowed in constraints.items()
    )
