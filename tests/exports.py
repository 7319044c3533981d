"""Bundles for tests, exported by `mmi export` as users run it, each model once for all workers.

`python -m exports NAME FOLDER` makes one of them before the tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx

from export.small_models import paper_reading, random_model, released_reading
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.cli.app import run
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.presets import tiny
from mmi_train.data.synthetic.vocabulary import build_tokenizer
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights.model_folder import CONFIG, TOKENIZER, load_model, save_model

# The trained model, or in a checkout without it one of its size with random weights.
SHIPPED = "shipped"

CONFIGS: dict[str, Callable[[], ModelConfig]] = {
    "paper": paper_reading,
    "released": released_reading,
    SHIPPED: tiny,
}
SCHEDULES = {
    "paper": ("unipc:4", "ddpm:3"),
    "released": ("unipc:4", "ddpm:3"),
    SHIPPED: ("ddim:4", "unipc:20"),
}

_STAGE = re.compile(r"^(.+) \((\d+) of (\d+) done", re.M)


@dataclass(frozen=True)
class Exported:
    """A model, its folder, its bundle, and the reported stages of the export: name, number of
    finished stages, number of stages."""

    model: MMInterleaved
    folder: Path
    bundle: Bundle
    stages: list[tuple[str, int, int]]

    def graph(self, name: str) -> onnx.ModelProto:
        """The file of a graph, its weights not read."""
        return onnx.load(self.bundle.graph_file(name), load_external_data=False)


def export(name: str, work: Path, assets: Path) -> Exported:
    """Export the model called `name` into `work`, unless another worker has done so."""
    folder = assets / "tiny"
    if name != SHIPPED or not (folder / CONFIG).exists():
        folder = work / "model"
    work.mkdir(parents=True, exist_ok=True)
    log = work / "export.log"
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            log.write_text(_export(name, folder, work / "bundle"))
    stages = [(what, int(done), int(all_)) for what, done, all_ in _STAGE.findall(log.read_text())]
    return Exported(load_model(folder), folder, Bundle.open(work / "bundle"), stages)


def _export(name: str, folder: Path, bundle: Path) -> str:
    """Make the model, if it is no shipped one, and its bundle; what the command says."""
    if not (folder / CONFIG).exists():
        save_model(random_model(CONFIGS[name]()), folder)
        tokenizer = build_tokenizer()
        tokenizer.enable_truncation(3)  # as fine-tuning leaves it
        tokenizer.enable_padding(length=9)
        tokenizer.save(str(folder / TOKENIZER))
    schedules = [word for key in SCHEDULES[name] for word in ("--schedule", key)]
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        code = run(["export", str(folder), "-o", str(bundle), *schedules])
    assert code == 0, told.getvalue()
    return told.getvalue()


if __name__ == "__main__":
    name, work = sys.argv[1:]
    export(name, Path(work), Path(__file__).resolve().parent.parent / "assets")
