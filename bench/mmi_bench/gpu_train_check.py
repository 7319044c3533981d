"""`make gpu-train-check`: show that a model trains on this GPU as it does on the CPU.

One micro-batch of drawn documents goes through the model on both; losses and gradients are
compared, in both precisions, with the fused MMFS operator and with its definition, with and without
gradient checkpointing. Then a step may not wait for the GPU, a fine-tuning of four steps writes its
model, and steps are timed. Exit code 0: all passed; 1: a check failed; 2: there is no GPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from mmi_bench.machine import describe
from mmi_deploy.cli import program
from mmi_deploy.documents.tokenizer import read_tokenizer_file
from mmi_deploy.system.files import prepare_file, write_new_file
from mmi_train.data.document_file import DocumentFile
from mmi_train.data.synthetic.drawn_world import DrawnWorld
from mmi_train.data.synthetic.world import easy
from mmi_train.model.layout import moved
from mmi_train.model.mm_interleaved import Batch, MMInterleaved
from mmi_train.training.devices import device_called
from mmi_train.training.fine_tuning import FineTuning, fine_tune
from mmi_train.training.fused_mmfs import use_fused_mmfs
from mmi_train.training.loop import RunConfig
from mmi_train.training.stages.interleaved import InterleavedStage
from mmi_train.weights.model_folder import TOKENIZER, load_model

CPU = torch.device("cpu")
Precision = Literal["fp32", "bf16"]

# Greatest relative difference of losses and of all gradients together.
SAME, MIXED = (1e-4, 1e-3), (2e-2, 1e-1)

TIMED_STEPS = 10


@dataclass(frozen=True)
class Finding:
    """One check: passed, failed, or None where it could not be run; and what was found."""

    check: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Results:
    """Losses and gradients of a micro-batch, on the CPU in fp32."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]


def micro_batch(folder: Path, model: MMInterleaved) -> Batch:
    """Drawn documents: questions about pictures, pictures to draw, stories."""
    tokenizer = read_tokenizer_file(folder / TOKENIZER)
    stage = InterleavedStage(model, tokenizer, DrawnWorld(easy()))
    return stage.batch(0, np.random.default_rng(0))


def forward_and_backward(
    folder: Path,
    batch: Batch,
    device: torch.device,
    precision: Precision = "fp32",
    *,
    fused: bool = False,
    checkpointed: bool = False,
) -> Results:
    """Run the paper's loss once, from the same random draws whatever the device."""
    model = load_model(folder).to(device).train()
    model.checkpoint_gradients(checkpointed)
    if fused:
        use_fused_mmfs(model, device)
    torch.manual_seed(0)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        losses = model(moved(batch, device))
    losses.total.backward()
    gradients = {
        name: value.grad.float().cpu()
        for name, value in model.named_parameters()
        if value.grad is not None
    }
    return Results({"text": float(losses.text), "image": float(losses.image)}, gradients)


