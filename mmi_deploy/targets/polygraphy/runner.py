"""Polygraphy runner around our engines: outputs that share the buffers of inputs.

Polygraphy's `TrtRunner` gives every output a buffer of its own. The KV caches of `llm` are updated
in place (`present_key.00` at the address of `past_key.00`), so that runner cannot run its engine.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from mmi_deploy.runtime.engine import Engine
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.targets.verify_target import engine_outputs


class EngineRunner(BaseRunner):
    """Run an engine of any backend in Polygraphy's `Comparator`, beside ONNX Runtime.

    Inputs are given and outputs returned in the types of the portable graph; the engine's own, such
    as float16, are cast here. Data loaders hence serve both sides.
    """

    def __init__(self, load: Callable[[], Engine], name: str) -> None:
        """load: called when the runner is activated. name: of the runner in Polygraphy's report."""
        super().__init__(name=name)
        self._load = load

    @classmethod
    def of(cls, runtime: Runtime, graph: str) -> EngineRunner:
        """Runner of the engine of `graph` in an opened runtime."""
        return cls(lambda: runtime.engine(graph), f"mmi-{graph}")

    def activate_impl(self) -> None:
        self._engine = self._load()

    def deactivate_impl(self) -> None:
        del self._engine  # the runtime that loaded it closes it

    def get_input_metadata_impl(self) -> Any:
        metadata = TensorMetadata()
        for tensor in self._engine.graph.inputs:
            dtype = np.dtype(np.float32 if tensor.activation else tensor.dtype)
            shape = [side if isinstance(side, int) else -1 for side in tensor.shape]
            metadata.add(tensor.name, dtype, shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, NDArray[Any]]) -> OrderedDict[str, NDArray[Any]]:
        start = time.perf_counter()
        outputs = OrderedDict(engine_outputs(self._engine, feed_dict))
        # Copies to and from the GPU are included.
        self.inference_time = time.perf_counter() - start
        return outputs
