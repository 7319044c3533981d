"""`mmi build`: the bundle's engines, from the plan to the target's folder. TensorRT is a fake
(fake_tensorrt.py) and recipes copy; everything between them is real."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.bundle.test_bundle import GOOD, NAMES, fill
from deploy.targets.fake_tensorrt import FakePlugin, Script, fake_tensorrt
from mmi_deploy.bundle.build_report import BUILD_ONLY, describe_targets, read_report
from mmi_deploy.bundle.bundle import Bundle, write_bundle
from mmi_deploy.bundle.kernel_plan import Kernel, ProfilePlan
from mmi_deploy.cli.app import run
from mmi_deploy.errors import BundleError, ConfigError, EngineError, MmiError
from mmi_deploy.spec.backends import TENSORRT_RTX
from mmi_deploy.spec.graphs import Graph, Limits
from mmi_deploy.spec.presets import tiny
from mmi_deploy.spec.target import Target
from mmi_deploy.system.progress import Progress, silent
from mmi_deploy.targets import tensorrt, tensorrt_plan
from mmi_deploy.targets.cache import EngineCache
from mmi_deploy.targets.precision import Ranges, recipe
from mmi_deploy.targets.tensorrt import build_targets, check_bindings
from mmi_deploy.targets.tensorrt_build import BuildResult, Job, Plugin
from mmi_deploy.targets.tensorrt_plan import Request, check_resources, plan_engines
from mmi_deploy.targets.tensorrt_process import MeasuredBuild, Memory

ELEMENTS = 1000
BINDING = {"float32": "float", "float16": "half", "int64": "int64", "int32": "int32"}


def small_model(name: str) -> onnx.ModelProto:
    """An ONNX file with one weight, which is all that a plan reads."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [ELEMENTS])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [ELEMENTS])
    weight = numpy_helper.from_array(np.ones(ELEMENTS, np.float32), "w")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    return helper.make_model(helper.make_graph([node], name, [value], [output], [weight]))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    folder = tmp_path / "bundle"
    with write_bundle(folder, tiny(), Limits(context=64)) as writer:
        fill(writer, proved=())
        for name in NAMES:
            onnx.save(small_model(name), writer.graph_file(name))
            writer.add_receipt(name, "the model", [GOOD])
    return Bundle.open(folder)


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines", 10**9)


@pytest.fixture(autouse=True)
def recipes_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake `rewrite`: the portable ONNX, with the contract's new types."""

    def rewrite(chosen: Any, graph: Graph, source: Path, out: Path, **_: Any) -> Graph:
        out.write_bytes(source.read_bytes())
        out.with_suffix(".safetensors").write_bytes(b"w" * 2 * ELEMENTS)
        return graph.typed(chosen.activations)

    monkeypatch.setattr(tensorrt, "rewrite", rewrite)


class Builder:
    """Fake builder: writes engines of a few bytes and records them."""

    def __init__(self, fails: dict[str, BaseException] | None = None) -> None:
        self.jobs: list[Job] = []
        self.fails = fails or {}

    def __call__(self, job: Job, progress: Progress) -> MeasuredBuild:
        self.jobs.append(job)
        assert job.source.is_file() and job.source.with_suffix(".safetensors").is_file()
        progress("Building", 1, 2)
        job.engine.write_bytes(f"{job.graph} {job.architecture}".encode())
        if job.graph in self.fails:
            raise self.fails[job.graph]
        graph: Graph = self.contract[job.graph]
        built = BuildResult(
            layers={"CAST": 4, "PLUGIN_V3": 3},
            bindings={t.name: BINDING[t.dtype] for t in (*graph.inputs, *graph.outputs)},
            engine_bytes=job.engine.stat().st_size,
            tensorrt="1.7.1",
            warnings=("be careful",),
        )
        return MeasuredBuild(built, 1.5, Memory(100, 50, 400, 150))

    contract: dict[str, Graph] = {}


@pytest.fixture
def request_for(bundle: Bundle) -> Callable[..., Request]:
    plugin = Plugin("build-only:1", True, no_module, register, same, accept)

    def make(*architectures: str, precision: str = "fp16", **changes: Any) -> Request:
        targets = tuple(
            Target(TENSORRT_RTX, name, precision) for name in architectures or ("sm89",)
        )
        chosen = recipe(precision)
        Builder.contract = {
            name: graph.typed(chosen.activations) for name, graph in bundle.graphs.items()
        }
        graphs = changes.pop("graphs", ("llm", "vae_decoder"))
        asked = Request(bundle, targets, chosen, graphs, plugin, "1.7.1")
        return replace(asked, **changes)

    return make


