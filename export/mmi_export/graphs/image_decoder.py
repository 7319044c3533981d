"""Graphs that draw a picture: `image_condition`, the two denoising steps and `vae_decoder`.

Letters: b batch, c channels, y condition tokens, z latent channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from mmi_deploy.spec.graphs import DEEP, Graph, numbered
from mmi_export.graphs import operators
from mmi_export.graphs.folding import FoldedMmfsBlock
from mmi_export.tracing.onnx_from_module import Tensors, sharing_copy
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.model.unet import KeyValue, MmfsBlock

# Arguments of `UNet.step` that are the same in every step.
Constants = tuple[Tensor, list[KeyValue], list[Tensor], Tensor, Tensor]


class ImageConditionGraph(nn.Module):
    """Map hidden states of the context to keys and values of every cross-attention."""

    def __init__(self, model: MMInterleaved, graph: Graph) -> None:
        super().__init__()
        self.decoder = model.image_decoder
        self.names = condition_names(graph)

    def forward(self, inputs: Tensors) -> Tensors:
        context, length = inputs["context"], inputs["context_length"]
        # Positions count backwards from the begin-of-image token.
        backwards = length[:, None] - 1 - torch.arange(context.shape[1])  # [b, x]
        newest_first = operators.gather_rows(context, backwards.clamp(min=0))
        condition = self.decoder.condition(newest_first, length)  # [b, y, c]
        pairs = self.decoder.unet.condition_keys_values(condition)
        return {
            name: tensor
            for names, pair in zip(self.names, pairs, strict=True)
            for name, tensor in zip(names, pair, strict=True)
        }


class _DenoiseGraph(nn.Module):
    """Base of a full and a shallow step: the U-Net with its MMFS blocks folded, on both guidance
    branches, or the one of a distilled U-Net, and the update of a tabulated sampler."""

    def __init__(self, model: MMInterleaved, graph: Graph) -> None:
        super().__init__()
        self.unet = sharing_copy(model.image_decoder.unet)
        self.unet.look_back = nn.ModuleList(
            FoldedMmfsBlock(block) for block in cast(Iterable[MmfsBlock], self.unet.look_back)
        )
        self.keys_values = condition_names(graph)
        self.values = graph.names("unet_value")
        self.branches = model.config.image_decoder.branches
        if self.branches == 1:
            return
        with torch.no_grad():
            pairs = self.unet.condition_keys_values(model.image_decoder.null_condition)
        # Keys and values of the unconditional branch, [1, y, c] each: the same for every picture.
        names = [name for pair in self.keys_values for name in pair]
        of_all = {
            numbered(f"condition_{kind}", index): tensor
            for index, pair in enumerate(pairs)
            for kind, tensor in zip(("key", "value"), pair, strict=True)
        }
        self.unconditional = nn.ParameterList(
            nn.Parameter(of_all[name].clone(), requires_grad=False) for name in names
        )

    def constants(self, inputs: Tensors) -> Constants:
        """Time rows, condition and images of all branches, as `UNet.step` takes them."""
        return (
            self.rows(inputs["time_table"].index_select(0, inputs["step"])),
            self._condition(inputs),
            [inputs[name] for name in self.values],
            self.rows(inputs["image_slot"]),
            self.rows(inputs["image_position"]),
        )

    def rows(self, tensor: Tensor) -> Tensor:
        """Repeat each row [b, ...] for every branch of its picture: [branches * b, ...]."""
        if self.branches == 1:
            return tensor
        return torch.stack([tensor] * self.branches, 1).flatten(0, 1)

    def prediction(self, inputs: Tensors, branches: Tensor) -> Tensor:
        """Prediction [b, z, side, side] from the rows of all branches: unconditional + guidance
        (conditional - unconditional)."""
        if self.branches == 1:
            return branches
        conditional, unconditional = branches.unflatten(0, (-1, self.branches)).unbind(1)
        guidance = inputs["guidance"][:, None, None, None]
        return unconditional + guidance * (conditional - unconditional)

    def _condition(self, inputs: Tensors) -> list[KeyValue]:
        """Keys and values [branches * b, y, c] for each cross-attention."""
        if self.branches == 1:
            return [(inputs[key], inputs[value]) for key, value in self.keys_values]
        names = [name for pair in self.keys_values for name in pair]
        both = [
            torch.stack([inputs[name], other.expand_as(inputs[name])], 1).flatten(0, 1)
            for name, other in zip(names, self.unconditional, strict=True)
        ]
        return list(zip(both[::2], both[1::2], strict=True))


class DenoiseStepGraph(_DenoiseGraph):
    """One step of a tabulated sampler; also gives the deep features that shallow steps reuse."""

    def forward(self, inputs: Tensors) -> Tensors:
        latents = self.rows(inputs["latents"])
        branches, deep = self.unet.step_and_deep(latents, *self.constants(inputs))
        state = _next_state(inputs, self.prediction(inputs, branches))
        return {**state, DEEP: deep.unflatten(0, (-1, self.branches))}


class DenoiseShallowGraph(_DenoiseGraph):
    """One step of a tabulated sampler with the deep features of an earlier one."""

    def forward(self, inputs: Tensors) -> Tensors:
        branches = self.unet.shallow_step(
            self.rows(inputs["latents"]), inputs[DEEP].flatten(0, 1), *self.constants(inputs)
        )
        return _next_state(inputs, self.prediction(inputs, branches))


class VaeDecoderGraph(nn.Module):
    """Decode latents [b, z, side, side] to pixels in [0, 1]."""

    def __init__(self, model: MMInterleaved, graph: Graph) -> None:
        super().__init__()
        self.vae = model.image_decoder.vae

    def forward(self, inputs: Tensors) -> Tensors:
        return {"pixels": self.vae.decode(inputs["latents"])}


def condition_names(graph: Graph) -> list[tuple[str, str]]:
    """Names of key and value of each cross-attention of `graph`, in running order."""
    keys, values = graph.names("condition_key"), graph.names("condition_value")
    return list(zip(keys, values, strict=True))


def _next_state(inputs: Tensors, prediction: Tensor) -> Tensors:
    """Update of the sampler by a prediction [b, z, side, side]."""
    latents, noise, history = (inputs[name] for name in ("latents", "noise", "history"))
    terms = torch.cat([torch.stack([latents, prediction, noise], 1), history], 1)
    coefficients = inputs["coefficients"].index_select(0, inputs["step"])  # [b, state, terms]
    state = (coefficients @ terms.flatten(2)).unflatten(2, latents.shape[1:])  # [b, state, z, ...]
    return {"next_latents": state[:, 0], "next_history": state[:, 1:]}
