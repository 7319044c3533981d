"""Reader of a Stable Diffusion in a diffusers folder: U-Net, autoencoder, noise schedule, and the
text encoder's output for an empty text.

Letters: c channels, y condition tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmi_deploy.errors import ConfigError, WeightsError
from mmi_deploy.spec.config import DiffusionConfig, UnetConfig, VaeConfig
from mmi_train.checkpoint_import.config_fields import (
    Fields,
    consistent_value,
    positive_int,
    read_json,
    readable_errors,
)
from mmi_train.checkpoint_import.misfits import compact
from mmi_train.checkpoint_import.parts import DiffusionPart
from mmi_train.model.unet import diffusers_unet
from mmi_train.model.vae import Vae
from mmi_train.weights.lazy_tensor import Reshaped, StoredTensor
from mmi_train.weights.safetensors_files import read_folder

# Weights files without their suffix, the first that is there.
_STEMS = ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16")

_FIX_TEXT_ENCODER = "download the folder whole, or leave out text_encoder and tokenizer"

# Layers of the autoencoder's attention, as diffusers named them before 2023, and names them now.
_OLD_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}

# Fields that do not change what diffusers' layers compute, or that are read here.
_NO_EFFECT = {
    "sample_size",
    "attention_head_dim",  # of the U-Net, the number of heads
    "num_attention_heads",
    "upcast_attention",
    "force_upcast",
    "downsample_padding",
    "scaling_factor",
    "latents_mean",
    "latents_std",
    "shift_factor",
}


def read_diffusion(folder: Path, like: UnetConfig, default: DiffusionConfig) -> DiffusionPart:
    """Read the pipeline in `folder`.

    like: the U-Net whose places of MMFS are taken. default: the noise schedule where the folder has
    none. Raises `ConfigError` that names the first field which our U-Net or autoencoder does not
    implement, and `WeightsError`.
    """
    unet = _unet(folder / "unet", like)
    vae = _vae(folder / "vae")
    return DiffusionPart(
        unet=unet,
        vae=vae,
        diffusion=_schedule(folder / "scheduler" / "scheduler_config.json", default),
        unet_tensors=read_folder(folder / "unet", _STEMS),
        vae_tensors=_renamed(read_folder(folder / "vae", _STEMS)),
        null_condition=_null_condition(folder),
    )


def _unet(folder: Path, like: UnetConfig) -> UnetConfig:
    path = folder / "config.json"
    fields = read_json(path)
    widths = _numbers(path, fields, "block_out_channels")
    names = ("num_attention_heads", "attention_head_dim")  # of the U-Net, synonyms
    heads = consistent_value(path, {name: fields.get(name) for name in names}) or 8
    down = fields.get("down_block_types") or []
    with readable_errors(path), torch.device("meta"):
        config = UnetConfig(
            latent_side=positive_int(path, fields, "sample_size"),
            latent_channels=positive_int(path, fields, "in_channels"),
            block_widths=widths,
            layers_per_block=positive_int(path, fields, "layers_per_block"),
            condition_width=positive_int(path, fields, "cross_attention_dim"),
            attention_heads=tuple(heads) if isinstance(heads, list) else (heads,) * len(widths),
            attention_blocks=tuple(kind == "CrossAttnDownBlock2D" for kind in down),
            mmfs_at=like.mmfs_at,
            norm_groups=fields.get("norm_num_groups", 32),
            linear_projection=fields.get("use_linear_projection", False),
        )
        _compare(path, fields, diffusers_unet(config).config)
    return config


def _vae(folder: Path) -> VaeConfig:
    path = folder / "config.json"
    fields = read_json(path)
    shift = fields.get("shift_factor") or fields.get("latents_mean")
    if shift is not None:
        raise ConfigError(
            f"{folder}: our autoencoder does not have shift_factor or latents_mean", got=shift
        )
    with readable_errors(path), torch.device("meta"):
        config = VaeConfig(
            block_widths=_numbers(path, fields, "block_out_channels"),
            layers_per_block=fields.get("layers_per_block", 1),
            latent_channels=positive_int(path, fields, "latent_channels"),
            scaling_factor=fields.get("scaling_factor", 0.18215),
            norm_groups=fields.get("norm_num_groups", 32),
            mid_attention=fields.get("mid_block_add_attention", True),
        )
        _compare(path, fields, Vae(config).autoencoder.config)
    return config


def _compare(path: Path, given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a field of `given` that changes what diffusers' layers compute.

    own: the fields of our module.
    """
    for name, value in given.items():
        if name.startswith("_") or name in _NO_EFFECT:
            continue
        plain = tuple(value) if isinstance(value, list) else value
        ours = own.get(name)
        ours = tuple(ours) if isinstance(ours, list) else ours
        if plain != ours and not (name not in own and not value):
            raise ConfigError(
                f"{path}: our U-Net and autoencoder do not have this {name}",
                expected=repr(ours),
                got=repr(plain),
                fix="build on a Stable Diffusion 1 or 2",
            )