def no_module(name: str) -> Any:
    return fake_tensorrt(Script())


def register(trt: Any) -> FakePlugin:
    return FakePlugin()


def same(model: onnx.ModelProto) -> onnx.ModelProto:
    return model


def accept(network: Any, model: onnx.ModelProto) -> None:
    """Plugin check that passes."""


def build(asked: Request, cache: EngineCache, builder: Builder) -> list[Any]:
    return build_targets(asked, cache, silent, builder)


# --- what is written -----------------------------------------------------------------------------


def test_targets_are_named_by_architecture_and_say_what_they_are_made_of(
    bundle: Bundle, cache: EngineCache, request_for: Callable[..., Request]
) -> None:
    reports = build(request_for("sm89", "sm80"), cache, Builder())
    names = ("tensorrt-rtx-sm80-fp16", "tensorrt-rtx-sm89-fp16")
    assert bundle.targets == names and [r.target for r in reports] == list(reversed(names))
    trusting = replace(bundle, unproved=True)
    target = trusting.target("tensorrt-rtx-sm89-fp16")
    assert target.activations == "float16"
    assert target.graphs == {"llm": "llm.engine", "vae_decoder": "vae_decoder.engine"}
    assert target.recipe["architecture"] == "sm89" and target.recipe["tensorrt"] == "1.7.1"
    assert target.recipe["plugin"] == "build-only:1" and target.recipe["precision"] == "fp16"
    folder = bundle.target_folder("tensorrt-rtx-sm89-fp16")
    assert (folder / "llm.engine").read_bytes() == b"llm sm89"
    assert not list((bundle.folder / "engines").glob(".*")), "nothing is left beside the targets"


def test_engines_that_did_not_run_are_not_trusted(
    bundle: Bundle, cache: EngineCache, request_for: Callable[..., Request]
) -> None:
    build(request_for(), cache, Builder())
    with pytest.raises(BundleError, match="llm .* has no receipt"):
        bundle.target("tensorrt-rtx-sm89-fp16")


def test_the_report_gives_layers_plugin_sizes_time_and_memory(
    bundle: Bundle, cache: EngineCache, request_for: Callable[..., Request]
) -> None:
    (report,) = build(request_for(), cache, Builder())
    assert read_report(bundle.target_folder(report.target)) == report
    assert report.remark == BUILD_ONLY and report.version == "1.7.1"
    llm = report.graphs[0]
    assert (llm.graph, llm.layers, llm.plugin_layers) == ("llm", {"CAST": 4, "PLUGIN_V3": 3}, 3)
    assert (llm.engine_bytes, llm.weights_bytes) == (8, 4 * ELEMENTS)
    assert (llm.seconds, llm.peak_bytes, llm.peak_private_bytes) == (1.5, 300, 100)
    assert set(llm.profiles) == {"prefill", "decode"} and llm.profiles["decode"]["t"] == [1, 1, 1]
    assert llm.warnings == ("be careful",) and not llm.cached
    assert report.engine_bytes == sum(graph.engine_bytes for graph in report.graphs)


def test_a_bundles_targets_are_described(
    bundle: Bundle, cache: EngineCache, request_for: Callable[..., Request]
) -> None:
    build(request_for("sm89"), cache, Builder())
    build(request_for("sm80"), cache, Builder())
    (bundle.target_folder("tensorrt-rtx-sm80-fp16") / "target.json").write_text("{")
    damaged, sound = describe_targets(bundle)
    assert damaged.stale and "cannot read" in damaged.remark
    assert (sound.precision, sound.architecture, sound.stale) == ("fp16", "sm89", False)
    assert sound.receipts == {"llm": "none", "vae_decoder": "none"} and sound.remark == BUILD_ONLY
    assert sound.report is not None and sound.bytes > sound.report.engine_bytes > 0


# --- the cache -----------------------------------------------------------------------------------


