"""Train any model folder further, on documents of one's own: groups of its weights, or adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import (
    ImageDecoderConfig,
    ModelConfig,
    read_config,
    to_json,
    with_fields,
)
from mmi_deploy.system.files import sha256_of, write_file
from mmi_deploy.system.output_folder import check_replaceable, new_folder, run_folder
from mmi_deploy.system.progress import Progress, silent
from mmi_train.data.documents import Documents
from mmi_train.data.mixture import MixedDocuments
from mmi_train.data.synthetic.drawn_world import DrawnWorld
from mmi_train.data.synthetic.world import WorldConfig
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.model.unet import UNet
from mmi_train.training.compiled import check_compiler, compile_blocks
from mmi_train.training.from_scratch import own_tokenizer
from mmi_train.training.loading import load_for_training
from mmi_train.training.loop import UNWATCHED, RunConfig, Stage, Watch, train
from mmi_train.training.lora import (
    ADAPTERS_KIND,
    LoraConfig,
    lora_rules,
    trained_adapters,
)
from mmi_train.training.optimiser import (
    GROUPS,
    GroupRule,
    OptimiserConfig,
)
from mmi_train.training.ranks import ALONE, Ranks
from mmi_train.training.stages.distillation import (
    ConsistencyStage,
    Distillation,
    DistillationStage,
    GuidanceStage,
    distilled_config,
    teacher_of,
)
from mmi_train.training.stages.distribution_matching import DistributionMatchingStage
from mmi_train.training.stages.documents import DocumentsStage
from mmi_train.training.stages.interleaved import InterleavedStage
from mmi_train.training.stages.packed_documents import PackedDocumentsStage
from mmi_train.training.teachers import load_teacher, teacher_config
from mmi_train.training.trackers import TrackerName, service
from mmi_train.training.validation import Validation
from mmi_train.weights.lazy_tensor import StoredTensor
from mmi_train.weights.model_folder import (
    CONFIG,
    FOLDER_KIND,
    TOKENIZER,
    WEIGHTS,
    fingerprint,
    write_changed,
)

MODEL, ADAPTERS = "model", "adapters"

# The largest part of a run, and the most optimiser steps, in which the rate rises.
_WARMUP_SHARE, _WARMUP = 0.1, 1000

_Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DiffusionChange:
    """Fields of the model's `DiffusionConfig` that a run changes, and writes with the model; None:
    as in the start model. `min_snr_gamma` 0: no weights."""

    prediction: Literal["epsilon", "v_prediction"] | None = None
    rescale_betas_zero_snr: bool | None = None
    min_snr_gamma: float | None = Field(default=None, ge=0)

    def of(self, config: ModelConfig) -> ModelConfig:
        """The configuration with the change. Raises `ConfigError` for one that does not fit."""
        changes = {name: value for name, value in asdict(self).items() if value is not None}
        if changes.get("min_snr_gamma") == 0:
            changes["min_snr_gamma"] = None
        return with_fields(config, {f"image_decoder.diffusion.{n}": v for n, v in changes.items()})


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FineTuning:
    """Weights that learn, their optimiser, and the documents of a micro-batch.

    `groups`: name in `GROUPS` of the groups of weights that learn, with their relative rates; None:
    adapters alone. `lora`: adapters, in addition. `rate`: base learning rate. `warmup`: optimiser
    steps in which it rises, None: a tenth of the run, at most 1000; see `OptimiserConfig` for the
    rest of the optimiser. `batch`: documents of a micro-batch. `packed`: documents of data sets
    fill rows of the whole context length, as in pre-training; documents of a file stay apart.
    `diffusion`: what changes of the noise schedule, the prediction and its loss. `max_bad`: broken
    documents that may be left out. `distill`: the U-Net learns from a teacher in place of the
    losses on documents.
    """

    groups: str | None = None
    lora: LoraConfig | None = LoraConfig()
    rate: float = Field(default=1e-4, gt=0)
    schedule: Literal["cosine", "flat_then_cool"] = "cosine"
    warmup: int | None = Field(default=None, ge=0)
    cool_from: float = Field(default=0.6, ge=0, le=1)
    floor: float = Field(default=0.0, ge=0, le=1)
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[_Beta, _Beta] = (0.9, 0.995)
    eps: float = Field(default=1e-6, gt=0)
    clip: float = Field(default=1.0, gt=0)
    batch: int = Field(default=4, ge=1)
    packed: bool = False
    text_weight: float = Field(default=1.0, ge=0)
    image_weight: float = Field(default=10.0, ge=0)
    diffusion: DiffusionChange = DiffusionChange()
    max_bad: int = Field(default=100, ge=0)
    checkpoint_gradients: bool = False
    distill: Distillation | None = None

    def optimiser(self, steps: int) -> OptimiserConfig:
        """Optimiser of a run of `steps` steps. Raises `ConfigError` if nothing learns."""
        if self.groups is None and self.lora is None:
            raise ConfigError(
                "nothing would learn", fix="choose adapters with --lora, or groups with --groups"
            )
        if self.groups is not None and self.groups not in GROUPS:
            raise ConfigError(
                "these groups of weights are unknown", expected=", ".join(GROUPS), got=self.groups
            )
        rules = GROUPS[self.groups] if self.groups else ()
        if self.lora is not None:
            rules = lora_rules(*rules, *([GroupRule("")] if self.groups else []))
        warmup = self.warmup
        if warmup is None:
            warmup = min(math.ceil(_WARMUP_SHARE * steps), _WARMUP)
        return OptimiserConfig(
            rate=self.rate,
            steps=steps,
            warmup=warmup,
            weight_decay=self.weight_decay,
            betas=self.betas,
            eps=self.eps,
            schedule=self.schedule,
            cool_from=self.cool_from,
            floor=self.floor,
            clip=self.clip,
            rules=rules,
        )


# Stages of distillation by kind.
DISTILLATIONS: Mapping[str, type[DistillationStage]] = {
    "guidance": GuidanceStage,
    "lcm": ConsistencyStage,
    "dmd": DistributionMatchingStage,
}


def stage_class(tuning: FineTuning, file: Documents) -> type[DocumentsStage]:
    """Stage that trains on `file`: packed rows are of mixtures alone."""
    packed = tuning.packed and isinstance(file, MixedDocuments)
    return PackedDocumentsStage if packed else DocumentsStage


def steps_of(epochs: float, documents: int, batch: int) -> int:
    """Optimiser steps of `batch` documents each in which `documents` are seen `epochs` times."""
    return max(math.ceil(epochs * documents / batch), 1)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
class Watching:
    """Measurements of a run, and where they are shown; its weights stay the same without.

    `held_out`: documents whose losses are measured every `every` optimiser steps, `prompts`: whose
    last pictures are drawn then. `tracker`: receiver of the curves beside TensorBoard. `profile`:
    optimiser steps that are traced.
    """

    held_out: Documents | None = None
    prompts: Documents | None = None
    every: int = Field(default=250, ge=1)
    tracker: TrackerName | None = None
    profile: int = Field(default=0, ge=0)


def fine_tune(
    start: Path,
    file: Documents | WorldConfig,
    out: Path,
    steps: int,
    tuning: FineTuning,
    run: RunConfig,
    device: torch.device,
    *,
    progress: Progress = silent,
    on_broken: Callable[[str], None] = lambda reason: None,
    ranks: Ranks = ALONE,
    watching: Watching | None = None,
    compiled: bool = False,
    teacher: Path | None = None,
) -> Path:
    """Train the model folder `start` on the documents of `file` and write the model folder
    `out/model`, and the adapters, if there are any, to `out/adapters`; returns the former.
    watching: what is measured and shown meanwhile. compiled: compile the blocks of the language
    model, which rounds otherwise; refused with 4-bit matrices.
    teacher: model folder whose U-Net is distilled; None: that of `start`.

    on_broken: told of each document that cannot be read. The same call resumes from the last
    checkpoint in `out`. Both folders are written at every checkpoint; weights that do not learn
    keep the bytes of `start`. ranks: all of them call this function and read `start`, the documents
    and `out`; only the first one writes and reports. Raises `MmiError` where another process trains
    there, or a folder holds files that mmi did not write.
    """
    taught = check_distillation(start, teacher, tuning, ranks.size)
    diffusion = tuning.diffusion.of(read_config(start / CONFIG)).image_decoder.diffusion
    if compiled:
        if tuning.lora is not None and tuning.lora.four_bit:
            raise ConfigError(
                "--compile with --four-bit has not been compared with a run that is not compiled",
                fix="leave out one of the two",
            )
        check_compiler(device)
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
        # One rank reads all of the file for this.
        ranks.check_agreement({"the start's weights": fingerprint(start)})
        begun = ranks.gather(f"weights {sha256_of(start / WEIGHTS)}" if ranks.main else "")[0]
        if teacher is not None:
            begun += f", teacher {sha256_of(teacher / WEIGHTS)}"
        model = load_for_training(
            start,
            optimiser,
            run.precision,
            device,
            lora=tuning.lora,
            checkpoint_gradients=tuning.checkpoint_gradients,
            ranks=ranks,
        )
        model.change_diffusion(diffusion)
        if compiled:
            compile_blocks(model, device)
        source = _source(model, start, file, tuning, run.seed, on_broken)
        stage: DocumentsStage | InterleavedStage | DistillationStage = source
        config = model.config
        if tuning.distill is not None:
            student = tuning.distill.config_of(taught)
            stage = DISTILLATIONS[student.kind](
                source,
                _frozen_teacher(model, start, teacher),
                taught.branches,
                tuning.distill,
                student,
                str(tuning.lora),
                run.accumulate,
            )
            config = distilled_config(model.config, student)

        def save(step: int, average: Mapping[str, StoredTensor]) -> None:
            changed = average
            if isinstance(stage, DistillationStage):
                changed = stage.model_state(average)
            if tuning.lora is not None:
                learned = {name: value.read() for name, value in changed.items()}
                trained = trained_adapters(tuning.lora, start, learned)
                with new_folder(adapters, None, kind=ADAPTERS_KIND) as work:
                    trained.save(work)
                    write_file(work / CONFIG, to_json(config))
                changed = trained.merged(start)
            with new_folder(model_folder, None, kind=FOLDER_KIND) as work:
                write_changed(work, start, changed, config)

        watch = _watch(watching, source, out, ranks, {**asdict(tuning), **asdict(run)})
        train(
            stage,
            optimiser,
            run,
            out / stage.name,
            save,
            progress,
            start=begun,
            frozen="those of the start",
            ranks=ranks,
            watch=watch,
        )
    return model_folder


def check_distillation(
    start: Path, teacher: Path | None, tuning: FineTuning, ranks: int
) -> ImageDecoderConfig:
    """Configuration of the teacher's image decoder. Raises `ConfigError` for a distillation, or a
    distilled model, that cannot be trained so."""
    config = read_config(start / CONFIG)
    decoder = config.image_decoder
    if teacher is not None:
        decoder = teacher_config(teacher, config).image_decoder
    if tuning.distill is not None:
        tuning.distill.config_of(decoder)
        if tuning.diffusion != DiffusionChange():
            raise ConfigError(
                "a distillation keeps the teacher's diffusion", fix="leave diffusion.* out"
            )
        if ranks > 1:
            raise ConfigError("a distillation runs in one process", fix="leave torchrun out")
        if tuning.groups not in (None, "unet"):
            raise ConfigError(
                "a distillation trains the U-Net alone",
                got=f"groups of {tuning.groups}",
                fix="choose --groups unet, or adapters with --lora",
            )
        if tuning.lora is not None and tuning.lora.layers != ("unet",):
            raise ConfigError(
                "a distillation trains the U-Net alone",
                got=f"adapters of {', '.join(tuning.lora.layers)}",
                fix='set lora.layers to ["unet"]',
            )
        if tuning.distill.kind == "dmd" and tuning.lora is not None and tuning.lora.dropout:
            raise ConfigError(
                "distribution matching compares pictures that are drawn without dropout",
                got=f"lora.dropout {tuning.lora.dropout:g}",
                fix="set lora.dropout to 0",
            )
    elif decoder.distillation is not None and tuning.image_weight > 0:
        raise ConfigError(
            f"the U-Net of {start} is distilled: the loss on pictures would undo that",
            fix="train the model that it was distilled from, and distil that; or train on text "
            "alone with --image-weight 0",
        )
    return decoder


def _source(
    model: MMInterleaved,
    start: Path,
    file: Documents | WorldConfig,
    tuning: FineTuning,
    seed: int,
    on_broken: Callable[[str], None],
) -> DocumentsStage | InterleavedStage:
    """Stage that makes micro-batches of the documents of a file, or of a drawn world."""
    if isinstance(file, WorldConfig):
        world = DrawnWorld(file)
        tokenizer = own_tokenizer(start, world)
        return InterleavedStage(model, tokenizer, world, world.distillation_mixture)
    return stage_class(tuning, file)(
        model,
        Tokenizer.open(start / TOKENIZER, model.config.tokens),
        file,
        tuning.batch,
        seed=seed,
        text_weight=tuning.text_weight,
        image_weight=tuning.image_weight,
        max_bad=tuning.max_bad,
        on_broken=on_broken,
        adapters=str(tuning.lora),
    )


def _watch(
    asked: Watching | None,
    stage: Stage,
    out: Path,
    ranks: Ranks,
    settings: Mapping[str, object],
) -> Watch:
    if asked is None:
        return UNWATCHED
    validation = None
    if asked.held_out is not None or asked.prompts is not None:
        assert isinstance(stage, DocumentsStage), "a distillation is not validated on documents"
        validation = Validation(stage, asked.held_out, asked.prompts, out, asked.every, ranks)
    tracker = None
    if asked.tracker is not None and ranks.main:
        tracker = service(asked.tracker, out, settings)
    return Watch(validation, tracker, asked.profile)


def _frozen_teacher(model: MMInterleaved, start: Path, teacher: Path | None) -> UNet:
    """The U-Net that a distillation of the loaded model learns from; teacher: None for its own."""
    frozen = teacher_of(model.image_decoder.unet)
    if teacher is not None:
        load_teacher(frozen, teacher, start)
    return frozen
