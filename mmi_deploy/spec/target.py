"""Build targets: a backend, an architecture and a precision.

A target's name is that of its folder in the bundle: `cpu-int8`, `cuda-fp16`,
`tensorrt-rtx-sm89-fp16`.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.backends import ARCHITECTURES, CPU, backend, backend_of


@dataclass(frozen=True)
class Target:
    """Build target. runtime: name of a backend. architecture: as `sm89`, None in ONNX Runtime.
    precision: name of a recipe, see `mmi_deploy.targets.precision`. Raises `ConfigError`."""

    runtime: str
    architecture: str | None
    precision: str

    def __post_init__(self) -> None:
        row = backend(self.runtime)
        if not row.architectures and self.architecture is not None:
            target = "the CPU target" if self.runtime == CPU else f"target {self.runtime}"
            raise ConfigError(f"{target} takes no --arch", got=self.architecture)
        if row.architectures and self.architecture not in ARCHITECTURES:
            raise ConfigError(
                f"{self.runtime} engines are built for an architecture",
                expected=", ".join(row.architectures),
                got=self.architecture or "none",
                fix="give --arch, for example --arch sm89",
            )

    @property
    def name(self) -> str:
        """The folder of its engines: backend, architecture and precision."""
        return "-".join(part for part in (self.runtime, self.architecture, self.precision) if part)


def build_options(name: str) -> str:
    """The options of `mmi build` that make the target called `name`."""
    row = backend_of(name)
    precision = name.removeprefix(row.name).partition("-")[2]
    words = [f"--target {row.name}"]
    if row.architectures:
        architecture, _, precision = precision.partition("-")
        words.append(f"--arch {architecture}")
    return " ".join([*words, *([f"--precision {precision}"] if precision else [])])
