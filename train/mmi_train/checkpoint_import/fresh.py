"""Initialisation of new weights as in the published training, module by module.

Only the module whose weights are being written is in memory. Modules whose weights are taken from
trained parts (CLIP's layers, the U-Net's body) are built at a minimal size, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from mmi_deploy.spec.config import ModelConfig
from mmi_train.model.image_decoder import ImageDecoder
from mmi_train.model.interactions import ConvFeedForward, DeformableAttention
from mmi_train.model.llama import Llama
from mmi_train.model.lm_head import LmHead
from mmi_train.model.unet import MmfsBlock, UNet
from mmi_train.model.vae import Vae
from mmi_train.model.visual_tokenizer import VisualTokenizer
from mmi_train.weights.lazy_tensor import Computed, StoredTensor

Build = Callable[[], nn.Module]


class FreshModule:
    """New weights of one module, built when the first of them is read.

    A weight is freed once it has been read.
    """

    def __init__(self, build: Build, seed: int) -> None:
        self._build, self._seed = build, seed
        self._names: set[str] = set()
        self._state: dict[str, Tensor] | None = None

    def lazy_tensor(self, name: str, shape: torch.Size) -> StoredTensor:
        """The tensor `name` of the module; it can be read once."""
        self._names.add(name)
        return Computed(shape, torch.float32, lambda: self._pop(name))

    def _pop(self, name: str) -> Tensor:
        if self._state is None:
            with torch.random.fork_rng(devices=[]):  # leaves the caller's generator as it was
                torch.manual_seed(self._seed)
                module = self._build()
            state = module.state_dict()
            self._state = {name: state[name] for name in self._names}
        return self._state.pop(name)


def fresh_tensors(
    shapes: Mapping[str, torch.Size], config: ModelConfig, taken: Iterable[str], seed: int
) -> dict[str, StoredTensor]:
    """A lazy new tensor for each name in `shapes`, ordered by module.

    taken: names whose tensors come from trained parts. seed: of the first module; each next module
    has the next seed.
    """
    builds = _builds(config, set(taken))
    modules = {
        prefix: FreshModule(build, seed + i) for i, (prefix, build) in enumerate(builds.items())
    }
    found: dict[str, StoredTensor] = {}
    for prefix, module in modules.items():
        for name, shape in shapes.items():
            if name.startswith(prefix) and name not in found:
                found[name] = module.lazy_tensor(name.removeprefix(prefix), shape)
    assert found.keys() == shapes.keys(), shapes.keys() - found.keys()
    return found


def _builds(config: ModelConfig, taken: set[str]) -> dict[str, Build]:
    """Builders of the modules by the prefix of their weights' names.

    The order counts twice: a weight belongs to the first prefix that its name begins with, and a
    module's seed is its place.
    """
    vision, decoder = config.vision, config.image_decoder
    given_clip = any(name.startswith("vision.encoder.layers.") for name in taken)
    given_unet = any(name.startswith("image_decoder.unet.") for name in taken)
    if given_clip:  # its layers are taken: as few as the adapter allows are drawn for nothing
        vision = replace(vision, layers=vision.interactions)
    small = replace(
        decoder.unet,
        block_widths=(32,),
        attention_heads=(1,),
        attention_blocks=(True,),
        layers_per_block=1,
        norm_groups=1,
        mmfs_at="up_blocks",
    )
    without_unet = replace(
        config,
        image_decoder=replace(
            decoder,
            unet=small,
            vae=replace(decoder.vae, block_widths=(32,), norm_groups=1, layers_per_block=1),
        ),
    )
    llama = config.llama
    block = replace(llama.cut(1), vocab=2, mlp_width=1, context=1, mmfs_every=1)
    builds: dict[str, Build] = {
        "vision.": lambda: _initialised(
            VisualTokenizer(vision, config.vision_resampler, llama.width), given_clip
        )
    }
    for layer in llama.mmfs_layers:
        builds[f"llm.layers.{layer}.look_back."] = lambda: _look_back(
            Llama(block, config.llm_mmfs, config.vision.width, config.vision.level_sides)
        )
    builds["head."] = lambda: LmHead(llama.width, 2, (0, 1))
    if given_unet:
        for index, (channels, side) in enumerate(decoder.unet.mmfs_maps):
            builds[f"image_decoder.unet.look_back.{index}."] = partial(
                MmfsBlock,
                decoder.mmfs,
                channels,
                side,
                decoder.unet.latent_side,
                config.vision.width,
                config.vision.level_sides,
            )
    else:
        builds["image_decoder.unet."] = lambda: UNet(
            decoder.unet, decoder.mmfs, config.vision.width, config.vision.level_sides
        )
        builds["image_decoder.vae."] = lambda: Vae(decoder.vae)
    builds["image_decoder."] = lambda: ImageDecoder(without_unet)
    builds[""] = lambda: _Boi(llama.width)
    return builds


class _Boi(nn.Module):
    """Holder of the vector that is added to the begin-of-image token's embedding, at first zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.boi_embedding = nn.Parameter(torch.zeros(1, width))


def _look_back(llama: Llama) -> nn.Module:
    return llama.mmfs_layers[0]


def _initialised(tokenizer: VisualTokenizer, given_clip: bool) -> VisualTokenizer:
    """Initialise what surrounds a given CLIP as the published training does.

    The adapter's convolutions and feed-forward layers and the position projection get PyTorch's
    default initialisation, sampling offsets and biases are zero (the published loader zeroes all
    biases of the adapter's linear layers), visual tokens are small. Without a CLIP the tokenizer
    keeps the initialisation of `mmi train`.
    """
    if not given_clip:
        return tokenizer
    encoder = tokenizer.encoder
    for module in (*encoder.spatial_prior.modules(), *encoder.interactions.modules()):
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
        elif isinstance(module, ConvFeedForward):
            for layer in (module.fc1, module.fc2):
                layer.reset_parameters()
                nn.init.zeros_(layer.bias)
        elif isinstance(module, DeformableAttention):
            nn.init.zeros_(module.offset_proj.bias)
    tokenizer.position_proj.reset_parameters()
    nn.init.normal_(tokenizer.output_proj.weight, std=1e-3)
    return tokenizer
