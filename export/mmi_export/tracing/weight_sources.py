"""Where the initialisers of an exported graph get their numbers from.

An initialiser is either a weight of the model as it is, which may stay in the model's own file, or
was made from weights by folding, and is then computed when it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mmi_export.tracing.fake_weights_model import BlankModel
from mmi_export.tracing.stored_weights import StoredWeights
from mmi_train.weights.lazy_tensor import InFile

ONNX_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}

Link = Callable[[Path, Path], str]
"""(a file, a folder) to the name under which the file is found in the folder."""


class WeightSources:
    """The numbers of graphs of one model. `link`: None: every weight is copied, in float32."""

    def __init__(self, model: BlankModel, stored: StoredWeights, link: Link | None) -> None:
        self.model, self.stored, self._link = model, stored, link

    @property
    def links(self) -> bool:
        """Whether weights stay where they are."""
        return self._link is not None

    def tracing(self) -> AbstractContextManager[None]:
        """While a module without numbers is traced."""
        return self.model.tracing()

    def attach(self, model: ir.Model, module: nn.Module) -> dict[str, InFile]:
        """Give the initialisers of `model`, which was traced from `module`, their numbers; returns
        those that stay where they are, which get none yet."""
        tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        tensors |= dict(module.named_buffers(remove_duplicate=False))
        linked = {}
        for name, value in model.graph.initializers.items():
            tensor = tensors.get(name)
            if not isinstance(tensor, FakeTensor):
                continue
            place = self._place(tensor)
            if place is not None:
                linked[name] = place
                value.const_value = None
            else:
                value.const_value = self._lazy(tensor, value)
        return linked

    def link(self, model: ir.Model, linked: Mapping[str, InFile], folder: Path) -> set[str]:
        """Let the weights that stay where they are be read from there, as float32; returns the
        files that they lie in."""
        files = set()
        for name, place in linked.items():
            value = model.graph.initializers.get(name)
            if value is None or self._link is None:
                continue
            file = self._link(place.path, folder)
            files.add(file)
            value.const_value = ir.ExternalTensor(
                file,
                place.offset,
                place.shape.numel() * place.dtype.itemsize,
                ONNX_TYPES[place.dtype],
                shape=ir.Shape(place.shape),
                name=name,
                base_dir=folder,
            )
            if value.dtype != ONNX_TYPES[place.dtype]:
                _read_as_float32(model.graph, value, ONNX_TYPES[place.dtype])
        return files

    def _place(self, tensor: Tensor) -> InFile | None:
        """Where a weight can stay; None for what is computed or cannot be read in place."""
        name = self.model.name(tensor)
        if name is None or self._link is None:
            return None
        place = self.stored.places[name]
        if place.dtype not in ONNX_TYPES or place.offset % place.dtype.itemsize:
            return None
        return place

    def _lazy(self, tensor: Tensor, value: ir.Value) -> ir.LazyTensor:
        assert value.dtype is not None

        def compute() -> ir.Tensor:
            return ir.Tensor(self.model.compute(tensor, self.stored.read).contiguous().numpy())

        return ir.LazyTensor(compute, dtype=value.dtype, shape=ir.Shape(tensor.shape))


def _read_as_float32(graph: ir.Graph, weight: ir.Value, stored: ir.DataType) -> None:
    """Cast a weight of 16 bits before it is used; of a table only the rows that were looked up."""
    uses = list(weight.uses())
    weight.dtype = stored
    if all(node.op_type == "Gather" and index == 0 for node, index in uses):
        for node, _ in uses:
            rows = node.outputs[0]
            rows_uses = list(rows.uses())
            cast = _cast(rows, f"{rows.name}.float32")
            rows.dtype = stored
            for user, index in rows_uses:
                user.replace_input_with(index, cast.outputs[0])
            graph.insert_after(node, cast)
        return
    cast = _cast(weight, f"{weight.name}.float32")
    for user, index in uses:
        user.replace_input_with(index, cast.outputs[0])
    first = uses[0][0] if len(uses) == 1 else min((user for user, _ in uses), key=_position(graph))
    graph.insert_before(first, cast)


def _cast(value: ir.Value, name: str) -> ir.Node:
    output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
    return ir.Node(
        "", "Cast", [value], [ir.AttrInt64("to", ir.DataType.FLOAT)], outputs=[output], name=name
    )


def _position(graph: ir.Graph) -> Callable[[ir.Node], int]:
    places = {node: index for index, node in enumerate(graph)}
    return places.__getitem__
