"""Train any model folder further, on documents of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.system.files import sha256_of
from mmi_deploy.system.output_folder import check_replaceable, new_folder, run_folder
from mmi_deploy.system.progress import Progress, silent
from mmi_train.data.document_file import DocumentFile
from mmi_train.training.fused_mmfs import use_fused_mmfs
from mmi_train.training.loop import RunConfig, train
from mmi_train.training.lora import ADAPTERS_KIND, LoraConfig, add_adapters, trained_adapters
from mmi_train.training.optimiser import TABLE_11, GroupRule, OptimiserConfig, frozen_matrices
from mmi_train.training.stages.documents import DocumentsStage
from mmi_train.weights.lazy_tensor import InMemory, StoredTensor
from mmi_train.weights.model_folder import (
    FOLDER_KIND,
    TOKENIZER,
    WEIGHTS,
    load_model,
    write_changed,
)


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
    lora: LoraConfig | None = None,
    checkpoint_gradients: bool = False,
    progress: Progress = silent,
    on_broken: Callable[[str], None] = lambda reason: None,
) -> Path:
    """Train the model folder `start` on the documents of `file` and write the model folder
    `out/model`; returns its path.

    documents: in one micro-batch. on_broken: told of each document that cannot be read. lora:
    adapters to train, under rules of `lora_rules`; they are merged into `out/model` and kept in
    `out/adapters` too. The same call resumes from the last checkpoint in `out`. The model folder is
    written at every checkpoint; weights that do not learn keep the bytes of `start`, and in mixed
    precision their matrices are held in bfloat16. Raises `MmiError` where another process trains
    there, or a folder to write holds files that mmi did not write.
    """
    folder, kept = out / "model", out / "adapters"
    with run_folder(out, "training"):
        check_replaceable(folder, None, kind=FOLDER_KIND, inputs=[start])
        if lora is not None:
            check_replaceable(kept, None, kind=ADAPTERS_KIND, inputs=[start])
        progress(f"loading {start}")
        narrow = frozen_matrices(optimiser.rules) if run.precision == "bf16" else None
        model = load_model(start, matrices=narrow)
        if lora is not None:
            add_adapters(model, lora, device)
        model = model.to(device)
        use_fused_mmfs(model, device)
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
            if lora is None:
                changed: dict[str, StoredTensor] = {n: InMemory(v) for n, v in average.items()}
            else:
                adapters = trained_adapters(lora, start, average)
                with new_folder(kept, None, kind=ADAPTERS_KIND) as work:
                    adapters.save(work)
                changed = adapters.merged(start)
            with new_folder(folder, None, kind=FOLDER_KIND) as work:
                write_changed(work, start, changed)

        begun = f"weights {sha256_of(start / WEIGHTS)}"
        if lora is not None:
            begun += f" with {lora}"
        train(stage, optimiser, run, out / stage.name, save, progress, begun)
    return folder
