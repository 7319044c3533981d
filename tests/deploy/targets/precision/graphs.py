"""Small graphs for the precision tests, in the form of the contract: written by hand, so that what
should come out is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mmi_deploy.spec.graphs import IR_VERSION, OPSET, Graph, Range, Tensor

ROWS, COLUMNS = 64, 96


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, np.ndarray],
    graph: Graph,
    functions: Sequence[onnx.FunctionProto] = (),
) -> Path:
    """A portable file of `graph`, its weights beside it."""
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "int32": TensorProto.INT32}

    def infos(tensors: Sequence[Tensor]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in tensors]

    made = helper.make_graph(
        list(nodes),
        graph.name,
        infos(graph.inputs),
        infos(graph.outputs),
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    model.functions.extend(functions)
    onnx.save(
        model,
        path,
        save_as_external_data=True,
        location=f"{path.stem}.weights",
        size_threshold=1024,
    )
    return path


def contract(inputs: Sequence[Tensor], outputs: Sequence[Tensor], name: str = "llm") -> Graph:
    """A graph whose only dynamic dimension is b."""
    return Graph(name, tuple(inputs), tuple(outputs), {"b": Range(1, 1, 4)})


def hidden(name: str, width: int) -> Tensor:
    return Tensor(name, "float32", ("b", width), activation=True)


def product(
    path: Path, weight: np.ndarray | None = None, stored: type = np.float32
) -> tuple[Path, Graph, np.ndarray]:
    """logits = RMS norm(x) W + 1, W stored as `stored`; x is an activation, logits are not.

    Returns the file, its contract and W.
    """
    if weight is None:
        draw = np.random.default_rng(0)
        weight = draw.standard_normal((ROWS, COLUMNS)).astype(np.float32) * 0.1
    weight = weight.astype(stored)
    graph = contract(
        [hidden("x", weight.shape[0])], [Tensor("logits", "float32", ("b", weight.shape[1]))]
    )
    nodes = [
        helper.make_node("RMSNormalization", ["x", "scale"], ["normed"], name="norm"),
        helper.make_node("MatMul", ["normed", "weight32"], ["product"], name="product_node"),
        helper.make_node("Add", ["product", "one"], ["logits"], name="bias"),
    ]
    if stored is np.float32:
        nodes[1].input[1] = "weight"
    else:
        nodes.insert(1, helper.make_node("Cast", ["weight"], ["weight32"], to=TensorProto.FLOAT))
    weights = {
        "weight": weight,
        "scale": np.ones(weight.shape[0], np.float32),
        "one": np.ones(weight.shape[1], np.float32),
    }
    return write(path, nodes, weights, graph), graph, weight.astype(np.float32)


def attention(path: Path, loudness: float) -> tuple[Path, Graph]:
    """y = attention of x [b, 48, 32] to itself in two heads, queries and keys `loudness` times as
    great as they should be: at 1 the logits are about 1, before the scale about 4."""
    draw = np.random.default_rng(0)
    heads, width, tokens = 2, 16, 48
    channels = heads * width
    x = Tensor("x", "float32", ("b", tokens, channels), activation=True)
    y = Tensor("y", "float32", ("b", tokens, channels), activation=True)
    graph = contract([x], [y], "denoise_step")
    split = np.array([0, tokens, heads, width])
    nodes, names = [], []
    for part in ("query", "key", "value"):
        nodes += [
            helper.make_node("MatMul", ["x", f"{part}_weight"], [f"{part}_flat"], name=f"{part}1"),
            helper.make_node(
                "Reshape", [f"{part}_flat", "split"], [f"{part}_cut"], name=f"{part}2"
            ),
            helper.make_node(
                "Transpose", [f"{part}_cut"], [part], perm=[0, 2, 1, 3], name=f"{part}3"
            ),
        ]
        names.append(part)
    nodes += [
        helper.make_node("Attention", names, ["attended"], name="attention"),
        helper.make_node("Transpose", ["attended"], ["turned"], perm=[0, 2, 1, 3], name="turn"),
        helper.make_node("Reshape", ["turned", "merge"], ["merged"], name="merge_node"),
        helper.make_node("MatMul", ["merged", "output_weight"], ["y"], name="output"),
    ]
    weights: dict[str, np.ndarray] = {
        f"{part}_weight": draw.standard_normal((channels, channels)).astype(np.float32)
        * np.float32((loudness if part in ("query", "key") else 1.0) / channels**0.5)
        for part in ("query", "key", "value", "output")
    }
    weights |= {"split": split, "merge": np.array([0, tokens, channels])}
    return write(path, nodes, weights, graph), graph
