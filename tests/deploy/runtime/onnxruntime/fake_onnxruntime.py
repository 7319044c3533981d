"""`onnxruntime` with a CUDA provider on `FakeCuda`: the CPU provider computes, late and on the fake
GPU's memory, and checks its user.

A run happens when someone waits for the stream. A recorded run reads and writes the addresses of
its recording, and is executed three times when it is made, as ONNX Runtime does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from deploy.runtime.tensorrt.fake_cuda import DEVICE, FakeCuda, Fault

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

# Device, number, element type, shape and address of a bound tensor.
Bound = tuple[str, int, np.dtype, tuple[int, ...], int]


@dataclass
class Node:
    name: str
    op_type: str
    domain: str = ""


@dataclass
class Part:
    ep_name: str
    nodes: list[Node]

    def get_nodes(self) -> list[Node]:
        return self.nodes


class RunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


@dataclass
class Binding:
    cuda: FakeCuda
    inputs: dict[str, Bound] = field(default_factory=dict)
    outputs: dict[str, Bound] = field(default_factory=dict)

    def _check(self, bound: Bound) -> Bound:
        device, _, dtype, shape, pointer = bound
        if device != "cuda":
            raise Fault(f"a tensor is bound on {device}")
        self.cuda.find(pointer, int(np.prod(shape)) * dtype.itemsize, DEVICE)
        return bound

    def bind_input(self, name: str, *bound: Any) -> None:
        self.inputs[name] = self._check(bound)

    def bind_output(self, name: str, *bound: Any) -> None:
        self.outputs[name] = self._check(bound)


class FakeOnnxRuntime:
    """The module. on_cpu: nodes that are said to run on the CPU. starts: whether the provider can
    be started. records: whether runs can be recorded."""

    RunOptions = RunOptions

    def __init__(
        self,
        cuda: FakeCuda,
        *,
        on_cpu: Sequence[Node] = (),
        starts: bool = True,
        records: bool = True,
        version: str = "1.31.1",
        providers: Sequence[str] = (CUDA, CPU),
    ) -> None:
        self.cuda, self.on_cpu, self.starts = cuda, list(on_cpu), starts
        self.records = records
        self.__version__, self.cuda_version = version, "13.0"
        self.providers = list(providers)
        self.preloaded = False
        self.sessions: list[FakeSession] = []

    def get_available_providers(self) -> list[str]:
        return self.providers

    def preload_dlls(self) -> None:
        self.preloaded = True

    def InferenceSession(  # noqa: N802
        self,
        model: Path,
        settings: Any,
        *,
        providers: Sequence[Any],
        enable_fallback: int,
        disabled_optimizers: Sequence[str],
    ) -> FakeSession:
        if not self.preloaded:
            raise Fault("CUDA's libraries were not loaded before the session")
        if enable_fallback or [name for name, _ in providers] != [CUDA]:
            raise Fault("the session may run on another provider")
        if "GatherSliceToSplitFusion" not in disabled_optimizers:
            raise Fault("slices become a Split, which copies from the host in a recording")
        self.sessions.append(FakeSession(self, model, settings, providers[0][1]))
        return self.sessions[-1]


class FakeSession:
    def __init__(
        self, world: FakeOnnxRuntime, model: Path, settings: Any, options: dict[str, str]
    ) -> None:
        self._world, self.options = world, options
        self._stream = int(options["user_compute_stream"])
        world.cuda.stream(self._stream)
        self._inner = ort.InferenceSession(model, settings, providers=[CPU])
        self._recorded: dict[int, Binding] = {}
        self.runs = 0

    def get_providers(self) -> list[str]:
        return [CUDA, CPU] if self._world.starts else [CPU]

    def get_inputs(self) -> list[Any]:
        return self._inner.get_inputs()

    def get_outputs(self) -> list[Any]:
        return self._inner.get_outputs()

    def get_provider_graph_assignment_info(self) -> list[Part]:
        rest = [Part(CPU, [node]) for node in self._world.on_cpu]
        return [Part(CUDA, [Node("node", "MatMul")]), Part(CPU, [Node("s", "Concat")]), *rest]

    def io_binding(self) -> Binding:
        return Binding(self._world.cuda)

    def run_with_iobinding(self, binding: Binding, options: RunOptions) -> None:
        if options.entries["disable_synchronize_execution_providers"] != "1":
            raise Fault("the run waits for the GPU")
        number, self.runs = int(options.entries["gpu_graph_id"]), self.runs + 1
        copy = Binding(binding.cuda, dict(binding.inputs), dict(binding.outputs))
        times = 1
        if number >= 0:
            if self.options["enable_cuda_graph"] != "1":
                raise Fault("a run is recorded in a session without CUDA graphs")
            if not self._world.records:
                raise RuntimeError("operation not permitted when stream is capturing")
            if number not in self._recorded:
                self._recorded[number], times = copy, 3
            copy = self._recorded[number]
        for _ in range(times):
            self._world.cuda.enqueue(self._stream, lambda: self._compute(copy))

    def _compute(self, binding: Binding) -> None:
        inner = self._inner.io_binding()
        for bound, bind in (
            (binding.inputs, inner.bind_input),
            (binding.outputs, inner.bind_output),
        ):
            for name, (_, _, dtype, shape, pointer) in bound.items():
                binding._check(("cuda", 0, dtype, shape, pointer))  # it may be freed by now
                bind(name, "cpu", 0, dtype, shape, pointer)
        self._inner.run_with_iobinding(inner)
