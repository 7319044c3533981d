"""`mmi inspect memory` against the bytes that a document takes on the fake GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.runtime.fake_model import picture
from deploy.runtime.tensorrt.fake_cuda import FakeCuda
from deploy.runtime.tensorrt.gpu_targets import add_target, machine
from mmi_deploy.analysis.memory_estimate import Model
from mmi_deploy.bundle.build_report import REPORT, GraphReport, TargetReport
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.runtime.session import Session
from mmi_deploy.runtime.tensorrt.engine import CONTEXT_BYTES, RECORDING_BYTES
from mmi_deploy.spec.graphs import Limits
from mmi_deploy.targets.precision import recipe
from mmi_deploy.targets.tensorrt_plan import KERNEL_BYTES

if TYPE_CHECKING:
    from exports import Exported

IMAGES = 4


def lean_target(bundle: Bundle, model: Model, limits: Limits) -> str:
    """Engines in float16 as `mmi build --rows 1 --max-images 4` makes them, of the sizes of
    `model`."""
    memory = model.memory(recipe("fp16"))
    engines = {
        graph.graph: {
            "weights": graph.weights + KERNEL_BYTES,
            "scratch": graph.workspace,
            "context_bytes": CONTEXT_BYTES,
        }
        for graph in memory.graphs
    }
    name = add_target(bundle, "float16", onnx=True, limits=limits, engines=engines)
    sizes = {"b": [1, 1, 1], "m": [1, IMAGES, IMAGES], "n": [1, IMAGES, limits.pool]}
    llm = GraphReport(graph="llm", layers={}, engine_bytes=1, weights_bytes=1, seconds=1,
                      profiles={"prefill": sizes})  # fmt: skip
    report = TargetReport(target=name, runtime="tensorrt", version="11.4.0", architecture="sm89",
                          precision="fp16", graphs=(llm,))  # fmt: skip
    (bundle.target_folder(name) / REPORT).write_text(report.model_dump_json())
    return name


def write_and_draw(session: Session) -> None:
    """Prompts of five lengths, a given picture and as many drawn ones as fit, each token and step
    often enough to be recorded."""
    session.append_text([1])
    session.append_image(picture(0, session.config.vision.image_size))
    for count in range(5):
        session.append_text([6] * (2 + count))
        for _ in range(3):
            session.next_logits()
            session.append_text([7])
        if session.images < IMAGES:
            session.append_text([session.config.tokens.boi])
            session.draw()


def test_the_estimate_is_what_a_document_takes(
    exported_once: Callable[[str], Exported], tmp_path: Path
) -> None:
    source = exported_once("paper").bundle
    shutil.copytree(source.folder, tmp_path / "b", ignore=shutil.ignore_patterns("engines"))
    bundle = Bundle.open(tmp_path / "b")
    limits = replace(bundle.limits, batch=1, images=IMAGES)
    files = {name: bundle.graph_file(name) for name in bundle.graphs}
    model = Model(bundle.config, files, limits.context, limits)
    cuda = FakeCuda(capacity=10**12)
    cuda.recording_bytes = RECORDING_BYTES
    gpu = machine(bundle, lean_target(bundle, model, limits), cuda=cuda)
    assert gpu.runtime.limits == limits
    session = Session(gpu.runtime)
    write_and_draw(session)
    estimate, allocated = model.memory(recipe("fp16")), cuda.held()
    code = len(estimate.graphs) * KERNEL_BYTES
    near(allocated, estimate.total - estimate.overhead + code)
    assert cuda.beside <= estimate.overhead - code
    near(allocated + cuda.beside, estimate.total)
    plan = gpu.target.plan()
    assert plan.contexts == estimate.overhead - code
    assert plan.workspace == estimate.workspace
    assert not cuda.faults


def near(found: int, expected: int) -> None:
    assert abs(found - expected) <= 0.05 * expected, (found, expected)
