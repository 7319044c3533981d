"""Rewrite a portable graph by a precision recipe."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from mmi_deploy.errors import BundleError, ConfigError
from mmi_deploy.spec.backends import BACKENDS
from mmi_deploy.spec.graphs import Graph
from mmi_deploy.targets.precision.activation_aware import fold_input_scales, importances
from mmi_deploy.targets.precision.attention_scale import fold_scales
from mmi_deploy.targets.precision.constants import FLOATS, ONNX, Constants
from mmi_deploy.targets.precision.moments import Moments
from mmi_deploy.targets.precision.ranges import Ranges, islands
from mmi_deploy.targets.precision.recipes import FLOAT32, MAX_FINITE, Recipe
from mmi_deploy.targets.precision.types import F32, NodeTypes, cast, insert_casts
from mmi_deploy.targets.precision.weight_only import quantise_products
from mmi_deploy.targets.precision.weights_file import write_weights


def rewrite(
    recipe: Recipe,
    graph: Graph,
    source: Path,
    out: Path,
    *,
    runtime: str,
    ranges: Ranges | None = None,
    moments: Moments | None = None,
) -> Graph:
    """Write the ONNX of `graph` for a target of `runtime` with `recipe`, its weights beside it.

    source: the portable file. out: the file to write; its weights get the suffix `.safetensors`.
    ranges: activation ranges, for fp16 and bf16. moments: of a graph that the recipe scales by its
    activations. Returns the typed contract. Raises `ConfigError` for a recipe that `runtime`
    refuses or that lacks moments, `WeightsError` for weights that overflow or are not finite,
    `BundleError` for a file of another graph, or without a weight that the recipe quantises.
    """
    activations = recipe.activations_on(runtime)
    typed_graph = graph.typed(activations)
    model = read_model(source, graph)
    constants = Constants(model.graph)
    weights, scaling = recipe.weights.get(graph.name), None
    if weights is not None and recipe.activation_aware:
        if moments is None:
            raise ConfigError(
                f"precision {recipe.name} needs recorded activations of {graph.name}",
                fix="build without --unproved, or choose a precision that rounds to nearest",
            )
        peaks = ranges.peaks if ranges else {}
        greatest = MAX_FINITE[activations] / recipe.margin
        scaling = fold_input_scales(
            model.graph, constants, weights, moments, runtime, peaks, greatest
        )
    if activations != FLOAT32:
        _lower(model.graph, constants, typed_graph, recipe, activations, ranges, runtime)
    if weights is not None:
        quantise_products(model.graph, constants, weights, runtime, importances(scaling))
    _tidy(model)
    # An engine of TensorRT contains its weights: its ONNX file is temporary and may link them all.
    write_weights(model.graph, out.with_suffix(".safetensors"), link_all=BACKENDS[runtime].plugin)
    proto = ir.to_proto(model)
    check_model(proto)
    onnx.save(proto, out)
    return typed_graph


def read_model(source: Path, graph: Graph) -> ir.Model:
    """Read a portable graph and infer the type of every value; weights stay in their files.

    Raises `BundleError` unless names and types of its inputs and outputs are those of `graph`.
    """
    try:
        proto = onnx.load(source, load_external_data=False)
        proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=False)
    except Exception as error:  # protobuf's and the checker's exceptions share no narrower class
        raise BundleError(
            f"cannot read {source}: {str(error).splitlines()[0]}",
            fix="write it again with `mmi export`",
        ) from None
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, source.parent)
    for kind, values, tensors in (
        ("inputs", model.graph.inputs, graph.inputs),
        ("outputs", model.graph.outputs, graph.outputs),
    ):
        got = {str(value.name): value.dtype for value in values}
        wanted = {tensor.name: _ONNX_OF[tensor.dtype] for tensor in tensors}
        if wrong := sorted(name for name in got | wanted if got.get(name) != wanted.get(name)):
            raise BundleError(
                f"{source} is not the portable {graph.name}: its {kind} differ in "
                + ", ".join(wrong[:5]),
                fix="write it again with `mmi export`",
            )
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


_ONNX_OF = {FLOAT32: F32, "int64": ir.DataType.INT64, "int32": ir.DataType.INT32}


# Graphs whose attentions beyond the range of float16 compute in float32; those of others do in
# bfloat16. For one query over the KV cache TensorRT-RTX fuses float32, with the casts inside, while
# bfloat16 would cast the whole cache in every layer and token. Of many queries it fuses 16 bits
# alone: float32 has the matrix of all queries and keys in memory.
_FLOAT32_ATTENTION = ("llm",)


def _lower(
    graph: ir.Graph,
    constants: Constants,
    contract: Graph,
    recipe: Recipe,
    activations: str,
    ranges: Ranges | None,
    runtime: str,
) -> None:
    low = {tensor.name for tensor in (*contract.inputs, *contract.outputs) if tensor.activation}
    beyond = ranges.beyond(MAX_FINITE[activations], recipe.margin) if ranges else set()
    _check_contract(graph.name, beyond & low, activations)
    dtype = ONNX[activations]
    wide = F32 if contract.name in _FLOAT32_ATTENTION else ir.DataType.BFLOAT16
    typed = NodeTypes(
        graph, constants, dtype, recipe.fp32_operators, islands(graph, beyond), low, wide
    )
    if BACKENDS[runtime].plugin:
        fold_scales(graph, constants, typed)
    for value in graph.inputs:
        if value.name in low:
            value.type = ir.TensorType(dtype)
    insert_casts(graph, constants, typed)
    _give_outputs(graph, low, dtype)


def _check_contract(name: str | None, beyond: set[str], activations: str) -> None:
    if beyond:
        raise BundleError(
            f"{name} gives or takes numbers that {activations} cannot hold in "
            + ", ".join(sorted(beyond)),
            fix="choose --precision bf16",
        )


def _give_outputs(graph: ir.Graph, low: set[str], activations: ir.DataType) -> None:
    """Cast outputs to the contract's types, keeping their names."""
    for index, value in enumerate(graph.outputs):
        wanted = activations if value.name in low else F32
        if value.dtype not in FLOATS or value.dtype == wanted:
            continue
        name = str(value.name)
        value.name = f"{name}.computed"
        output = cast(graph, value, wanted, {})
        output.name = name
        graph.outputs[index] = output


def _tidy(model: ir.Model) -> None:
    for tidy in (
        passes.RemoveUnusedNodesPass(),
        passes.NameFixPass(),
    ):
        tidy(model)


def check_model(model: onnx.ModelProto) -> None:
    """Check that types and shapes agree at every node, as strongly typed builders require.

    External weights become inputs: no check reads them, and the checker refuses hard links as a
    security risk.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.initializer[:]
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            bare.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
        else:
            bare.graph.initializer.append(tensor)
    onnx.checker.check_model(bare, full_check=True)
