"""Export a module to an ONNX file that follows the contract in `mmi_deploy.spec.graphs`.

The module maps {input name: tensor} to {output name: tensor}; its `Graph` gives names, dynamic
dimensions and their ranges, and nothing else.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn

from mmi_deploy.spec.graphs import (
    IR_VERSION,
    MMFS_DOMAIN,
    MMFS_OPERATOR,
    MMFS_VERSION,
    OPSET,
    Graph,
    Range,
)
from mmi_deploy.targets.precision.rewrite import check_model
from mmi_deploy.targets.precision.weights_file import is_external, write_values
from mmi_export.tracing.weight_sources import WeightSources
from mmi_plugins.onnx_function import mmfs_function
from mmi_train.weights.lazy_tensor import InFile

# Inputs and outputs of exported modules: tensors by the names of the contract.
Tensors = dict[str, Tensor]

Module = TypeVar("Module", bound=nn.Module)

# Sizes of the dynamic dimensions while tracing: all different, so that the tracer merges none.
_EXAMPLE_SIZES = (2, 3, 5, 7, 11, 13, 17)


def onnx_from_module(
    module: nn.Module, graph: Graph, path: Path, weights: WeightSources | None = None
) -> set[str]:
    """Write `module` as the ONNX file `path`, with its weights in a safetensors file beside it.

    `weights`: sources of the values of a module with fake weights, of which some stay in the
    model's files. Returns the names of these files beside `path`.
    """
    sizes = example_sizes(graph)
    with weights.tracing() if weights else torch.no_grad(), _quiet_exporter():
        inputs = {
            tensor.name: torch.zeros(tensor.resolve(**sizes), dtype=getattr(torch, tensor.dtype))
            for tensor in graph.inputs
        }
        # The ONNX exporter would trace too, but silently makes a dimension static where the module
        # asks for its size; torch.export raises.
        traced = torch.export.export(
            module,
            (),
            {"inputs": inputs},
            dynamic_shapes={"inputs": _dynamic_shapes(graph)},
            strict=False,
        )
        program = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in graph.inputs],
            output_names=[tensor.name for tensor in graph.outputs],
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model = program.model
    assert model.opset_imports[""] == OPSET, f"exported at opset {model.opset_imports}"
    model.ir_version = IR_VERSION
    linked = weights.attach(model, module) if weights else {}
    with _quiet_exporter():
        _simplify(model, linked)
    files = weights.link(model, linked, path.parent) if weights else set()
    _expand_masks(model)
    _apply_contract(model, graph)
    _attach_function(model)
    _externalise(model, path.with_suffix(".safetensors"))
    proto = ir.to_proto(model)
    check_model(proto)
    onnx.save(proto, path)
    return files


def _simplify(model: ir.Model, linked: Mapping[str, InFile]) -> None:
    """Fold constants, merge equal subexpressions, remove unused nodes.

    These are the exporter's own passes without its pattern rewriting, which takes a third of an
    export and which every runtime repeats when it loads the file. Linked weights (`linked`) are
    not constants here: nothing is computed from them.
    """
    passes.InlinePass()(model)
    _transpose_weights(model, linked)
    fold_constants(model)
    for simplify in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        simplify(model)


def _transpose_weights(model: ir.Model, linked: Mapping[str, InFile]) -> None:
    """Store weights transposed that the graph reads through a Transpose only."""
    initializers = model.graph.initializers
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.name not in initializers or weight.name in linked:
            continue
        tensor = weight.const_value
        if tensor is None or len(weight.uses()) > 1:
            continue
        order = node.attributes["perm"].as_ints()
        name = f"{weight.name}.transposed"
        transposed = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape[axis] for axis in order),
            type=ir.TensorType(tensor.dtype),
            const_value=_transposed(tensor, order),
        )
        model.graph.register_initializer(transposed)
        node.outputs[0].replace_all_uses_with(transposed)
        model.graph.remove(node, safe=True)


def _transposed(tensor: ir.TensorProtocol, order: Sequence[int]) -> ir.LazyTensor:
    shape = ir.Shape(tensor.shape[axis] for axis in order)

    def transpose() -> ir.Tensor:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().transpose(order)))

    return ir.LazyTensor(transpose, dtype=tensor.dtype, shape=shape)


def _expand_masks(model: ir.Model) -> None:
    """Expand masks of Attention to one row per query: ONNX broadcasts a single row, ONNX Runtime
    does not."""
    for node in list(model.graph):
        mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
        if mask is None or mask.shape is None or mask.shape[-2] != 1:
            continue
        query = node.inputs[0]
        assert query is not None and query.shape is not None and isinstance(query.shape[-2], int)
        tape = ir.tape.Tape()
        shape = tape.op("Constant", [], {"value_ints": [1, 1, query.shape[-2], 1]})
        expanded = tape.op("Expand", [mask, shape])
        model.graph.insert_before(node, tape.nodes)
        node.replace_input_with(3, expanded)
    passes.NameFixPass()(model)


def example_sizes(graph: Graph) -> dict[str, int]:
    """Choose a size for each dynamic dimension within its range, all different if possible."""
    sizes = zip(graph.ranges.items(), _EXAMPLE_SIZES, strict=False)
    return {letter: min(max(size, allowed.min), allowed.max) for (letter, allowed), size in sizes}


def _dynamic_shapes(graph: Graph) -> dict[str, dict[int, object]]:
    letters = {
        letter: torch.export.Dim(letter, min=allowed.min, max=allowed.max)
        for letter, allowed in graph.ranges.items()
        if not _fixed(allowed)
    }

    def dimension(side: int | str) -> object | None:
        if isinstance(side, int):
            return None
        factor, star, letter = side.rpartition("*")
        if letter not in letters:
            return None
        return int(factor) * letters[letter] if star else letters[letter]

    return {
        tensor.name: {
            axis: found
            for axis, side in enumerate(tensor.shape)
            if (found := dimension(side)) is not None
        }
        for tensor in graph.inputs
    }


def _fixed(allowed: Range) -> bool:
    return allowed.min == allowed.max


def _apply_contract(model: ir.Model, graph: Graph) -> None:
    """Check names and types against the contract and write its shapes into the file."""
    fixed = {letter: allowed.min for letter, allowed in graph.ranges.items() if _fixed(allowed)}
    _name_dimensions(model, graph)
    for values, tensors in (
        (model.graph.inputs, graph.inputs),
        (model.graph.outputs, graph.outputs),
    ):
        assert [value.name for value in values] == [tensor.name for tensor in tensors], graph.name
        for value, tensor in zip(values, tensors, strict=True):
            assert value.dtype == ir.DataType[_ONNX_NAMES[tensor.dtype]], (
                f"{tensor.name}: {value.dtype}"
            )
            value.shape = ir.Shape(_resolved(side, fixed) for side in tensor.shape)
    model.graph.name = graph.name


def _name_dimensions(model: ir.Model, graph: Graph) -> None:
    """Rename the tracer's symbols in shapes inside the file to the contract's letters."""
    letters = {
        str(dim): side
        for value, tensor in zip(model.graph.inputs, graph.inputs, strict=True)
        for dim, side in zip(value.shape or (), tensor.shape, strict=True)
        if isinstance(side, str) and side.isalpha() and not isinstance(dim, int)
    }

    def named(dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int) or dim.value is None:
            return dim if isinstance(dim, int) else None
        return re.sub(r"\w+", lambda symbol: letters.get(symbol[0], symbol[0]), dim.value)

    for node in model.graph:
        for output in node.outputs:
            if output.shape is not None:
                output.shape = ir.Shape(named(dim) for dim in output.shape)


# Name of an element type in ONNX, by its name in the contract.
_ONNX_NAMES = {"float32": "FLOAT", "int64": "INT64", "int32": "INT32"}


def _resolved(side: int | str, fixed: Mapping[str, int]) -> int | str:
    if isinstance(side, int):
        return side
    factor, star, letter = side.rpartition("*")
    return (int(factor) if star else 1) * fixed[letter] if letter in fixed else side


def _attach_function(model: ir.Model) -> None:
    """Add the model-local function of the MMFS operator, for the number of levels in use."""
    nodes = [node for node in model.graph if node.domain == MMFS_DOMAIN]
    levels = {len(node.attributes["level_heights"].as_ints()) for node in nodes}
    if not nodes:
        return
    assert len(levels) == 1 and all(node.op_type == MMFS_OPERATOR for node in nodes)
    function = ir.serde.deserialize_function(mmfs_function(levels.pop()))
    model.functions[function.identifier()] = function
    model.opset_imports[MMFS_DOMAIN] = MMFS_VERSION


def _externalise(model: ir.Model, file: Path) -> None:
    """Write the weights of `model` that are in no file yet to `file`, one at a time."""
    weights = [
        value
        for value in model.graph.initializers.values()
        if (tensor := value.const_value) is not None
        and not isinstance(tensor, ir.ExternalTensor)
        and is_external(tensor)
    ]
    if weights:
        write_values(file, weights)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's reports on its passes; results are checked here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def sharing_copy(module: Module) -> Module:
    """Copy `module` with shared parameters and buffers, so that its parts can be replaced."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