def compare(check: str, found: Results, wanted: Results, limits: tuple[float, float]) -> Finding:
    """Compare losses and gradients within two relative limits."""
    loss = max(
        abs(value - wanted.losses[name]) / max(abs(wanted.losses[name]), 1e-12)
        for name, value in found.losses.items()
    )
    same = found.gradients.keys() == wanted.gradients.keys()
    gradient = float("inf")
    if same:
        pairs = [(found.gradients[name], value) for name, value in wanted.gradients.items()]
        error = sum(float((a - b).double().square().sum()) for a, b in pairs)
        gradient = (error / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5
    passed = loss <= limits[0] and gradient <= limits[1]  # NaN fails
    detail = f"losses {loss:.1e} of {limits[0]:.0e}, gradients {gradient:.1e} of {limits[1]:.0e}"
    return Finding(check, passed, detail)


@contextmanager
def _waits_are_errors() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_waits(folder: Path, batch: Batch, device: torch.device) -> Finding:
    """Run a forward and a backward pass in which PyTorch refuses to wait for the GPU."""
    name = "a step waits for nothing"
    if device.type != "cuda":
        return Finding(name, None, "needs CUDA")
    model = load_model(folder).to(device).train()
    use_fused_mmfs(model, device)
    there = moved(batch, device)
    model(there).total.backward()  # compiles kernels and fills the allocator
    with _waits_are_errors():
        model(there).total.backward()
    return Finding(name, True, "forward and backward")


def check_fine_tuning(folder: Path, device: torch.device) -> Finding:
    """Fine-tune for four steps on documents of two pictures, and read the model that is written."""
    with TemporaryDirectory() as place:
        data = Path(place) / "documents.jsonl"
        for colour in ("red", "blue"):
            Image.new("RGB", (64, 64), colour).save(Path(place) / f"{colour}.png")
        given = [
            [{"image": f"{colour}.png", "learn": False}, {"text": f"a {colour} square."}]
            for colour in ("red", "blue")
        ]
        drawn = [[{"text": "a red square.", "learn": False}, {"image": "red.png"}]]
        data.write_text("\n".join(map(json.dumps, given + drawn)))
        run = RunConfig(average=0.0, checkpoint_every=2)
        tuning = FineTuning(batch=3)
        model = fine_tune(folder, DocumentFile(data), Path(place) / "run", 4, tuning, run, device)
        load_model(model)
    return Finding("four steps of LoRA write a model", True, "read again, every weight finite")


def check_speed(folder: Path, batch: Batch, device: torch.device) -> Finding:
    """Time whole steps in bf16: forward, backward, and the gradients' norm as the one wait."""
    model = load_model(folder).to(device).train()
    use_fused_mmfs(model, device)
    there, seconds = moved(batch, device), []
    for _ in range(TIMED_STEPS + 2):
        begun = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            losses = model(there)
        losses.total.backward()
        float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        model.zero_grad()
        seconds.append(time.perf_counter() - begun)
    took = median(seconds[2:])
    pictures = 0 if batch.pictures is None else len(batch.pictures)
    detail = (
        f"{1000 * took:.1f} ms a micro-batch of {batch.token_ids.numel()} tokens and {pictures} "
        f"drawn pictures (median of {TIMED_STEPS}, {1000 * min(seconds[2:]):.1f} to "
        f"{1000 * max(seconds[2:]):.1f})"
    )
    if device.type == "cuda":
        detail += f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB at most"
    return Finding("speed, bf16", True, detail)


def findings(folder: Path, device: torch.device) -> Iterator[Finding]:
    """Run every check; one that raises has failed."""
    batch = micro_batch(folder, load_model(folder))
    run = partial(forward_and_backward, folder, batch)
    wanted = run(CPU)
    for name, limits, results in (
        ("fp32 as on the CPU", SAME, partial(run, device)),
        ("bf16 beside fp32", MIXED, partial(run, device, "bf16")),
        ("the fused MMFS as its definition", SAME, partial(run, device, fused=True)),
        ("checkpointed gradients", SAME, partial(run, device, checkpointed=True)),
    ):
        yield _tried(name, lambda n=name, r=results, k=limits: compare(n, r(), wanted, k))  # type: ignore[misc]
    yield _tried("a step waits for nothing", partial(check_waits, folder, batch, device))
    yield _tried("four steps of LoRA write a model", partial(check_fine_tuning, folder, device))
    yield _tried("speed, bf16", partial(check_speed, folder, batch, device))


def _tried(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # the others are still worth running
        return Finding(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def gpu_train_check(
    model: Annotated[
        Path, typer.Argument(help="A model folder that knows the drawn world's words.")
    ] = Path("assets/tiny"),
    device: Annotated[
        Literal["cuda", "cpu"], typer.Option(help="cpu: try the checks without a GPU.")
    ] = "cuda",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Report: a new .json file.", dir_okay=False)
    ] = None,
) -> int:
    """Show that a model trains on this GPU as it does on the CPU, and how fast."""
    if out is not None:
        prepare_file(out)
    place = device_called(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = []
    for finding in findings(model, place):
        found.append(finding)
        word = {True: "passed", False: "FAILED", None: "not run"}[finding.passed]
        typer.echo(f"{word:8}{finding.check}: {finding.detail}")
    if out is not None:
        about = {"machine": describe(), "device": str(place), "torch": torch.__version__}
        if place.type == "cuda":
            about["gpu"] = torch.cuda.get_device_name(place)
        report = {**about, "findings": [asdict(finding) for finding in found]}
        write_new_file(out, json.dumps(report, indent=2) + "\n")
    return int(any(finding.passed is False for finding in found))


run = program.program("gpu-train-check", gpu_train_check)

if __name__ == "__main__":
    program.main(run)
