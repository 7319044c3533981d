"""Models that stand in for real ones: right names, shapes, types and sizes, weights of no meaning.

For trying what a large model needs (exports, builds, memory, FLOPs) without its weights. Empty
weights are all zeros and take no disk; random ones are drawn.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from mmi_deploy.bundle import Bundle
from mmi_deploy.config import ModelConfig, to_json
from mmi_deploy.errors import ConfigError
from mmi_export.blank_model import BlankModel
from mmi_export.bundle_export import Weights, export_bundle
from mmi_train.weights import CONFIG, TOKENIZER, WEIGHTS

TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""What a stand-in may be stored in, and what safetensors calls it."""

_DEVIATION = 0.02
_ALIGNMENT = 64


def export_stand_in(
    config: ModelConfig,
    out_folder: Path,
    *,
    weights: Weights = "empty",
    layers: int | None = None,
    dtype: str = "float16",
    **options: Any,
) -> Bundle:
    """`export_bundle` of a model of `config` that nobody has: its weights are made here.

    `layers`: cut the language model to its first so many. `options`: those of `export_bundle`.
    """
    config = config if layers is None else cut(config, layers)
    out_folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{out_folder.name}.model.", suffix=".tmp", dir=out_folder.parent
    ) as folder:
        write_stand_in(config, Path(folder), weights, dtype)
        options = {"layout": "linked", "scope": "slice"} | options
        return export_bundle(Path(folder), out_folder, weights=weights, **options)


def cut(config: ModelConfig, layers: int) -> ModelConfig:
    """`config` with the first `layers` layers of the language model."""
    most = config.llama.layers
    if not 1 <= layers <= most:
        raise ConfigError(
            f"{config.name} cannot be cut to {layers} layers", expected=f"1 to {most}"
        )
    return replace(
        config,
        name=f"{config.name}_{layers}_layers",
        llama=replace(config.llama, layers=layers),
    )


def write_stand_in(config: ModelConfig, folder: Path, weights: Weights, dtype: str) -> None:
    """Write a model folder of `config`: configuration, a tokenizer of numbered words, weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(to_json(config))
    _tokenizer(config).save(str(folder / TOKENIZER))
    shapes = BlankModel(config).weights
    header: dict[str, object] = {}
    end = 0
    for name, tensor in shapes.items():
        start, end = end, end + tensor.numel() * getattr(torch, dtype).itemsize
        header[name] = {
            "dtype": TYPES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if weights == "random":
            for part in _drawn(shapes, dtype):
                file.write(part)
        file.truncate(8 + len(text) + end)


def _drawn(shapes: Mapping[str, Tensor], dtype: str, seed: int = 0) -> Any:
    """The bytes of every weight, drawn one after another: norms around 1, the rest around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in shapes.items():
        value = torch.randn(tensor.shape, generator=generator).mul_(_DEVIATION)
        if "norm" in name and name.endswith("weight"):
            value += 1
        yield value.to(getattr(torch, dtype)).view(torch.uint8).numpy().data


def _tokenizer(config: ModelConfig) -> Tokenizer:
    """Words that name their ids, so that every id has its own text."""
    tokens = config.tokens
    special = {tokens.pad: "<pad>", tokens.bos: "<s>", tokens.eos: "</s>"}
    special |= {tokens.boi: "<|beginofimage|>", tokens.image: "<|image|>"}
    words = [special.get(index, f"w{index}") for index in range(config.llama.vocab)]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, words[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special.values()))
    return tokenizer
