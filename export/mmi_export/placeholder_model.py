"""Placeholder models: right names, shapes, types and sizes, weights without meaning.

They show what a large model takes (export, build, memory, FLOPs) without its weights. Empty weights
are zeros in a sparse file, which takes no disk; random weights are drawn.
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
from mmi_export.tracing.fake_weights_model import FakeWeightsModel
from mmi_train.weights.lazy_tensor import Computed, StoredTensor
from mmi_train.weights.model_folder import CONFIG, TOKENIZER, WEIGHTS
from mmi_train.weights.writer import NAMES, write_safetensors

# Origin of a bundle's weights: a model's own, or placeholders.
Weights = Literal["given", "empty", "random"]

# Weights that are looked up or used as they are, and multiply nothing.
_TABLES = (
    "embed_tokens",
    "boi_embedding",
    "position_embedding",
    "level_embed",
    "image_index",
    "queries",
    "null_condition",
)


@contextmanager
def placeholder_model(
    config: ModelConfig, beside: Path, weights: Weights, layers: int | None, dtype: torch.dtype
) -> Iterator[Path]:
    """Temporary model folder with placeholder weights, on the disk of `beside`, from where weights
    can be linked. `layers`: keep the first `layers` layers of the language model; None: all."""
    config = config if layers is None else cut(config, layers)
    beside.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(beside.parent, f".{beside.name}.model-") as folder:
        write_placeholder_model(config, folder, weights, dtype)
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
        llama=config.llama.cut(layers),
    )


def write_placeholder_model(
    config: ModelConfig, folder: Path, weights: Weights, dtype: torch.dtype
) -> None:
    """Write a model folder of `config`: configuration, a tokenizer of numbered words, weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(to_json(config))
    _tokenizer(config).save(str(folder / TOKENIZER))
    shapes = FakeWeightsModel(config).weights
    if weights == "random":
        write_safetensors(folder / WEIGHTS, _drawn(shapes), dtype)
    else:
        empty = {
            name: Stored(NAMES[dtype], value.shape, value.numel() * dtype.itemsize)
            for name, value in shapes.items()
        }
        write_safetensors_file(folder / WEIGHTS, empty)


def _drawn(shapes: Mapping[str, Tensor], seed: int = 0) -> dict[str, StoredTensor]:
    """Draw every weight when it is written. Scales keep every part of the model active: linear maps
    keep the scale of their input, norms scale by about 1, tables are as large as activations."""
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
    """Tokenizer with one word per id, `w` and the id."""
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
