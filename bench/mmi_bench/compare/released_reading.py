"""The released reading at sizes that a CPU can measure: configurations, and bundles of random
weights.

The weights mean nothing: text and pictures are noise. Time depends on shapes alone, and noise shows
any difference between two backends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from mmi_deploy.spec.config import ModelConfig, TokenConfig
from mmi_deploy.spec.presets import released_13b
from mmi_deploy.system.progress import Progress, silent
from mmi_deploy.system.temporary_folder import temporary_folder
from mmi_export.export import export_bundle
from mmi_export.placeholder_model import write_placeholder_model

Size = Literal["small", "large"]

# LLaMA's width, layers, heads and MLP width; CLIP's width, heads and MLP width.
_LLAMA: dict[Size, tuple[int, int, int, int]] = {
    "small": (128, 6, 4, 160),
    "large": (1024, 8, 16, 2816),
}
_CLIP: dict[Size, tuple[int, int, int]] = {"small": (128, 4, 96), "large": (512, 8, 2048)}

_GOLDEN_TOKENS = TokenConfig(bos=1, eos=2, pad=511, boi=512, image=513)


def released_reading(size: Size) -> ModelConfig:
    """Configuration of the released reading at `size`.

    `small` is the configuration of the golden files with CLIP 128 wide, so that the LLM's MMFS has
    8 channels per head, which the kernels need. `large` has a wider LLaMA and CLIP,
    and the released vocabulary, context and image resampler.
    """
    released = released_13b()
    width, layers, heads, mlp_width = _LLAMA[size]
    clip_width, clip_heads, clip_mlp_width = _CLIP[size]
    decoder = released.image_decoder
    resampler = released.vision_resampler
    if size == "small":
        resampler = replace(resampler, queries=8, width=48, layers=4, heads=4, mlp_width=96)
    return replace(
        released,
        name=f"released_{size}",
        tokens=released.tokens if size == "large" else _GOLDEN_TOKENS,
        vision=replace(
            released.vision,
            width=clip_width,
            heads=clip_heads,
            mlp_width=clip_mlp_width,
            adapter_heads=clip_heads,
            adapter_points=4,
        ),
        vision_resampler=replace(resampler, context_width=clip_width),
        llama=replace(
            released.llama,
            vocab=released.llama.vocab if size == "large" else 514,
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=heads,
            mlp_width=mlp_width,
            context=released.llama.context if size == "large" else 512,
        ),
        llm_mmfs=replace(released.llm_mmfs, value_width=clip_width),
        image_decoder=replace(
            decoder,
            resampler=replace(
                decoder.resampler, width=64, context_width=width, heads=4, mlp_width=96
            ),
            unet=replace(
                decoder.unet,
                latent_side=32,
                block_widths=(32, 64, 64, 64),
                condition_width=64,
                attention_heads=(2, 4, 4, 4),
            ),
            vae=replace(decoder.vae, block_widths=(32, 32, 32, 32), layers_per_block=1),
        ),
    )


@contextmanager
def placeholder_bundle(
    config: ModelConfig, progress: Progress = silent
) -> Iterator[tuple[Path, Path]]:
    """A bundle of `config` with random fp32 weights and the model folder that it was exported from,
    in a temporary folder.

    The bundle has no receipts: a comparison, in which both compute the same documents, is itself
    the proof.
    """
    with temporary_folder(Path(tempfile.gettempdir()), "mmi-bench-") as folder:
        bundle, model = folder / "bundle", folder / "model"
        progress("drawing weights", detail=config.name)
        write_placeholder_model(config, model, "random", torch.float32)
        export_bundle(model, bundle, scope="none", weights="random", progress=progress)
        yield bundle, model
