"""The plan of a run against what the run holds, as the allocator reports it."""

from __future__ import annotations

import gc
import json
import re
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import is_fake
from torch.profiler import ProfilerActivity, profile

from export.small_models import paper_reading, write_small_model
from mmi_deploy.cli.app import run
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import DistillationConfig, DistillationKind
from mmi_train.data.document_file import DocumentFile
from mmi_train.model.autocast import mixed_precision
from mmi_train.model.mm_interleaved import Batch, MMInterleaved
from mmi_train.training import memory_plan as memory_planning
from mmi_train.training.checkpoints import learning
from mmi_train.training.fine_tuning import DISTILLATIONS, FineTuning
from mmi_train.training.loading import load_for_training
from mmi_train.training.loop import AveragedStage, RunConfig
from mmi_train.training.lora import LoraConfig
from mmi_train.training.memory_plan import MemoryPlan, Step, Unit, memory_plan
from mmi_train.training.optimiser import make_optimiser
from mmi_train.training.ranks import ALONE, sharded_units
from mmi_train.training.stages.distillation import (
    Distillation,
    DistillationStage,
    distilled_config,
    teacher_of,
)
from mmi_train.training.stages.documents import DocumentsStage
from mmi_train.weights.model_folder import TOKENIZER, load_model, save_model

# Bytes that a convolution of oneDNN takes for itself, which no operator shows.
SCRATCH = 1.1e6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_small_model(folder, paper_reading())
    Image.new("RGB", (40, 40), "red").save(folder / "a.png")
    document = [{"text": "a red circle."}, {"image": "a.png"}] * 2
    (folder / "d.jsonl").write_text(json.dumps(document))
    (folder / "text.jsonl").write_text(json.dumps([{"text": "a red circle " * 20}]))
    return folder


def held_by_a_run(
    base: Path, file: DocumentFile, tuning: FineTuning, run: RunConfig
) -> tuple[int, int]:
    """Bytes of weights and tables, and the most that two steps hold beside them: the sum of all
    that PyTorch's allocator hands out and takes back."""
    optimiser = tuning.optimiser(2)
    model = load_for_training(
        base,
        optimiser,
        run.precision,
        torch.device("cpu"),
        lora=tuning.lora,
        checkpoint_gradients=tuning.checkpoint_gradients,
        ranks=ALONE,
    )
    tokenizer = Tokenizer.open(base / TOKENIZER, model.config.tokens)
    source = DocumentsStage(model, tokenizer, file, tuning.batch)
    model.train()
    stage: DocumentsStage | DistillationStage = source
    if tuning.distill is not None:
        teacher = teacher_of(model.image_decoder.unet)
        student = tuning.distill.config_of(model.config.image_decoder)
        kind = DISTILLATIONS[student.kind]
        stage = kind(source, teacher, 2, tuning.distill, student)
    # The first micro-batch of distribution matching, from which student and critic learn.
    batch = stage.batch(0, np.random.default_rng(0))
    module = stage.module
    adam = make_optimiser(module, optimiser)
    copies = stage.copies if isinstance(stage, DistillationStage) else []
    parts = (module, *copies)
    tensors = {tensor for part in parts for tensor in (*part.parameters(), *part.buffers())}
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        average = {name: value.detach().clone() for name, value in learning(module).items()}
        if isinstance(stage, AveragedStage):
            stage.follow(average)
        for _ in range(2):
            for _ in range(run.accumulate):
                with mixed_precision(run.precision, torch.device("cpu")):
                    losses = stage.losses(batch)
                (losses["total"] / run.accumulate).backward()
            adam.step()
            adam.zero_grad()
            del losses
    assert average
    events = seen.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return sum(value.numel() * value.dtype.itemsize for value in tensors), max(accumulate(changes))


