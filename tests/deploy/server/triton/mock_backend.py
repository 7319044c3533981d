"""Mock of Triton's Python backend: its module, a request, and the sender of its responses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition
from types import ModuleType
from typing import Any

import numpy as np

from mmi_deploy.server.triton.model import UTILS

FINAL = 1

# Seconds that a test waits for a response.
PATIENCE = 60


@dataclass
class Tensor:
    name: str
    values: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.values


class TritonError:
    INTERNAL, INVALID_ARG, UNAVAILABLE = 2, 4, 5

    def __init__(self, message: str, code: int) -> None:
        self.message, self.code = message, code


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None


@dataclass
class Sender:
    """Responses of one request; refuses any after the last, as the real one does."""

    responses: list[InferenceResponse] = field(default_factory=list)
    finals: int = 0
    left: bool = False
    broken: Callable[[int], bool] = lambda number: False
    changed: Condition = field(default_factory=Condition)

    def is_cancelled(self) -> bool:
        return self.left

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        with self.changed:
            assert not self.finals, "a response after the last one"
            if response is not None and self.broken(len(self.responses)):
                raise RuntimeError("out of shared memory at 0x7f0011223344")
            if response is not None:
                self.responses.append(response)
            self.finals += flags & FINAL
            self.changed.notify_all()

    def wait(self, done: Callable[[Sender], object] = lambda sender: sender.finals) -> None:
        """Wait until `done`, or until the last response."""
        with self.changed:
            assert self.changed.wait_for(lambda: done(self), PATIENCE)

    @property
    def events(self) -> list[dict[str, Any]]:
        """Events of the responses."""
        tensors = [one.output_tensors[0] for one in self.responses if one.output_tensors]
        assert all(tensor.name == "event" for tensor in tensors)
        assert all(t.values.dtype == object and t.values.shape == (1,) for t in tensors)
        return [json.loads(tensor.values[0]) for tensor in tensors]

    @property
    def images(self) -> dict[int, np.ndarray]:
        """Pictures by the number of their response."""
        return {
            number: response.output_tensors[1].values
            for number, response in enumerate(self.responses)
            if len(response.output_tensors) > 1
        }

    @property
    def error(self) -> TritonError:
        """The error that is the last response."""
        assert self.finals == 1 and self.responses[-1].error is not None
        return self.responses[-1].error


@dataclass
class Request:
    """A request. data: of the input; None for a request without it. microseconds: its timeout."""

    data: bytes | None
    microseconds: int = 0
    sender: Sender = field(default_factory=Sender)

    def get_response_sender(self) -> Sender:
        return self.sender

    def timeout(self) -> int:
        return self.microseconds


@contextmanager
def backend() -> Iterator[list[str]]:
    """Make the module importable; yields the lines that are logged."""
    lines: list[str] = []
    module: Any = ModuleType(UTILS)
    module.Tensor, module.InferenceResponse, module.TritonError = (
        *(Tensor, InferenceResponse, TritonError),
    )
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    module.Logger = type("Logger", (), {"log_error": staticmethod(lines.append)})
    module.get_input_tensor_by_name = lambda request, name: (
        None if request.data is None else Tensor(name, np.array([request.data], object))
    )
    sys.modules[UTILS] = module
    try:
        yield lines
    finally:
        del sys.modules[UTILS]
