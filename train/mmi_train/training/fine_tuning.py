"""Train any model folder further, on documents of one's own: groups of its weights, or adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError
from mmi_deploy.system.files import sha256_of
from mmi_deploy.system.output_folder import check_replaceable, new_folder, run_folder
from mmi_deploy.system.progress import Progress, silent
from mmi_train.data.document_file import DocumentFile
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.training.fused_mmfs import use_fused_mmfs
from mmi_train.training.loop import RunConfig, train
from mmi_train.training.lora import (
    ADAPTERS_KIND,
    LoraConfig,
    add_adapters,
    lora_rules,
    trained_adapters,
)
from mmi_train.training.optimiser import (
    TABLES,
    GroupRule,
    OptimiserConfig,
    frozen_matrices,
)
from mmi_train.training.ranks import ALONE, Ranks
from mmi_train.training.stages.documents import DocumentsStage
from mmi_train.weights.lazy_tensor import InMemory, StoredTensor
from mmi_train.weights.model_folder import (
    FOLDER_KIND,
    TOKENIZER,
    WEIGHTS,
    load_model,
    write_changed,
)

MODEL, ADAPTERS = "model", "adapters"

# The largest part of a run, and the most optimiser steps, in which the rate rises.
_WARMUP_SHARE, _WARMUP = 0.1, 1000


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FineTuning:
    """Choice of the weights that learn, and size of a micro-batch.

    `groups`: name in `TABLES` of the groups of weights that learn, with their relative rates; None:
    adapters alone. `lora`: adapters, in addition. `rate`: base learning rate, None: the table's.
    `batch`: documents of a micro-batch. `max_bad`: broken documents that may be left out.
    """

    groups: str | None = None
    lora: LoraConfig | None = LoraConfig()
    rate: float | None = None
    batch: int = 4
    text_weight: float = 1.0
    image_weight: float = 10.0
    max_bad: int = 100
    checkpoint_gradients: bool = False

    def optimiser(self, steps: int) -> OptimiserConfig:
        """Optimiser of a run of `steps` steps. Raises `ConfigError` if nothing learns."""
        if self.groups is None and self.lora is None:
            raise ConfigError(
                "nothing would learn", fix="choose adapters with --lora, or groups with --groups"
            )
        if self.groups is not None and self.groups not in TABLES:
            raise ConfigError(
                "these groups of weights are unknown", expected=", ".join(TABLES), got=self.groups
            )
        table = TABLES[self.groups or "published"]
        rules = table.rules if self.groups else ()
        if self.lora is not None:
            rules = lora_rules(*rules, *([GroupRule("")] if self.groups else []))
        return replace(
            table,
            rate=self.rate or table.rate,
            steps=steps,
            warmup=min(math.ceil(_WARMUP_SHARE * steps), _WARMUP),
            rules=rules,
        )


def steps_of(epochs: float, documents: int, batch: int) -> int:
    """Optimiser steps of `batch` documents each in which `documents` are seen `epochs` times."""
    return max(math.ceil(epochs * documents / batch), 1)


def fine_tune(
    start: Path,
    file: DocumentFile,
    out: Path,
    steps: int,
    tuning: FineTuning,
    run: RunConfig,
    device: torch.device,
    *,
    progress: Progress = silent,
    on_broken: Callable[[str], None] = lambda reason: None,
    ranks: Ranks = ALONE,
) -> Path:
    """Train the model folder `start` on the documents of `file` and write the model folder
    `out/model`, and the adapters, if there are any, to `out/adapters`; returns the former.

    on_broken: told of each document that cannot be read. The same call resumes from the last
    checkpoint in `out`. Both folders are written at every checkpoint; weights that do not learn
    keep the bytes of `start`. ranks: all of them call this function and read `start`, the documents
    and `out`; only the first one writes and reports. Raises `MmiError` where another process trains
    there, or a folder holds files that mmi did not write.
    """
    model_folder, adapters = out / MODEL, out / ADAPTERS
    optimiser = tuning.optimiser(steps)
    if not ranks.main:
        progress, on_broken = silent, lambda reason: None
    with run_folder(out, "training") if ranks.main else nullcontext():
        if ranks.main:
            check_replaceable(model_folder, None, kind=FOLDER_KIND, inputs=[start])
            if tuning.lora is not None:
                check_replaceable(adapters, None, kind=ADAPTERS_KIND, inputs=[start])
        progress(f"loading {start}")
        model = _loaded(start, tuning, optimiser, run.precision, device, ranks)
        stage = DocumentsStage(
            model,
            Tokenizer.open(start / TOKENIZER, model.config.tokens),
            file,
            tuning.batch,
            seed=run.seed,
            text_weight=tuning.text_weight,
            image_weight=tuning.image_weight,
            max_bad=tuning.max_bad,
            on_broken=on_broken,
            adapters=str(tuning.lora),
        )

        def save(step: int, average: Mapping[str, Tensor]) -> None:
            if tuning.lora is None:
                changed: Mapping[str, StoredTensor] = {
                    name: InMemory(value) for name, value in average.items()
                }
            else:
                trained = trained_adapters(tuning.lora, start, average)
                with new_folder(adapters, None, kind=ADAPTERS_KIND) as work:
                    trained.save(work)
                changed = trained.merged(start)
            with new_folder(model_folder, None, kind=FOLDER_KIND) as work:
                write_changed(work, start, changed)

        begun = f"weights {sha256_of(start / WEIGHTS)}"
        train(stage, optimiser, run, out / stage.name, save, progress, begun, ranks)
    return model_folder


def _loaded(
    start: Path,
    tuning: FineTuning,
    optimiser: OptimiserConfig,
    precision: Literal["bf16", "fp32"],
    device: torch.device,
    ranks: Ranks,
) -> MMInterleaved:
    """The model on `device`, with adapters; in mixed precision its frozen matrices in bfloat16. Of
    several ranks each moves only its shards there, later."""
    lean = frozen_matrices(optimiser.rules) if precision == "bf16" else None
    model = load_model(start, matrices=lean)
    if tuning.lora is not None:
        add_adapters(model, tuning.lora, device)
    if ranks.size == 1:
        model.to(device)
    model.checkpoint_gradients(tuning.checkpoint_gradients)
    use_fused_mmfs(model, device)
    return model
