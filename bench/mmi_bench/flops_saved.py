"""FLOPs saved by deployment: the model as published beside its exported graphs.

*As published* is counted by PyTorch's own counter while the training modules run in the published
order on the meta device, where tensors have no contents: image values projected for every token and
every U-Net call, W_q for every image, time embedding and the condition's keys and values for every
step. *Deployed* is counted from the ONNX files of a bundle (`mmi_deploy.analysis.cost`). Both count
matrix products, convolutions and attention, a multiply-add as 2: PyTorch counts nothing else.

Letters: b batch, t tokens, w wanted positions, n encoded images, m image slots, x context tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmi_deploy.analysis.cost import Total, cost, cost_of_file, loop_invariant
from mmi_deploy.analysis.shapes import read_graph, sized
from mmi_deploy.analysis.stored_bytes import as_in_file
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import Limits, chosen_sizes, feature_cells, graphs
from mmi_train.baseline.published_mmfs import as_published
from mmi_train.model.llama import KvCache
from mmi_train.model.mm_interleaved import MMInterleaved

META = torch.device("meta")

# Inputs of a denoising step that change every step; all others are the same for a whole picture.
CHANGING = ("latents", "history", "noise", "step")

# Numbers of images in context for which tokens are counted.
IMAGES = (0, 1, 2, 4)


class Published:
    """Model of `config` in the published order of computation, on the meta device."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        with META:
            model = MMInterleaved(config)
        self.model = as_published(model.to(META)).eval().requires_grad_(False)

    def token(self, images: int, context: int) -> int:
        """FLOPs of one token at the end of a full cache of `context` slots."""
        llama, model = self.config.llama, self.model

        def decode() -> None:
            cache = KvCache(llama, 1, context, META)
            cache.length = context - 1
            looks: tuple[list[Tensor], Tensor, Tensor] | tuple[()] = ()
            if images:
                looks = (
                    model.llm.image_values(self._features(images)),
                    _integers(1, images),
                    _integers(1, 1, images),
                )
            hidden = torch.empty(1, 1, llama.width)
            model.head(model.llm(hidden, _longs(1, 1), None, cache, *looks))

        return flops(decode)

    def call(self, images: int) -> int:
        """FLOPs of one call of the U-Net on all branches of guidance, which see copies of the same
        images."""
        unet, decoder = self.config.image_decoder.unet, self.model.image_decoder
        rows = self.config.image_decoder.branches

        def run() -> None:
            latents = torch.empty(rows, unet.latent_channels, unet.latent_side, unet.latent_side)
            tokens = self.config.image_decoder.resampler.queries
            condition = torch.empty(rows, tokens, unet.condition_width)
            looks: tuple[Tensor, ...] = ()
            if images:
                looks = (
                    self._features(rows * images),
                    _integers(rows, images),
                    _integers(rows, images),
                )
            decoder.unet(latents, _longs(rows), condition, *looks)

        return flops(run)

    def parts(self) -> dict[str, int]:
        """FLOPs of repeated computations, by name."""
        unet, config = self.model.image_decoder.unet, self.config
        rows = self.config.image_decoder.branches
        decoder = config.image_decoder
        shape = (rows, decoder.resampler.queries, decoder.unet.condition_width)
        one = self._features(1)
        return {
            "image values of the LLM, per token and image": flops(
                lambda: self.model.llm.image_values(one)
            ),
            "image values of the U-Net, per branch, call and image": flops(
                lambda: unet.image_values(one)
            ),
            "keys and values of the condition, per call": flops(
                lambda: unet.condition_keys_values(torch.empty(shape))
            ),
            "time embedding and projections, per call": flops(lambda: unet.time_rows(_longs(rows))),
        }

    def _features(self, images: int) -> Tensor:
        cells = feature_cells(self.config)
        return torch.empty(images, cells, self.config.vision.width, device=META)


def flops(run: Callable[[], object]) -> int:
    """Count the FLOPs of `run` with PyTorch's counter on the meta device, attention as matmuls."""
    with torch.no_grad(), META, sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            run()
    return int(counter.get_total_flops())


def _integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32)


def _longs(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64)


@dataclass(frozen=True)
class Row:
    """Matrix FLOPs of one piece of work, as published and as deployed. `published`: None for work
    of the deployed model alone."""

    what: str
    published: int | None
    deployed: int

    @property
    def ratio(self) -> float | None:
        return None if self.published is None else self.published / self.deployed


def repeated_in_step(config: ModelConfig, limits: Limits, file: Path) -> Total:
    """FLOPs of the `denoise_step` graph in `file` that depend on no input that changes by step."""
    contract = graphs(config, limits)["denoise_step"]
    sizes = chosen_sizes(contract, {})
    graph = sized(read_graph(file), contract, sizes)
    return loop_invariant(graph, cost(graph, sizes, as_in_file(graph)), CHANGING)


def repeated(config: ModelConfig) -> dict[str, int]:
    """`Published.parts` of `config`."""
    return Published(config).parts()


def compare(
    config: ModelConfig, limits: Limits, files: Mapping[str, Path], steps: int = 20
) -> list[Row]:
    """Compare a token, a U-Net call, an encoded image and a picture of `steps` steps, at a full
    context. `files`: graph name -> portable ONNX file."""
    contract = graphs(config, limits)

    def deployed(graph: str, **sizes: int) -> int:
        return cost_of_file(files[graph], contract[graph], sizes).total.matrix

    published = Published(config)
    rows = []
    for images in (count for count in IMAGES if count <= limits.images):
        visible = max(images, 1)
        own = deployed("llm", t=1, w=1, b=1, m=visible, n=visible)
        with_images = f"a token with {images} image{'' if images == 1 else 's'}"
        rows.append(Row(with_images, published.token(images, limits.context), own))
    seen = min(config.image_decoder.mmfs.images_seen, limits.images, max(IMAGES))
    calls = {}
    for images in sorted({0, 1, seen}):
        visible = max(images, 1)
        step = deployed("denoise_step", b=1, m=visible, n=visible)
        calls[images] = Row(
            f"a denoising step that sees {images} image{'' if images == 1 else 's'}",
            published.call(images),
            step,
        )
    rows += calls.values()
    for graph, reader in (("llm_values", "LLM"), ("unet_values", "U-Net")):
        rows.append(Row(f"values of an image for the {reader}, once", None, deployed(graph, n=1)))
    last = calls[seen]
    assert last.published is not None
    condition = deployed("image_condition", b=1, x=min(64, limits.context))
    name = f"a picture of {steps} steps that sees {seen}, its condition left out"
    rows.append(Row(name, steps * last.published, steps * last.deployed))
    rows.append(Row("condition of a picture, once", None, condition))
    return rows
