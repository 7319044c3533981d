"""Samplers as tables of coefficients, probed from diffusers' own schedulers.

Every solver here is linear: its next latents and the history it keeps are weighted sums of the
latents, the U-Net's prediction, fresh noise and the history. One step of the scheduler on a basis
therefore gives these weights: each input is a row of the identity (six terms), each output is a row
of the table. Predictions of v are converted linearly too, so that they work the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import DiffusionConfig, DistillationConfig, ImageDecoderConfig
from mmi_deploy.spec.graphs import STATE, TERMS
from mmi_deploy.spec.schedule import (
    HISTORY_START,
    LATENTS,
    LCM,
    NOISE,
    PREDICTION,
    Schedule,
    ScheduleName,
    check_schedule,
    parse_schedule_name,
)
from mmi_train.model.consistency import denoised_by, lcm, with_noise
from mmi_train.model.diffusion import ddim, scheduler_options, spacing_options

LAST_SAMPLE, LAST_DATA, OLDER_DATA = range(HISTORY_START, TERMS)


@dataclass(frozen=True)
class _Solver:
    scheduler: type[Any]
    options: dict[str, Any]


_SOLVERS = {
    "ddpm": _Solver(DDPMScheduler, {"variance_type": "fixed_small", "clip_sample": False}),
    "ddim": _Solver(DDIMScheduler, {"clip_sample": False}),
    "dpmpp_2m": _Solver(
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
    ),
    "unipc": _Solver(UniPCMultistepScheduler, {"solver_order": 2, "solver_type": "bh2"}),
}


def diffusers_scheduler(name: str, diffusion: DiffusionConfig, spacing: str | None = None) -> Any:
    """Build diffusers' scheduler `name` with the configuration of Stable Diffusion. spacing: None
    for that of the model."""
    solver = _SOLVERS[name]
    spacing = spacing or diffusion.spacing
    return solver.scheduler(
        **scheduler_options(diffusion), **spacing_options(spacing), **solver.options
    )


def scheduler_of(key: str, decoder: ImageDecoderConfig) -> Any:
    """Build diffusers' scheduler for a schedule's key, with its timesteps set. The ancestral
    sampler is DDIM with eta 1, which takes its noise explicitly (`samplers.next_latents`)."""
    diffusion, distilled = decoder.diffusion, decoder.distillation
    named = parse_schedule_name(key, diffusion.steps)
    if named.solver == LCM:
        assert distilled is not None and distilled.solver_steps is not None
        made: Any = lcm(diffusion, distilled.solver_steps)
    elif named.solver == "ddpm":
        made = ddim(diffusion, named.spacing)
    else:
        made = diffusers_scheduler(named.solver, diffusion, named.spacing)
    made.set_timesteps(named.steps)
    return made


def schedule_table(
    name: str, steps: int, diffusion: DiffusionConfig, spacing: str | None = None
) -> Schedule:
    """Build the table of one solver for `steps` steps, without the U-Net's time table. spacing:
    None for that of the model. Raises `ConfigError` for one that the solver or the model cannot
    take."""
    spacing = spacing or diffusion.spacing
    named = parse_schedule_name(f"{name}-{spacing}:{steps}", diffusion.steps)
    scheduler = diffusers_scheduler(name, diffusion, spacing)
    scheduler.set_timesteps(steps)
    begun = int(scheduler.timesteps[0])
    if diffusion.rescale_betas_zero_snr and begun != diffusion.steps - 1:
        raise ConfigError(
            f"{named.key} cannot draw with a model of zero terminal SNR, whose noise is that of "
            "its last timestep",
            expected=f"a first timestep of {diffusion.steps - 1}",
            got=begun,
            fix=f"write {name}-{diffusion.spacing}:{steps}",
        )
    return _table(named, scheduler)


def lcm_table(steps: int, diffusion: DiffusionConfig, solver_steps: int) -> Schedule:
    """Build the table of multistep consistency sampling; `solver_steps`: timesteps on which the
    consistency function was trained, the noisiest of which it begins with."""
    named = parse_schedule_name(f"{LCM}:{steps}", diffusion.steps)
    scheduler = lcm(diffusion, solver_steps)
    scheduler.set_timesteps(steps)
    return _table(named, scheduler)


def _table(named: ScheduleName, scheduler: Any) -> Schedule:
    """Probe a scheduler whose timesteps are set."""
    name, steps = named.solver, named.steps
    if len(scheduler.timesteps) != steps:
        raise ConfigError(
            f"{name} cannot make {steps} steps",
            got=f"{len(scheduler.timesteps)} steps",
            fix="choose another number of steps",
        )
    table = torch.stack([_probe_step(scheduler, timestep) for timestep in scheduler.timesteps])
    if not table.isfinite().all():
        raise ConfigError(
            f"{name} with {steps} steps has coefficients that are not finite",
            fix="choose another number of steps",
        )
    return Schedule(
        name=named.name,
        timesteps=scheduler.timesteps.numpy().astype(np.int64),
        coefficients=table.numpy().astype(np.float32),
        initial_sigma=float(scheduler.init_noise_sigma),
    )


def parse_schedule(
    text: str, diffusion: DiffusionConfig, distilled: DistillationConfig | None = None
) -> Schedule:
    """Build the table for `NAME:STEPS` or `NAME-SPACING:STEPS`, the form of the command line.
    Raises `ConfigError`, also for a sampler with which a model that is `distilled` cannot draw."""
    named = parse_schedule_name(text, diffusion.steps)
    check_schedule(named, diffusion, distilled)
    if distilled is not None and distilled.solver_steps is not None:
        return lcm_table(named.steps, diffusion, distilled.solver_steps)
    return schedule_table(named.solver, named.steps, diffusion, named.spacing)


def _probe_step(scheduler: Any, timestep: torch.Tensor) -> torch.Tensor:
    """Advance the scheduler by one step on the basis: [STATE, TERMS] float64."""
    basis = torch.eye(TERMS, dtype=torch.float64)[:, None]  # [TERMS, 1, TERMS]
    rows = torch.zeros(STATE, 1, TERMS, dtype=torch.float64)
    keeps_data = hasattr(scheduler, "model_outputs")
    keeps_sample = getattr(scheduler, "last_sample", None) is not None
    if keeps_data:
        scheduler.model_outputs = [basis[OLDER_DATA], basis[LAST_DATA]]
    if keeps_sample:
        scheduler.last_sample = basis[LAST_SAMPLE]
    if isinstance(scheduler, LCMScheduler):
        rows[2] = denoised_by(scheduler, basis[PREDICTION], timestep, basis[LATENTS])
        rows[0] = with_noise(scheduler, rows[2], timestep, basis[NOISE])
        return rows[:, 0]
    if isinstance(scheduler, DDPMScheduler):
        rows[0] = _without_noise(scheduler, timestep, basis[PREDICTION], basis[LATENTS])
        rows[0] += _noise_scale(scheduler, timestep) * basis[NOISE]
    else:
        rows[0] = scheduler.step(basis[PREDICTION], timestep, basis[LATENTS]).prev_sample
    if getattr(scheduler, "last_sample", None) is not None:
        rows[1] = scheduler.last_sample
    if keeps_data:
        rows[2], rows[3] = scheduler.model_outputs[-1], scheduler.model_outputs[-2]
    else:  # the solver has no use for it, but previews have
        rows[2] = _data_prediction(scheduler, timestep, basis[PREDICTION], basis[LATENTS])
    return rows[:, 0]  # [STATE, TERMS]


def _data_prediction(
    scheduler: Any, timestep: torch.Tensor, prediction: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """Data prediction of a step of a scheduler that keeps no history."""
    draw = {"generator": torch.Generator().manual_seed(0)}  # adds noise to the next latents alone
    data: torch.Tensor = scheduler.step(
        prediction, int(timestep), sample, **draw
    ).pred_original_sample
    return data


def _without_noise(
    scheduler: DDPMScheduler, timestep: torch.Tensor, prediction: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """Mean of an ancestral step: its result minus a step of zeros with the same draw."""
    zero = torch.zeros_like(sample)
    step, alone = (
        scheduler.step(output, int(timestep), latents, torch.Generator().manual_seed(0)).prev_sample
        for output, latents in ((prediction, sample), (zero, zero))
    )
    return step - alone


def _noise_scale(scheduler: DDPMScheduler, timestep: torch.Tensor) -> float:
    """Factor of the noise of an ancestral step: a step of zeros divided by its draw."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    added = scheduler.step(zero, int(timestep), zero, torch.Generator().manual_seed(0)).prev_sample
    draw = torch.randn(1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return float(added / draw)
