"""What an engine is built for: who runs it, on which architecture, in which precision.

A target's name is that of its folder in the bundle: `cpu-int8`, `tensorrt-rtx-sm89-fp16`.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmi_deploy.errors import ConfigError

CPU = "cpu"
TENSORRT = "tensorrt"
TENSORRT_RTX = "tensorrt-rtx"
RUNTIMES = (CPU, TENSORRT, TENSORRT_RTX)

ARCHITECTURES = {
    "sm80": "A100",
    "sm86": "RTX 30, A10",
    "sm87": "Orin",
    "sm89": "L4, L40S, RTX 40",
    "sm90": "H100, H200",
    "sm100": "B200",
    "sm120": "RTX 50",
}
"""Architectures that are known, and cards that have them."""

TENSORRT_RTX_ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120")
"""Those of them that TensorRT-RTX 1.7 compiles for; the one installed is asked before a build."""


@dataclass(frozen=True)
class Target:
    """runtime: one of `RUNTIMES`. architecture: `sm89`, or None for the CPU. precision: the name of
    a recipe, see `mmi_deploy.targets.precision`."""

    runtime: str
    architecture: str | None
    precision: str

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise ConfigError(
                f"there is no target {self.runtime!r}", expected=" or ".join(RUNTIMES)
            )
        if self.runtime == CPU and self.architecture is not None:
            raise ConfigError("the CPU target takes no --arch", got=self.architecture)
        if self.runtime != CPU and self.architecture not in ARCHITECTURES:
            compiled = TENSORRT_RTX_ARCHITECTURES
            raise ConfigError(
                f"{self.runtime} engines are built for an architecture",
                expected=", ".join(compiled if self.runtime == TENSORRT_RTX else ARCHITECTURES),
                got=self.architecture or "none",
                fix="give --arch, for example --arch sm89",
            )

    @property
    def name(self) -> str:
        """The folder of its engines: runtime, architecture and precision."""
        return "-".join(part for part in (self.runtime, self.architecture, self.precision) if part)


def build_options(name: str) -> str:
    """The options of `mmi build` that make the target called `name`."""
    gpu = max((r for r in RUNTIMES if name.startswith(f"{r}-sm")), key=len, default=None)
    runtime, rest = (gpu, name.removeprefix(f"{gpu}-")) if gpu else (CPU, name)
    architecture, _, precision = rest.partition("-")
    words = [f"--target {runtime}", *([f"--arch {architecture}"] if gpu else [])]
    return " ".join([*words, *([f"--precision {precision}"] if precision else [])])
