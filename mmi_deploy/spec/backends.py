"""Backends: the runtimes that execute graphs, a row each. No other file names their differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mmi_deploy.errors import ConfigError

CPU = "cpu"
TENSORRT = "tensorrt"
TENSORRT_RTX = "tensorrt-rtx"

# Choices of kernels beside a file: found or compiled by themselves, or none.
AUTO, NONE = "auto", "none"

# Compute capabilities of NVIDIA GPUs, and GPUs that have them.
ARCHITECTURES = {
    "sm80": "A100",
    "sm86": "RTX 30, A10",
    "sm87": "Orin",
    "sm89": "L4, L40S, RTX 40",
    "sm90": "H100, H200",
    "sm100": "B200",
    "sm120": "RTX 50",
}


@dataclass(frozen=True)
class Backend:
    """One row of `BACKENDS`."""

    # As in `mmi build --target` and at the beginning of a target's name.
    name: str
    # The class that opens a target of a bundle: a `mmi_deploy.runtime.backend.Backend`.
    entry_point: str
    # Python module of the runtime, the pip package that brings it, and the oldest version that
    # computes all operators of the graphs.
    module: str
    package: str
    minimum_version: tuple[int, ...]
    engine_suffix: str
    # Architectures that engines are built for; none on the CPU.
    architectures: tuple[str, ...] = ()
    # Whether engines can be built for a GPU that is not in this machine.
    cross_compiles: bool = False
    # Names of TensorRT's builder flags beyond the defaults. An engine that requires user allocation
    # allocates nothing when it runs, so that it can be recorded into a CUDA graph. REFIT and
    # STRIP_PLAN need a GPU while they build; WEIGHT_STREAMING makes no difference to a build.
    builder_flags: tuple[str, ...] = ()
    # Whether quantised weights have a scale per block of rows always: MatMulNBits knows no other.
    block_scales: bool = False
    # Recipes to choose from, the most exact first; the first is built by default.
    default_precision: str = "fp16"
    precisions: tuple[str, ...] = ("fp16", "int8", "mixed", "int4")

    @property
    def on_gpu(self) -> bool:
        """Whether engines run on a GPU: its memory, its architectures, the MMFS plugin."""
        return bool(self.architectures)


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        backend.name: backend
        for backend in (
            Backend(
                CPU,
                "mmi_deploy.runtime.onnxruntime.backend:OnnxRuntimeBackend",
                "onnxruntime",
                "onnxruntime",
                (1, 31),
                ".onnx",
                block_scales=True,
                default_precision="int8",
                precisions=("fp32", "int8", "int4"),
            ),
            # Attention, rotary embedding and the KV cache in place are known from 10.15.1 on.
            Backend(
                TENSORRT,
                "mmi_deploy.runtime.tensorrt.backend:TensorRtBackend",
                "tensorrt",
                "tensorrt",
                (10, 15, 1),
                ".engine",
                tuple(ARCHITECTURES),
            ),
            # 1.7 is the first that was tried; the installed one is asked before a build.
            Backend(
                TENSORRT_RTX,
                "mmi_deploy.runtime.tensorrt.backend:TensorRtBackend",
                "tensorrt_rtx",
                "tensorrt-rtx-cu13",
                (1, 7),
                ".engine",
                ("sm80", "sm86", "sm89", "sm120"),
                cross_compiles=True,
                builder_flags=("REQUIRE_USER_ALLOCATION",),
            ),
        )
    }
)


def backend(name: str) -> Backend:
    """The backend called `name`; raises `ConfigError` that lists those there are."""
    if name not in BACKENDS:
        raise ConfigError(f"there is no backend {name!r}", expected=" or ".join(BACKENDS))
    return BACKENDS[name]


def backend_of(target: str) -> Backend:
    """The backend of a target by its name: `tensorrt-sm89-fp16` runs in TensorRT, all that no
    other backend's name begins is for the CPU."""
    named = [row for row in BACKENDS.values() if target.startswith(f"{row.name}-")]
    return max(named, key=lambda row: len(row.name), default=BACKENDS[CPU])
