"""A whole target on a GPU: documents come out as on the CPU, memory is what was planned, and what
does not belong together is refused before anything is loaded."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deploy.runtime.fake_model import LIMITS, fake_config, fake_runtime, picture
from deploy.runtime.tensorrt.fake_cuda import FakeCuda
from deploy.runtime.tensorrt.gpu_targets import PLUGIN, Machine, add_target, fake_bundle, machine
from mmi_deploy.bundle.build_report import REPORT, GraphReport, TargetReport
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.manifest import sha256_of
from mmi_deploy.cli.app import run
from mmi_deploy.documents.document import Document, Draw, Image, Text, document_of
from mmi_deploy.documents.images import Rgb
from mmi_deploy.errors import BundleError, ConfigError, DocumentError, EngineError
from mmi_deploy.runtime.events import Finished, ImageDone, TextDelta
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.session import Session
from mmi_deploy.runtime.tensorrt import backend
from mmi_deploy.spec.backends import backend_of
from mmi_deploy.spec.graphs import Limits
from mmi_deploy.spec.target import build_options

if TYPE_CHECKING:
    from exports import Exported

DOCUMENT = document_of(Text("w5"), Draw(), Image(picture(3)), Text("w6"), Draw())
OPTIONS = GenerationOptions(
    seed=3, turn_tokens=6, max_images=3, temperature=0, schedule="ancestral:4", full_every=2
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return fake_bundle(tmp_path / "bundle", fake_config(), LIMITS)


def told(
    runtime: Runtime, document: Document = DOCUMENT, options: GenerationOptions = OPTIONS
) -> tuple[str, list[Rgb]]:
    """The text and the pictures of a generation."""
    text, pictures = "", []
    for event in generate(runtime, document, options):
        if isinstance(event, TextDelta):
            text += event.text
        elif isinstance(event, ImageDone):
            pictures.append(event.rgb)
        elif isinstance(event, Finished):
            assert event.reason == "max_images"
    return text, pictures


def difference(some: list[Rgb], others: list[Rgb]) -> int:
    """The greatest difference of a pixel."""
    pairs = zip(some, others, strict=True)
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in pairs)


@pytest.mark.parametrize("rtx", [False, True], ids=["tensorrt", "rtx"])
@pytest.mark.parametrize(
    ("activations", "pixels"), [("float32", 0), ("float16", 1), ("bfloat16", 4)]
)
def test_a_document_is_the_one_that_the_cpu_makes(
    bundle: Bundle, activations: str, pixels: int, rtx: bool
) -> None:
    """Text and pictures, with two samplers' worth of steps, from engines of each type. Half types
    keep 11 or 8 bits of what goes from engine to engine: a few levels of 255."""
    text, pictures = told(fake_runtime()[0])
    gpu = machine(bundle, add_target(bundle, activations, rtx=rtx))
    for _ in range(2):  # the second finds recordings and places of the first
        written, drawn = told(gpu.runtime)
        assert written == text and difference(drawn, pictures) <= pixels
    assert len(pictures) == 5 and not gpu.cuda.faults
    assert gpu.launches["denoise_step"] and gpu.launches["denoise_shallow"] and gpu.launches["llm"]


def test_most_steps_and_tokens_are_launched_from_recordings(bundle: Bundle) -> None:
    """One recording for as long as the images in sight stay: of decoding within a document, of
    denoising over all pictures with as many images."""
    gpu = machine(bundle, add_target(bundle))
    session = Session(gpu.runtime)
    session.append_text([1])
    session.append_image(picture(0))
    session.next_logits()
    for token in range(10):
        session.append_text([5 + token])
        session.next_logits()
    assert gpu.launches["llm"] == 10 - 1
    for _ in range(3):
        session.append_text([3])
        session.draw()
    # 1, 2 and 2 images in sight; the first step with a number of them is an ordinary one.
    assert gpu.launches["denoise_step"] == 3 + 3 + 4


def test_nothing_passes_the_host_between_engines(bundle: Bundle) -> None:
    """Copies to the host: the logits of each token that is asked for, and the pixels. From the
    host: pixels, noise, tables, and small inputs; no features, values, states or conditions."""
    gpu = machine(bundle, add_target(bundle))
    session = Session(gpu.runtime)
    session.append_text([1])
    session.append_image(picture(0))
    session.append_text([6, 3])
    session.draw()
    gpu.cuda.calls.clear()
    session.append_text([6])
    session.next_logits()
    session.append_text([3])
    session.draw()
    config, kinds = bundle.config, gpu.cuda.cudaMemcpyKind
    copies = [arguments for name, arguments in gpu.cuda.calls if name == "cudaMemcpyAsync"]
    to_host = sorted(size for *_, size, kind, _ in copies if kind == kinds.cudaMemcpyDeviceToHost)
    to_gpu = {size for *_, size, kind, _ in copies if kind == kinds.cudaMemcpyHostToDevice}
    pixels = 3 * config.image_decoder.image_size**2 * 4
    latents = 4 * 4 * 4 * 4
    assert to_host == [config.llama.vocab * 4, pixels]
    assert to_gpu <= {4, 8, 16, 24, 32, latents, 3 * latents, 3 * 16 * 16 * 4}


@pytest.mark.parametrize("beams", [1, 3])
def test_a_document_takes_the_memory_that_was_planned(bundle: Bundle, beams: int) -> None:
    """To the byte, but for what one run needs and gives back, and the places of staged inputs."""
    gpu = machine(bundle, add_target(bundle, "float16"))
    plan = gpu.target.plan(beams)
    assert plan.workspace is None and "known once they are loaded" in plan.lines()[-1]
    before = gpu.cuda.held()
    session = Session(gpu.runtime, beams)
    session._picture_rows()
    assert gpu.cuda.held() - before == sum(plan.caches.values())
    gpu.runtime.load()
    assert gpu.target.plan().workspace == 1 << 16  # the greatest need of one engine
    assert gpu.target.plan().free == gpu.cuda.capacity - gpu.cuda.held()
    lines = "\n".join(gpu.target.plan().lines())
    assert "workspace that engines share" in lines and "KV cache" in lines
    del session
    gpu.runtime.close()
    del gpu.runtime, gpu.target
    gc.collect()
    assert gpu.cuda.held() == 0 and not gpu.cuda.faults


def test_engines_that_take_turns_give_the_same(bundle: Bundle) -> None:
    """--resident: less memory at a time, the same document, loaded anew when they are needed."""
    name = add_target(bundle)
    text, pictures = told(fake_runtime()[0])
    whole, some = machine(bundle, name), machine(bundle, name, resident=["encoder", "llm"])
    written, drawn = told(some.runtime)
    assert written == text and difference(drawn, pictures) == 0
    loads = some.tensorrt.loads
    assert loads.count("llm") == loads.count("vision_encoder") == 1
    assert loads.count("vae_decoder") == loads.count("denoise_step") == len(pictures)
    plan, planned = some.target.plan(), whole.target.plan()
    assert plan.weights.keys() == {"vision_encoder", "llm_values", "llm"}
    assert list(plan.swapped) == ["condition", "denoise", "vae"]
    saved = sum(plan.swapped.values()) - max(plan.swapped.values())
    assert plan.workspace and planned.total - (plan.total - plan.workspace) == saved
    some.runtime.load()
    assert not some.cuda.faults


def test_sessions_in_several_threads_share_the_gpu(bundle: Bundle) -> None:
    """Also where engines take turns: one may be taken off while another session draws."""
    gpu = machine(bundle, add_target(bundle), resident=["llm"])
    expected, wrong = told(fake_runtime()[0]), []

    def work() -> None:
        try:
            text, pictures = told(gpu.runtime)
            assert text == expected[0] and difference(pictures, expected[1]) == 0
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not gpu.cuda.faults


@pytest.mark.parametrize("wanted", ["w", "k"])
def test_limits_are_those_that_the_engines_were_built_for(bundle: Bundle, wanted: str) -> None:
    """Smaller engines take fewer images, and a fourth is refused like any beyond the limit.

    Reports of earlier versions call the wanted positions k.
    """
    small = Limits(LIMITS.context, 1, 3, pool=3)
    name = add_target(bundle, limits=small)
    sizes = {"b": [1, 1, 1], "n": [1, 3, 3], "m": [1, 3, 3], "t": [1, 9, 64], wanted: [1, 1, 64]}
    profile = {"prefill": sizes}
    report = TargetReport(
        target=name, runtime="tensorrt", version="11.4.0", architecture="sm89", precision="fp32",
        graphs=(GraphReport(graph="llm", layers={}, engine_bytes=1, weights_bytes=1, seconds=1,
                            profiles=profile),),
    )  # fmt: skip
    (bundle.target_folder(name) / REPORT).write_text(report.model_dump_json())
    gpu = machine(bundle, name)
    assert gpu.runtime.limits == small and gpu.runtime.graphs["llm"].ranges["n"].max == 3
    session = Session(gpu.runtime)
    session.append_text([1])
    for number in range(3):
        session.append_image(picture(number))
        session.append_text([5])
    session.next_logits()
    with pytest.raises(DocumentError, match="too many images; expected at most 3"):
        session.append_image(picture(3))


def test_engines_that_nothing_proves_are_refused(bundle: Bundle) -> None:
    name = add_target(bundle, proved=False)
    line = refusal(bundle, name)
    command = f"mmi verify {bundle.folder} --target {name}"
    assert "vision_encoder in" in line and f"`{command}`, or run the graph anyway" in line
    machine(replace(bundle, unproved=True), name).runtime.load()


def test_names_of_targets() -> None:
    names = ("tensorrt-sm89-fp16", "tensorrt-rtx-sm120-int4-128", "cpu-int8", "cpu", "portable")
    assert [backend_of(name).name for name in names] == ["tensorrt", "tensorrt-rtx", *["cpu"] * 3]
    assert [build_options(name) for name in names] == [
        "--target tensorrt --arch sm89 --precision fp16",
        "--target tensorrt-rtx --arch sm120 --precision int4-128",
        "--target cpu --precision int8",
        "--target cpu",
        "--target cpu",
    ]


def refusal(bundle: Bundle, name: str, **options: Any) -> str:
    with pytest.raises((EngineError, BundleError, ConfigError)) as error:
        opened: Machine = machine(bundle, name, **options)
        opened.runtime.load()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_engines_for_another_card_are_refused(bundle: Bundle) -> None:
    line = refusal(bundle, add_target(bundle), cuda=FakeCuda(capability=(9, 0)))
    assert line == (
        "tensorrt-sm89-fp32 was built for another GPU; expected sm89 (L4, L40S, RTX 40); "
        f"got sm90 (Fake GPU). build for it: `mmi build {bundle.folder} --target tensorrt "
        "--arch sm90 --precision fp32`"
    )


def test_engines_of_another_tensorrt_are_refused(bundle: Bundle) -> None:
    line = refusal(bundle, add_target(bundle, recipe={"tensorrt": "11.3.1"}))
    assert "another version of tensorrt; expected 11.3.1; got 11.4.0" in line
    assert f"`mmi build {bundle.folder} --target tensorrt --arch sm89 --precision fp32`" in line


def test_the_plugin_must_be_the_one_they_were_built_with(bundle: Bundle, tmp_path: Path) -> None:
    library = tmp_path / "libmmi_tensorrt-11.4-1.so"
    library.write_bytes(PLUGIN)
    identity = f"libmmi_tensorrt-11.4-0.so:{sha256_of(library)[:16]}"
    name = add_target(bundle, recipe={"plugin": identity}, engines={"llm": {"plugin": True}})
    assert "needs our TensorRT plugin" in refusal(bundle, name)
    told(machine(bundle, name, library=library).runtime)
    library.write_bytes(PLUGIN + b" changed")
    line = refusal(bundle, name, library=library)
    assert "was built with another plugin" in line and "--kernels FILE" in line
    inside = add_target(bundle, "float16", recipe={"plugin": "ahead-of-time-sm80:0123"})
    for given in (None, library):  # the engines hold the plugin themselves
        gpu = machine(bundle, inside, library=given)
        assert gpu.runtime.schedule() and not gpu.tensorrt.plugins
    missing = refusal(bundle, name, library=tmp_path / "none.so")
    assert "cannot load the plugin" in missing and "`mmi plugins build tensorrt`" in missing


@pytest.mark.parametrize("identity", ["build-only:0123", "stand-in:0123"])
def test_engines_of_the_build_only_plugin_are_refused(bundle: Bundle, identity: str) -> None:
    """`stand-in` is what earlier versions wrote."""
    line = refusal(bundle, add_target(bundle, recipe={"plugin": identity}))
    assert (
        "build-only plugin" in line and "`mmi plugins build tensorrt`, then run `mmi build" in line
    )


def test_a_gpu_that_is_too_small_is_refused_before_anything_is_loaded(bundle: Bundle) -> None:
    name = add_target(bundle)
    cuda = FakeCuda(capacity=20_000)
    line = refusal(bundle, name, cuda=cuda)
    assert "too little free memory" in line and "--resident llm" in line and "got 20.0 kB" in line
    assert cuda.held() == 0
    name = add_target(bundle, engines={"llm": {"weights": 10**9}})
    full = FakeCuda(capacity=5 * 10**8)
    line = refusal(bundle, name, cuda=full)  # the plan fits, what TensorRT takes does not
    assert "OutOfMemory" in line or "memory is full" in line
    assert "--resident" in line


def test_targets_that_lack_an_engine_or_stem_from_another_export(bundle: Bundle) -> None:
    line = refusal(bundle, add_target(bundle, leave_out=["vae_decoder"]))
    assert "has no engine of vae_decoder" in line and "--graph vae_decoder`" in line
    (bundle.folder / "bundle.json").write_text((bundle.folder / "bundle.json").read_text() + " ")
    line = refusal(Bundle.open(bundle.folder), "tensorrt-sm89-fp32")
    assert "built from another export" in line


def test_a_target_that_was_not_built_is_refused(bundle: Bundle) -> None:
    add_target(bundle)
    with pytest.raises(ConfigError) as error:
        Runtime.open(bundle, target="tensorrt-sm90-fp16", kernels="none")
    assert str(error.value) == (
        f"{bundle.folder} has no target 'tensorrt-sm90-fp16'; expected cpu or tensorrt-sm89-fp32. "
        f"build it with `mmi build {bundle.folder} --target tensorrt --arch sm90 --precision fp16`"
    )
    with pytest.raises(ConfigError, match="leave out --resident"):
        Runtime.open(bundle, resident=["llm"], kernels="none")


def test_on_this_machine_the_reason_is_one_line(bundle: Bundle) -> None:
    """With the real modules: what is missing here, whatever it is, or nothing."""
    name = add_target(bundle)
    try:
        Runtime.open(bundle, target=name, kernels="none")
    except EngineError as error:
        assert "\n" not in str(error)
        assert any(part in str(error) for part in ("install it with", "NVIDIA GPU", "built"))


@pytest.mark.parametrize("activations", ["float32", "float16"])
def test_an_exported_model_makes_the_document_that_onnx_runtime_makes(
    exported_once: Callable[[str], Exported], tmp_path: Path, activations: str
) -> None:
    """The whole loop over real graphs, in float32 to the bit: text, pictures, look-backs."""
    source = exported_once("paper").bundle
    bundle = copy_of(source, tmp_path / "bundle")
    gpu = machine(bundle, add_target(bundle, activations, onnx=True))
    side = bundle.config.vision.image_size
    document = document_of(Text("a red"), Image(picture(1, side)), Draw(), Text("and"), Draw())
    options = replace(OPTIONS, turn_tokens=4, max_images=2, schedule="ddpm:3", full_every=1)
    cpu = Runtime.open(bundle, threads=1, kernels="none")
    (text, pictures), (written, drawn) = (told(r, document, options) for r in (cpu, gpu.runtime))
    assert len(pictures) == 4 and not gpu.cuda.faults
    if activations == "float32":
        assert written == text and difference(drawn, pictures) == 0
    else:
        assert difference(drawn[:1], pictures[:1]) <= 8


def copy_of(bundle: Bundle, folder: Path) -> Bundle:
    """Copy of the bundle, into which targets may be written."""
    shutil.copytree(bundle.folder, folder, ignore=shutil.ignore_patterns("engines"))
    return Bundle.open(folder)


def test_a_target_that_was_not_built_on_the_command_line(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "story.md").write_text("w5 w6")
    words = ["generate", tmp_path / "story.md", "-o", tmp_path / "out", "-b", bundle.folder]
    options = ["--target", "tensorrt-rtx-sm120-int4", "--device", "1", "--resident", "llm"]
    assert run([*map(str, words), *options]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "has no target 'tensorrt-rtx-sm120-int4'; expected cpu. build it with" in line


def test_generate_says_what_the_gpu_holds_before_it_loads(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The command on the fake GPU, as a user runs it."""
    name = add_target(bundle)
    gpu = machine(bundle, name)
    monkeypatch.setattr(backend, "import_cuda", lambda: gpu.cuda)
    monkeypatch.setattr(backend, "import_tensorrt", lambda runtime: gpu.tensorrt)
    (tmp_path / "story.md").write_text("w5 w6 ![]()")
    words = ["generate", tmp_path / "story.md", "-o", tmp_path / "out", "-b", bundle.folder]
    options = ["--target", name, "--resident", "encoder, llm", "--max-tokens", "4", "--json"]
    assert run([*map(str, words), *options]) == 0
    told = capsys.readouterr()
    assert f"{name} on Fake GPU:" in told.err and "weights of vae, in turns" in told.err
    assert json.loads(told.out)["images"] >= 1
    assert gpu.tensorrt.loads.count("llm") == 1
    options[3] = "unet"
    words[3] = tmp_path / "other"
    assert run([*map(str, words), *options]) == 2
    assert "no engines are called 'unet'; expected encoder, llm" in capsys.readouterr().err


