"""Backends: the runtimes that execute graphs, and the one table of their differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mmi_deploy.errors import ConfigError

CPU = "cpu"
CUDA = "cuda"
TENSORRT = "tensorrt"
TENSORRT_RTX = "tensorrt-rtx"

# Values of --kernels besides a file: find or compile a kernel library, or use none.
AUTO, NONE = "auto", "none"

# Compute capabilities of NVIDIA GPUs, with examples of GPUs.
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

    # Value of `mmi build --target`, and prefix of a target's name.
    name: str
    # The class that opens a target of a bundle: a `mmi_deploy.runtime.backend.Backend`.
    entry_point: str
    # Python module of the runtime, its pip package, and the oldest version that supports all
    # operators of the graphs.
    module: str
    package: str
    minimum_version: tuple[int, ...]
    engine_suffix: str
    # Whether engines run on a GPU, with its memory.
    on_gpu: bool = False
    # Architectures for which engines are built; empty where one engine runs on all of them.
    architectures: tuple[str, ...] = ()
    # Whether engines can be built for a GPU that is not in this machine.
    cross_compiles: bool = False
    # Whether the MMFS operator is TensorRT's plugin, and engines come from TensorRT's builder; else
    # it is a custom operator of ONNX Runtime.
    plugin: bool = False
    # Names of TensorRT's builder flags beyond the defaults. An engine that requires user allocation
    # allocates nothing when it runs, so that it can be recorded into a CUDA graph. REFIT and
    # STRIP_PLAN need a GPU while they build; WEIGHT_STREAMING makes no difference to a build.
    builder_flags: tuple[str, ...] = ()
    # Whether quantised weights always have a scale per block of rows, as MatMulNBits requires.
    block_scales: bool = False
    # Precision that is built by default, and all recipes to choose from, the most exact first.
    default_precision: str = "fp16"
    precisions: tuple[str, ...] = ("fp16", "int8", "mixed", "int4")


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
            # 1.31 is the first version whose CUDA provider has all operators of the graphs.
            Backend(
                CUDA,
                "mmi_deploy.runtime.onnxruntime.cuda_backend:CudaBackend",
                "onnxruntime",
                "'onnxruntime-gpu[cuda,cudnn]'",
                (1, 31),
                ".onnx",
                on_gpu=True,
                block_scales=True,
                precisions=("fp32", "fp16", "int8", "mixed", "int4"),
            ),
            # 10.15.1 is the first version with attention, rotary embedding and in-place KV cache.
            Backend(
                TENSORRT,
                "mmi_deploy.runtime.tensorrt.backend:TensorRtBackend",
                "tensorrt",
                "tensorrt",
                (10, 15, 1),
                ".engine",
                on_gpu=True,
                architectures=tuple(ARCHITECTURES),
                plugin=True,
            ),
            # 1.7 is the first version that was tested; a build checks the installed version first.
            Backend(
                TENSORRT_RTX,
                "mmi_deploy.runtime.tensorrt.backend:TensorRtBackend",
                "tensorrt_rtx",
                "tensorrt-rtx-cu13",
                (1, 7),
                ".engine",
                on_gpu=True,
                architectures=("sm80", "sm86", "sm89", "sm120"),
                cross_compiles=True,
                plugin=True,
                builder_flags=("REQUIRE_USER_ALLOCATION",),
            ),
        )
    }
)


def backend(name: str) -> Backend:
    """The backend called `name`; raises `ConfigError` that lists all backends."""
    if name not in BACKENDS:
        raise ConfigError(f"there is no backend {name!r}", expected=" or ".join(BACKENDS))
    return BACKENDS[name]


def backend_of(target: str) -> Backend:
    """The backend of a target by the target's name: `tensorrt-sm89-fp16` runs in TensorRT.

    A name that begins with none of the backends' names is a CPU target.
    """
    named = [row for row in BACKENDS.values() if target.startswith(f"{row.name}-")]
    return max(named, key=lambda row: len(row.name), default=BACKENDS[CPU])
