"""The top of the parity ladder: a whole document, runtime against plain PyTorch.

The engines here are the very modules that are exported, run in PyTorch, so that what is compared
is the loop: caches, positions, slots, contexts, draws, tables. That each ONNX file equals its
module is what its receipt proves.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from deploy.runtime.fake_model import fake_tokenizer, picture
from export.small_models import random_model, released_reading
from mmi_deploy.documents.images import to_pixels, to_rgb
from mmi_deploy.runtime.backend import HostBackend
from mmi_deploy.runtime.buffers import HOST, Array, Buffer
from mmi_deploy.runtime.engine import Engine
from mmi_deploy.runtime.keyed_random import first_latents, step_noise
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.session import Session
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import Graph, Limits, graphs
from mmi_deploy.spec.presets import tiny
from mmi_deploy.spec.schedule import Schedule
from mmi_export.export import MODULES, with_time_table
from mmi_export.schedules import diffusers_scheduler, parse_schedule
from mmi_train.model.diffusion import ddim
from mmi_train.model.generation import draw_pictures
from mmi_train.model.mm_interleaved import MMInterleaved

SEED = 5


class TorchEngine(Engine):
    """A graph's module, run in PyTorch; the new cache is copied to where the old one is."""

    def __init__(self, model: MMInterleaved, graph: Graph) -> None:
        super().__init__(graph, HOST)
        self._module = MODULES[graph.name](model, graph)

    def _execute(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        tensors = {name: torch.from_numpy(buffer.read()) for name, buffer in inputs.items()}
        with torch.no_grad():
            for name, tensor in self._module(tensors).items():
                outputs[name].write(tensor.contiguous().numpy())


def torch_runtime(model: MMInterleaved) -> Runtime:
    config, diffusion = model.config, model.config.image_decoder.diffusion

    def schedule(key: str | None) -> Schedule:
        return with_time_table(model, parse_schedule(key or "ddim:3", diffusion))

    limits = Limits(context=160)
    backend = HostBackend(graphs(config, limits), limits, lambda graph: TorchEngine(model, graph))
    keys = ("ddim:3", "unipc:4", "ddpm:3")
    return Runtime(config, fake_tokenizer(config), backend, schedule, keys)


@pytest.fixture(scope="module", params=[tiny, released_reading])
def model(request: pytest.FixtureRequest) -> MMInterleaved:
    config: ModelConfig = request.param()
    return random_model(config)


def logits_of(model: MMInterleaved, token_ids: list[int], images: list[Array]) -> Array:
    """Logits of the last token, computed in one forward pass."""
    with torch.no_grad():
        encoded = model.encode_images(pixels_of(images))
        slots = torch.arange(len(images))[None]
        return model.head(model.read(torch.tensor([token_ids]), encoded, slots)[:, -1])[0].numpy()


def pixels_of(images: list[Array]) -> torch.Tensor:
    return torch.from_numpy(np.stack([to_pixels(image) for image in images]))


def test_texts_and_pictures_equal_plain_pytorch(model: MMInterleaved) -> None:
    """Two given images, text token by token, a picture drawn by each kind of sampler, and text
    after it. Logits to 1e-4 of values near 5 (fp32, sums in another order); pictures to one of 255
    levels, from rounding."""
    tokens, unet = model.config.tokens, model.config.image_decoder.unet
    session = Session(torch_runtime(model))
    side = model.config.vision.image_size
    images = [picture(1, side), picture(2, side)]
    session.append_text([tokens.bos, 7, 8])
    session.append_image(images[0])
    session.append_text([10, 11])
    session.append_image(images[1])
    session.append_text([12])
    for token in (20, 21):
        given = logits_of(model, session.token_ids, images)
        np.testing.assert_allclose(session.next_logits(), given, atol=1e-4)
        session.append_text([token])
    session.append_text([tokens.boi])

    shape = (1, unet.latent_channels, unet.latent_side, unet.latent_side)
    latents = torch.from_numpy(first_latents(SEED, 2, shape))
    row = torch.tensor([session.token_ids])
    for key in ("ddim:3", "unipc:4", "ddpm:3"):
        name, steps = key.split(":")
        diffusion, noise = model.config.image_decoder.diffusion, None
        scheduler = diffusers_scheduler(name, diffusion)
        if name == "ddpm":  # plain PyTorch draws it as DDIM with eta = 1
            scheduler = ddim(diffusion)
            noise = [
                torch.from_numpy(step_noise(SEED, 2, step, shape)) for step in range(int(steps))
            ]
        scheduler.set_timesteps(int(steps))
        expected = draw_pictures(
            model,
            row,
            pixels_of(images),
            torch.tensor([[0, 1, -1]]),
            torch.tensor([[0, 2]]),
            latents,
            scheduler,
            guidance=2.5,
            step_noise=noise,
        )
        drawn = drawn_by(session, key)
        difference = np.abs(drawn.astype(int) - to_rgb(expected[0].numpy()))
        assert difference.max() <= 1 and drawn.std() > 10, key

    session.append_image(drawn)
    session.append_text([30])
    given = logits_of(model, session.token_ids, [*images, drawn])
    np.testing.assert_allclose(session.next_logits(), given, atol=1e-4)


def drawn_by(session: Session, key: str) -> Array:
    steps = session.draw_steps(key, 2.5, SEED)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value
