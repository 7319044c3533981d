"""Several ranks load, compute, write and resume what one process does with more accumulation."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.checkpoint import filesystem
from torch.distributed.tensor import DTensor

from export.small_models import paper_reading, write_small_model
from mmi_deploy.errors import MmiError, WeightsError
from mmi_deploy.spec.config import ModelConfig
from mmi_train.data.document_file import DocumentFile
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.training import validation
from mmi_train.training.checkpoints import path_of, read_checkpoint
from mmi_train.training.compiled import compiled_parts
from mmi_train.training.fine_tuning import FineTuning, Watching, fine_tune
from mmi_train.training.loading import load_for_training
from mmi_train.training.loop import RunConfig
from mmi_train.training.lora import LoraConfig
from mmi_train.training.ranks import ALONE, Ranks, joined_ranks
from mmi_train.training.sharded_checkpoints import ShardedCheckpoints
from mmi_train.training.validation import VALUES, read_values
from train.training.test_compiled import losses_of, small_model

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[3]
QLORA = [LoraConfig(rank=2, four_bit=True)] if find_spec("bitsandbytes") else []
RUN = RunConfig(
    precision="fp32", accumulate=6, average=0.5, log_every=1, checkpoint_every=1, keep=9
)
LORA = FineTuning(lora=LoraConfig(rank=2), batch=1)
LORAS = (None, LoraConfig(rank=2), *QLORA)
TUNINGS = {
    "lora": LORA,
    "groups": replace(LORA, groups="published", lora=None, checkpoint_gradients=True),
}
STEPS = 2


def model_config() -> ModelConfig:
    """Small, with dropout in the visual tokenizer (Q-Former) as the released model has it."""
    config = paper_reading()
    resampler = replace(config.vision_resampler, form="qformer", layers=1, cross_every=1)
    return replace(config, vision_resampler=resampler)


def start(folder: Path) -> Path:
    """A model folder and documents: texts alone, images that are read, drawn, and drawn from
    images, so that the micro-batches of two ranks run different parts of the model."""
    write_small_model(folder / "model", model_config())
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    text = {"text": "a red circle."}
    read, drawn = {"image": "0.png", "learn": False}, {"image": "1.png"}
    documents = [[text], [read, text], [text, drawn], [read, text, drawn], [text, text], [text]]
    lines = [json.dumps(document) for document in documents]
    (folder / "documents.jsonl").write_text("\n".join([*lines, '[{"image": "none.png"}]']))
    (folder / "held.jsonl").write_text("\n".join(lines[1:4]))
    (folder / "prompts.jsonl").write_text("\n".join(lines[2:4]))
    return folder


def tune(
    folder: Path, out: Path, tuning: FineTuning, ranks: Ranks, told: Callable[[str], Any] = print
) -> None:
    # Ranks have a loader process each, one process has none.
    run = replace(RUN, accumulate=RUN.accumulate // ranks.size, workers=int(ranks.size > 1))
    documents, device = DocumentFile(folder / "documents.jsonl"), torch.device("cpu")
    watching = None
    if out.name in ("lora-one", "lora-two"):
        validation.SOLVER_STEPS = 2
        held, prompts = (DocumentFile(folder / f"{name}.jsonl") for name in ("held", "prompts"))
        watching = Watching(held, prompts, every=STEPS)
    fine_tune(
        folder / "model",
        documents,
        out,
        STEPS,
        tuning,
        run,
        device,
        ranks=ranks,
        on_broken=told,
        watching=watching,
    )


def forked(folder: Path, job: Callable[[Ranks], None], size: int = 2) -> None:
    """Run `job` in forked processes, and write the exit status of each and the error that it
    ended with, a line for each rank, to `folder`."""
    children = []
    for rank in range(size):
        if (child := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
            try:
                with joined_ranks("cpu", f"file://{folder / job.__name__}.meeting") as ranks:
                    job(ranks)
            except MmiError as error:
                (folder / f"{job.__name__}-{rank}.error").write_text(str(error))
                os._exit(error.exit_code)
            os._exit(0)
        children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / f"{job.__name__}.ends").write_text(json.dumps(ends))


def loaded(folder: Path, ranks: Ranks, config: LoraConfig | None) -> MMInterleaved:
    tuning = replace(LORA, lora=config, groups=None if config else "published")
    device = torch.device("cpu")
    rules = tuning.optimiser(1)
    return load_for_training(folder / "model", rules, "bf16", device, lora=config, ranks=ranks)


def killing(*args: Any, **more: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk(*args: Any, **more: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def main(folder: Path) -> None:
    """All runs of two ranks, forked from one process, so that modules are imported once."""
    torch.set_num_threads(1)

    def alike(ranks: Ranks) -> None:
        for name, tuning in TUNINGS.items():
            with (folder / f"told-{ranks.rank}").open("a") as told:
                tune(folder, folder / f"{name}-two", tuning, ranks, lambda line: told.write(line))

    def disagreeing(ranks: Ranks) -> None:
        other = replace(LORA, rate=1e-3) if ranks.rank else LORA
        tune(folder, folder / "disagreeing", other, ranks)

    def killed(ranks: Ranks) -> None:
        """While it writes its shards of the last checkpoint."""
        save = ShardedCheckpoints.save

        def killed_at_the_last(self: ShardedCheckpoints, *tensors: Any) -> None:
            if ranks.rank == 1 and tensors[3].step == STEPS:
                assert self._under_way is not None
                self._under_way.result()
                filesystem._write_item = killing  # type: ignore[assignment]
            save(self, *tensors)

        ShardedCheckpoints.save = killed_at_the_last  # type: ignore[method-assign]
        tune(folder, folder / "killed", LORA, ranks)

    def full(ranks: Ranks) -> None:
        if ranks.rank == 1:
            filesystem._write_item = full_disk  # type: ignore[assignment]
        tune(folder, folder / "full", LORA, ranks)

    def filled(ranks: Ranks) -> None:
        """The shards of all ranks, joined, are the weights that one process loads."""
        for config in LORAS:
            whole = loaded(folder, ALONE, config).state_dict()
            for name, value in loaded(folder, ranks, config).state_dict().items():
                own = value.full_tensor() if isinstance(value, DTensor) else value
                assert own.dtype == whole[name].dtype and torch.equal(own, whole.pop(name)), name
            assert not whole

    def grown(ranks: Ranks) -> None:
        tune(folder, folder / "two-three", LORA, ranks)

    def doubled(ranks: Ranks) -> None:
        tune(folder, folder / "one-two", LORA, ranks)

    def compiled(ranks: Ranks) -> None:
        """Traced without a compiler, the hooks that gather weights left out."""
        losses, gradients = losses_of(small_model(), (12,))
        model = small_model()
        ranks.shard(model)
        for part in compiled_parts(model):
            part.compile(fullgraph=True, backend="eager")
        counters.clear()
        own_losses, own_gradients = losses_of(model, (12,))
        assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
        torch.testing.assert_close(own_losses, losses)
        for ours, theirs in zip(own_gradients, gradients, strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs)  # type: ignore[attr-defined]

    for job in (alike, disagreeing, killed, full, filled, compiled):
        forked(folder, job)
    shutil.copytree(folder / "killed", folder / "two-three")
    forked(folder, grown, 3)
    tune(folder, folder / "one-two", LORA, ALONE)
    shutil.rmtree(folder / "one-two" / "documents" / f"step-{STEPS:08d}")
    shutil.rmtree(folder / "one-two" / "model")
    forked(folder, doubled)


def held(out: Path, step: int) -> dict[str, Tensor]:
    found = read_checkpoint(path_of(out / "documents", step))
    return {
        f"{kind}:{name}": value.read()
        for kind, tensors in found.items()
        for name, value in tensors.items()
    }


def model_of(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "model.safetensors")


def losses(out: Path) -> dict[str, list[float]]:
    found = EventAccumulator(str(out / "documents" / "curves"))
    found.Reload()
    return {
        name: [event.value for event in found.Scalars(name)] for name in found.Tags()["scalars"]
    }


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], most: float) -> None:
    """Relative to the norm of each tensor; biases of keys, to which attention is blind, have
    gradients of rounding alone."""
    assert ours.keys() == theirs.keys() and ours
    wrong = {}
    for name, value in ours.items():
        difference = float((value - theirs[name]).norm() / (theirs[name].norm() + 1e-9))
        if difference > most and "key_proj.bias" not in name:
            wrong[name] = difference
    assert wrong == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which `main` has run, and one process has trained as its ranks did."""
    found = start(tmp_path_factory.mktemp("ranks"))
    parts = (".", "export", "train", "plugins", "tests")
    path = os.pathsep.join(str(REPOSITORY / part) for part in parts)
    program = f"from tests.train.training.test_ranks import *\nmain(Path({str(found)!r}))"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=560,
        check=True,
    )
    for name, tuning in TUNINGS.items():
        tune(found, found / f"{name}-one", tuning, ALONE, print)
    return found


