"""Fifty kills at random moments, of one process or of a rank; resumed on other numbers of ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from export.small_models import paper_reading, write_small_model
from mmi_deploy.errors import MmiError
from mmi_train.data.document_file import DocumentFile
from mmi_train.training.checkpoints import latest_checkpoint
from mmi_train.training.fine_tuning import FineTuning, Watching, fine_tune
from mmi_train.training.loop import RunConfig
from mmi_train.training.lora import LoraConfig
from mmi_train.training.ranks import joined_ranks

pytestmark = pytest.mark.exhaustive

REPOSITORY = Path(__file__).resolve().parents[3]
KILLS, STEPS, EVERY = 50, 24, 2
TUNING = FineTuning(lora=LoraConfig(rank=2, layers=("llm",)), batch=1, rate=1e-3)
RUN = RunConfig(precision="fp32", average=0.5, log_every=1, checkpoint_every=EVERY)
# Ranks and loader processes of one attempt after the other; 2 ranks with 1 micro-batch compute what
# 1 process does with 2.
MACHINES = [(2, 0), (1, 2), (2, 1), (1, 0)]


def start(folder: Path) -> Path:
    write_small_model(folder / "model", paper_reading())
    Image.new("RGB", (40, 40), "red").save(folder / "a.png")
    text, read = {"text": "a red circle."}, {"image": "a.png", "learn": False}
    documents = [[text], [read, text], [text, text], [read, text, text]]
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    return folder


def tune(folder: Path, out: Path, rank: int, size: int, workers: int, meeting: str) -> None:
    """Train as one of `size` ranks; steps done go to `out`.steps."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}

    def told(what: str, done: int = 0, total: int = 0, **more: str) -> None:
        if what == "documents":
            with (out.parent / f"{out.name}.steps").open("a") as file:
                file.write(f"{done}\n")

    with joined_ranks("cpu", meeting) as ranks:
        fine_tune(
            folder / "model",
            DocumentFile(folder / "documents.jsonl"),
            out,
            STEPS,
            TUNING,
            replace(RUN, accumulate=2 // size, workers=workers),
            torch.device("cpu"),
            progress=told,
            ranks=ranks,
            watching=Watching(DocumentFile(folder / "documents.jsonl"), every=EVERY),
        )


def forked(folder: Path, out: Path, size: int, workers: int) -> list[int]:
    """Begin an attempt; returns its processes, each in a group of its own with its workers."""
    meeting = f"file://{folder / f'meeting-{time.monotonic_ns()}'}"
    children = []
    for rank in range(size):
        if (child := os.fork()) == 0:
            os.setpgid(0, 0)
            try:
                tune(folder, out, rank, size, workers, meeting)
            except MmiError as error:
                os._exit(error.exit_code)
            os._exit(0)
        children.append(child)
    return children


def main(folder: Path) -> None:
    """Kill `KILLS` attempts, and note what each left; this process itself never computes."""
    torch.set_num_threads(1)
    rng = random.Random(0)
    for child in forked(folder, folder / "whole", 1, 0):
        assert os.waitpid(child, 0)[1] == 0
    kills, number, attempt = 0, 0, 0
    while kills < KILLS:
        out = folder / f"out-{number}"
        size, workers = MACHINES[attempt % len(MACHINES)]
        attempt += 1
        before = latest_checkpoint(out / "documents")
        done = folder / f"{out.name}.steps"
        done.unlink(missing_ok=True)
        children = forked(folder, out, size, workers)
        victim = rng.choice(children)
        waited = time.monotonic() + rng.uniform(0.5, 12.0)
        ended = 0
        while time.monotonic() < waited and not ended:
            time.sleep(0.01)
            ended = os.waitpid(victim, os.WNOHANG)[0]
        if not ended:
            os.killpg(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
            kills += 1
        ends = [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children if c != victim]
        steps = done.read_text().split() if done.exists() else []
        newest = latest_checkpoint(out / "documents")
        told = {
            "out": out.name,
            "killed": not ended,
            "ranks": size,
            "workers": workers,
            "others": ends,
            "before": None if before is None else before.name,
            "after": None if newest is None else newest.name,
            "step": max(map(int, steps), default=0),
            "whole": all(load_file(file) for file in loaded(out)),
        }
        with (folder / "told.jsonl").open("a") as file:
            file.write(json.dumps(told) + "\n")
        if ended and not any(ends):
            number += 1
    for child in forked(folder, folder / f"out-{number}", 2, 0):
        assert os.waitpid(child, 0)[1] == 0


def loaded(out: Path) -> Iterator[Path]:
    """Files of weights that a user may read at any time."""
    yield from out.glob("documents/step-*/*.safetensors")
    yield from out.glob("model/*.safetensors")
    yield from out.glob("adapters/*.safetensors")


def number_of(checkpoint: str | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.removeprefix("step-"))


def test_fifty_kills_lose_at_most_the_steps_since_a_checkpoint(tmp_path: Path) -> None:
    start(tmp_path)
    parts = (".", "export", "train", "plugins", "tests")
    path = os.pathsep.join(str(REPOSITORY / part) for part in parts)
    program = f"from tests.train.training.test_kills import *\nmain(Path({str(tmp_path)!r}))"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    told = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    assert sum(one["killed"] for one in told) == KILLS
    for one in told:
        after = number_of(one["after"])
        assert one["whole"] and after >= number_of(one["before"]), one
        # One process writes a checkpoint before it goes on, ranks before they begin the next.
        under_way = EVERY if one["ranks"] > 1 else 0
        assert after >= (one["step"] - 1) // EVERY * EVERY - under_way, one
        assert all(end in (0, 2) for end in one["others"]), one
    whole = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    values = (tmp_path / "whole" / "validation.jsonl").read_text().splitlines()
    for out in sorted({one["out"] for one in told}):
        for name, value in load_file(tmp_path / out / "model" / "model.safetensors").items():
            torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-5)
        again = (tmp_path / out / "validation.jsonl").read_text().splitlines()
        for mine, other in zip(again, values, strict=True):
            assert json.loads(mine) == pytest.approx(json.loads(other), rel=1e-3)
