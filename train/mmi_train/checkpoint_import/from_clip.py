"""Reader of CLIP's vision transformer in a Hugging Face folder."""

from __future__ import annotations

import re
from dataclasses import replace
from math import isclose
from pathlib import Path
from typing import Any

from mmi_deploy.errors import ConfigError
from mmi_train.checkpoint_import.config_fields import (
    Fields,
    consistent_value,
    positive_int,
    read_json,
    readable_errors,
)
from mmi_train.checkpoint_import.parts import VisionPart
from mmi_train.model.vit_adapter import resize_positions
from mmi_train.weights.lazy_tensor import InMemory, StoredTensor
from mmi_train.weights.safetensors_files import read_folder

_PREFIX = "vision_model."
_POSITIONS = "embeddings.position_embedding.weight"

# CLIP's text half; its last norm, which our encoder leaves out; ids that the configuration
# determines.
_UNUSED = re.compile(
    r"(text_model|text_projection|visual_projection|logit_scale|post_layernorm)\b.*|.*position_ids"
)

# Values of absent fields: Hugging Face writes only what differs from these.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)

# CLIP's image processor as we implement it: pixels from 0 to 1, then mean and deviation.
_PIXELS = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}


def read_clip(folder: Path, image_size: int | None = None) -> VisionPart:
    """Read the vision half of the CLIP in `folder`; another `image_size` resizes its positions.

    Raises `ConfigError` for another kind of model; the caller checks that the weights fit.
    """
    path = folder / "config.json"
    config = read_json(path)
    with readable_errors(path):
        return _read(folder, path, config, image_size)


def _read(folder: Path, path: Path, config: Fields, image_size: int | None) -> VisionPart:
    fields = _fields(folder, path, config)
    pixel_mean, pixel_std = _pixel_statistics(folder / "preprocessor_config.json")
    own, patch = (positive_int(path, fields, name) for name in ("image_size", "patch_size"))
    part = VisionPart(
        image_size=own,
        patch_size=patch,
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        activation=fields["hidden_act"],
        eps=fields["layer_norm_eps"],
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        tensors=_renamed(read_folder(folder, ("model", "pytorch_model"))),
    )
    return part if image_size in (None, own) else _resized(part, image_size)


def _fields(folder: Path, path: Path, config: Fields) -> Fields:
    """The vision half's fields with their defaults; raises `ConfigError` for another model."""
    inner, older = config.get("vision_config", config), config.get("vision_config_dict") or {}
    for name, value in older.items():  # CLIP's first folders have both objects
        places = {"vision_config": inner.get(name), "vision_config_dict": value}
        stated = consistent_value(
            path, {f"{place}.{name}": found for place, found in places.items()}
        )
        inner = {**inner, name: stated}
    kind = inner.get("model_type", config.get("model_type"))
    if kind not in ("clip_vision_model", "clip"):
        raise ConfigError(
            f"{folder} is not a CLIP", expected="model_type clip or clip_vision_model", got=kind
        )
    fields = {name: inner.get(name, default) for name, default in _DEFAULTS.items()}
    if fields["hidden_act"] not in ("quick_gelu", "gelu") or fields["num_channels"] != 3:
        raise ConfigError(
            f"{folder}: our vision transformer does not have its hidden_act or num_channels",
            expected="quick_gelu or gelu, 3",
            got=f"{fields['hidden_act']}, {fields['num_channels']}",
        )
    return fields


def _pixel_statistics(path: Path) -> tuple[Any, Any]:
    """Mean and deviation of the image processor at `path`, or CLIP's own without one; raises
    `ConfigError` for another preprocessing."""
    scale = read_json(path) if path.is_file() else {}
    for field, plain in _PIXELS.items():
        if not isclose(plain if scale.get(field) is None else scale[field], plain):
            raise ConfigError(
                f"{path}: our images are not prepared with this {field}",
                expected=f"{plain:.6g}" if isinstance(plain, float) else plain,
                got=scale[field],
            )
    return tuple(scale.get("image_mean", _MEAN)), tuple(scale.get("image_std", _STD))


def _resized(part: VisionPart, image_size: int) -> VisionPart:
    """The part for another image size, its position table interpolated."""
    tensors = part.tensors
    # An image smaller than a patch has no grid; the configuration refuses it later.
    if image_size >= part.patch_size and _POSITIONS in tensors:
        table = tensors[_POSITIONS].read().float()
        resized = InMemory(resize_positions(table, image_size // part.patch_size))
        tensors = {**tensors, _POSITIONS: resized}
    return replace(part, image_size=image_size, tensors=tensors)


def _renamed(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors that our encoder has, by our names."""
    found = {}
    for name, tensor in stored.items():
        own = name.removeprefix(_PREFIX)
        if _UNUSED.fullmatch(own):
            continue
        own = re.sub(r"^pre_layrnorm\.", "pre_norm.", own)
        found[re.sub(r"^encoder\.layers\.", "layers.", own)] = tensor
    return found
