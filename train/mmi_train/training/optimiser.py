"""AdamW with the paper's parameter groups (Table 11) and learning-rate schedules."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated
from torch import nn

from mmi_deploy.errors import ConfigError
from mmi_train.training.ranks import local
from mmi_train.training.stages import CRITIC_PREFIX, MODEL_PREFIX
from mmi_train.weights.model_folder import TypeOfMatrix


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class GroupRule:
    """Learning rate and weight decay, relative to the base values, of parameters whose name matches
    `pattern` (the first matching rule applies); a rate of 0 freezes them. `optional`: a model may
    be without such parameters."""

    pattern: str
    rate: float = 1.0
    decay: float = 1.0
    optional: bool = False


# All parameters learn at the base rate; the VAE, which has a stage of its own, is frozen.
FROM_SCRATCH = (
    GroupRule(r"image_decoder\.vae\.", rate=0.0),
    GroupRule(r"look_back\.gate$", decay=0.0),
)

# What makes pictures out of hidden states: context resampler and U-Net with MMFS.
IMAGE_DECODER = (
    GroupRule(r"^image_decoder\.vae\.", rate=0.0),
    GroupRule(r"^image_decoder\."),
    GroupRule("", rate=0.0),
)

# The published run: CLIP, the LLM body, its embeddings and head and the VAE are frozen; the U-Net
# and all sampling offsets learn at 1e-5, the rest at 1e-4.
TABLE_11 = (
    GroupRule(r"^image_decoder\.vae\.", rate=0.0),
    GroupRule(r"^vision\.encoder\.(embeddings|pre_norm|layers)\.", rate=0.0),
    GroupRule(r"look_back\.gate$", decay=0.0),
    GroupRule(r"offset_proj", rate=0.1, decay=0.0),
    GroupRule(r"^llm\..*look_back\."),
    GroupRule(r"^llm\.", rate=0.0),
    GroupRule(r"^head\.head\.", rate=0.0),
    GroupRule(r"^image_decoder\.unet\.look_back\..*null_value$", rate=0.0, optional=True),
    GroupRule(r"^image_decoder\.unet\.(?!look_back)", rate=0.1),
)


# Frozen in every table: the autoencoder, CLIP, whose adapter learns, and the null value of MMFS in
# the U-Net of released models, which nothing reads.
_ALWAYS_FROZEN = (
    GroupRule(r"^image_decoder\.vae\.", rate=0.0),
    GroupRule(r"^vision\.encoder\.(embeddings|pre_norm|layers)\.", rate=0.0),
    GroupRule(r"^image_decoder\.unet\.look_back\..*null_value$", rate=0.0, optional=True),
)

# The language model as it was before MMFS: body, embeddings and head.
_LANGUAGE_MODEL = r"^(llm\.(?!layers\.\d+\.look_back\.)|head\.head\.)"


def _paper(language_model: float, image_decoder: float) -> tuple[GroupRule, ...]:
    """Groups as the paper's tables name them, with rates relative to that of "others": the whole
    image decoder, its resampler and MMFS included, and every sampling offset as its layer."""
    return (
        *_ALWAYS_FROZEN,
        GroupRule(_LANGUAGE_MODEL, rate=language_model),
        GroupRule(r"^image_decoder\.", rate=image_decoder),
    )


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class OptimiserConfig:
    """AdamW and its learning-rate schedule. `rate`: base learning rate. `steps`, `warmup`:
    optimiser steps. `cool_from`: share of the run after which `flat_then_cool` decays linearly.
    `floor`: least multiplier of the base rate. `clip`: greatest gradient norm."""

    rate: float
    steps: int
    warmup: int
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    schedule: Literal["cosine", "flat_then_cool"] = "cosine"
    cool_from: float = 0.6
    floor: float = 0.0
    clip: float = 1.0
    rules: tuple[GroupRule, ...] = TABLE_11

    def rate_factor(self, step: int) -> float:
        """Multiplier of the base learning rate at `step` (from 0): linear warm-up, then the
        schedule."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        if self.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        else:
            factor = 1.0 if done < self.cool_from else (1 - done) / (1 - self.cool_from)
        return max(factor, self.floor)

    def is_flat_at(self, step: int, steps: int) -> bool:
        """True if the rates up to `step` are the same for any number of steps from `steps` on."""
        if self.schedule == "cosine":
            return False
        return step <= self.warmup + self.cool_from * (steps - self.warmup)


