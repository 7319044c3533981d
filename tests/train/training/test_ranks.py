"""Two ranks compute, write and resume what one process does with twice the accumulation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from export.small_models import paper_reading, random_model
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from mmi_deploy.errors import MmiError
from mmi_deploy.spec.config import ModelConfig
from mmi_train.data.document_file import DocumentFile
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.training.checkpoints import latest_checkpoint
from mmi_train.training.fine_tuning import FineTuning, fine_tune
from mmi_train.training.loop import RunConfig
from mmi_train.training.lora import LoraConfig
from mmi_train.training.ranks import Ranks, joined_ranks
from mmi_train.weights.model_folder import TOKENIZER, load_model, save_model

REPOSITORY = Path(__file__).resolve().parents[3]
RUN = RunConfig(
    precision="fp32", accumulate=4, average=0.5, log_every=1, checkpoint_every=1, keep=9
)
LORA = FineTuning(lora=LoraConfig(rank=2), batch=1)
TUNINGS = {
    "lora": LORA,
    "groups": replace(LORA, groups="published", lora=None, checkpoint_gradients=True),
}
STEPS = 3


def model_config() -> ModelConfig:
    """Small, with dropout in the visual tokenizer (Q-Former) as the released model has it."""
    config = paper_reading()
    resampler = replace(config.vision_resampler, form="qformer", layers=1, cross_every=1)
    return replace(config, vision_resampler=resampler)


@cache
def start(folder: Path) -> Path:
    """A model folder and documents: texts alone, images that are read, drawn, and drawn from
    images, so that the micro-batches of two ranks run different parts of the model."""
    save_model(random_model(model_config()), folder / "model")
    build_tokenizer().save(str(folder / "model" / TOKENIZER))
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    text = {"text": "a red circle."}
    read, drawn = {"image": "0.png", "learn": False}, {"image": "1.png"}
    documents = [[text], [read, text], [text, drawn], [read, text, drawn], [text, text], [text]]
    lines = [json.dumps(document) for document in documents]
    (folder / "documents.jsonl").write_text("\n".join([*lines, '[{"image": "none.png"}]']))
    return folder


def tune(
    folder: Path,
    out: Path,
    tuning: FineTuning,
    ranks: Ranks,
    steps: int = STEPS,
    told: Callable[[str], None] = print,
) -> None:
    run = replace(RUN, accumulate=RUN.accumulate // ranks.size)
    documents = DocumentFile(folder / "documents.jsonl")
    device = torch.device("cpu")
    fine_tune(
        folder / "model", documents, out, steps, tuning, run, device, ranks=ranks, on_broken=told
    )


def started(program: str, rank: int, meeting: Path) -> subprocess.Popen[str]:
    """A process that runs `program` as one of two ranks."""
    begin = (
        "from tests.train.training.test_ranks import *\n"
        f"with joined_ranks('cpu', 'file://{meeting}') as ranks:\n    "
    )
    path = os.pathsep.join(
        str(REPOSITORY / name) for name in (".", "export", "train", "plugins", "tests")
    )
    environment = {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", begin + program],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def both(program: str, meeting: Path) -> list[tuple[int, str, str]]:
    """Exit status and both outputs of two ranks that run `program`."""
    processes = [started(program, rank, meeting) for rank in range(2)]
    found = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, found, strict=True)]


def held(out: Path, step: int) -> dict[str, Tensor]:
    path = out / "documents" / f"step-{step:08d}"
    return {
        f"{file.stem}:{name}": value
        for file in sorted(path.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def losses(out: Path) -> dict[str, list[float]]:
    found = EventAccumulator(str(out / "documents" / "curves"))
    found.Reload()
    return {
        name: [event.value for event in found.Scalars(name)] for name in found.Tags()["scalars"]
    }


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], most: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys() and ours
    wrong = {
        name: difference
        for name, value in ours.items()
        if (difference := float((value - theirs[name]).norm() / (theirs[name].norm() + 1e-12)))
        > most
    }
    assert wrong == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(tmp_path_factory.mktemp("ranks"))


def test_two_ranks_are_one_process_and_their_checkpoints_each_others(folder: Path) -> None:
    """Losses, gradients (AdamW's first moment after a step), weights and averages; a run of two
    ranks that one process takes up, and the reverse."""
    program = (
        f"folder = Path({str(folder)!r})\n"
        "    for name, tuning in TUNINGS.items():\n"
        "        tune(folder, folder / f'{name}-two', tuning, ranks)\n"
        "    tune(folder, folder / 'resumed', replace(LORA, rate=1e-3), ranks, 1)\n"
    )
    ended = both(program, folder / "meeting")
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2] + ended[1][2]
    assert ended[0][1].count("none.png") == len(TUNINGS) and not ended[1][1]
    for name, tuning in TUNINGS.items():
        two, one = folder / f"{name}-two", folder / f"{name}-one"
        tune(folder, one, tuning, Ranks())
        assert_close(held(two, STEPS), held(one, STEPS), 1e-4)
        ours, theirs = losses(two), losses(one)
        assert ours.keys() == theirs.keys() and "documents/image" in ours
        for curve, values in ours.items():
            np.testing.assert_allclose(values, theirs[curve], rtol=1e-5, atol=1e-7, err_msg=curve)