@pytest.mark.parametrize("name", TUNINGS)
def test_two_ranks_are_one_process(folder: Path, name: str) -> None:
    """Losses, gradients (AdamW's first moment after a step), weights and averages."""
    assert json.loads((folder / "alike.ends").read_text()) == [0, 0]
    two, one = folder / f"{name}-two", folder / f"{name}-one"
    assert_close(held(two, 1), held(one, 1), 1e-5)
    assert_close(held(two, STEPS), held(one, STEPS), 1e-4)
    ours, theirs = losses(two), losses(one)
    assert ours.keys() == theirs.keys() and "documents/image" in ours
    for curve, values in ours.items():
        np.testing.assert_allclose(values, theirs[curve], rtol=1e-5, atol=1e-7, err_msg=curve)
    assert sorted(path.name for path in two.iterdir()) == sorted(p.name for p in one.iterdir())
    if name != "lora":
        return
    for mine, other in zip(read_values(two / VALUES), read_values(one / VALUES), strict=True):
        assert mine == pytest.approx(other, rel=1e-4) and len(mine) == 4
    for step in (0, STEPS):
        pictures = [
            np.asarray(Image.open(out / "samples" / f"step-{step:08d}.png"), np.float32)
            for out in (two, one)
        ]
        assert np.abs(pictures[0] - pictures[1]).max() <= 2 and pictures[0].std() > 5


