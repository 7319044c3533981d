"""The parts that a new model is built from: the contract between readers and `new_model`.

A reader (`from_llama`, `from_gguf`, `from_clip`, `from_diffusion`) returns one part: sizes, and
tensors that still lie in the files. A reader of a new kind of checkpoint returns one of these too.

Letters: c channels, y condition tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmi_deploy.errors import ConfigError, WeightsError
from mmi_deploy.spec.config import DiffusionConfig, UnetConfig, VaeConfig
from mmi_train.checkpoint_import.misfits import shape_misfits
from mmi_train.weights.lazy_tensor import StoredTensor

# Hugging Face's names of the two tensors whose rows are tokens.
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class LlmPart:
    """Sizes, tensors and tokenizer of a LLaMA or of a descendant.

    context: positions that it was trained for. tied: the head is the embedding. tensors: by Hugging
    Face's names. bos, pad: ids, None where the model names none. ends: ids of all end tokens, the
    first of them the one of training. channels_per_head to layers_without_rope: as in
    `LlamaConfig`. window: tokens of its sliding attention window, None without one. remarks: lines
    for the user. Raises `ConfigError` for heads that do not divide the width, and `WeightsError`
    that names every tensor which does not fit.
    """

    source: Path
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    context: int
    eps: float
    rope_theta: float
    tied: bool
    tensors: Mapping[str, StoredTensor]
    tokenizer: Tokenizer
    bos: int | None
    ends: tuple[int, ...]
    pad: int | None
    channels_per_head: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_divisors: tuple[float, ...] = ()
    layers_without_rope: tuple[int, ...] = ()
    window: int | None = None
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        uneven = self.channels_per_head is None and self.width % self.heads
        if self.kv_heads < 1 or uneven or self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.source}: {self.heads} heads and {self.kv_heads} key-value heads do not "
                f"divide a width of {self.width}"
            )
        self._check_tensors()

    @property
    def head(self) -> StoredTensor:
        return self.tensors[EMBEDDING if self.tied else HEAD]

    def _check_tensors(self) -> None:
        integers = [
            f"{name} holds {str(tensor.dtype).removeprefix('torch.')} numbers"
            for name, tensor in self.tensors.items()
            if not tensor.dtype.is_floating_point
        ]
        expected = self._shapes()
        if problems := shape_misfits(self.tensors, expected, expected, integers):
            raise WeightsError(
                f"{self.source}: the weights do not fit its config: " + "; ".join(problems)
            )

    def _shapes(self) -> dict[str, torch.Size]:
        """Expected shapes by Hugging Face's names."""
        width, head_width = self.width, self.channels_per_head or self.width // self.heads
        query_width, kv_width = self.heads * head_width, self.kv_heads * head_width
        rows = self.tensors[EMBEDDING].shape[0] if EMBEDDING in self.tensors else 0
        shapes: dict[str, tuple[int, ...]] = {
            EMBEDDING: (rows, width),
            "model.norm.weight": (width,),
        }
        for layer in range(self.layers):
            block = f"model.layers.{layer}."
            if self.qkv_bias:
                shapes |= {
                    f"{block}self_attn.q_proj.bias": (query_width,),
                    f"{block}self_attn.k_proj.bias": (kv_width,),
                    f"{block}self_attn.v_proj.bias": (kv_width,),
                }
            if self.qk_norm:
                norms = (f"{block}self_attn.{side}_norm.weight" for side in "qk")
                shapes |= dict.fromkeys(norms, (head_width,))
            shapes |= {
                f"{block}self_attn.q_proj.weight": (query_width, width),
                f"{block}self_attn.k_proj.weight": (kv_width, width),
                f"{block}self_attn.v_proj.weight": (kv_width, width),
                f"{block}self_attn.o_proj.weight": (width, query_width),
                f"{block}mlp.gate_proj.weight": (self.mlp_width, width),
                f"{block}mlp.up_proj.weight": (self.mlp_width, width),
                f"{block}mlp.down_proj.weight": (width, self.mlp_width),
                f"{block}input_layernorm.weight": (width,),
                f"{block}post_attention_layernorm.weight": (width,),
            }
        if not self.tied:
            shapes[HEAD] = (rows, width)
        return {name: torch.Size(shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class VisionPart:
    """Sizes of a CLIP vision transformer, and its tensors by their names below our
    `vision.encoder.`."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str
    eps: float
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class DiffusionPart:
    """Configurations of a Stable Diffusion, and its tensors by their names below our
    `image_decoder.unet.` and `image_decoder.vae.autoencoder.`.

    null_condition [1, y, c]: the text encoder's output for an empty text, None without an encoder.
    """

    unet: UnetConfig
    vae: VaeConfig
    diffusion: DiffusionConfig
    unet_tensors: dict[str, StoredTensor]
    vae_tensors: dict[str, StoredTensor]
    null_condition: Tensor | None


@dataclass(frozen=True)
class Parts:
    """All parts of one new model; without `vision` or `diffusion` those are new and small.

    bos, eos: spellings that replace the language model's begin token and all its end tokens.
    context: tokens of the longest document; None: the language model's.
    """

    llm: LlmPart
    vision: VisionPart | None = None
    diffusion: DiffusionPart | None = None
    bos: str | None = None
    eos: str | None = None
    context: int | None = None