def test_what_is_unchanged_is_not_built_again(
    bundle: Bundle, cache: EngineCache, request_for: Callable[..., Request]
) -> None:
    first, second = Builder(), Builder()
    build(request_for("sm89", "sm80"), cache, first)
    assert [(job.graph, job.architecture) for job in first.jobs] == [
        ("llm", "sm89"), ("llm", "sm80"), ("vae_decoder", "sm89"), ("vae_decoder", "sm80"),
    ]  # fmt: skip
    reports = build(request_for("sm89", "sm80"), cache, second)
    assert not second.jobs
    assert all(graph.cached for report in reports for graph in report.graphs)
    assert reports[0].graphs[0].seconds == 1.5, "what the build took when it was made"


def test_without_the_cache_the_targets_own_engines_are_taken(
    bundle: Bundle, tmp_path: Path, request_for: Callable[..., Request]
) -> None:
    build(request_for(), EngineCache(tmp_path / "one", 0), Builder())
    again = Builder()
    (report,) = build(request_for(), EngineCache(tmp_path / "two", 0), again)
    assert not again.jobs and all(graph.cached for graph in report.graphs)
    engine = bundle.target_folder("tensorrt-rtx-sm89-fp16") / "llm.engine"
    engine.write_bytes(b"~" * engine.stat().st_size)
    with pytest.raises(MmiError, match="holds llm.engine, which was changed since mmi wrote it"):
        build(request_for(), EngineCache(tmp_path / "three", 0), again)
    assert not again.jobs, "refused before the work"
    engine.unlink()
    build(request_for(), EngineCache(tmp_path / "three", 0), again)
    assert [job.graph for job in again.jobs] == ["llm"], "the missing one is made again"