def test_documents_that_take_turns_keep_their_recordings(bundle: Bundle) -> None:
    """0 and 2 images, so other shapes and other caches at each token; as each would alone."""
    gpu, cpu = machine(bundle, add_target(bundle)), fake_runtime()[0]
    sessions = []
    for runtime in (gpu.runtime, cpu):
        pair = Session(runtime), Session(runtime)
        for index, session in enumerate(pair):
            session.append_text([1])
            for image in range(2 * index):
                session.append_image(picture(image))
            session.append_text([6, 7])  # a prefill: no decode step begins the documents
            session.next_logits()
        sessions.append(pair)
    before = gpu.launches["llm"]
    logits = []
    for token in range(50):
        for session in sessions[0]:
            session.append_text([5 + token % 7])
            logits.append(session.next_logits().copy())
    assert gpu.launches["llm"] - before == 98
    for index, session in enumerate(sessions[1]):
        for token in range(50):
            session.append_text([5 + token % 7])
            np.testing.assert_array_equal(session.next_logits(), logits[2 * token + index])
    assert not gpu.cuda.faults


def test_kernels_of_rtx_are_saved_at_the_end_of_a_document(tmp_path: Path) -> None:
    """A service that is killed later has not compiled them in vain."""
    bundle = fake_bundle(tmp_path / "bundle", fake_config(), LIMITS)
    gpu = machine(bundle, add_target(bundle, "float16", rtx=True))
    kernels = tmp_path / "kernels"
    assert not kernels.exists()
    told(gpu.runtime)
    names = {path.name.partition("-")[0] for path in kernels.iterdir()}
    assert names >= {"llm", "denoise_step", "vision_encoder", "vae_decoder"}
    assert gpu.tensorrt.loads, "the engines are still loaded"
    gpu.runtime.close()
