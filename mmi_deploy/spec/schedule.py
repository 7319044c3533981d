"""Schedules: samplers as tables of coefficients, so that the runtime needs no solver code.

`denoise_step` multiplies the coefficients. A bundle holds one file per (solver, steps).
`mmi_export.schedules` computes the tables from diffusers' schedulers; every solver here is linear
in (latents, prediction, noise, history).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from mmi_deploy.errors import BundleError, ConfigError, WeightsError
from mmi_deploy.spec.config import DiffusionConfig, DistillationConfig
from mmi_deploy.spec.graphs import STATE, TERMS
from mmi_deploy.system.files import write_file
from mmi_deploy.system.safetensors_reader import read_header

# Columns of the coefficients of a step; the history begins at the last of these.
LATENTS, PREDICTION, NOISE, HISTORY_START = 0, 1, 2, 3

# Row of the history that holds the data prediction of the last step, whatever the solver: the
# latents of the picture as far as it is known. Previews show it.
LAST_DATA_ROW = 1

SOLVERS = ("ddpm", "ddim", "dpmpp_2m", "unipc")

# Multistep sampling of a consistency model (Luo et al. 2023), which takes no other sampler.
LCM = "lcm"

# Timestep spacings of diffusers. `leading`, Stable Diffusion's, is left out of a schedule's name.
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class ScheduleName:
    """Name of a schedule, on the command line `SOLVER:STEPS` or `SOLVER-SPACING:STEPS`."""

    solver: str
    spacing: str
    steps: int

    @property
    def name(self) -> str:
        """Solver and spacing, as in `ddim-trailing`."""
        return self.solver if self.spacing == SPACINGS[0] else f"{self.solver}-{self.spacing}"

    @property
    def key(self) -> str:
        """Canonical spelling, as in bundles."""
        return f"{self.name}:{self.steps}"


def parse_schedule_name(text: str, most: int) -> ScheduleName:
    """Parse the name of a schedule; `most`: training steps of the model.

    Raises `ConfigError`, also for a schedule of `most` steps or more.
    """
    found = re.fullmatch(r"([a-z0-9_]+)(?:-([a-z]+))?([:-])([0-9]{1,6})", text)
    solver, spacing, colon, steps = found.groups() if found else ("", None, "", "0")
    spacing = spacing or SPACINGS[0]
    if solver not in (*SOLVERS, LCM) or spacing not in SPACINGS:
        raise ConfigError(
            f"{text!r} is not a schedule",
            expected=f"NAME:STEPS or NAME-SPACING:STEPS, NAME one of {', '.join((*SOLVERS, LCM))} "
            f"and SPACING one of {', '.join(SPACINGS)}",
            fix="write ddim:20",
        )
    name = ScheduleName(solver, spacing, int(steps))
    if colon != ":":
        raise ConfigError(f"{text!r} is not a schedule", fix=f"write {name.key}")
    if not 1 <= name.steps < most:
        raise ConfigError(
            f"{solver} cannot take {name.steps} steps",
            expected=f"1 to {most - 1}",
            fix="write ddim:20",
        )
    return name


def default_schedule(diffusion: DiffusionConfig, distilled: DistillationConfig | None) -> str:
    """Sampler of a model for which none is asked."""
    if distilled is not None and distilled.solver_steps is not None:
        return f"{LCM}:{min(4, distilled.solver_steps)}"
    return ScheduleName("unipc", diffusion.spacing, 20).key


def check_schedule(
    name: ScheduleName, diffusion: DiffusionConfig, distilled: DistillationConfig | None
) -> None:
    """Raise `ConfigError` unless a model, which is `distilled`, can be sampled by the schedule."""
    usual = default_schedule(diffusion, distilled)
    if distilled is None or distilled.solver_steps is None:
        if name.solver == LCM:
            raise ConfigError(
                f"{name.key} samples a consistency model, and this model is none",
                fix=f"choose {usual}, or distil the model with `mmi train MODEL --distill lcm`",
            )
        return
    if name.solver != LCM or name.spacing != SPACINGS[0]:
        raise ConfigError(
            f"{name.key} does not sample a consistency model, which this model is",
            fix=f"choose {usual}",
        )
    if name.steps > distilled.solver_steps:
        raise ConfigError(
            f"lcm cannot take {name.steps} steps with this model",
            expected=f"1 to {distilled.solver_steps}",
            fix=f"choose {usual}",
        )


@dataclass(frozen=True)
class Schedule:
    """One solver at one number of steps.

    timesteps [steps] int64: training steps at which the U-Net is evaluated, noisiest first.
    coefficients [steps, STATE, TERMS] float32: rows are the next latents, then the next history
    (last corrected sample, last and second last data prediction; a solver that uses none of them
    keeps the last data prediction alone); columns are the latents, the
    prediction (of the model's prediction type), noise, then the history.
    initial_sigma: standard deviation of the first latents.
    time_table [steps, sum of ResNet widths] float32: the U-Net's time projections of `timesteps`,
    added by the exporter, which has the weights.
    """

    name: str
    timesteps: NDArray[np.int64]
    coefficients: NDArray[np.float32]
    initial_sigma: float = 1.0
    time_table: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.coefficients.shape != (self.steps, STATE, TERMS):
            raise BundleError(
                f"the coefficients of schedule {self.key} have the wrong shape",
                expected=(self.steps, STATE, TERMS),
                got=self.coefficients.shape,
            )
        if self.time_table is not None and (
            self.time_table.ndim != 2 or len(self.time_table) != self.steps
        ):
            raise BundleError(
                f"the time table of schedule {self.key} has the wrong shape",
                expected=f"({self.steps}, width)",
                got=self.time_table.shape,
            )

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def key(self) -> str:
        """Spelling on the command line and in the manifest: `ddim:20`."""
        return f"{self.name}:{self.steps}"

    def draws_noise(self, step: int) -> bool:
        """True if this step adds fresh noise; deterministic solvers never do."""
        return bool(self.coefficients[step, :, NOISE].any())

    def with_time_table(self, time_table: NDArray[np.float32]) -> Schedule:
        """Copy of the schedule with the U-Net's time projections [steps, width]."""
        return replace(self, time_table=np.ascontiguousarray(time_table, np.float32))

    def save(self, path: Path) -> None:
        """Write the schedule as safetensors, for `read_schedule`."""
        tensors: dict[str, NDArray[Any]] = {
            "timesteps": self.timesteps,
            "coefficients": self.coefficients,
        }
        if self.time_table is not None:
            tensors["time_table"] = self.time_table
        about = {"name": self.name, "initial_sigma": repr(self.initial_sigma)}
        write_file(path, save(tensors, about))


def read_schedule(path: Path) -> Schedule:
    """Read a file of `Schedule.save`; raises `BundleError`."""
    try:
        read_header(path)
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return Schedule(
            name=metadata["name"],
            timesteps=tensors["timesteps"],
            coefficients=tensors["coefficients"],
            initial_sigma=float(metadata["initial_sigma"]),
            time_table=tensors.get("time_table"),
        )
    except WeightsError as error:
        raise BundleError(f"a schedule cannot be read: {error}") from None
    except (KeyError, ValueError) as error:
        raise BundleError(
            f"{path} is not a schedule: {error}", fix="export the bundle again"
        ) from None