@pytest.mark.parametrize(
    "change",
    [
        {"tensorrt": "1.8.0"},
        {"plugin": Plugin("libmmi:2", False, no_module, register, same, accept)},
        {"limits": Limits(context=64, batch=2)},
        {"force": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_tensorrt_plugin_or_profile_is_another_engine(
    cache: EngineCache, request_for: Callable[..., Request], change: dict[str, Any]
) -> None:
    build(request_for(graphs=("llm",)), cache, Builder())
    again = Builder()
    build(request_for(graphs=("llm",), **change), cache, again)
    assert [job.graph for job in again.jobs] == ["llm"]


def test_another_precision_or_other_weights_are_another_engine(
    bundle: Bundle, cache: EngineCache, request_for: Callable[..., Request]
) -> None:
    asked = request_for(graphs=("llm",))
    keys = {part.key for part in plan_engines(asked)}
    keys |= {part.key for part in plan_engines(request_for(graphs=("llm",), precision="bf16"))}
    model = small_model("llm")
    model.graph.initializer[0].raw_data = b"\1" * 4 * ELEMENTS
    with write_bundle(bundle.folder, tiny(), Limits(context=64)) as writer:
        fill(writer)
        for name in bundle.graphs:
            path = writer.graph_file(name)
            onnx.save(model if name == "llm" else small_model(name), path)
    other = Bundle.open(bundle.folder, unproved=True)
    keys |= {part.key for part in plan_engines(replace(asked, bundle=other))}
    assert len(keys) == 3


def test_building_one_graph_keeps_the_others_that_are_up_to_date(
    bundle: Bundle, cache: EngineCache, request_for: Callable[..., Request]
) -> None:
    build(request_for(), cache, Builder())
    again = Builder()
    (report,) = build(request_for(graphs=("vae_decoder",), force=True), cache, again)
    assert [job.graph for job in again.jobs] == ["vae_decoder"]
    assert [graph.graph for graph in report.graphs] == ["llm", "vae_decoder"]
    (report,) = build(request_for(graphs=("vae_decoder",), tensorrt="1.8.0"), cache, again)
    assert [graph.graph for graph in report.graphs] == ["vae_decoder"], "llm's is stale now"


def test_a_graph_with_islands_of_float32_is_kept_as_others_are(
    cache: EngineCache, request_for: Callable[..., Request]
) -> None:
    ranges = {"llm": Ranges({"x": 1e6}, {}, 1), "vae_decoder": None}
    build(request_for(ranges=ranges), cache, Builder())
    (report,) = build(request_for(graphs=("vae_decoder",), ranges=ranges), cache, Builder())
    assert [graph.graph for graph in report.graphs] == ["llm", "vae_decoder"]


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [EngineError("cannot parse"), OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()],
    ids=lambda error: type(error).__name__,
)
def test_a_build_that_fails_leaves_the_bundle_as_it_was_and_keeps_finished_engines(
    bundle: Bundle,
    cache: EngineCache,
    request_for: Callable[..., Request],
    error: BaseException,
) -> None:
    before = sorted(bundle.folder.rglob("*"))
    with pytest.raises(type(error)):
        build(request_for(), cache, Builder({"vae_decoder": error}))
    left = [path for path in bundle.folder.rglob("*") if path not in before]
    assert [path.name for path in left] == ["engines"] and not bundle.targets
    again = Builder()
    build(request_for(), cache, again)
    assert [job.graph for job in again.jobs] == ["vae_decoder"]


def test_an_engine_that_breaks_its_contract_is_refused(bundle: Bundle) -> None:
    graph = bundle.graphs["vae_decoder"]
    check_bindings(graph, {"latents": "float", "pixels": "float"})
    with pytest.raises(EngineError, match="another pixels .* expected float32; got half"):
        check_bindings(graph, {"latents": "float", "pixels": "half"})
    with pytest.raises(EngineError, match="another pixels .* got none"):
        check_bindings(graph, {"latents": "float"})
    with pytest.raises(EngineError, match="an extra tensor; got extra"):
        check_bindings(graph, {"latents": "float", "pixels": "float", "extra": "float"})


def test_too_little_memory_or_disk_is_refused_before_anything_is_built(
    bundle: Bundle,
    cache: EngineCache,
    request_for: Callable[..., Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = plan_engines(request_for())
    check_resources(parts, bundle, cache)
    check_resources([], bundle, cache)
    monkeypatch.setattr(tensorrt_plan, "free_memory", lambda: 10**8)
    line = "too little memory to build .* expected about 700.0 MB free; got 100.0 MB.*--force"
    with pytest.raises(EngineError, match=line):
        check_resources(parts, bundle, cache)
    monkeypatch.setattr(tensorrt_plan, "free_memory", lambda: 10**12)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(EngineError, match="too little space on the disk.*--force"):
        check_resources(parts, bundle, cache)


def test_free_memory_is_at_most_what_there_is() -> None:
    assert (
        0
        < tensorrt_plan.free_memory()
        <= sum((psutil.virtual_memory().total, psutil.swap_memory().total))
    )


def test_limits_beyond_the_bundles_are_refused(request_for: Callable[..., Request]) -> None:
    with pytest.raises(ConfigError, match="--max-images .* expected 1 to 49; got 50"):
        plan_engines(request_for(limits=Limits(context=64, images=50)))
    with pytest.raises(ConfigError, match="--rows .* expected 1 to 8; got 9"):
        plan_engines(request_for(limits=Limits(context=64, batch=9)))


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def command(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run `mmi build BUNDLE ...` with the fake builder."""
    from mmi_plugins.tensorrt import plugin as plugins_for_builds

    monkeypatch.setenv("MMI_CACHE", str(tmp_path / "cache"))
    plugin = Plugin("build-only:1", True, no_module, register, same, accept)
    monkeypatch.setattr(plugins_for_builds, "plugin_for", lambda *_: plugin)
    builder = Builder()
    Builder.contract = {name: graph.typed("float16") for name, graph in bundle.graphs.items()}
    real = build_targets
    monkeypatch.setattr(
        tensorrt,
        "build_targets",
        lambda request, cache, progress: real(request, cache, progress, builder),
    )

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(["build", str(bundle.folder), *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    yield call


ONE = ("--arch", "sm89", "--unproved", "--graph", "llm")


def test_the_command_says_memory_first_and_shows_a_table(
    command: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, err = command(*ONE)
    assert code == 0, err
    lines = err.splitlines()
    assert lines[0].startswith("1 of 1 engines to build; the largest, of llm, takes about 700")
    assert "llm for sm89 (0 of 1 done)" in lines
    assert "tensorrt-rtx-sm89-fp16" in out and "build-only plugin" in out and "llm" in out
    code, _, err = command(*ONE)
    assert code == 0 and err.splitlines() == ["llm for sm89: cached (0 of 1 done)"]


def test_ranges_that_are_known_count_without_proofs(
    command: Callable[..., tuple[int, str, str]], bundle: Bundle, tmp_path: Path
) -> None:
    """A GPU's machine may be too small to run the bundle; ranges of another machine will do."""

    def key(*options: str) -> str:
        code, out, err = command(*ONE, "--dry-run", "--json", *options)
        assert code == 0, err
        return str(json.loads(out)["parts"][0]["key"])

    without, wide = key(), key("--precision", "bf16")
    folder = tmp_path / "cache" / "ranges"
    folder.mkdir(parents=True)
    Ranges({"x": 1e6}, {}, 1).save(folder / f"{bundle.identity[:32]}-llm.json")
    assert key() != without, "float16 cannot hold x"
    assert key("--precision", "bf16") == wide


def test_the_report_is_printed_for_programs(command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = command(*ONE, "--arch", "sm80", "--json")
    assert code == 0
    targets = json.loads(out)["targets"]
    assert [target["architecture"] for target in targets] == ["sm89", "sm80"]
    assert targets[0]["graphs"][0]["layers"] == {"CAST": 4, "PLUGIN_V3": 3}
    assert targets[0]["graphs"][0]["plugin_layers"] == 3


def test_engines_built_one_by_one_stay_beside_each_other(
    bundle: Bundle, command: Callable[..., tuple[int, str, str]]
) -> None:
    """They come from the cache; those of another precision have a folder of their own."""
    assert command(*ONE)[0] == 0
    code, _, err = command(*ONE[:-1], "vae_decoder")
    assert code == 0 and "llm for sm89: cached (0 of 2 done)" in err.splitlines()
    held = bundle.target("tensorrt-rtx-sm89-fp16", unproved=True).graphs
    assert set(held) == {"llm", "vae_decoder"}


def test_a_dry_run_says_what_it_would_take_and_builds_nothing(
    bundle: Bundle, command: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = command(*ONE, "--dry-run", "--json")
    (part,) = json.loads(out)["parts"]
    assert code == 0 and not bundle.targets
    assert (part["graph"], part["cached"]) == ("llm", False)
    assert part["weights_bytes"] == 2 * ELEMENTS and part["memory_bytes"] > 7e8
    assert part["profiles"]["decode"]["t"] == [1, 1, 1]
    command(*ONE)
    (part,) = json.loads(command(*ONE, "--dry-run", "--json")[1])["parts"]
    assert part["cached"] and part["memory_bytes"] == 0
    assert "cached" in command(*ONE, "--dry-run")[1]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--arch", "sm90"), "does not build for sm90.*expected sm80, sm86, sm89, sm120"),
        (("--arch", "sm12"), "expected sm80.*got sm12"),
        (("--target", "gpu"), "no backend 'gpu'; expected cpu or cuda or tensorrt or tensorrt-rtx"),
        (("--arch", "sm89", "--graph", "unet"), "no graph 'unet'; expected vision_encoder"),
        (("--arch", "sm80", "--precision", "fp8"), "fp8 cannot be built for sm80"),
        (("--arch", "sm89", "--precision", "fp1"), "no precision 'fp1'"),
        (("--arch", "sm89", "--max-images", "99"), "--max-images .* got 99"),
        (("--arch", "sm89", "--products", "x"), "--products.* expected plugin or tensorrt; got x"),
        (("--target", "cpu", "--products", "tensorrt"), "--products does not apply to CPU targets"),
        (("--target", "cpu", "--arch", "sm89", "--precision", "int8"), "takes no --arch"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(
    bundle: Bundle,
    command: Callable[..., tuple[int, str, str]],
    arguments: tuple[str, ...],
    line: str,
) -> None:
    code, out, err = command(*arguments)
    assert code == 2 and not out and len(err.splitlines()) == 1
    assert re.search(line, err), err
    assert not bundle.targets


@pytest.mark.parametrize("precision", ["int8", "fp8", "int4", "mixed"])
def test_weights_with_a_scale_per_channel_take_two_rows(
    request_for: Callable[..., Request], precision: str
) -> None:
    """In a batch of exactly one they would be written dequantised (test_plan_rules.py). The head of
    int4 has one scale per channel too."""
    one, three = (Limits(context=64, batch=rows) for rows in (1, 3))

    def most(limits: Limits, **asked: Any) -> dict[str, int]:
        plans = plan_engines(request_for(limits=limits, **asked))
        return {plan.graph: max(p.ranges["b"].max for p in plan.profiles) for plan in plans}

    names = ("llm", "vae_decoder")
    assert most(one, precision=precision, graphs=names) == {"llm": 2, "vae_decoder": 1}
    assert most(three, precision=precision, graphs=names) == {"llm": 3, "vae_decoder": 3}
    assert most(one, graphs=names) == {"llm": 1, "vae_decoder": 1}


def test_engines_are_built_for_one_row_unless_more_are_asked_for(
    command: Callable[..., tuple[int, str, str]],
) -> None:
    for options, rows in (((), 1), (("--rows", "4"), 4)):
        (part,) = json.loads(command(*ONE, *options, "--dry-run", "--json")[1])["parts"]
        assert part["profiles"]["decode"]["b"] == [1, 1, rows]
        assert part["profiles"]["prefill"]["b"] == [1, 1, rows]
        assert part["profiles"]["prefill"]["w"] == [1, 1, 1], "logits of one position"


@pytest.mark.parametrize("precision", ["int8", "fp8", "int4", "mixed"])
def test_our_products_take_one_row(request_for: Callable[..., Request], precision: str) -> None:
    one = Limits(context=64, batch=1)
    ours = plan_engines(request_for(precision=precision, limits=one, own_products=True))
    theirs = plan_engines(request_for(precision=precision, own_products=False))
    assert [plan.key_parts["products"] for plan in ours] == ["plugin", "tensorrt"]
    assert [plan.key_parts["products"] for plan in theirs] == ["tensorrt", "tensorrt"]


def test_our_products_are_packed_and_one_that_is_left_needs_two_rows(
    request_for: Callable[..., Request], cache: EngineCache
) -> None:
    packed: list[Path] = []

    def pack(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
        packed.append(path)
        return model

    def leave(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
        step = onnx.helper.make_node("DequantizeLinear", ["a", "b"], ["c"], name="odd")
        model.graph.node.append(step)
        return model

    plugin = request_for().plugin
    asked = request_for(
        precision="int8", graphs=("llm",), limits=Limits(context=64, batch=1), own_products=True
    )
    build(replace(asked, plugin=replace(plugin, products=pack)), cache, Builder())
    assert [path.name for path in packed] == ["llm.onnx"]
    odd = replace(asked, plugin=replace(plugin, products=leave), force=True)
    with pytest.raises(ConfigError, match="plugin does not take the weight of odd.*rows 2"):
        build(odd, cache, Builder())
    build(replace(odd, limits=Limits(context=64, batch=2)), cache, Builder())


def test_a_bundle_for_one_row_says_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "single"
    with write_bundle(folder, tiny(), Limits(context=64, batch=1)) as writer:
        fill(writer, proved=())
        for name in NAMES:
            onnx.save(small_model(name), writer.graph_file(name))
            writer.add_receipt(name, "the model", [GOOD])
    plugin = Plugin("build-only:1", True, no_module, register, same, accept)
    target = Target(TENSORRT_RTX, "sm89", "int8")
    asked = Request(Bundle.open(folder), (target,), recipe("int8"), ("llm",), plugin, "1.7.1")
    with pytest.raises(
        ConfigError, match="for 1 row: .* expected at least 2. .* export .* with --rows 2"
    ):
        plan_engines(asked)


class WastefulBuilder(Builder):
    """Builds engines that write a weight dequantised, in each profile."""

    def __call__(self, job: Job, progress: Progress) -> MeasuredBuild:
        measured = super().__call__(job, progress)
        weight = Kernel(
            name="k", kind="kgen", constants=("w:Int8[64,64]",), outputs=("d:Half[64,64]",)
        )
        plans = tuple(ProfilePlan(profile=p.name, kernels=(weight,)) for p in job.profiles)
        return replace(measured, built=replace(measured.built, plans=plans))


def test_an_engine_whose_kernels_break_a_fatal_rule_is_not_taken(
    bundle: Bundle, request_for: Callable[..., Request], cache: EngineCache
) -> None:
    """Neither when it is built nor when it lies in the cache; --force takes it, and says it."""
    asked, builder = request_for(graphs=("llm",)), WastefulBuilder()
    for _ in range(2):
        with pytest.raises(EngineError, match="engine of llm would be slow: k writes a weight of"):
            build(asked, cache, builder)
    assert len(builder.jobs) == 1 and not bundle.targets
    (report,) = build(replace(asked, force=True), cache, builder)
    (llm,) = report.graphs
    assert [(one.rule, one.profile) for one in llm.findings] == [("dequantised weights", "decode")]
    assert [plan.profile for plan in llm.plans] == ["prefill", "decode"]
    found = read_report(bundle.target_folder(report.target))
    assert found is not None and found.graphs[0].plans == llm.plans
