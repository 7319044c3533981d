"""Schedules as tables: whole trajectories equal diffusers' own, for every solver and prediction."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmi_deploy.errors import BundleError, ConfigError
from mmi_deploy.spec.config import DiffusionConfig, DistillationConfig
from mmi_deploy.spec.graphs import HISTORY, STATE
from mmi_deploy.spec.schedule import (
    LAST_DATA_ROW,
    SOLVERS,
    Schedule,
    default_schedule,
    read_schedule,
)
from mmi_export.schedules import (
    diffusers_scheduler,
    lcm_table,
    parse_schedule,
    schedule_table,
)
from mmi_train.model.consistency import lcm

SHAPE = (2, 4, 3, 3)
PREDICTIONS = ("epsilon", "v_prediction")
ZERO_SNR = DiffusionConfig("v_prediction", rescale_betas_zero_snr=True)


def denoiser(timestep: int, latents: np.ndarray) -> np.ndarray:
    """A fake U-Net: linear and bent parts, different at every timestep."""
    t = timestep / 1000
    return 0.6 * latents + 0.4 * np.sin(3 * latents + t) - t * np.roll(latents, 1, axis=1)


def by_table(
    schedule: Schedule, latents: np.ndarray, noises: np.ndarray, dtype: type
) -> np.ndarray:
    """Apply the table as `denoise_step` does: one matrix product per step."""
    state = np.zeros((STATE, *latents.shape), dtype)
    state[0] = latents * schedule.initial_sigma
    for step, timestep in enumerate(schedule.timesteps):
        prediction = denoiser(int(timestep), state[0])
        terms = np.stack([state[0], prediction, noises[step], *state[1:]]).astype(dtype)
        state = np.tensordot(schedule.coefficients[step].astype(dtype), terms, axes=1)
    assert len(state) == 1 + HISTORY
    return state[0]


def by_diffusers(
    name: str, diffusion: DiffusionConfig, steps: int, latents: np.ndarray, dtype: torch.dtype
):
    """Run diffusers' scheduler; also return the noise of every step."""
    scheduler = lcm(diffusion, 50) if name == "lcm" else diffusers_scheduler(name, diffusion)
    scheduler.set_timesteps(steps)
    sample = torch.from_numpy(latents).to(dtype) * scheduler.init_noise_sigma
    options = {"generator": torch.Generator().manual_seed(7)} if name in ("ddpm", "lcm") else {}
    draws = torch.Generator().manual_seed(7)
    noises = []
    for timestep in scheduler.timesteps:
        noises.append(torch.randn(SHAPE, generator=draws, dtype=dtype).numpy())
        prediction = torch.from_numpy(denoiser(int(timestep), sample.numpy())).to(dtype)
        sample = scheduler.step(prediction, timestep, sample, **options).prev_sample
    return sample.numpy(), np.stack(noises)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("name", SOLVERS)
def test_trajectory_equals_diffusers(name: str, steps: int, prediction: str) -> None:
    """Relative to the largest value: 1e-5 in float64 (the table is float32), 1e-4 in float32."""
    diffusion = DiffusionConfig(prediction=prediction)
    latents = np.random.default_rng(steps).standard_normal(SHAPE)
    schedule = schedule_table(name, steps, diffusion)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        expected, noises = by_diffusers(name, diffusion, steps, latents, dtype)
        got = by_table(
            schedule, latents, noises, np.float64 if dtype == torch.float64 else np.float32
        )
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert error < tolerance, f"{name}:{steps} {prediction} {dtype}: relative error {error:.2e}"


@pytest.mark.parametrize("name", SOLVERS)
def test_every_column_that_a_solver_uses_matters(name: str) -> None:
    """Dropping any used column changes the trajectory, so the comparison above can see each."""
    diffusion = DiffusionConfig(prediction="v_prediction")
    schedule = schedule_table(name, 8, diffusion)
    used = [
        column
        for column in range(schedule.coefficients.shape[2])
        if schedule.coefficients[:, 0, column].any()
    ]
    expected_columns = {
        "ddpm": [0, 1, 2],
        "ddim": [0, 1],
        "dpmpp_2m": [0, 1, 4],
        "unipc": [0, 1, 3, 4, 5],
    }
    assert used == expected_columns[name]


def test_ddpm_timesteps_are_stable_diffusions() -> None:
    """Its published scheduler configuration: `leading` spacing with an offset of 1."""
    assert schedule_table("ddpm", 5, DiffusionConfig("epsilon")).timesteps.tolist() == [
        801,
        601,
        401,
        201,
        1,
    ]


