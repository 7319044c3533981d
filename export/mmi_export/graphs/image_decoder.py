"""Graphs that draw a picture: `image_condition`, the two denoising steps and `vae_decoder`.

Letters: b batch, c channels, y condition tokens, z latent channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from mmi_deploy.spec.graphs import DEEP, UNET_BATCH_PER_PICTURE, Graph
from mmi_export.graphs.folding import FoldedMmfsBlock
from mmi_export.tracing.onnx_from_module import Tensors, sharing_copy
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.model.unet import KeyValue, MmfsBlock

# Arguments of `UNet.step` that are the same in every step.
Constants = tuple[Tensor, list[KeyValue], list[Tensor], Tensor, Tensor]


class ImageConditionGraph(nn.Module):
    """Map hidden states of the context to keys and values of every cross-attention.

    The rows of the unconditional branch depend on no input: they are constants of the graph.
    """

    def __init__(self, model: MMInterleaved, graph: Graph) -> None:
        super().__init__()
        self.decoder = model.image_decoder
        self.names = list(
            zip(graph.names("condition_key"), graph.names("condition_value"), strict=True)
        )
        with torch.no_grad():
            pairs = self.decoder.unet.condition_keys_values(self.decoder.null_condition)
        unconditional = [tensor for pair in pairs for tensor in pair]  # [1, y, c] each
        self.unconditional = nn.ParameterList(
            nn.Parameter(tensor, requires_grad=False) for tensor in unconditional
        )

    def forward(self, inputs: Tensors) -> Tensors:
        condition = self.decoder.condition(inputs["context"], inputs["context_length"])  # [b, y, c]
        pairs = self.decoder.unet.condition_keys_values(condition)
        conditional = [tensor for pair in pairs for tensor in pair]
        names = [name for pair in self.names for name in pair]
        return {
            name: torch.cat([own, other.expand_as(own)])  # [2b, y, c]
            for name, own, other in zip(names, conditional, self.unconditional, strict=True)
        }


class _DenoiseGraph(nn.Module):
    """Base of a full and a shallow step: the U-Net with its MMFS blocks folded, on both guidance
    branches, and the update of a tabulated sampler."""

    def __init__(self, model: MMInterleaved, graph: Graph) -> None:
        super().__init__()
        self.unet = sharing_copy(model.image_decoder.unet)
        self.unet.look_back = nn.ModuleList(
            FoldedMmfsBlock(block) for block in cast(Iterable[MmfsBlock], self.unet.look_back)
        )
        keys, values = graph.names("condition_key"), graph.names("condition_value")
        self.keys_values = list(zip(keys, values, strict=True))
        self.values = graph.names("unet_value")

    def constants(self, inputs: Tensors) -> Constants:
        """Time rows, condition and images of both guidance branches, as `UNet.step` takes them."""
        return (
            _row(inputs["time_table"], inputs["step"]),
            [(inputs[key], inputs[value]) for key, value in self.keys_values],
            [inputs[name] for name in self.values],
            _both(inputs["image_slot"]),
            _both(inputs["image_position"]),
        )


class DenoiseStepGraph(_DenoiseGraph):
    """One step of a tabulated sampler; also gives the deep features that shallow steps reuse."""

    def forward(self, inputs: Tensors) -> Tensors:
        branches, deep = self.unet.step_and_deep(_both(inputs["latents"]), *self.constants(inputs))
        return {**_next_state(inputs, branches), DEEP: deep}


class DenoiseShallowGraph(_DenoiseGraph):
    """One step of a tabulated sampler with the deep features of an earlier one."""

    def forward(self, inputs: Tensors) -> Tensors:
        branches = self.unet.shallow_step(
            _both(inputs["latents"]), inputs[DEEP], *self.constants(inputs)
        )
        return _next_state(inputs, branches)


class VaeDecoderGraph(nn.Module):
    """Decode latents [b, z, side, side] to pixels in [0, 1]."""

    def __init__(self, model: MMInterleaved, graph: Graph) -> None:
        super().__init__()
        self.vae = model.image_decoder.vae

    def forward(self, inputs: Tensors) -> Tensors:
        return {"pixels": self.vae.decode(inputs["latents"])}


def _both(tensor: Tensor) -> Tensor:
    """Repeat `tensor` along the batch, once for each guidance branch."""
    return torch.cat([tensor] * UNET_BATCH_PER_PICTURE)


def _next_state(inputs: Tensors, branches: Tensor) -> Tensors:
    """Update of the sampler by unconditional + guidance (conditional - unconditional)."""
    conditional, unconditional = branches.unflatten(0, (UNET_BATCH_PER_PICTURE, -1))
    prediction = unconditional + inputs["guidance"] * (conditional - unconditional)
    latents, noise, history = (inputs[name] for name in ("latents", "noise", "history"))
    terms = torch.cat([torch.stack([latents, prediction, noise]), history])  # [terms, b, z, ...]
    coefficients = _row(inputs["coefficients"], inputs["step"]).squeeze(0)  # [state, terms]
    state = (coefficients @ terms.flatten(1)).unflatten(1, latents.shape)  # [state, b, z, ...]
    return {"next_latents": state[0], "next_history": state[1:]}


def _row(table: Tensor, step: Tensor) -> Tensor:
    """Row `step` (a scalar tensor) of a table, [1, ...]."""
    return table.index_select(0, step.reshape(1))
