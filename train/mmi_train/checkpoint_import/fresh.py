"""New weights as the published training starts them, drawn part by part.

Only the part that is being written is in memory. A part that comes from elsewhere (CLIP's layers,
the U-Net's body) is built as small as it can be, or not at all.
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


class FreshPart:
    """Some weights of a module that is built when the first of them is asked for, and let go as
    they are taken."""

    def __init__(self, build: Build, seed: int) -> None:
        self._build, self._seed = build, seed
        self._wanted: set[str] = set()
        self._state: dict[str, Tensor] | None = None

    def promise(self, name: str, shape: torch.Size) -> StoredTensor:
        """The tensor `name`, which can be read once."""
        self._wanted.add(name)
        return Computed(shape, torch.float32, lambda: self._take(name))

    def _take(self, name: str) -> Tensor:
        if self._state is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                module = self._build()
            state = module.state_dict()
            self._state = {name: state[name] for name in self._wanted}
        return self._state.pop(name)


def fresh_tensors(
    shapes: Mapping[str, torch.Size], config: ModelConfig, taken: Iterable[str], seed: int
) -> dict[str, StoredTensor]:
    """A new tensor for each of our names in `shapes`, in an order in which parts follow each other.

    `taken`: the names that come from elsewhere.
    """
    builds = _builds(config, set(taken))
    parts = {prefix: FreshPart(build, seed + i) for i, (prefix, build) in enumerate(builds.items())}
    found: dict[str, StoredTensor] = {}
    for prefix, part in parts.items():
        for name, shape in shapes.items():
            if name.startswith(prefix) and name not in found:
                found[name] = part.promise(name.removeprefix(prefix), shape)
    assert found.keys() == shapes.keys(), shapes.keys() - found.keys()
    return found


def _builds(config: ModelConfig, taken: set[str]) -> dict[str, Build]:
    """How each part is built, by the prefix of its names; longer prefixes first."""
    vision, decoder = config.vision, config.image_decoder
    given_clip = any(name.startswith("vision.encoder.layers.") for name in taken)
    given_unet = any(name.startswith("image_decoder.unet.") for name in taken)
    if given_clip:  # the layers that are drawn in vain are few
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
    block = replace(llama, vocab=2, mlp_width=1, context=1, layers=1, mmfs_every=1)
    builds: dict[str, Build] = {
        "vision.": lambda: _started(
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
    """What is added to the embedding of the begin-of-image token: nothing, at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.boi_embedding = nn.Parameter(torch.zeros(1, width))


def _look_back(llama: Llama) -> nn.Module:
    return llama.mmfs_layers[0]


def _started(tokenizer: VisualTokenizer, given_clip: bool) -> VisualTokenizer:
    """As the published training starts what stands around a given CLIP: PyTorch's own start for the
    adapter's convolutions and feed-forward layers and the position projection, no offsets (its
    loader set all biases of the adapter's linear layers to zero), small visual tokens.

    Without a CLIP everything is trained from nothing, and starts as `mmi train` does.
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
