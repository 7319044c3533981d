"""Graphs that run once per image: `vision_encoder` and `image_values`.

Letters: n encoded images, s feature cells, h heads, d channels per head, c channels.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from mmi_deploy.spec.graphs import Graph
from mmi_export.graphs.folding import FoldedValues
from mmi_export.tracing.onnx_from_module import Tensors
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.model.mmfs import take_levels
from mmi_train.model.unet import MmfsBlock
from mmi_train.model.visual_tokenizer import flatten_maps


class VisionEncoderGraph(nn.Module):
    """`MMInterleaved.vision`: encode pixels as visual tokens and features [n, s, c]."""

    def __init__(self, model: MMInterleaved, graph: Graph) -> None:
        super().__init__()
        self.vision = model.vision

    def forward(self, inputs: Tensors) -> Tensors:
        tokens, maps = self.vision(inputs["pixels"])
        return {"visual_tokens": tokens, "features": flatten_maps(maps)}


class ImageValuesGraph(nn.Module):
    """Project features to the values of every MMFS layer, [n, s, h, d] each.

    Norms of one kind of layer differ in their weights alone, which are folded into the projections:
    features are normalised once for the language model and once for the U-Net.
    """

    def __init__(self, model: MMInterleaved, graph: Graph) -> None:
        super().__init__()
        self.level_sides = model.config.vision.level_sides
        unet = model.image_decoder.unet
        self.llm_levels = model.config.llm_mmfs.levels
        self.unet_levels = model.config.image_decoder.mmfs.levels
        self.llm_values = FoldedValues(model.llm.mmfs_layers)
        self.unet_values = FoldedValues(cast(list[MmfsBlock], list(unet.look_back)))
        self.llm_names = graph.names("llm_value")
        self.unet_names = graph.names("unet_value")

    def forward(self, inputs: Tensors) -> Tensors:
        features = inputs["features"]
        llm = self.llm_values(take_levels(features, self.level_sides, self.llm_levels))
        unet = self.unet_values(take_levels(features, self.level_sides, self.unet_levels))
        return {
            **dict(zip(self.llm_names, llm, strict=True)),
            **dict(zip(self.unet_names, unet, strict=True)),
        }
