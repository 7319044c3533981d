"""Bundles with a target for a GPU, opened on the fake GPU."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.runtime import fake_model
from deploy.runtime.tensorrt.fake_cuda import FakeCuda
from deploy.runtime.tensorrt.fake_tensorrt import FakeTensorRt, write_plan
from mmi_deploy.bundle.bundle import Bundle, write_bundle, write_target
from mmi_deploy.parity import Case
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.tensorrt.backend import TensorRtBackend
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import GRAPHS, Limits, Range, graphs

PROVED = [Case(sizes={}, error=0.0, tolerance=1e-4)]
PLUGIN = b"\x7fELF our plugin"
# Bytes of workspace of the engines that need more than the others.
SCRATCH = {"llm": 1 << 14, "denoise_step": 1 << 16}


def fake_bundle(folder: Path, config: ModelConfig, limits: Limits) -> Bundle:
    """Write a bundle with placeholders for graphs."""
    with write_bundle(folder, config, limits) as writer:
        for make in GRAPHS:
            writer.graph_file(make.__name__).write_bytes(b"no graph")
            writer.add_receipt(make.__name__, "nothing", PROVED)
        fake_model.fake_tokenizer(config)._inner.save(str(writer.tokenizer))
        for key in ("plain:4", "ancestral:4"):
            writer.add_schedule(fake_model.fake_schedule(key))
        writer.preview = fake_model.PREVIEW_MAP
    return Bundle.open(folder)


def add_target(
    bundle: Bundle,
    activations: str = "float32",
    *,
    rtx: bool = False,
    onnx: bool = False,
    recipe: Mapping[str, str] | None = None,
    engines: Mapping[str, Mapping[str, Any]] | None = None,
    leave_out: Collection[str] = (),
    proved: bool = True,
    limits: Limits | None = None,
) -> str:
    """Write a target whose engines run the bundle's ONNX files, or `fake_model`. recipe, engines:
    what differs from a good one."""
    runtime = "tensorrt-rtx" if rtx else "tensorrt"
    precision = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[activations]
    name = f"{runtime}-sm89-{precision}"
    about = {"architecture": "sm89", "precision": precision, "tensorrt": "11.4.0"}
    with write_target(bundle, name, about | dict(recipe or {}), activations) as writer:
        for graph in graphs(bundle.config, limits or bundle.limits).values():
            if graph.name in leave_out:
                continue
            decode = {"t": Range(1, 1, 1), "w": Range(1, 1, 1)}
            options: dict[str, Any] = {
                "onnx": bundle.graph_file(graph.name) if onnx else None,
                "profiles": [{}, decode] if graph.name == "llm" else None,
                "scratch": SCRATCH.get(graph.name, 4096),
            }
            path = writer.engine_file(graph.name, ".engine")
            changed = (engines or {}).get(graph.name, {})
            write_plan(path, graph.typed(activations), **{**options, **changed})
            if proved:
                writer.add_receipt(graph.name, "nothing", PROVED)
    return name


@dataclass
class Machine:
    """A GPU, its TensorRT, and the runtime of a target on it."""

    cuda: FakeCuda
    tensorrt: FakeTensorRt
    target: TensorRtBackend
    runtime: Runtime

    @property
    def launches(self) -> dict[str, int]:
        """Number of launches of each engine from a recording."""
        return self.runtime.recordings()["launches"]


def machine(
    bundle: Bundle,
    name: str,
    *,
    cuda: FakeCuda | None = None,
    log: fake_model.Log | None = None,
    **options: Any,
) -> Machine:
    """Open a target on a fake GPU. log: keeps what `fake_model`'s engines are asked."""
    cuda = cuda or FakeCuda()
    config, log = bundle.config, log or fake_model.Log()

    def compute(graph: str, inputs: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        log.calls.append((graph, {name: array.copy() for name, array in inputs.items()}))
        function = fake_model._GRAPHS[graph]
        more = (graphs(config, bundle.limits)[graph],)
        wants_graph = function in (fake_model.values, fake_model.image_condition)
        caches = {name: array for name, array in inputs.items() if name.startswith("past_")}
        found = function(config, inputs, *(more if wants_graph else ()))
        return {**found, **{name.replace("past", "present"): a for name, a in caches.items()}}

    module = FakeTensorRt(cuda, compute, rtx="rtx" in name)
    options.setdefault("cache", bundle.folder.parent / "kernels")
    target = TensorRtBackend.open(bundle, name, cuda=cuda, tensorrt=module, **options)
    return Machine(cuda, module, target, Runtime.from_backend(bundle, target))