def test_only_the_ancestral_sampler_draws_noise() -> None:
    for name in SOLVERS:
        schedule = schedule_table(name, 5, DiffusionConfig("epsilon"))
        assert any(schedule.draws_noise(step) for step in range(5)) == (name == "ddpm")


def test_command_line_spelling() -> None:
    diffusion = DiffusionConfig("epsilon")
    assert parse_schedule("unipc:7", diffusion).key == "unipc:7"
    trailing = parse_schedule("ddim-trailing:4", diffusion)
    assert trailing.key == "ddim-trailing:4" and trailing.timesteps[0] == 999
    for wrong in (
        "unipc",
        "unipc:",
        "unipc:-3",
        "unipc:0",
        "unipc:1000",
        "plms:5",
        "ddim-upwards:4",
        "ddim:٢٠",
        "ddim:" + "9" * 5000,
    ):
        with pytest.raises(ConfigError):
            parse_schedule(wrong, diffusion)


def test_schedule_survives_its_file(tmp_path) -> None:
    schedule = schedule_table("unipc", 6, DiffusionConfig("v_prediction"))
    schedule = schedule.with_time_table(np.arange(6 * 5, dtype=np.float32).reshape(6, 5))
    schedule.save(tmp_path / "unipc-6.safetensors")
    again = read_schedule(tmp_path / "unipc-6.safetensors")
    assert (again.name, again.initial_sigma) == (schedule.name, schedule.initial_sigma)
    for field in ("timesteps", "coefficients", "time_table"):
        np.testing.assert_array_equal(getattr(again, field), getattr(schedule, field))
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(BundleError, match=r"broken\.safetensors"):
        read_schedule(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_keeps_the_data_prediction(name: str, prediction: str) -> None:
    """In the same row of the history, and other than noise: previews show it."""
    diffusion = DiffusionConfig(prediction=prediction)
    schedule = schedule_table(name, 7, diffusion)
    kept = diffusers_scheduler(name, diffusion).alphas_cumprod.double().numpy()
    for step, timestep in enumerate(schedule.timesteps):
        signal, noise = kept[timestep] ** 0.5, (1 - kept[timestep]) ** 0.5
        row = schedule.coefficients[step, 1 + LAST_DATA_ROW]
        if prediction == "epsilon":
            wanted = [1 / signal, -noise / signal, 0, 0, 0, 0]
        else:
            wanted = [signal, -noise, 0, 0, 0, 0]
        np.testing.assert_allclose(row, wanted, rtol=1e-3, atol=1e-3)


def reference_products(diffusion: DiffusionConfig) -> np.ndarray:
    """Lin et al. 2023, Algorithm 1, in float64 and in its own order: products of (1 - beta)."""
    root = np.linspace(diffusion.beta_start**0.5, diffusion.beta_end**0.5, diffusion.steps)
    kept = np.sqrt(np.cumprod(1 - root**2))
    first, last = kept[0], kept[-1]
    return ((kept - last) * first / (first - last)) ** 2


@pytest.mark.parametrize("name", SOLVERS)
def test_tables_of_zero_terminal_snr_are_diffusers(name: str) -> None:
    """Compare whole trajectories from pure noise with diffusers' `rescale_betas_zero_snr`: finite,
    and the first step is from the last timestep."""
    latents = np.random.default_rng(0).standard_normal(SHAPE)
    for steps in (1, 5, 20):
        schedule = schedule_table(name, steps, ZERO_SNR)
        assert schedule.key == f"{name}-trailing:{steps}" and schedule.timesteps[0] == 999
        assert np.isfinite(schedule.coefficients).all() and abs(schedule.coefficients).max() < 2
        expected, noises = by_diffusers(name, ZERO_SNR, steps, latents, torch.float64)
        got = by_table(schedule, latents, noises, np.float64)
        assert np.abs(got - expected).max() / np.abs(expected).max() < 1e-5, f"{name}:{steps}"


@pytest.mark.parametrize("name", SOLVERS)
def test_data_of_zero_terminal_snr_is_that_of_the_float64_reference(name: str) -> None:
    """x = sqrt(a) noisy - sqrt(1 - a) v at every step. Solvers in log SNR, as diffusers has them,
    take 2^-24 for a at the last timestep, so that sqrt(a) is off by 2^-12 there."""
    products = reference_products(ZERO_SNR)
    schedule = schedule_table(name, 8, ZERO_SNR)
    for row, timestep in zip(schedule.coefficients, schedule.timesteps, strict=True):
        kept = products[timestep]
        wanted = [kept**0.5, -((1 - kept) ** 0.5), 0, 0, 0, 0]
        tolerance = 2.5e-4 if timestep == 999 else 2e-6
        np.testing.assert_allclose(row[1 + LAST_DATA_ROW], wanted, rtol=0, atol=tolerance)


def test_deterministic_step_from_pure_noise_is_the_prediction_alone() -> None:
    """DDIM at a = 0: the data is -v and the noise is the latents, without a division by a."""
    products = reference_products(ZERO_SNR)
    schedule = schedule_table("ddim", 4, ZERO_SNR)
    kept = products[int(schedule.timesteps[1])]
    wanted = [(1 - kept) ** 0.5, -(kept**0.5), 0, 0, 0, 0]
    np.testing.assert_allclose(schedule.coefficients[0, 0], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*SOLVERS, "ddim-linspace:1", "ddpm-leading:7"])
