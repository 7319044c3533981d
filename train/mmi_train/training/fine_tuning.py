"""Train any model folder further, on documents of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import WeightsError
from mmi_deploy.system.files import sha256_of, write_file
from mmi_deploy.system.output_folder import check_replaceable, new_folder, run_folder
from mmi_deploy.system.progress import Progress, silent
from mmi_train.data.document_file import DocumentFile
from mmi_train.training.loop import RunConfig, train
from mmi_train.training.optimiser import TABLE_11, GroupRule, OptimiserConfig
from mmi_train.training.stages.documents import DocumentsStage
from mmi_train.weights.lazy_tensor import InMemory, StoredTensor
from mmi_train.weights.model_folder import (
    CONFIG,
    FOLDER_KIND,
    TOKENIZER,
    WEIGHTS,
    load_model,
)
from mmi_train.weights.safetensors_files import read_safetensors
from mmi_train.weights.writer import write_safetensors


def schedule_of(
    rate: float, steps: int, rules: tuple[GroupRule, ...] = TABLE_11
) -> OptimiserConfig:
    """AdamW of the published run (Table 11) with another rate and number of steps; a tenth of
    them, at most a thousand, warm up."""
    return OptimiserConfig(
        rate=rate,
        steps=steps,
        warmup=min(max(steps // 10, 1), 1000),
        weight_decay=0.05,
        betas=(0.9, 0.995),
        eps=1e-6,
        rules=rules,
    )


def steps_of(epochs: float, documents: int, batch: int) -> int:
    """Optimiser steps of `batch` documents each in which `documents` are seen `epochs` times."""
    return max(math.ceil(epochs * documents / batch), 1)


def fine_tune(
    start: Path,
    file: DocumentFile,
    out: Path,
    optimiser: OptimiserConfig,
    run: RunConfig,
    *,
    documents: int,
    image_weight: float,
    max_bad: int,
    device: torch.device,
    checkpoint_gradients: bool = False,
    progress: Progress = silent,
    on_broken: Callable[[str], None] = lambda reason: None,
) -> Path:
    """Train the model folder `start` on the documents of `file` and write the model folder
    `out/model`; returns its path.

    documents: in one micro-batch. on_broken: told of each document that cannot be read. The same
    call resumes from the last checkpoint in `out`. The model folder is written at every checkpoint;
    weights that do not learn keep the bytes of `start`. Raises `MmiError` where another process
    trains there, or `out/model` holds files that mmi did not write.
    """
    folder = out / "model"
    with run_folder(out, "training"):
        check_replaceable(folder, None, kind=FOLDER_KIND, inputs=[start])
        progress(f"loading {start}")
        model = load_model(start).to(device)
        model.checkpoint_gradients(checkpoint_gradients)
        stage = DocumentsStage(
            model,
            Tokenizer.open(start / TOKENIZER, model.config.tokens),
            file,
            documents,
            seed=run.seed,
            image_weight=image_weight,
            max_bad=max_bad,
            on_broken=on_broken,
        )

        def save(step: int, average: Mapping[str, Tensor]) -> None:
            write_model(start, folder, average)

        begun = f"weights {sha256_of(start / WEIGHTS)}"
        train(stage, optimiser, run, out / stage.name, save, progress, begun)
    return folder


def write_model(start: Path, folder: Path, changed: Mapping[str, Tensor]) -> None:
    """Write the model folder `folder`, atomically: `start` with the `changed` weights, each in the
    type that it has there. Raises `WeightsError` for numbers beyond that type."""
    stored: dict[str, StoredTensor] = dict(read_safetensors(start / WEIGHTS))
    for name, value in changed.items():
        dtype = stored[name].dtype
        if float(value.abs().max()) > torch.finfo(dtype).max:
            raise WeightsError(
                f"{name} has grown beyond {str(dtype).removeprefix('torch.')}, the type of {start}",
                fix="start from that model in float32 or bfloat16, or lower the rate",
            )
        stored[name] = InMemory(value.detach().cpu().to(dtype))
    with new_folder(folder, None, kind=FOLDER_KIND) as work:
        write_safetensors(work / WEIGHTS, stored)
        for name in (CONFIG, TOKENIZER):
            write_file(work / name, (start / name).read_bytes())
