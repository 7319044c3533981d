"""The map of the previews, fitted to the VAE decoder of a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from export.small_models import paper_reading, random_model
from mmi_deploy.errors import WeightsError
from mmi_deploy.spec.config import VaeConfig
from mmi_export.preview_map import _cells, _scenes, fit_preview_map
from mmi_train.model.vae import Vae
from mmi_train.weights.model_folder import CONFIG, load_model

PREFIX = "image_decoder.vae."


def stored(vae: Vae) -> Any:
    """The weights of a VAE, as those of a model folder are read."""
    weights = vae.state_dict()
    return SimpleNamespace(read=lambda name: weights[name.removeprefix(PREFIX)])


def test_the_map_is_near_the_trained_decoder(repository: Path) -> None:
    """On scenes that were not fitted, and far better than one grey for all cells."""
    folder = repository / "assets" / "tiny"
    if not (folder / CONFIG).exists():
        pytest.skip("the trained model is not here")
    vae = load_model(folder).image_decoder.vae
    found = fit_preview_map(vae.config, stored(vae))
    assert found == fit_preview_map(vae.config, stored(vae)), "a fit depends on the weights alone"
    latents, colours = _cells(vae, _scenes(vae.config.factor)[64:])
    side = int(latents.shape[1] ** 0.5)
    cells = latents.swapaxes(1, 2).reshape(len(latents), -1, side, side).astype(np.float32)
    shown = np.stack([found.pixels(one).clip(0, 1) for one in cells])
    wanted = colours.swapaxes(1, 2).reshape(shown.shape)
    assert np.abs(shown - wanted).mean() == pytest.approx(found.error, abs=1e-4)
    assert found.error < 0.4 * np.abs(wanted - wanted.mean()).mean()


def test_scenes_have_a_side_that_the_autoencoder_halves() -> None:
    for factor in (1, 4, 8, 64):
        assert _scenes(factor).shape[2:] == (64, 64)
    scenes = _scenes(24)
    assert scenes.shape[2:] == (192, 192)
    assert torch.equal(scenes[:, :, ::3, ::3], _scenes(8))


def test_an_autoencoder_that_overflows_is_refused() -> None:
    vae = random_model(paper_reading()).image_decoder.vae
    config: VaeConfig = vae.config
    assert fit_preview_map(config, stored(vae)).error < 1
    with torch.no_grad():
        vae.autoencoder.decoder.conv_out.weight.fill_(torch.inf)
    with pytest.raises(WeightsError, match="not finite"):
        fit_preview_map(config, stored(vae))