def test_a_schedule_that_begins_below_pure_noise_is_refused(name: str) -> None:
    """In a line that names the schedule to ask for instead."""
    asked = name if ":" in name else f"{name}-leading:20"
    with pytest.raises(ConfigError, match=r"zero terminal SNR.*999.*-trailing:") as refused:
        parse_schedule(asked, ZERO_SNR)
    advice = str(refused.value).rpartition("write ")[2]
    assert parse_schedule(advice, ZERO_SNR).key == advice


def test_the_default_schedule_is_one_that_the_model_can_take() -> None:
    assert default_schedule(DiffusionConfig("epsilon"), None) == "unipc:20"
    own = default_schedule(ZERO_SNR, None)
    assert parse_schedule(own, ZERO_SNR).timesteps[0] == 999


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_consistency_sampling_equals_diffusers(steps: int, prediction: str) -> None:
    """Compare whole trajectories with `LCMScheduler` and its own draws in float64: 1e-5 of the
    largest value, as the table is float32."""
    diffusion = DiffusionConfig(prediction)  # type: ignore[arg-type]
    schedule = lcm_table(steps, diffusion, 50)
    latents = np.random.default_rng(1).standard_normal(SHAPE)
    expected, noises = by_diffusers("lcm", diffusion, steps, latents, torch.float64)
    got = by_table(schedule, latents, noises, np.float64)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    assert [schedule.draws_noise(step) for step in range(steps)] == [True] * (steps - 1) + [False]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_coefficients_of_consistency_sampling(prediction: str) -> None:
    """Luo et al. 2023, Algorithm 3, written out in float64: f = c_skip z + c_out x with
    c_skip = 0.25 / (100 t^2 + 0.25) and c_out = 10 t / sqrt(100 t^2 + 0.25), then
    sqrt(a) f + sqrt(1 - a) noise at the next timestep."""
    diffusion = DiffusionConfig(prediction)  # type: ignore[arg-type]
    schedule = lcm_table(4, diffusion, 50)
    assert schedule.key == "lcm:4" and schedule.initial_sigma == 1.0
    assert schedule.timesteps.tolist() == [999, 759, 499, 259]
    betas = np.linspace(diffusion.beta_start**0.5, diffusion.beta_end**0.5, 1000) ** 2
    products = np.cumprod(1 - betas)
    for step, t in enumerate(schedule.timesteps.astype(float)):
        product = products[int(t)]
        skip, out = 0.25 / (100 * t**2 + 0.25), 10 * t / np.sqrt(100 * t**2 + 0.25)
        signal, sigma = np.sqrt(product), np.sqrt(1 - product)
        if prediction == "epsilon":
            data = np.array([1 / signal, -sigma / signal])
        else:
            data = np.array([signal, -sigma])
        denoised = np.array([skip, 0.0]) + out * data
        rate, noise = 1.0, 0.0
        if step < 3:
            following = products[schedule.timesteps[step + 1]]
            rate, noise = np.sqrt(following), np.sqrt(1 - following)
        expected = np.zeros((STATE, 6))
        expected[0, :3] = [*(rate * denoised), noise]
        expected[1 + LAST_DATA_ROW, :2] = denoised
        np.testing.assert_allclose(schedule.coefficients[step], expected, rtol=2e-5, atol=1e-7)


def test_samplers_of_distilled_models() -> None:
    """A consistency model has no sampler but its own, others do not have that one."""
    diffusion = DiffusionConfig("epsilon")
    guided = DistillationConfig("guidance", 3.5)
    consistent = DistillationConfig("lcm", 3.5, 20)
    assert parse_schedule("lcm:20", diffusion, consistent).steps == 20
    assert parse_schedule("unipc:4", diffusion, guided).steps == 4
    for key, distilled in (
        ("lcm:4", None),
        ("lcm:4", guided),
        ("ddim:4", consistent),
        ("lcm-trailing:4", consistent),
        ("lcm:21", consistent),
    ):
        with pytest.raises(ConfigError) as error:
            parse_schedule(key, diffusion, distilled)
        assert "\n" not in str(error.value)
