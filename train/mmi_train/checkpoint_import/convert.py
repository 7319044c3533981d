"""Conversion of the published checkpoint, a folder of pickles, to a model folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmi_deploy.spec.config import ModelConfig, to_json
from mmi_deploy.system.output_folder import new_folder
from mmi_deploy.system.progress import Progress, silent
from mmi_train.checkpoint_import.state_dict import Plan, plan_state
from mmi_train.checkpoint_import.tokenizer_files import published_tokenizer
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights.lazy_tensor import StoredTensor
from mmi_train.weights.model_folder import CONFIG, FOLDER_KIND, TOKENIZER, WEIGHTS
from mmi_train.weights.pickles import read_pickles
from mmi_train.weights.writer import write_safetensors


@dataclass(frozen=True)
class ConvertedModel:
    """A written model. tensors: their number. size: bytes of the weights file."""

    tensors: int
    size: int


def convert_checkpoint(
    checkpoint: Path,
    out: Path,
    config: ModelConfig,
    tokenizer: Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    inputs: Sequence[Path] = (),
    progress: Progress = silent,
) -> ConvertedModel:
    """Convert `checkpoint` (a folder of pickles, or one) into the model folder `out`, atomically.

    config: of the checkpoint's model. tokenizer: see `published_tokenizer`. dtype: of the written
    weights; None keeps the checkpoint's types. inputs: further files that were read. No more than a
    few pieces of a tensor are in memory. Raises `WeightsError` and `ConfigError`, for names and
    shapes before anything is written.
    """
    read = [checkpoint, tokenizer, *inputs]
    with new_folder(out, force, kind=FOLDER_KIND, inputs=read) as work:
        published_tokenizer(tokenizer, config.tokens).save(str(work / TOKENIZER))
        (work / CONFIG).write_text(to_json(config))
        published = read_pickles(checkpoint)
        progress("comparing names and shapes")
        tensors = _plan(config, published).lazy_tensors(published)
        size = write_safetensors(work / WEIGHTS, tensors, dtype, progress)
    return ConvertedModel(len(tensors), size)


def _plan(config: ModelConfig, published: Mapping[str, StoredTensor]) -> Plan:
    with torch.device("meta"):
        outline = MMInterleaved(config)
    return plan_state(outline, published)
