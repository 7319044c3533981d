"""Diffusion and autoencoder against diffusers; the image decoder against its definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import DiffusionConfig, VaeConfig
from mmi_deploy.spec.presets import PRESETS, released_13b, tiny
from mmi_train.model.diffusion import Diffusion, ddim, scheduler_options, spacing_options
from mmi_train.model.image_decoder import (
    CONDITION_DROP,
    DenoisingStep,
    ImageDecoder,
    PreviousImages,
    RandomDraws,
)
from mmi_train.model.vae import Posterior, Vae

PREDICTIONS = ("epsilon", "v_prediction")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def decoder() -> ImageDecoder:
    """The tiny preset's, untrained, with MMFS blocks that are awake."""
    torch.manual_seed(0)
    model = ImageDecoder(tiny()).eval()
    for block in model.unet.look_back:
        torch.nn.init.normal_(block.conv.weight, std=0.1)
    return model


def look_back(pictures: int, images: int = 2) -> PreviousImages:
    config = tiny()
    cells = sum(side * side for side in config.vision.level_sides)
    slot = torch.arange(pictures)[:, None] % images
    return PreviousImages(
        normal(images, cells, config.vision.width, seed=3), slot, torch.ones_like(slot)
    )


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_diffusion_is_that_of_diffusers(schedule: str, prediction: str, zero_snr: bool) -> None:
    """To 5e-6: diffusers multiplies the products in fp32, we in fp64; 1.8e-6 was seen. With a
    terminal SNR of zero its fp32 loses more in the differences near the end: 2e-5."""
    if zero_snr and prediction == "epsilon":
        pytest.skip("refused, see below")
    config = DiffusionConfig(
        prediction=prediction, beta_schedule=schedule, rescale_betas_zero_snr=zero_snr
    )
    ours, theirs = Diffusion(config), DDPMScheduler(**scheduler_options(config))
    latents, noise = normal(5, 4, 3, 3), normal(5, 4, 3, 3, seed=1)
    timestep = torch.tensor([0, 1, 400, 800, 999])
    noisy = ours.add_noise(latents, noise, timestep)
    close = {"rtol": 0, "atol": 2e-5 if zero_snr else 5e-6}
    torch.testing.assert_close(noisy, theirs.add_noise(latents, noise, timestep), **close)
    expected = noise
    if prediction == "v_prediction":
        expected = theirs.get_velocity(latents, noise, timestep)
    target = ours.target(latents, noise, timestep)
    torch.testing.assert_close(target, expected, **close)


def test_the_last_timestep_of_zero_terminal_snr_is_noise_alone() -> None:
    """To the bit; its target is the picture, with the sign of v."""
    diffusion = Diffusion(DiffusionConfig("v_prediction", rescale_betas_zero_snr=True))
    latents, noise, last = normal(1, 4, 3, 3), normal(1, 4, 3, 3, seed=1), torch.tensor([999])
    assert torch.equal(diffusion.add_noise(latents, noise, last), noise)
    assert torch.equal(diffusion.target(latents, noise, last), -latents)


def test_epsilon_without_terminal_signal_is_refused() -> None:
    with pytest.raises(ValueError, match="rescale_betas_zero_snr needs the prediction v_predict"):
        DiffusionConfig("epsilon", rescale_betas_zero_snr=True)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_error_of_the_picture(prediction: str) -> None:
    """Hang et al. 2023, Sec. 3.4: any prediction's weighted error is min(SNR, gamma) times that of
    the picture that it means, here computed in float64 from the betas."""
    gamma, steps = 5.0, torch.tensor([0, 100, 400, 900, 999])
    config = DiffusionConfig(prediction=prediction, min_snr_gamma=gamma)
    diffusion = Diffusion(config)
    root = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.steps)
    kept = np.cumprod(1 - root**2)[steps]  # [b]
    noisy, predicted, target = (normal(5, 4, 3, 3, seed=seed).double() for seed in (1, 2, 3))
    column = (slice(None), None, None, None)
    signal, sigma = (torch.from_numpy(v**0.5)[column] for v in (kept, 1 - kept))

    def picture(output: Tensor) -> Tensor:
        if prediction == "epsilon":
            return (noisy - sigma * output) / signal
        return signal * noisy - sigma * output

    error = (picture(predicted) - picture(target)).square().mean((1, 2, 3))
    expected = torch.from_numpy(np.minimum(kept / (1 - kept), gamma)) * error
    weight = diffusion.loss_weight(steps)
    assert weight is not None
    got = weight.double() * (predicted - target).square().mean((1, 2, 3))
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=0)


