"""Graphs that run once per image: `vision_encoder`, `llm_values` and `unet_values`.

Letters: n encoded images, s feature cells, h heads, d channels per head, c channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn

from mmi_deploy.spec.config import MmfsConfig
from mmi_deploy.spec.graphs import Graph
from mmi_export.graphs.folding import FoldedValues
from mmi_export.tracing.onnx_from_module import Tensors
from mmi_train.model.llama import GatedMmfs
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.model.mmfs import take_levels
from mmi_train.model.unet import MmfsBlock
from mmi_train.model.visual_tokenizer import flatten_maps

MmfsLayers = Sequence[GatedMmfs] | Sequence[MmfsBlock]


class VisionEncoderGraph(nn.Module):
    """`MMInterleaved.vision`: encode pixels as visual tokens and features [n, s, c]."""

    def __init__(self, model: MMInterleaved, graph: Graph) -> None:
        super().__init__()
        self.vision = model.vision

    def forward(self, inputs: Tensors) -> Tensors:
        tokens, maps = self.vision(inputs["pixels"])
        return {"visual_tokens": tokens, "features": flatten_maps(maps)}


class _ValuesGraph(nn.Module):
    """Project features [n, s, c] to the values [n, s, h, d] of every MMFS layer of one kind.

    Norms of these layers differ in their weights alone, which are folded into the projections:
    features are normalised once.
    """

    def __init__(
        self, model: MMInterleaved, graph: Graph, mmfs: MmfsConfig, layers: MmfsLayers
    ) -> None:
        super().__init__()
        self.level_sides, self.levels = model.config.vision.level_sides, mmfs.levels
        self.values = FoldedValues(layers)
        self.names = [tensor.name for tensor in graph.outputs]

    def forward(self, inputs: Tensors) -> Tensors:
        features = take_levels(inputs["features"], self.level_sides, self.levels)
        return dict(zip(self.names, self.values(features), strict=True))


class LlmValuesGraph(_ValuesGraph):
    """Image values of the language model's layers."""

    def __init__(self, model: MMInterleaved, graph: Graph) -> None:
        super().__init__(model, graph, model.config.llm_mmfs, model.llm.mmfs_layers)


class UnetValuesGraph(_ValuesGraph):
    """Image values of the U-Net's blocks."""

    def __init__(self, model: MMInterleaved, graph: Graph) -> None:
        decoder = model.image_decoder
        blocks = cast(list[MmfsBlock], list(decoder.unet.look_back))
        super().__init__(model, graph, decoder.config.mmfs, blocks)
