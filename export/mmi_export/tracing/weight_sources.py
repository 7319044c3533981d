"""Sources of the values of an exported graph's initialisers.

An initialiser is either an unchanged weight of the model, which may stay in the model's own file,
or a folded tensor, which is computed when it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mmi_export.tracing.fake_weights_model import FakeWeightsModel
from mmi_export.tracing.stored_weights import StoredWeights
from mmi_train.weights.lazy_tensor import InFile

ONNX_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}

# Function of (file, folder) that links the file into the folder and returns its name there.
Link = Callable[[Path, Path], str]


class WeightSources:
    """Values of the graphs of one model. `link`: None to copy every weight in float32."""

    def __init__(self, model: FakeWeightsModel, stored: StoredWeights, link: Link | None) -> None:
        self.model, self.stored, self._link = model, stored, link

    @property
    def links(self) -> bool:
        """True if unchanged weights stay in the model's files."""
        return self._link is not None

    def tracing(self) -> AbstractContextManager[None]:
        """Context in which a module with fake weights is traced."""
        return self.model.tracing()

    def attach(self, model: ir.Model, module: nn.Module) -> dict[str, InFile]:
        """Set the values of the initialisers of `model`, which was traced from `module`. Returns
        the linked ones, which get their values in `link`."""
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
        """Let `model` read its linked weights from the model's files, cast to float32; returns the
        names of these files in `folder`."""
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
        """File position of a weight that can be linked; None for a computed or unaligned tensor."""
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
    """Cast a 16-bit weight to float32 before its use; of a table, cast the gathered rows only."""
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