def test_min_snr_is_finite_without_signal_and_off_by_default() -> None:
    """At an SNR of zero v has no weight: its picture's error is not divided by zero."""
    options = {"rescale_betas_zero_snr": True, "min_snr_gamma": 5.0}
    weight = Diffusion(DiffusionConfig("v_prediction", **options)).loss_weight(torch.arange(1000))
    assert weight is not None and weight.isfinite().all() and weight[-1] == 0 < weight[-2]
    assert Diffusion(DiffusionConfig("epsilon")).loss_weight(torch.arange(3)) is None


def test_losses_of_pictures_are_weighted(decoder: ImageDecoder) -> None:
    draws = decoder.random_draws(4, torch.Generator().manual_seed(0))
    posterior = Posterior(normal(4, *decoder.latent_shape), torch.zeros(4, *decoder.latent_shape))
    given = (posterior, normal(4, 32, 128), look_back(4), draws)
    plain = decoder.losses(*given)
    config = replace(decoder.config.diffusion, min_snr_gamma=1.0)
    try:
        decoder.diffusion = Diffusion(config)
        weighted = decoder.losses(*given)
    finally:
        decoder.diffusion = Diffusion(decoder.config.diffusion)
    torch.testing.assert_close(weighted, plain * Diffusion(config).loss_weight(draws.timestep))
    assert not torch.equal(weighted, plain)


