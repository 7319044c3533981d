"""A CUDA target of ONNX Runtime on the fake GPU: documents come out as on the CPU, repeated runs
are recorded, and an installation or a graph that would run on the CPU is refused in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
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
from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.runtime.events import ImageDone, TextDelta
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.onnxruntime import cuda_backend, cuda_engine
from mmi_deploy.runtime.onnxruntime.cuda_backend import RECORDED, CudaBackend
from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.session import Session
from mmi_deploy.spec.backends import backend_of
from mmi_deploy.spec.target import Target, build_options
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
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's libraries count as installed, and any file as our kernel library. The function of MMFS
    runs in its place, on the CPU."""
    monkeypatch.setattr(cuda_backend.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(cuda_backend, "OnnxOptions", lambda threads, library: OnnxOptions(1))


class Machine:
    """A GPU, its ONNX Runtime, and the runtime of a target on it."""

    def __init__(
        self, bundle: Bundle, target: str, *, kernels: bool = True, record: bool = True, **fake: Any
    ) -> None:
        self.cuda = fake.pop("cuda", None) or FakeCuda()
        self.module = FakeOnnxRuntime(self.cuda, **fake)
        self.backend = CudaBackend.open(
            replace(bundle, unproved=True),
            target,
            cuda=self.cuda,
            onnxruntime=self.module,
            library=Path("kernels.so") if kernels else None,
            record=record,
        )
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


def test_tokens_and_steps_are_launched_from_recordings(bundle: Bundle) -> None:
    """From the third on. Prefills, and graphs that run once per picture, are not recorded."""
    one = Machine(bundle, "cuda-fp32")
    session = Session(one.runtime)
    session.append_text([1, 5, 6])
    for token in range(7, 17):
        session.next_logits()
        session.append_text([token])
    session.next_logits()
    # The first is the prefill; of ten tokens the first runs as it is, and the second is recorded.
    assert one.runtime.recordings() == {"launches": {"llm": 8}, "refusals": {}}
    made(one.runtime)
    launches = one.runtime.recordings()["launches"]
    assert launches["denoise_step"] > 0
    assert not any(count for name, count in launches.items() if name not in RECORDED)
    assert not one.cuda.faults


def test_a_run_without_recordings_gives_the_same(bundle: Bundle) -> None:
    one = Machine(bundle, "cuda-fp32", record=False)
    assert made(one.runtime)[0] == made(Machine(bundle, "cuda-fp32").runtime)[0]
    assert not any(one.runtime.recordings()["launches"].values())


def test_a_run_that_cannot_be_recorded_runs_all_the_same(bundle: Bundle) -> None:
    one = Machine(bundle, "cuda-fp32", records=False)
    assert made(one.runtime)[0] == made(Machine(bundle, "cuda-fp32").runtime)[0]
    found = one.runtime.recordings()
    assert not any(found["launches"].values())
    assert (
        found["refusals"]["llm"] == "llm failed: operation not permitted when stream is capturing"
    )


def test_recordings_end_where_a_session_is_full(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_engine, "MAX_RECORDINGS", 1)
    one = Machine(bundle, "cuda-fp32")
    first, second = (Session(one.runtime) for _ in range(2))
    for session in (first, second):
        session.append_text([1, 5, 6])
    for token in range(7, 12):
        for session in (first, second):
            session.next_logits()
            session.append_text([token])
    found = one.runtime.recordings()
    assert found["launches"]["llm"] == 2  # of the first document alone
    assert "1 recordings, the most" in found["refusals"]["llm"]


def test_without_the_kernel_library_graphs_may_copy_and_are_not_recorded(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    one = Machine(bundle, "cuda-fp32", kernels=False)
    assert "mmi plugins build onnxruntime --cuda" in caplog.text
    one.runtime.load()
    enabled = {
        graph: session.options["enable_cuda_graph"]
        for graph, session in zip(one.runtime.graphs, one.module.sessions, strict=True)
    }
    assert {graph for graph, value in enabled.items() if value == "0"} == set(RECORDED)
    assert all(session.options["use_tf32"] == "0" for session in one.module.sessions)


def test_engines_are_compared_and_get_receipts(bundle: Bundle) -> None:
    one = Machine(bundle, "cuda-fp32")
    manifest = replace(bundle, unproved=True).target("cuda-fp32")
    proofs = compare_target(bundle, manifest, one.runtime)
    assert {proof.graph for proof in proofs} == set(bundle.graphs)
    assert all(proof.passed and "on the GPU itself" in proof.compared_with for proof in proofs)
    write_receipts(bundle, manifest, proofs)
    opened = CudaBackend.open(
        bundle, "cuda-fp32", cuda=FakeCuda(), onnxruntime=FakeOnnxRuntime(FakeCuda())
    )
    assert opened.plan().device == "Fake GPU"


def refusal(bundle: Bundle, load: bool = False, **fake: Any) -> str:
    with pytest.raises(MmiError) as error:
        one = Machine(bundle, "cuda-fp16", **fake)
        assert load
        one.runtime.load()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_machine_or_an_installation_that_would_run_on_the_cpu_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    cure = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    assert "no usable NVIDIA GPU" in refusal(bundle, cuda=FakeCuda(devices=0))
    line = refusal(bundle, providers=["CPUExecutionProvider"])
    assert "installed without its CUDA provider" in line and cure in line
    line = refusal(bundle, version="1.30.2")
    assert "expected 1.31; got 1.30.2" in line and cure in line
    line = refusal(bundle, load=True, starts=False)
    assert "cannot start its CUDA provider, and would run on the CPU" in line
    with monkeypatch.context() as patch:
        patch.setattr(cuda_backend, "_installed", lambda package: True)
        line = refusal(bundle)
        assert "onnxruntime and onnxruntime-gpu are both installed" in line
        assert "pip uninstall --yes onnxruntime onnxruntime-gpu; " + cure in line
    with monkeypatch.context() as patch:
        missing = "libcublas.so.13: cannot open shared object file"

        def load(name: str) -> None:
            if "cublas" in name:
                raise OSError(missing)

        patch.setattr(cuda_backend.ctypes, "CDLL", load)
        line = refusal(bundle)
        assert missing in line and cure in line


@pytest.mark.parametrize(
    ("node", "name"),
    [
        (Node("node_max_pool2d", "MaxPool"), "'node_max_pool2d' (MaxPool)"),
        (Node("mmfs", "MultiImageDeformableAttention", "mmi"), "'mmfs' (mmi::MultiImage"),
        (Node("shape", "Concat", "mmi"), "'shape' (mmi::Concat)"),
    ],
)
def test_a_node_on_the_cpu_is_refused_by_name(bundle: Bundle, node: Node, name: str) -> None:
    line = refusal(bundle, load=True, on_cpu=[node])
    assert f"does not run the node {name}" in line and "vision_encoder.onnx" in line


def test_unproved_targets_and_resident_engines_are_refused(bundle: Bundle) -> None:
    world: dict[str, Any] = {"cuda": FakeCuda(), "onnxruntime": FakeOnnxRuntime(FakeCuda())}
    with pytest.raises(MmiError, match=r"mmi verify .* --target cuda-fp16"):
        CudaBackend.open(bundle, "cuda-fp16", **world)
    with pytest.raises(ConfigError, match="leave out --resident"):
        CudaBackend.open(bundle, "cuda-fp16", resident=["llm"], **world)


def test_names_of_cuda_targets() -> None:
    assert Target("cuda", None, "fp16").name == "cuda-fp16"
    assert backend_of("cuda-int4-128").name == "cuda"
    assert build_options("cuda-int4-128") == "--target cuda --precision int4-128"
    with pytest.raises(ConfigError, match="target cuda takes no --arch; got sm89"):
        Target("cuda", "sm89", "fp16")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_precisions_without_kernels_are_refused(bundle: Bundle, precision: str) -> None:
    with pytest.raises(ConfigError, match=f"precision {precision} is not for ONNX Runtime"):
        build_cuda_target(bundle, recipe(precision), None)


def test_the_command_line_builds_verifies_and_refuses(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """This machine has no GPU, and the package of ONNX Runtime without CUDA."""
    folder = str(bundle.folder)
    assert run(["build", folder, "--target", "cuda", "--precision", "int8", "--dry-run"]) == 0
    assert "cuda-int8" in capsys.readouterr().out
    for options in (["--graph", "llm"], ["--rows", "2"], ["--plugin", "x.so"]):
        assert run(["build", folder, "--target", "cuda", *options]) == 2
        assert "does not apply to cuda targets" in capsys.readouterr().err
    document = tmp_path / "story.md"
    document.write_text("red")
    for command in (
        ["verify", folder, "--target", "cuda-fp16", "--kernels", "none", "--force"],
        ["generate", str(document), "-o", str(tmp_path / "out"), "-b", folder, "--unproved"]
        + ["--target", "cuda-fp16", "--kernels", "none"],
    ):
        assert run(command) == 2
        (line,) = [text for text in capsys.readouterr().err.splitlines() if "mmi:" in text]
        assert "installed without its CUDA provider" in line
