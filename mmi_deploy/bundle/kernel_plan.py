"""Kernel plan of an engine: its final kernels, with the tensors that they read and write.

TensorRT fuses the layers of a parsed network into kernels. What a run costs is decided there: how
many kernels are launched, and how many bytes pass through memory between them. A build stores the
plan in the target's report, so that it can be read on any machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from pydantic import BaseModel, ConfigDict

# Bits of one element, by TensorRT's name of the type.
BITS = {
    "Float": 32, "Half": 16, "BFloat16": 16, "FP8": 8, "Int64": 64, "Int32": 32, "Int8": 8,
    "UInt8": 8, "Int4": 4, "FP4": 4, "Bool": 8,
}  # fmt: skip

# Kinds of entries that launch nothing: dynamic sizes, and synchronisation of streams.
_ON_HOST = ("shape_call", "reshape", "cast", "wait", "signal")

FLOATS = ("Float", "Half", "BFloat16")

_TENSOR = re.compile(r"(.*):(\w+)\[([-\d,]*)\]")


@dataclass(frozen=True)
class PlanTensor:
    """A tensor that a kernel reads or writes. type: TensorRT's name, as `Half`. shape: -1 for a
    dynamic dimension."""

    name: str
    type: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> PlanTensor:
        """Read what `str()` of a tensor gives, such as `hidden:Half[-1,192]`."""
        found = _TENSOR.fullmatch(text)
        if found is None:
            raise ValueError(f"not a tensor of a plan: {text!r}")
        name, kind, sides = found.groups()
        return cls(name, kind, tuple(int(side) for side in sides.split(",") if side))

    def __str__(self) -> str:
        return f"{self.name}:{self.type}[{','.join(map(str, self.shape))}]"

    @property
    def elements(self) -> int:
        """Number of elements, where each dynamic dimension counts as 1."""
        return prod(max(side, 1) for side in self.shape)

    @property
    def bytes(self) -> int:
        """Size in memory, where each dynamic dimension counts as 1."""
        return -(-self.elements * BITS.get(self.type, 32) // 8)


class Kernel(BaseModel):
    """One kernel of an engine.

    kind: TensorRT's type of the layer. nodes: ONNX nodes that it computes, as far as TensorRT says.
    inputs, constants, outputs: `str()` of their tensors; constants are weights inside the engine.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    nodes: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @cached_property
    def reads(self) -> tuple[PlanTensor, ...]:
        return tuple(PlanTensor.parse(text) for text in self.inputs)

    @cached_property
    def weights(self) -> tuple[PlanTensor, ...]:
        return tuple(PlanTensor.parse(text) for text in self.constants)

    @cached_property
    def writes(self) -> tuple[PlanTensor, ...]:
        return tuple(PlanTensor.parse(text) for text in self.outputs)

    @property
    def launched(self) -> bool:
        """False for what runs on the host, as the computation of shapes does."""
        return self.kind not in _ON_HOST

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.weights)

    @property
    def read_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.reads if tensor.name not in self._in_place)

    @property
    def written_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.writes if tensor.name not in self._in_place)

    @property
    def bytes(self) -> int:
        """Bytes that pass through memory in one run: weights, inputs and outputs. A tensor that is
        updated in place (a KV cache, of which a few rows are written) does not count."""
        return self.weight_bytes + self.read_bytes + self.written_bytes

    @property
    def _in_place(self) -> set[str]:
        return {one.name for one in self.reads} & {one.name for one in self.writes}


class ProfilePlan(BaseModel):
    """Kernels of one optimisation profile, in the order in which they run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: str
    kernels: tuple[Kernel, ...]

    @property
    def launched(self) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in self.kernels if kernel.launched)

    def total(self, what: str) -> int:
        """Sum over all kernels of one of their byte counts, such as `weight_bytes`."""
        return sum(getattr(kernel, what) for kernel in self.launched)

    def largest(self, count: int) -> Sequence[Kernel]:
        """The kernels that move most bytes."""
        return sorted(self.launched, key=lambda kernel: -kernel.bytes)[:count]


class Finding(BaseModel):
    """A place where a plan breaks a rule of `mmi_deploy.targets.plan_rules`. why: what that costs.
    bytes: through memory in vain in one run, where they are known. fatal: the engine must not be
    used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: str
    profile: str
    what: str
    why: str = ""
    bytes: int = 0
    fatal: bool = False
