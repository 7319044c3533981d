"""A CUDA target of ONNX Runtime on the fake GPU: documents come out as on the CPU, repeated runs are
recorded, and an installation or a graph that would run on the CPU is refused in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from deploy.runtime.onnxruntime.fake_onnxruntime import FakeOnnxRuntime, Node
from deploy.runtime.tensorrt.fake_cuda import FakeCuda
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.cli.app import run
from mmi_deploy.documents.document import Draw, Image, Text, document_of
from mmi_deploy.documents.images import Rgb
from mmi_deploy.errors import EngineError, MmiError
from mmi_deploy.runtime.events import ImageDone, TextDelta
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.onnxruntime import cuda_backend
from mmi_deploy.runtime.onnxruntime.cuda_backend import CudaBackend
from mmi_deploy.runtime.onnxruntime.cuda_engine import MAX_RECORDINGS
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.backends import backend_of
from mmi_deploy.spec.target import Target, build_options
from mmi_deploy.targets.calibration import Calibration
from mmi_deploy.targets.cuda import build_cuda_target
from mmi_deploy.targets.precision import recipe
from mmi_deploy.targets.verify_target import compare_target, write_receipts

if TYPE_CHECKING:
    from exports import Exported

OPTIONS = GenerationOptions(seed=3, max_tokens=12, min_tokens=12, max_images=1, temperature=0)


@pytest.fixture(scope="module")
def bundle(
    exported_once: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """Copy of a small bundle, with targets for CUDA that nothing has proved."""
    folder = tmp_path_factory.mktemp("cuda") / "bundle"
    shutil.copytree(exported_once("paper").bundle.folder, folder)
    opened = Bundle.open(folder)
    for name in ("fp32", "fp16", "int4"):
        build_cuda_target(opened, recipe(name), None)
    return Bundle.open(folder)


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's libraries count as installed."""
    monkeypatch.setattr(cuda_backend.ctypes, "CDLL", lambda name: None)


class Machine:
    """A GPU, its ONNX Runtime, and the runtime of a target on it."""

    def __init__(self, bundle: Bundle, target: str, record: bool = True, **fake: Any) -> None:
        self.cuda = fake.pop("cuda", None) or FakeCuda()
        self.module = FakeOnnxRuntime(self.cuda, **fake)
        self.backend = CudaBackend.open(
            replace(bundle, unproved=True),
            target,
            cuda=self.cuda,
            onnxruntime=self.module,
            record=record,
        )
        # The function of MMFS runs here on the CPU: no kernel of ours is compiled, and the fake
        # session records all the same.
        self.backend.library = None
        self.runtime = Runtime.from_backend(bundle, self.backend)


def document() -> Any:
    pixels = np.random.default_rng(5).integers(0, 256, (64, 64, 3), np.uint8)
    return document_of(Image(pixels), Text("red"), Draw(), Text("blue"))


def made(runtime: Runtime) -> tuple[str, list[Rgb]]:
    """Text and pictures of a generation."""
    text, pictures = "", []
    for event in generate(runtime, document(), OPTIONS):
        if isinstance(event, TextDelta):
            text += event.text
        elif isinstance(event, ImageDone):
            pictures.append(event.rgb)
    return text, pictures


def test_a_document_is_the_one_that_the_cpu_makes(bundle: Bundle) -> None:
    expected = made(Runtime.open(bundle, kernels="none", threads=1))
    one = Machine(bundle, "cuda-fp32")
    found = made(one.runtime)
    assert found[0] == expected[0] and len(found[1]) == len(expected[1]) == 1
    np.testing.assert_array_equal(found[1][0], expected[1][0])
    one.runtime.close()
    assert not one.cuda.faults


@pytest.mark.parametrize("name", ["fp16", "int4"])
def test_lower_precisions_run_with_buffers_of_their_types(bundle: Bundle, name: str) -> None:
    one = Machine(bundle, f"cuda-{name}")
    assert one.runtime.graphs["llm"]["past_key.00"].dtype == "float16"
    text, (picture,) = made(one.runtime)
    assert text and picture.shape == (bundle.config.image_decoder.image_size,) * 2 + (3,)
    assert not one.cuda.faults
    if name == "int4":
        file = bundle.target_folder("cuda-int4") / "llm.onnx"
        products = [
            node
            for node in onnx.load(file, load_external_data=False).graph.node
            if node.op_type == "MatMulNBits"
        ]
        bits = {field.i for node in products for field in node.attribute if field.name == "bits"}
        assert bits == {4, 8}