def test_only_the_first_rank_tells_of_documents_that_any_rank_cannot_read(folder: Path) -> None:
    assert (folder / "told-0").read_text().count("line 7 of") == len(TUNINGS)
    assert not (folder / "told-1").read_text()


def test_ranks_with_other_settings_are_refused_before_the_first_step(folder: Path) -> None:
    assert json.loads((folder / "disagreeing.ends").read_text()) == [2, 2]
    for rank in range(2):
        told = (folder / f"disagreeing-{rank}.error").read_text()
        assert "ranks 0 and 1 disagree; expected rate 0.0001; got rate 0.001. start" in told
    assert list((folder / "disagreeing").iterdir()) == []


def test_each_rank_reads_its_rows_of_what_one_process_loads(folder: Path) -> None:
    assert json.loads((folder / "filled.ends").read_text()) == [0, 0]


def test_compiled_blocks_of_ranks_are_whole_graphs_and_compute_what_they_did(folder: Path) -> None:
    assert json.loads((folder / "compiled.ends").read_text()) == [0, 0]


def test_a_killed_rank_ends_the_others_and_one_process_goes_on(folder: Path) -> None:
    """The checkpoint of two ranks, and what the run had done, is one process's."""
    assert json.loads((folder / "killed.ends").read_text()) == [2, -signal.SIGKILL]
    told = (folder / "killed-0.error").read_text()
    assert "another rank of this run has ended" in told and "\n" not in told
    out = folder / "killed"
    left = sorted(path.name for path in (out / "documents").iterdir())
    assert left == ["curves", "step-00000001"]
    tune(folder, out, LORA, ALONE, print)
    assert_close(held(out, STEPS), held(folder / "lora-one", STEPS), 1e-4)


@pytest.mark.parametrize(
    ("out", "job", "ranks"), [("two-three", "grown", 3), ("one-two", "doubled", 2)]
)
def test_other_numbers_of_ranks_go_on(folder: Path, out: str, job: str, ranks: int) -> None:
    assert json.loads((folder / f"{job}.ends").read_text()) == [0] * ranks
    assert_close(held(folder / out, STEPS), held(folder / "lora-one", STEPS), 1e-4)
    assert_close(model_of(folder / out), model_of(folder / "lora-one"), 1e-4)


def test_a_checkpoint_is_read_by_the_library_that_writes_it(folder: Path) -> None:
    path = path_of(folder / "lora-two" / "documents", STEPS)
    ours = held(folder / "lora-two", STEPS)
    found = {name: torch.full_like(value, torch.nan) for name, value in ours.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    assert all(torch.equal(value, ours[name]) for name, value in found.items())


def test_a_full_disk_of_a_rank_ends_the_run_in_a_line(folder: Path) -> None:
    """Every rank says so; nothing is taken for a checkpoint."""
    assert json.loads((folder / "full.ends").read_text()) == [2, 2]
    for rank in range(2):
        told = (folder / f"full-{rank}.error").read_text()
        assert told.startswith("a checkpoint could not be written: rank 1: No space left on device")
        assert "\n" not in told
    assert [path.name for path in (folder / "full" / "documents").iterdir()] == ["curves"]


def test_a_lost_shard_is_told(folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(path_of(folder / "lora-two" / "documents", STEPS), tmp_path / "step")
    shards = sorted(path.glob("shard-*"))
    assert len(shards) == 2
    shards[0].unlink()
    with pytest.raises(WeightsError, match=r"lacks .* of "):
        read_checkpoint(path)
