"""GPU data sheets: peak rates, memory bandwidth and memory size, from the vendor's figures.

Rates are dense: where the vendor gives a figure with structured sparsity only, it is halved.
GeForce GPUs run fp16 at half rate when they accumulate in fp32, as TensorRT does by default: the
table has that rate. fp32 products run in TF32, TensorRT's default. A gigabyte is 10^9 bytes, so the
memory of every GPU is rounded down.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmi_deploy.errors import ConfigError

GB = 10**9
TERA = 1e12

# Assumed, not measured: CUDA context, code and workspaces of libraries.
DRIVER_RESERVE = 1 * GB

# Assumed, not measured: operating system and host process, where CPU and GPU share the memory.
SYSTEM_RESERVE = 4 * GB


@dataclass(frozen=True)
class Gpu:
    """Data sheet of one GPU. name: on the command line. title: product name. memory: bytes.
    bandwidth: bytes/s. matrix: type -> FLOP/s (or integer operations/s) of the tensor cores, for
    the types that they support. vector: FLOP/s of the fp32 units. shared: CPU and GPU share the
    memory.
    """

    name: str
    title: str
    architecture: str
    memory: int
    bandwidth: float
    matrix: dict[str, float]
    vector: float
    source: str
    shared: bool = False

    @property
    def reserve(self) -> int:
        """Bytes that the driver and the system take (assumed)."""
        return DRIVER_RESERVE + (SYSTEM_RESERVE if self.shared else 0)

    @property
    def room(self) -> int:
        """Bytes that a model may use."""
        return self.memory - self.reserve

    def peak(self, compute: str) -> float:
        """FLOP/s of matrix products in `compute`; the fp16 rate for a type without tensor cores."""
        return self.matrix.get(compute, self.matrix["float16"])


def _rates(fp16: float, *, tf32: float, fp8: float | None, int8: float) -> dict[str, float]:
    """Convert dense peak rates from tera-operations/s. bf16 has the rate of fp16 on all GPUs
    here."""
    rates = {"float32": tf32, "float16": fp16, "bfloat16": fp16, "int8": int8}
    if fp8 is not None:
        rates["float8_e4m3fn"] = fp8
    return {kind: rate * TERA for kind, rate in rates.items()}


_HOPPER = _rates(989.4, tf32=494.7, fp8=1978.9, int8=1978.9)
_A100 = _rates(312, tf32=156, fp8=None, int8=624)
_ORIN_BRIEF = (
    "NVIDIA Jetson AGX Orin Series Technical Brief: GPU 170 sparse INT8 TOPS, 5.3 fp32 TFLOPS, "
    "204.8 GB/s; github.com/NVIDIA/Deep-Learning-Accelerator-SW: GPU 171 sparse INT8 TOPS at MAXN"
)

# Data sheets by name, small GPUs first.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "orin-32",
            "Jetson AGX Orin 32 GB",
            "sm87",
            32 * GB,
            204.8 * GB,
            _rates(27, tf32=13.5, fp8=None, int8=54),
            3.33 * TERA,
            "NVIDIA Jetson AGX Orin Series Technical Brief: GPU 108 sparse INT8 TOPS, 3.33 fp32 "
            "TFLOPS, 204.8 GB/s",
            shared=True,
        ),
        Gpu(
            "orin-64",
            "Jetson AGX Orin 64 GB",
            "sm87",
            64 * GB,
            204.8 * GB,
            _rates(42.5, tf32=21.2, fp8=None, int8=85),
            5.3 * TERA,
            _ORIN_BRIEF,
            shared=True,
        ),
        Gpu(
            "l4",
            "L4",
            "sm89",
            24 * GB,
            300 * GB,
            _rates(121, tf32=60, fp8=242.5, int8=242.5),
            30.3 * TERA,
            "NVIDIA L4 datasheet, www.nvidia.com/en-us/data-center/l4: FP16 242, FP8 and INT8 485 "
            "with sparsity, 300 GB/s",
        ),
        Gpu(
            "l40s",
            "L40S",
            "sm89",
            48 * GB,
            864 * GB,
            _rates(362, tf32=183, fp8=733, int8=733),
            91.6 * TERA,
            "NVIDIA L40S datasheet, www.nvidia.com/en-us/data-center/l40s: FP16 362, FP8 733 "
            "dense, 864 GB/s",
        ),
        Gpu(
            "rtx4090",
            "GeForce RTX 4090",
            "sm89",
            24 * GB,
            1008 * GB,
            _rates(165.2, tf32=82.6, fp8=330.3, int8=660.6),
            82.6 * TERA,
            "NVIDIA Ada GPU Architecture whitepaper, appendix: FP16 with FP32 accumulate 165.2, "
            "FP8 330.3, INT8 660.6 dense, 1008 GB/s",
        ),
        Gpu(
            "rtx5090",
            "GeForce RTX 5090",
            "sm120",
            32 * GB,
            1792 * GB,
            _rates(209.5, tf32=104.8, fp8=419, int8=838),
            104.8 * TERA,
            "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix: FP16 with FP32 accumulate "
            "209.5, FP8 419, INT8 838 dense, 1792 GB/s",
        ),
        Gpu(
            "a100-40",
            "A100 40 GB",
            "sm80",
            40 * GB,
            1555 * GB,
            _A100,
            19.5 * TERA,
            "NVIDIA A100 datasheet, www.nvidia.com/en-us/data-center/a100: 312, INT8 624 dense, "
            "1555 GB/s",
        ),
        Gpu(
            "a100-80",
            "A100 80 GB (SXM)",
            "sm80",
            80 * GB,
            2039 * GB,
            _A100,
            19.5 * TERA,
            "NVIDIA A100 datasheet, www.nvidia.com/en-us/data-center/a100: 312, INT8 624 dense, "
            "2039 GB/s",
        ),
        Gpu(
            "h100",
            "H100 80 GB (SXM)",
            "sm90",
            80 * GB,
            3350 * GB,
            _HOPPER,
            66.9 * TERA,
            "NVIDIA H100 datasheet, www.nvidia.com/en-us/data-center/h100: FP16 1978.9, FP8 3957.8 "
            "with sparsity, 3.35 TB/s",
        ),
        Gpu(
            "h200",
            "H200 141 GB (SXM)",
            "sm90",
            141 * GB,
            4800 * GB,
            _HOPPER,
            66.9 * TERA,
            "NVIDIA H200 datasheet, www.nvidia.com/en-us/data-center/h200: as H100, 4.8 TB/s",
        ),
        Gpu(
            "b200",
            "B200 180 GB (HGX)",
            "sm100",
            180 * GB,
            8000 * GB,
            _rates(2250, tf32=1125, fp8=4500, int8=4500),
            75 * TERA,
            "NVIDIA DGX B200 datasheet, www.nvidia.com/en-us/data-center/dgx-b200: 1440 GB, 64 "
            "TB/s and 72 PFLOPS FP8 with sparsity for eight",
        ),
    )
}

# Common GPU memory sizes in gigabytes, for tables without named GPUs.
SIZES = (8, 16, 24, 40, 80)


def gpu(name: str) -> Gpu:
    """Data sheet of the GPU called `name`. Raises `ConfigError` that lists the known GPUs."""
    if name not in GPUS:
        raise ConfigError(f"unknown GPU {name!r}", expected=", ".join(GPUS))
    return GPUS[name]
