"""Model with fake weights: modules of any size are built, folded and traced without memory.

Parameters are fake tensors, which have a shape and a type only. Every operation on them is
recorded, so that any folded tensor can be computed later from the few weights that it depends on,
written, and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers.initialization import no_init_weights

from mmi_deploy.spec.config import ModelConfig
from mmi_train.model.mm_interleaved import MMInterleaved

# Function that reads a weight by name, in the type in which the model computes.
Read = Callable[[str], Tensor]


class FakeWeightsModel:
    """`MMInterleaved` of `config` with fake weights.

    `module` is used like any model within `building`; `compute` gives the values of a tensor that
    was made there.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._record = _Record()
        with self.building():
            self.module = MMInterleaved(config).eval()
        # Fake weights by name; their shapes are those that a checkpoint must hold.
        self.weights: dict[str, Tensor] = dict(self.module.state_dict(keep_vars=True))
        self._names = {id(tensor): name for name, tensor in self.weights.items()}

    @contextmanager
    def building(self) -> Iterator[None]:
        """Context in which new modules get fake weights, and operations on weights are recorded."""
        with torch.no_grad(), no_init_weights(), self._fake, self._record:
            yield

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Context in which new tensors are fake, and no operation is recorded."""
        with torch.no_grad(), self._fake:
            yield

    def name(self, tensor: Tensor) -> str | None:
        """Name of a weight of the model; None for a computed tensor."""
        return self._names.get(id(tensor))

    def compute(self, tensor: Tensor, read: Read) -> Tensor:
        """Compute the values of `tensor`; reads only the weights that it depends on."""
        known: dict[int, Tensor] = {}
        with torch.no_grad():
            return self._compute(tensor, read, known)

    def _compute(self, tensor: Tensor, read: Read, known: dict[int, Tensor]) -> Tensor:
        if not isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) in known:
            return known[id(tensor)]
        if name := self.name(tensor):
            value = read(name)
        else:
            step = self._record.steps[id(tensor)]
            args, kwargs = tree_map_only(
                Tensor, lambda part: self._compute(part, read, known), (step.args, step.kwargs)
            )
            value = tree_flatten(step.operator(*args, **kwargs))[0][step.output]
        known[id(tensor)] = value
        return value


class _Step:
    """One recorded operation, and the index `output` of the tensor among its outputs."""

    def __init__(self, operator: Any, args: Any, kwargs: Any, output: int, tensor: Tensor) -> None:
        self.operator, self.args, self.kwargs, self.output = operator, args, kwargs, output
        # Kept alive: steps are found by `id`, which Python gives again once a tensor is freed.
        self.tensor = tensor


class _Record(TorchDispatchMode):
    """Record the operation that made each fake tensor; an in-place operation removes its step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, _Step] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            for tensor in tree_flatten(result)[0]:
                self.steps.pop(id(tensor), None)
            return result
        for index, tensor in enumerate(tree_flatten(result)[0]):
            if isinstance(tensor, FakeTensor):
                self.steps[id(tensor)] = _Step(func, args, kwargs, index, tensor)
        return result
