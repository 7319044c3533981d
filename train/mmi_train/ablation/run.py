"""One run of an ablation: a training with one seed, measured; its result is kept in a file.

Rows of several studies that mean the same training share its runs.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import with_fields
from mmi_deploy.system.files import sha256_of, write_file
from mmi_deploy.system.progress import Progress, silent
from mmi_train.ablation.measures import measure
from mmi_train.ablation.parts import FROZEN, MMFS, PARTS
from mmi_train.ablation.studies import Training
from mmi_train.data.synthetic.drawn_world import DrawnWorld
from mmi_train.evaluation.contact_sheet import contact_sheet
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.training.from_scratch import averaged, open_gates, own_tokenizer
from mmi_train.training.loop import RunConfig, train
from mmi_train.training.optimiser import GroupRule, OptimiserConfig
from mmi_train.training.stages.interleaved import InterleavedStage
from mmi_train.weights.model_folder import WEIGHTS, load_model


@dataclass(frozen=True)
class Scale:
    """Size of every run: optimiser `steps`, held-out `questions` of each kind, `solver_steps` of a
    picture, micro-batches of the held-out losses. `share`: documents of a step, of those of the
    study's mixture."""

    steps: int
    questions: int
    solver_steps: int = 10
    loss_batches: int = 4
    share: float = 1.0
    new_mmfs: bool = True
    precision: Literal["bf16", "fp32"] = "fp32"


@dataclass(frozen=True)
class Start:
    """Model folder that runs start from; `sha256` of its weights."""

    folder: Path
    sha256: str

    @classmethod
    def at(cls, folder: Path) -> Start:
        """Raises `ConfigError` where there are no weights."""
        if not (folder / WEIGHTS).is_file():
            raise ConfigError(
                f"{folder} is no model folder", fix="give one that `mmi train-tiny` wrote: --start"
            )
        return cls(folder, sha256_of(folder / WEIGHTS))


def settings(training: Training, scale: Scale, start: Start, seed: int) -> dict[str, Any]:
    """All that decides a run's result, as JSON values."""
    told = asdict(training) | {"world": str(training.world)}
    about = {"training": told, "scale": asdict(scale), "start": start.sha256, "seed": seed}
    return dict(json.loads(json.dumps(about)))


def name_of(about: Mapping[str, Any]) -> str:
    """Name of a run's files: a checksum of its settings."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def result_of(
    training: Training,
    scale: Scale,
    start: Start,
    seed: int,
    folder: Path,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Result of a run: from `folder`, if it is there, or trained and measured now.

    The JSON file has `measures`, `seconds` of work, the settings, and the name of a contact sheet
    (PNG) beside it, if pictures were drawn. A run that was stopped goes on from its last
    checkpoint.
    """
    about = settings(training, scale, start, seed)
    name = name_of(about)
    path = folder / f"{name}.json"
    if (kept := _read(path)) is not None and kept["settings"] == about:
        return kept
    begun = time.process_time()
    stage, rules = _stage(training, scale, start, seed)
    optimiser = OptimiserConfig(
        rate=training.rate,
        steps=scale.steps,
        warmup=max(scale.steps // 10, 1),
        weight_decay=0.02,
        betas=(0.9, 0.98),
        eps=1e-8,
        schedule="flat_then_cool",
        floor=0.02,
        rules=rules,
    )
    run = RunConfig(seed=seed, precision=scale.precision, average=0.98, checkpoint_every=100)
    work = folder / name
    weights = train(stage, optimiser, run, work, progress=progress, start=f"{start.sha256} {name}")
    with averaged(stage.module, weights):
        stage.model.eval()
        measures, samples = measure(
            stage, scale.questions, scale.solver_steps, scale.loss_batches, seed, progress
        )
    result: dict[str, Any] = {"measures": measures, "settings": about}
    result["seconds"] = round(time.process_time() - begun, 1)
    if samples:
        sheet = io.BytesIO()
        contact_sheet(samples).save(sheet, "PNG")
        result["pictures"] = f"{name}.png"
        write_file(folder / result["pictures"], sheet.getvalue())
    write_file(path, json.dumps(result, indent=1) + "\n")
    shutil.rmtree(work)  # checkpoints and curves, many times the size of the result
    return result


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def _stage(
    training: Training, scale: Scale, start: Start, seed: int
) -> tuple[InterleavedStage, tuple[GroupRule, ...]]:
    """The model with the changes of `training` in a stage, and the rules of what learns."""
    fresh = training.fresh + ((MMFS,) if scale.new_mmfs else ())
    model = changed_model(replace(training, fresh=fresh), start.folder, seed)
    mixture = {kind: max(round(n * scale.share), 1) for kind, n in training.mixture.items()}
    world = DrawnWorld(training.world)
    stage = InterleavedStage(
        model,
        own_tokenizer(start.folder, world),
        world,
        mixture,
        text_weight=training.text_weight,
        image_weight=training.image_weight,
        recall_weight=0.0,
        sketch_weight=0.0,
    )
    frozen = [FROZEN[part] for part in training.parts if part in FROZEN]
    return stage, (
        *(GroupRule(pattern, rate=0.0) for pattern in (*frozen, r"^image_decoder\.vae\.")),
        *(GroupRule(pattern, optional=bool(frozen)) for pattern in training.learns),
        GroupRule("", rate=0.0),
    )


def changed_model(training: Training, start: Path, seed: int) -> MMInterleaved:
    """The model of the folder `start` with other fields and parts. Weights that do not fit any
    more, and those that `fresh` names, are new."""
    trained = load_model(start)
    config = with_fields(trained.config, training.fields)
    torch.manual_seed(seed)
    model = MMInterleaved(config)
    open_gates(model)
    own = model.state_dict()
    kept = {
        name: value
        for name, value in trained.state_dict().items()
        if name in own
        and own[name].shape == value.shape
        and not any(re.search(pattern, name) for pattern in training.fresh)
    }
    model.load_state_dict(kept, strict=False)
    for part in training.parts:  # after the weights, which would undo it
        PARTS[part](model)
    return model