def assert_planned(base: Path, documents: str, tuning: FineTuning, run: RunConfig) -> None:
    """Within a tenth, of the whole and of what is there beside the weights."""
    kind = tuning.checkpoint_gradients
    file = DocumentFile(base / documents)
    plan = memory_plan(
        base,
        file,
        tuning,
        precision=run.precision,
        accumulate=run.accumulate,
        checkpointed=(kind,),
        batches=(tuning.batch,),
    )
    weights, most = held_by_a_run(base, file, tuning, run)
    names = ("frozen weights", "learning weights", "adapters", "tables", "teacher")
    assert sum(plan.held[name] for name in names) == weights
    planned = plan.per_rank(tuning.batch, kind)
    assert planned == pytest.approx(weights + most, rel=0.1)
    assert planned - weights == pytest.approx(most, rel=0.1, abs=SCRATCH)


ADAPTERS = FineTuning(batch=2, lora=LoraConfig(rank=4), checkpoint_gradients=True)


def test_a_plan_is_within_a_tenth_of_what_a_run_holds(base: Path) -> None:
    tuning = replace(ADAPTERS, batch=16, checkpoint_gradients=False)
    assert_planned(base, "text.jsonl", tuning, RunConfig(precision="bf16"))


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("lcm", None),
        ("guidance", LoraConfig(layers=("unet",), rank=4)),
        ("dmd", None),
        ("dmd", LoraConfig(layers=("unet",), rank=4)),
    ],
)
def test_a_plan_counts_the_teacher_of_a_distillation(
    base: Path, kind: DistillationKind, lora: LoraConfig | None
) -> None:
    distill = Distillation(kind) if kind == "guidance" else Distillation(kind, solver_steps=20)
    groups = None if lora else "unet"
    tuning = FineTuning(batch=3, groups=groups, lora=lora, rate=1e-4, distill=distill)
    assert_planned(base, "d.jsonl", tuning, RunConfig(precision="fp32"))


def test_a_plan_of_the_largest_distillation_has_its_4_bit_weights_and_checkpoints(
    base: Path,
) -> None:
    """Critic and teacher share what has adapters."""
    held, peaks = {}, {}
    for kind in ("lcm", "dmd"):
        lora = LoraConfig(layers=("unet",), rank=4, four_bit=True)
        distill = Distillation(kind, solver_steps=20)  # type: ignore[arg-type]
        tuning = FineTuning(batch=2, groups=None, lora=lora, distill=distill)
        plan = memory_plan(base, DocumentFile(base / "d.jsonl"), tuning)
        held[kind], peaks[kind] = plan.held, plan.activations
    four_bit = "4-bit weights"
    assert held["lcm"][four_bit] > 0 and held["dmd"][four_bit] == 2 * held["lcm"][four_bit]
    assert held["dmd"]["teacher"] + held["lcm"][four_bit] < 1.01 * held["lcm"]["teacher"]
    for activations in peaks.values():
        assert activations(2, True) < 0.5 * activations(2, False)


def test_a_plan_of_a_distillation_is_refused_as_the_run_is(base: Path, tmp_path: Path) -> None:
    """A student is no teacher of its kind, but may learn on from its first one."""
    config = paper_reading()
    student = tmp_path / "student"
    model = load_model(base)
    model.config = distilled_config(config, DistillationConfig("lcm", 3.5, 20))
    save_model(model, student)
    (student / TOKENIZER).write_bytes((base / TOKENIZER).read_bytes())
    file = DocumentFile(base / "d.jsonl")
    tuning = FineTuning(groups="unet", lora=None, distill=Distillation("lcm", solver_steps=20))
    with pytest.raises(ConfigError, match="the teacher is distilled itself"):
        memory_plan(student, file, tuning)
    with pytest.raises(ConfigError, match="in one process"):
        memory_plan(base, file, tuning, ranks=2)
    with pytest.raises(ConfigError, match="trains the U-Net alone"):
        memory_plan(base, file, replace(tuning, groups=None, lora=LoraConfig(layers=("llm",))))
    plan = memory_plan(student, file, tuning, teacher=base, checkpointed=(False,), batches=(1, 2))
    assert plan.held["teacher"] > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("groups", ["all", "published", None])
