"""Many documents on a GPU: the runs go through the fake CUDA runtime, which checks addresses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploy.runtime.fake_model import LIMITS, fake_config, fake_runtime, picture
from deploy.runtime.tensorrt.gpu_targets import add_target, fake_bundle, machine
from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.documents.document import Document, Draw, Image, Text, document_of
from mmi_deploy.documents.images import Rgb
from mmi_deploy.runtime.events import Event, ImageDone, ImageProgress, TextDelta
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.options import GenerationOptions

DOCUMENTS = [
    document_of(Text("w5"), Draw(), Image(picture(3)), Text("w6"), Draw()),
    document_of(Text("w7 w8 w9 w10")),
    document_of(Image(picture(4)), Image(picture(3)), Text("w11"), Draw()),
    document_of(Image(picture(5)), Text("w12 w13")),
    document_of(Text("w14 w15"), Draw()),
]


def options(number: int) -> GenerationOptions:
    return GenerationOptions(
        seed=number,
        max_tokens=12,
        max_images=1,
        schedule=("plain:4", "ancestral:4")[number // 2 % 2],
        guidance=(1.0, 3.5, 7.0)[number % 3],
        full_every=1 + number // 4,
        previews=number % 4,
    )


def collected(events: list[Event]) -> tuple[str, list[Rgb]]:
    """Text, and pictures with their previews in order."""
    text, pictures = "", []
    for event in events:
        match event:
            case TextDelta(more):
                text += more
            case ImageDone(_, rgb) | ImageProgress(preview=np.ndarray() as rgb):
                pictures.append(rgb)
    return text, pictures


def told(document: Document, number: int) -> tuple[str, list[Rgb]]:
    """The document alone, on the CPU."""
    return collected(list(generate(fake_runtime()[0], document, options(number))))


@pytest.mark.parametrize("activations", ["float32", "float16"])
def test_documents_together_are_those_of_the_cpu(tmp_path: Path, activations: str) -> None:
    bundle = fake_bundle(tmp_path / "bundle", fake_config(), LIMITS)
    gpu = machine(bundle, add_target(bundle, activations))
    with BatchEngine(gpu.runtime, slots=3, warm_up=False) as engine:
        streams = [engine.submit(d, options(number)) for number, d in enumerate(DOCUMENTS)]
        together = [collected(list(stream)) for stream in streams]
        runs = dict(engine.stats().rows)
    assert not gpu.cuda.faults
    for number, (document, (text, pictures)) in enumerate(zip(DOCUMENTS, together, strict=True)):
        wanted, drawn = told(document, number)
        most = 0 if activations == "float32" else 2
        if not most:
            assert text == wanted
        assert len(pictures) == len(drawn)
        for one, other in zip(pictures, drawn, strict=True):
            assert abs(one.astype(int) - other).max() <= most
    assert runs["denoise"] and runs["shallow"] and runs["decode"]
    # A run has 1, 2 or 3 rows, so that few recordings serve most of them.
    assert gpu.launches["denoise_step"] and gpu.launches["llm"]


def test_warm_up_runs_every_engine_and_measures_it(tmp_path: Path) -> None:
    bundle = fake_bundle(tmp_path / "bundle", fake_config(), LIMITS)
    gpu = machine(bundle, add_target(bundle))
    with BatchEngine(gpu.runtime, slots=3) as engine:
        assert engine.stats().text_gap_bound > 0
        text, pictures = collected(list(engine.submit(DOCUMENTS[0], options(0))))
    wanted, drawn = told(DOCUMENTS[0], 0)
    assert text == wanted and len(pictures) == len(drawn)
    assert all((one == other).all() for one, other in zip(pictures, drawn, strict=True))
    assert not gpu.cuda.faults


def test_kernels_of_rtx_are_saved_when_a_document_ends(tmp_path: Path) -> None:
    bundle = fake_bundle(tmp_path / "bundle", fake_config(), LIMITS)
    gpu = machine(bundle, add_target(bundle, "float16", rtx=True))
    with BatchEngine(gpu.runtime, slots=3, warm_up=False) as engine:
        list(engine.submit(DOCUMENTS[0], options(0)))
        assert {path.name.partition("-")[0] for path in (tmp_path / "kernels").iterdir()} >= {"llm"}