# Groups of the published code and of the paper's tables by name; the rates that theirs are relative
# to, and the rest of the tables, are in the recipes. Where a table leaves it open whether the
# language model learns, it does if the task is one of text.
GROUPS: Mapping[str, tuple[GroupRule, ...]] = {
    # Pre-training, as the published code groups: the U-Net's body and all offsets at 1e-5.
    "published": TABLE_11,
    # Pre-training, as the paper says: 1e-5 image decoder, 1e-4 others.
    "table_11": _paper(0.0, 0.1),
    # Questions and captions: 1e-6 language model, 1e-5 others.
    "table_12": _paper(0.1, 1.0),
    # Referring expressions: 2e-5.
    "table_13": _paper(1.0, 1.0),
    # Segmentation to image: 1e-5 image decoder, 1e-4 others.
    "table_14": _paper(0.0, 0.1),
    # Stories: 1e-4 image decoder, 1e-5 others.
    "table_15": _paper(0.0, 10.0),
    # The U-Net without MMFS, and its critic if there is one: what distillation trains.
    "unet": (
        GroupRule(r"^image_decoder\.unet\.(?!look_back)"),
        GroupRule(rf"^{re.escape(CRITIC_PREFIX)}(?!look_back)", optional=True),
        GroupRule("", rate=0.0),
    ),
    # The image decoder without the autoencoder: what the pictures stage trains.
    "image_decoder": IMAGE_DECODER,
    # Everything but the autoencoder, at one rate.
    "all": FROM_SCRATCH,
}


@dataclass(frozen=True)
class _GroupKey:
    """Multiplier of the learning rate, and weight decay, of one parameter group."""

    rate: float
    decay: float


# Ends of the names of embeddings: of words, of CLIP's patches, of images in MMFS.
_EMBEDDINGS = ("embed_tokens.weight", "position_embedding.weight", "image_index.weight")


def frozen_matrices(rules: Sequence[GroupRule]) -> TypeOfMatrix:
    """Types of the matrices that `rules` freeze, for `load_model`: bfloat16, half the memory.

    Under bfloat16 autocast, which rounds them at every use, nothing changes. Embeddings and the
    head, whose rows of the two new tokens are not rounded there, keep the file's type; the
    autoencoder runs without autocast, in fp32.
    """

    def type_of(name: str, stored: torch.dtype) -> torch.dtype | None:
        rule = next((rule for rule in rules if re.search(rule.pattern, name)), GroupRule(""))
        if rule.rate > 0 or name.startswith("image_decoder.vae."):
            return None
        if name.startswith("head.") or name.endswith(_EMBEDDINGS):
            return stored
        return torch.bfloat16

    return type_of


def _undecayed(model: nn.Module) -> set[str]:
    """Names of parameters without weight decay, as published: biases and the weights of `LayerNorm`
    itself; the published norms of maps are no subclass of it, and are decayed."""
    names = {name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"}
    for prefix, module in model.named_modules():
        if type(module) is nn.LayerNorm:
            names |= {f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)}
    return names


def parameter_groups(model: nn.Module, config: OptimiserConfig) -> list[dict]:
    """Parameter groups for AdamW, each with its `rate` multiplier; freezes parameters of rate 0.

    Rules see the names that parameters have in MM-Interleaved, whatever module of a stage holds it.
    Raises `ConfigError` for a rule that matches no parameter.
    """
    undecayed = _undecayed(model)
    groups: defaultdict[_GroupKey, list[nn.Parameter]] = defaultdict(list)
    unused = {rule.pattern for rule in config.rules if not rule.optional}
    for name, parameter in model.named_parameters():
        own = name.removeprefix(MODEL_PREFIX)
        fitting = [rule for rule in config.rules if re.search(rule.pattern, own)]
        unused.difference_update(rule.pattern for rule in fitting)
        rule = fitting[0] if fitting else GroupRule("")
        parameter.requires_grad_(rule.rate > 0)
        if rule.rate > 0:
            decay = 0.0 if name in undecayed else config.weight_decay * rule.decay
            groups[_GroupKey(rule.rate, decay)].append(parameter)
    if unused:
        raise ConfigError(
            "rules of the optimiser match no parameter of this model",
            got=", ".join(sorted(unused)),
            fix="correct the pattern, or leave the rule out",
        )
    return [
        {"params": parameters, "rate": key.rate, "weight_decay": key.decay}
        for key, parameters in groups.items()
    ]


def make_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """Make AdamW over the parameter groups of `model`, this rank's part of each parameter; call
    `set_rate` before each step."""
    groups = parameter_groups(model, config)
    for group in groups:
        group["params"] = [local(parameter) for parameter in group["params"]]
    return torch.optim.AdamW(groups, lr=config.rate, betas=config.betas, eps=config.eps, fused=True)


def set_rate(optimiser: torch.optim.Optimizer, config: OptimiserConfig, step: int) -> float:
    """Set the learning rate of every group for `step`; returns the base learning rate."""
    rate = config.rate * config.rate_factor(step)
    for group in optimiser.param_groups:
        group["lr"] = rate * group["rate"]
    return rate


def trainable(model: nn.Module) -> Iterable[nn.Parameter]:
    """Trainable parameters, after `parameter_groups` froze the others."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