def _numbers(path: Path, fields: Fields, name: str) -> tuple[int, ...]:
    """The list of numbers `name`; their values are checked by the configuration."""
    value = fields.get(name)
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{path}: {name} is wrong", expected="a list of numbers", got=value)
    return tuple(value)


def _schedule(path: Path, default: DiffusionConfig) -> DiffusionConfig:
    if not path.is_file():
        return default
    fields = read_json(path)
    kind = fields.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise ConfigError(
            f"{path}: prediction_type is not known", expected="epsilon, v_prediction", got=kind
        )
    if fields.get("trained_betas") is not None:
        raise ConfigError(f"{path}: trained_betas are not known")
    with readable_errors(path):
        return DiffusionConfig(
            prediction=kind,
            steps=fields.get("num_train_timesteps", 1000),
            beta_start=fields.get("beta_start", 0.0001),
            beta_end=fields.get("beta_end", 0.02),
            beta_schedule=fields.get("beta_schedule", "linear"),
            rescale_betas_zero_snr=fields.get("rescale_betas_zero_snr") or False,
        )


def _renamed(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The autoencoder's tensors by diffusers' present names; 1x1 convolutions, of which its
    attention once consisted, become matrices."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if match := re.fullmatch(r"(.+\.attentions\.\d+\.)(\w+)\.(weight|bias)", name):
            name = f"{match[1]}{_OLD_ATTENTION.get(match[2], match[2])}.{match[3]}"
            if len(tensor.shape) == 4 and tensor.shape[2:] == (1, 1):
                tensor = Reshaped(tensor, torch.Size(tensor.shape[:2]))
        found[name] = tensor
    return found


def _null_condition(folder: Path) -> Tensor | None:
    """The text encoder's output for an empty text, [1, y, c], or None without a text encoder.

    Raises `WeightsError`.
    """
    tokenizer_folder, weights = folder / "tokenizer", folder / "text_encoder"
    if not tokenizer_folder.is_dir() or not weights.is_dir():
        return None
    from transformers import CLIPTextModel, CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        encoder, found = CLIPTextModel.from_pretrained(
            weights, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        ids = tokenizer("", padding="max_length", return_tensors="pt").input_ids
    except Exception as error:  # `tokenizers` raises plain Exception
        line = " ".join(str(error).split())
        raise WeightsError(
            f"cannot read {weights} and {tokenizer_folder}: {line}", fix=_FIX_TEXT_ENCODER
        ) from None
    # transformers initialises missing tensors at random and goes on.
    if missing := compact(sorted(found["missing_keys"])):
        raise WeightsError(f"{weights} lacks tensors: {', '.join(missing)}", fix=_FIX_TEXT_ENCODER)
    length = encoder.config.max_position_embeddings
    if ids.shape[1] != length:
        raise WeightsError(
            f"{tokenizer_folder} is not the tokenizer of {weights}",
            expected=f"texts padded to {length} tokens",
            got=ids.shape[1],
            fix=_FIX_TEXT_ENCODER,
        )
    with torch.no_grad():
        return encoder.eval()(ids).last_hidden_state
