"""A model without numbers: modules of any size are built, folded and traced in no memory.

Parameters are fake tensors, which have a shape and a type only. Whatever is computed from them is
written down, operation by operation, so that any tensor that folding made can be computed later
from the few weights that it was made of, and be dropped when it has been written.
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

Read = Callable[[str], Tensor]
"""The weight of a name, in the type in which the model computes."""


class BlankModel:
    """`MMInterleaved` of `config`, its weights known by name alone.

    `module` is used like any model within `building`; `compute` gives the numbers of a tensor that
    was made there.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._record = _Record()
        with self.building():
            self.module = MMInterleaved(config).eval()
        self.weights: dict[str, Tensor] = dict(self.module.state_dict(keep_vars=True))
        """Shapes of all that a checkpoint must hold, by name."""
        self._names = {id(tensor): name for name, tensor in self.weights.items()}

    @contextmanager
    def building(self) -> Iterator[None]:
        """Modules that are made within hold no numbers, and what they are made of is recorded."""
        with torch.no_grad(), no_init_weights(), self._fake, self._record:
            yield

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Tensors that are made within are fake, and nothing is recorded."""
        with torch.no_grad(), self._fake:
            yield

    def name(self, tensor: Tensor) -> str | None:
        """The name of a weight of the model; None for what was computed."""
        return self._names.get(id(tensor))

    def compute(self, tensor: Tensor, read: Read) -> Tensor:
        """The numbers of `tensor`, from no more weights than it depends on."""
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
    """One recorded operation, and which of its outputs is meant."""

    def __init__(self, operator: Any, args: Any, kwargs: Any, output: int, tensor: Tensor) -> None:
        self.operator, self.args, self.kwargs, self.output = operator, args, kwargs, output
        self.tensor = tensor  # kept, so that no other tensor gets its identity


class _Record(TorchDispatchMode):
    """What every tensor was made by. Tensors that were written into have no steps."""

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
