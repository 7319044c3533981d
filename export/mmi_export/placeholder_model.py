"""Models that stand in for real ones: right names, shapes, types and sizes, weights of no meaning.

For trying what a large model needs (exports, builds, memory, FLOPs) without its weights. Empty
weights are all zeros and take no disk; random ones are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import ModelConfig, to_json
from mmi_deploy.system.safetensors_writer import Stored, write_safetensors_file
from mmi_deploy.system.temporary_folder import temporary_folder
from mmi_export.tracing.fake_weights_model import BlankModel
from mmi_train.weights.lazy_tensor import Computed, StoredTensor
from mmi_train.weights.model_folder import CONFIG, TOKENIZER, WEIGHTS
from mmi_train.weights.writer import NAMES, write_safetensors

Weights = Literal["given", "empty", "random"]
"""What the weights of a bundle are: a model's, or those of a stand-in."""

_TABLES = (
    "embed_tokens",
    "boi_embedding",
    "position_embedding",
    "level_embed",
    "image_index",
    "queries",
    "null_condition",
)
"""Weights that are looked up or taken as they are, and multiply nothing."""


@contextmanager
def stand_in(
    config: ModelConfig, beside: Path, weights: Weights, layers: int | None, dtype: torch.dtype
) -> Iterator[Path]:
    """A model folder for the time of an export, on the disk of `beside`, so that its weights can be
    linked from there. `layers`: cut the language model to its first so many."""
    config = config if layers is None else cut(config, layers)
    beside.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(beside.parent, f".{beside.name}.model-") as folder:
        write_stand_in(config, folder, weights, dtype)
        yield folder


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


def write_stand_in(config: ModelConfig, folder: Path, weights: Weights, dtype: torch.dtype) -> None:
    """Write a model folder of `config`: configuration, a tokenizer of numbered words, weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(to_json(config))
    _tokenizer(config).save(str(folder / TOKENIZER))
    shapes = BlankModel(config).weights
    if weights == "random":
        write_safetensors(folder / WEIGHTS, _drawn(shapes), dtype)
    else:
        empty = {
            name: Stored(NAMES[dtype], value.shape, value.numel() * dtype.itemsize)
            for name, value in shapes.items()
        }
        write_safetensors_file(folder / WEIGHTS, empty)


def _drawn(shapes: Mapping[str, Tensor], seed: int = 0) -> dict[str, StoredTensor]:
    """Every weight drawn when it is written, so that no part of a model is silent: maps keep the
    size of what they map, norms scale by about 1, tables are as large as activations."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: torch.Size) -> Tensor:
        value = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            return 1 + 0.2 * value
        if len(shape) < 2:
            return 0.2 * value
        if any(part in name for part in _TABLES):
            return value
        return value * shape[1:].numel() ** -0.5

    return {
        name: Computed(tensor.shape, torch.float32, partial(draw, name, tensor.shape))
        for name, tensor in shapes.items()
    }


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
