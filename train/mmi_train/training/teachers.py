"""Teachers of a distillation: another model folder of the same shape, in place of the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from mmi_deploy.errors import ConfigError, WeightsError
from mmi_deploy.spec.config import ModelConfig, read_config
from mmi_train.model.unet import UNet
from mmi_train.training.lora import stored_name
from mmi_train.training.stages.distillation import UNET
from mmi_train.weights.model_folder import CONFIG, WEIGHTS
from mmi_train.weights.safetensors_files import read_safetensors


def teacher_config(teacher: Path, student: ModelConfig) -> ModelConfig:
    """Configuration of the model folder `teacher`. Raises `ConfigError` unless it has the shape of
    the student's model."""
    found = read_config(teacher / CONFIG)
    if _shape(found) == _shape(student):
        return found
    parts = ("tokens", "vision", "vision_resampler", "llama", "llm_mmfs", "image_decoder")
    left, right = _shape(found), _shape(student)
    other = [part for part in parts if getattr(left, part) != getattr(right, part)]
    raise ConfigError(
        f"the teacher {teacher} has another shape than the model: {', '.join(other)}",
        fix="give a teacher with the same configuration",
    )


def _shape(config: ModelConfig) -> ModelConfig:
    return replace(config, name="", image_decoder=replace(config.image_decoder, distillation=None))


def load_teacher(unet: UNet, teacher: Path, start: Path) -> None:
    """Copy the U-Net of the folder `teacher` into `unet`, apart from MMFS. Raises `WeightsError`
    where anything else of it differs from the model folder `start`, whose conditions it sees."""
    own, others = read_safetensors(start / WEIGHTS), read_safetensors(teacher / WEIGHTS)
    state = {stored_name(name): value for name, value in unet.state_dict().items()}
    for name, tensor in others.items():
        inner = name.removeprefix(UNET)
        if inner == name or inner.startswith("look_back."):
            if not torch.equal(tensor.read(), own[name].read()):
                raise WeightsError(
                    f"the teacher {teacher} and the model differ in more than their U-Nets: {name}",
                    fix="distil the model from itself, or from what it was distilled from",
                )
        else:
            state[inner].copy_(tensor.read())