def test_unknown_beta_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="linear or scaled_linear; got cosine"):
        Diffusion(DiffusionConfig(prediction="epsilon", beta_schedule="cosine"))


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_with_noise_is_the_ancestral_sampler(prediction: str, zero_snr: bool) -> None:
    """Song et al. 2021, Sec. 4.1: eta = 1 is DDPM. Its noise is drawn here as DDPM draws it."""
    if zero_snr and prediction == "epsilon":
        pytest.skip("refused, see above")
    config = DiffusionConfig(prediction=prediction, rescale_betas_zero_snr=zero_snr)
    options = scheduler_options(config) | spacing_options(config.spacing)
    ancestral = DDPMScheduler(**options, variance_type="fixed_small", clip_sample=False)
    ours = ddim(config)
    ancestral.set_timesteps(5)
    ours.set_timesteps(5)
    assert ours.timesteps.tolist() == ancestral.timesteps.tolist()
    latents = expected = normal(1, 4, 5, 5)
    source, copy = (torch.Generator().manual_seed(9) for _ in range(2))
    for index, timestep in enumerate(ours.timesteps):
        predicted = normal(1, 4, 5, 5, seed=100 + index)
        expected = ancestral.step(predicted, timestep, expected, generator=source).prev_sample
        noise = torch.randn(latents.shape, generator=copy)
        given = {"eta": 1.0, "variance_noise": noise}
        latents = ours.step(predicted, timestep, latents, **given).prev_sample
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch", [1, 2])
def test_vae_is_diffusers_autoencoder_on_scaled_latents(patch: int) -> None:
    config = VaeConfig(
        block_widths=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=0.5,
        norm_groups=4,
        patch=patch,
    )
    torch.manual_seed(0)
    vae = Vae(config).eval()
    pixels = torch.rand(2, 3, 16, 16)
    side = 16 // config.factor
    # A patch's pixels are the channels of a cell, colour slowest.
    cells = pixels.reshape(2, 3, 16 // patch, patch, 16 // patch, patch)
    cells = cells.permute(0, 1, 3, 5, 2, 4).reshape(2, 3 * patch**2, 16 // patch, 16 // patch)
    expected = vae.autoencoder.encode(cells * 2 - 1).latent_dist
    posterior = vae.encode(pixels)
    torch.testing.assert_close(posterior.mean, expected.mean)
    torch.testing.assert_close(posterior.log_variance, expected.logvar)

    noise = normal(2, 4, side, side)
    latents = vae.latents(posterior, noise)
    torch.testing.assert_close(latents, 0.5 * (expected.mean + expected.std * noise))
    decoded = vae.autoencoder.decode(latents / 0.5).sample
    decoded = decoded.reshape(2, 3, patch, patch, 16 // patch, 16 // patch)
    decoded = decoded.permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 16, 16)
    got = vae.decode(3 * latents)
    assert got.shape == pixels.shape and got.min() >= 0 and got.max() <= 1
    torch.testing.assert_close(vae.decode_unclipped(latents), decoded / 2 + 0.5)


def test_pictures_are_encoded_in_float32_and_a_few_at_a_time(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = normal(5, 3, 64, 64).sigmoid()
    expected = decoder.vae.encode(pixels)
    monkeypatch.setattr("mmi_train.model.image_decoder.ENCODED_AT_ONCE", 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = decoder.encode(pixels)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_condition_reads_the_context_and_no_padding(decoder: ImageDecoder) -> None:
    width = tiny().llama.width
    context = normal(2, 9, width)
    short = decoder.condition(context[:, :5], torch.tensor([5, 3]))
    padded = decoder.condition(context, torch.tensor([5, 3]))
    torch.testing.assert_close(padded, short, rtol=0, atol=1e-5)
    longer = decoder.condition(context, torch.tensor([6, 3]))
    assert (longer[0] - short[0]).abs().max() > 1e-3
    torch.testing.assert_close(longer[1], short[1], rtol=0, atol=1e-5)


def test_context_is_marked_with_its_distance_from_the_picture(decoder: ImageDecoder) -> None:
    """Sin/cos of the place counted from the begin-of-image token, which has place 0."""
    width = tiny().llama.width
    place = np.arange(6)[:, None] / 10000 ** (np.arange(width // 2) / (width // 2))
    table = np.concatenate([np.sin(place), np.cos(place)], axis=1)
    np.testing.assert_allclose(decoder.context_positions[:6], table, atol=1e-6)
    given = normal(1, 6, width)
    marked = decoder.context_proj(given) + torch.from_numpy(table).float()
    expected = decoder.resampler(marked)
    torch.testing.assert_close(
        decoder.condition(given, torch.tensor([6])), expected, rtol=0, atol=1e-5
    )


def test_loss_is_the_squared_error_of_the_prediction(decoder: ImageDecoder) -> None:
    """Sec. 3.3, Eq. 5, the U-Net called by hand for each picture alone."""
    shape = decoder.latent_shape
    posterior = Posterior(normal(3, *shape), normal(3, *shape, seed=1) - 3)
    condition = normal(3, decoder.config.resampler.queries, decoder.config.resampler.width)
    images = look_back(3)
    draws = RandomDraws(
        drop=torch.tensor([0.5, CONDITION_DROP - 1e-3, CONDITION_DROP + 1e-3]),
        posterior=normal(3, *shape, seed=4),
        noise=normal(3, *shape, seed=5),
        timestep=torch.tensor([10, 500, 900]),
    )
    scheduler = DDPMScheduler(**scheduler_options(decoder.config.diffusion))
    with torch.no_grad():
        losses = decoder.losses(posterior, condition, images, draws)
        for i in range(3):
            std = torch.exp(posterior.log_variance[i : i + 1] / 2)
            latents = posterior.mean[i : i + 1] + std * draws.posterior[i : i + 1]
            latents = latents * decoder.config.vae.scaling_factor
            noise, timestep = draws.noise[i : i + 1], draws.timestep[i : i + 1]
            predicted = decoder.unet(
                scheduler.add_noise(latents, noise, timestep),
                timestep,
                decoder.null_condition if i == 1 else condition[i : i + 1],
                images.features,
                images.slot[i : i + 1],
                images.position[i : i + 1],
            )
            target = scheduler.get_velocity(latents, noise, timestep)
            expected = F.mse_loss(predicted, target)
            torch.testing.assert_close(losses[i], expected, rtol=1e-4, atol=1e-5)


def test_draws_repeat_with_their_seed(decoder: ImageDecoder) -> None:
    first, again = (decoder.random_draws(64, torch.Generator().manual_seed(3)) for _ in range(2))
    other = decoder.random_draws(64, torch.Generator().manual_seed(4))
    assert torch.equal(first.noise, again.noise) and torch.equal(first.timestep, again.timestep)
    assert not torch.equal(first.noise, other.noise)
    assert first.timestep.min() >= 0 and 500 < first.timestep.max() < 1000
    assert not torch.equal(first.noise, first.posterior)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_drawing_follows_the_scheduler_and_guidance(decoder: ImageDecoder, guidance: float) -> None:
    """eps = eps_u + g (eps_c - eps_u), both branches with the same images; steps by hand."""
    images, latents = look_back(1), normal(1, *decoder.latent_shape)
    condition = normal(1, decoder.config.resampler.queries, decoder.config.resampler.width)
    noises = [normal(1, *decoder.latent_shape, seed=20 + step) for step in range(3)]
    scheduler = ddim(decoder.config.diffusion)
    scheduler.set_timesteps(3)
    seen: list[DenoisingStep] = []
    got = decoder.draw(
        condition,
        images,
        latents,
        scheduler,
        guidance=guidance,
        step_noise=noises,
        on_step=seen.append,
    )
    look = images.features, images.slot, images.position
    expected = latents
    with torch.no_grad():
        for timestep, noise, step in zip(scheduler.timesteps, noises, seen, strict=True):
            with_text = decoder.unet(expected, timestep[None], condition, *look)
            without = decoder.unet(expected, timestep[None], decoder.null_condition, *look)
            predicted = without + guidance * (with_text - without)
            torch.testing.assert_close(step.prediction, predicted, rtol=1e-4, atol=1e-4)
            options = {"eta": 1.0, "variance_noise": noise}
            expected = scheduler.step(predicted, timestep, expected, **options).prev_sample
            torch.testing.assert_close(step.latents, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_qformer_decoder_of_the_release_has_the_same_interface() -> None:
    """Skips, null slot, Q-Former, epsilon: the other reading of the same class."""
    config = tiny()
    decoder = config.image_decoder
    released = replace(
        config,
        image_decoder=replace(
            decoder,
            resampler=replace(decoder.resampler, form="qformer"),
            unet=replace(decoder.unet, mmfs_at="skips"),
            mmfs=replace(decoder.mmfs, null_slot=True),
            diffusion=DiffusionConfig(prediction="epsilon"),
        ),
    )
    torch.manual_seed(0)
    model = ImageDecoder(released).eval()
    condition = model.condition(normal(2, 4, config.llama.width), torch.tensor([4, 2]))
    assert condition.shape == (2, decoder.resampler.queries, decoder.resampler.width)
    shape = (2, *model.latent_shape)
    posterior = Posterior(normal(*shape), normal(*shape))
    losses = model.losses(posterior, condition, look_back(2), model.random_draws(2))
    assert losses.shape == (2,) and bool(torch.isfinite(losses).all())


def millions(*modules: torch.nn.Module) -> float:
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def test_released_sizes_are_those_of_the_published_model() -> None:
    """Millions of parameters in the published module tree, its sin/cos tables left out."""
    with torch.device("meta"):
        model = ImageDecoder(released_13b())
    look_back = millions(model.unet.look_back)
    assert look_back == pytest.approx(57.0, abs=0.05)
    assert millions(model.unet) - look_back == pytest.approx(865.9, abs=0.05)
    assert millions(model.vae) == pytest.approx(83.7, abs=0.05)
    assert millions(model.resampler) == pytest.approx(23.2, abs=0.05)
    assert millions(model.context_proj) == pytest.approx(26.2, abs=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_draws_pictures_of_its_size(name: str) -> None:
    """Shapes through condition, U-Net with MMFS and autoencoder, without a single number."""
    config = PRESETS[name]()
    with torch.device("meta"):
        model = ImageDecoder(config).to("meta")  # its constant tables hold numbers
        condition = model.condition(torch.empty(1, 3, config.llama.width), torch.tensor([3]))
        cells = sum(side * side for side in config.vision.level_sides)
        features = torch.empty(2, cells, config.vision.width)
        keys_values = model.unet.condition_keys_values(condition)
        values = model.unet.image_values(features)
        latents = torch.empty(1, *model.latent_shape)
        pixels = model.vae.decode(latents)
    decoder = config.image_decoder
    assert condition.shape == (1, decoder.resampler.queries, decoder.unet.condition_width)
    assert [key.shape[2] for key, _ in keys_values] == list(decoder.unet.cross_attention_widths)
    own = sum(config.vision.level_sides[level] ** 2 for level in decoder.mmfs.levels)
    assert {value.shape[:2] for value in values} == {(2, own)}
    assert len(values) == decoder.unet.mmfs_blocks
    assert pixels.shape == (1, 3, decoder.image_size, decoder.image_size)
