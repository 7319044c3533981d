"""CLIP's vision transformer to build on, from a Hugging Face folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

from mmi_deploy.errors import ConfigError
from mmi_train.checkpoint_import.config_fields import Fields, agreed, count, fitting, read_json
from mmi_train.model.vit_adapter import resize_positions
from mmi_train.weights.lazy_tensor import InMemory, StoredTensor
from mmi_train.weights.safetensors_files import read_folder

_PREFIX = "vision_model."
_POSITIONS = "embeddings.position_embedding.weight"
_NOT_OURS = re.compile(
    r"(text_model|text_projection|visual_projection|logit_scale|post_layernorm)\b.*|.*position_ids"
)
"""CLIP's other half; its last norm, which ours leaves out; what the configuration determines."""

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
"""What a CLIP folder that does not mention a field means: Hugging Face writes differences only."""

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)

_PIXELS = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
"""Fields of CLIP's image processor: pixels from 0 to 1, then mean and deviation."""


@dataclass(frozen=True)
class VisionPart:
    """Sizes of a CLIP, and its tensors by the names below our `vision.encoder.`."""

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


def read_vision(folder: Path, image_size: int | None = None) -> VisionPart:
    """The vision half of the CLIP in `folder`; with another `image_size`, its positions resized.

    Raises `ConfigError` for another kind of model; whether the weights fit is for the caller.
    """
    path = folder / "config.json"
    config = read_json(path)
    with fitting(path):
        return _read(folder, path, config, image_size)


def _read(folder: Path, path: Path, config: Fields, image_size: int | None) -> VisionPart:
    inner, older = config.get("vision_config", config), config.get("vision_config_dict") or {}
    for name, value in older.items():  # CLIP's first folders have both
        places = {"vision_config": inner.get(name), "vision_config_dict": value}
        stated = agreed(path, {f"{place}.{name}": found for place, found in places.items()})
        inner = {**inner, name: stated}
    kind = inner.get("model_type", config.get("model_type"))
    if kind not in ("clip_vision_model", "clip"):
        raise ConfigError(
            f"{folder} is no CLIP", expected="model_type clip or clip_vision_model", got=kind
        )
    fields = {name: inner.get(name, default) for name, default in _DEFAULTS.items()}
    if fields["hidden_act"] not in ("quick_gelu", "gelu") or fields["num_channels"] != 3:
        raise ConfigError(
            f"{folder}: our vision transformer does not have its hidden_act or num_channels",
            expected="quick_gelu or gelu, 3",
            got=f"{fields['hidden_act']}, {fields['num_channels']}",
        )
    pixels = folder / "preprocessor_config.json"
    scale = read_json(pixels) if pixels.is_file() else {}
    for field, plain in _PIXELS.items():
        if not isclose(plain if scale.get(field) is None else scale[field], plain):
            raise ConfigError(
                f"{pixels}: our images are not prepared with this {field}",
                expected=f"{plain:.6g}" if isinstance(plain, float) else plain,
                got=scale[field],
            )
    own, patch = (count(path, fields, name) for name in ("image_size", "patch_size"))
    size = image_size or own
    tensors = _named(read_folder(folder, ("model", "pytorch_model")))
    if size != own and size >= patch and _POSITIONS in tensors:  # no patch: refused when built
        table = tensors[_POSITIONS].read().float()
        tensors[_POSITIONS] = InMemory(resize_positions(table, size // patch))
    return VisionPart(
        image_size=size,
        patch_size=patch,
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        activation=fields["hidden_act"],
        eps=fields["layer_norm_eps"],
        pixel_mean=tuple(scale.get("image_mean", _MEAN)),
        pixel_std=tuple(scale.get("image_std", _STD)),
        tensors=tensors,
    )


def _named(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    found = {}
    for name, tensor in stored.items():
        own = name.removeprefix(_PREFIX)
        if _NOT_OURS.fullmatch(own):
            continue
        own = re.sub(r"^pre_layrnorm\.", "pre_norm.", own)
        found[re.sub(r"^encoder\.layers\.", "layers.", own)] = tensor
    return found
