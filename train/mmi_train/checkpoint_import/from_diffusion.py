"""Stable Diffusion to build on, from a diffusers folder: U-Net, autoencoder, noise schedule, and
what its text encoder makes of nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmi_deploy.errors import ConfigError, WeightsError
from mmi_deploy.spec.config import DiffusionConfig, UnetConfig, VaeConfig
from mmi_train.checkpoint_import.config_fields import Fields, agreed, count, fitting, read_json
from mmi_train.checkpoint_import.state_dict import compact
from mmi_train.model.unet import diffusers_unet
from mmi_train.model.vae import Vae
from mmi_train.weights.lazy_tensor import Reshaped, StoredTensor
from mmi_train.weights.safetensors_files import read_folder

_STEMS = ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16")

_WHOLE = "download the folder whole, or leave out text_encoder and tokenizer"

_OLD_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
"""How diffusers called the autoencoder's attention before 2023, and calls it now."""

_NO_EFFECT = {
    "sample_size",  # read by us, not by the layers
    "attention_head_dim",  # the number of heads, read by us
    "num_attention_heads",
    "upcast_attention",  # of the arithmetic
    "force_upcast",
    "downsample_padding",
    "scaling_factor",
    "latents_mean",
    "latents_std",
    "shift_factor",
}


@dataclass(frozen=True)
class DiffusionPart:
    """Configurations, and tensors by the names below our `image_decoder.unet.` and
    `image_decoder.vae.autoencoder.`. `null_condition` [1, tokens, width]: the text encoder's output
    for an empty text, if the folder holds one."""

    unet: UnetConfig
    vae: VaeConfig
    diffusion: DiffusionConfig
    unet_tensors: dict[str, StoredTensor]
    vae_tensors: dict[str, StoredTensor]
    null_condition: Tensor | None


def read_diffusion(folder: Path, like: UnetConfig, prediction: DiffusionConfig) -> DiffusionPart:
    """The parts of the pipeline in `folder`. `like`: where MMFS goes. `prediction`: the noise
    schedule where the folder has none. Raises `ConfigError` naming the first field that our U-Net
    or autoencoder does not have, and `WeightsError`."""
    unet = _unet(folder / "unet", like)
    vae = _vae(folder / "vae")
    return DiffusionPart(
        unet=unet,
        vae=vae,
        diffusion=_schedule(folder / "scheduler" / "scheduler_config.json", prediction),
        unet_tensors=read_folder(folder / "unet", _STEMS),
        vae_tensors=_renamed(read_folder(folder / "vae", _STEMS)),
        null_condition=_null_condition(folder),
    )


def _unet(folder: Path, like: UnetConfig) -> UnetConfig:
    path = folder / "config.json"
    fields = read_json(path)
    widths = _counts(path, fields, "block_out_channels")
    names = ("num_attention_heads", "attention_head_dim")  # of the U-Net, the same thing
    heads = agreed(path, {name: fields.get(name) for name in names}) or 8
    down = fields.get("down_block_types") or []
    with fitting(path), torch.device("meta"):
        config = UnetConfig(
            latent_side=count(path, fields, "sample_size"),
            latent_channels=count(path, fields, "in_channels"),
            block_widths=widths,
            layers_per_block=count(path, fields, "layers_per_block"),
            condition_width=count(path, fields, "cross_attention_dim"),
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
    with fitting(path), torch.device("meta"):
        config = VaeConfig(
            block_widths=_counts(path, fields, "block_out_channels"),
            layers_per_block=fields.get("layers_per_block", 1),
            latent_channels=count(path, fields, "latent_channels"),
            scaling_factor=fields.get("scaling_factor", 0.18215),
            norm_groups=fields.get("norm_num_groups", 32),
            mid_attention=fields.get("mid_block_add_attention", True),
        )
        _compare(path, fields, Vae(config).autoencoder.config)
    return config


def _compare(path: Path, given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a field of `given` that changes what `own` computes."""
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


def _counts(path: Path, fields: Fields, name: str) -> tuple[int, ...]:
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
    if fields.get("trained_betas") is not None or fields.get("rescale_betas_zero_snr"):
        raise ConfigError(f"{path}: trained_betas and rescale_betas_zero_snr are not known")
    with fitting(path):
        return DiffusionConfig(
            prediction=kind,
            steps=fields.get("num_train_timesteps", 1000),
            beta_start=fields.get("beta_start", 0.0001),
            beta_end=fields.get("beta_end", 0.02),
            beta_schedule=fields.get("beta_schedule", "linear"),
        )


def _renamed(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The autoencoder's tensors by today's names; its attention once was 1x1 convolutions."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if match := re.fullmatch(r"(.+\.attentions\.\d+\.)(\w+)\.(weight|bias)", name):
            name = f"{match[1]}{_OLD_ATTENTION.get(match[2], match[2])}.{match[3]}"
            if len(tensor.shape) == 4 and tensor.shape[2:] == (1, 1):
                tensor = Reshaped(tensor, torch.Size(tensor.shape[:2]))
        found[name] = tensor
    return found


def _null_condition(folder: Path) -> Tensor | None:
    """[1, tokens, width]: what the text encoder makes of an empty text; raises `WeightsError`."""
    words, weights = folder / "tokenizer", folder / "text_encoder"
    if not words.is_dir() or not weights.is_dir():
        return None
    from transformers import CLIPTextModel, CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(words, local_files_only=True)
        encoder, found = CLIPTextModel.from_pretrained(
            weights, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        ids = tokenizer("", padding="max_length", return_tensors="pt").input_ids
    except Exception as error:  # `tokenizers` raises plain Exception
        line = " ".join(str(error).split())
        raise WeightsError(f"cannot read {weights} and {words}: {line}", fix=_WHOLE) from None
    if missing := compact(sorted(found["missing_keys"])):  # transformers draws them at random
        raise WeightsError(f"{weights} lacks tensors: {', '.join(missing)}", fix=_WHOLE)
    length = encoder.config.max_position_embeddings
    if ids.shape[1] != length:
        raise WeightsError(
            f"{words} is not the tokenizer of {weights}",
            expected=f"texts padded to {length} tokens",
            got=ids.shape[1],
            fix=_WHOLE,
        )
    with torch.no_grad():
        return encoder.eval()(ids).last_hidden_state