def test_plans_of_all_kinds_of_runs(
    base: Path,
    groups: str | None,
    checkpointed: bool,
    precision: Literal["bf16", "fp32"],
    accumulated: int,
) -> None:
    tuning = replace(ADAPTERS, batch=3, checkpoint_gradients=checkpointed)
    if groups is not None:
        tuning = replace(tuning, groups=groups, lora=None)
    run = RunConfig(precision=precision, accumulate=accumulated)
    assert_planned(base, "d.jsonl", tuning, run)


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    held = {"learning weights": 1000, "gradients": 200}
    steps = {(1, False): Step(300, 7), (4, False): Step(600, 28)}
    plan = MemoryPlan(held, steps, tokens=9)
    assert plan.activations(4, False) == 400 and plan.flops(10, False) == 70
    assert [plan.per_rank(n, False) for n in (1, 4)] == [1300, 1600]
    for memory in (1300, 1399, 1400, 1799, 4321):
        found = plan.largest_batch(memory, False)
        assert plan.per_rank(found, False) <= memory < plan.per_rank(found + 1, False)
    assert plan.largest_batch(1299, False) == 0


def test_a_rank_holds_its_shards_and_what_it_gathers() -> None:
    units = [Unit(300, 50), Unit(400, 0), Unit(300, 150)]
    plan = MemoryPlan(
        {"learning weights": 1000, "gradients": 200},
        {(4, False): Step(600, 28)},
        tokens=9,
        units=units,
        ranks=2,
    )
    # Shards, the rest and two of the largest unit, gradients of the rest and of one unit.
    assert plan.per_rank(4, False) == 600 + (300 + 2 * 400) + (150 + 50) + 400
    assert replace(plan, accumulate=2).per_rank(4, False) == plan.per_rank(4, False)
    more = replace(plan, units=[*units, Unit(0, 0)], accumulate=2)
    assert more.gathered == 2 * 400 + 200 and replace(more, ranks=1).gathered == 0


def test_every_rank_holds_4_bit_weights_whole_and_copies_its_shards_for_checkpoints() -> None:
    held = {"4-bit weights": 500, "tables": 7, "learning weights": 100, "gradients": 100}
    held |= {"AdamW's moments": 200, "averages (EMA)": 100}
    steps = {(1, False): Step(100, 1)}
    plan = MemoryPlan(held, steps, tokens=9, units=[Unit(0, 0)], ranks=4, largest=(400, 30))
    assert plan.per_rank(1, False) == 507 + 500 // 4
    assert plan.checkpoint_copy == 400 // 4 and replace(plan, ranks=1).checkpoint_copy == 0
    assert plan.reading == 100 and replace(plan, largest=(400, 300)).reading == 300


def test_the_command_prints_a_plan(
    base: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(model: MMInterleaved, batch: Batch, *more: object) -> Step:
        units = sharded_units(model)
        assert len(units) == len(set(units)) and units[-1] is model
        assert all(value.is_cpu and is_fake(value) for value in model.parameters())
        return Step(10**6 * len(batch.token_ids), 10**12)

    monkeypatch.setattr(memory_planning, "_step", step)
    command = ["train", str(base), "--data", str(base / "d.jsonl"), "--plan", "--gpus", "2"]
    assert run([*command, "--memory", "1GB", "--tflops", "0.1", "--batch", "2"]) == 0
    text = capsys.readouterr().out
    assert "each of 2 ranks, 2 documents of" in text and "gathered from all ranks" in text
    assert re.search(r"largest batch in 1GB +9\d\d +9\d\d", text), text
    # Three documents are a step of 4, which takes each of two ranks 10 seconds, three times.
    assert re.search(r"TFLOP of a step +2 ", text)
    assert re.search(r"days of 1 steps +0\.000116 ", text)
