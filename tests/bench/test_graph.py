"""`mmi bench graph`: valid inputs, the copies of a device, sizes, and refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import DTypeLike

from deploy.runtime.fake_model import LIMITS, FakeEngine, Log, fake_config, fake_runtime
from mmi_bench.graph import ALL, computation, inputs_of, named, overview, run, sizes_of
from mmi_bench.runs import Settings, measure
from mmi_deploy.cli.app import run as mmi
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.buffers import HOST, Array, Buffer, HostMemory
from mmi_deploy.spec.graphs import Limits, graphs
from mmi_deploy.spec.presets import tiny

GRAPHS = graphs(fake_config(), LIMITS)
QUICK = Settings(0.001, 0.002, 3)


class Gpu(HostMemory):
    """Memory that counts its copies as a GPU's would."""

    device = "cuda"

    def __init__(self) -> None:
        self.written: list[int] = []
        self.read_bytes = 0
        self.counting = False

    def from_array(self, array: Array) -> Buffer:
        return super().from_array(array.copy())

    def allocate(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        return super().from_array(np.zeros(shape, dtype))

    def write(self, buffer: Buffer, array: Array) -> None:
        self.written.append(array.nbytes)
        super().read(buffer)[...] = array

    def read(self, buffer: Buffer) -> Array:
        self.read_bytes += buffer.bytes if self.counting else 0
        return super().read(buffer)


@pytest.mark.parametrize("name", GRAPHS)
def test_inputs_are_those_that_an_engine_takes(name: str) -> None:
    graph, config = GRAPHS[name], fake_config()
    for rows in (1, 3):
        (sizes,) = sizes_of(graph, {}, [rows])
        inputs = inputs_of(graph, sizes, seed=7)
        same = inputs_of(graph, sizes, seed=7)
        other = inputs_of(graph, sizes, seed=8)
        assert all(np.array_equal(inputs[key], same[key]) for key in inputs)
        assert any(not np.array_equal(inputs[key], other[key]) for key in inputs)
        engine = FakeEngine(graph, config, Log())
        found = measure(computation(engine, inputs, sizes), QUICK)
        assert len(found.runs) >= 3 and not found.on_device


@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_tokens_lie_within_the_cache_and_see_all_images(tokens: int) -> None:
    llm = GRAPHS["llm"]
    (sizes,) = sizes_of(llm, {"t": tokens, "m": 4, "n": 6, "b": 2}, ())
    for seed in range(20):
        inputs = inputs_of(llm, sizes, seed)
        assert (np.diff(inputs["position"], axis=1) == 1).all()
        assert (inputs["position"][:, 0] == inputs["write_index"]).all()
        assert inputs["position"].max() < LIMITS.context and (inputs["start"] == 0).all()
        assert (inputs["image_position"] > 0).all()
        assert (inputs["image_slot"] == [[0, 1, 2, 3]] * 2).all()


def test_half_precision_targets_get_half_precision() -> None:
    graph = GRAPHS["llm"].typed("float16")
    inputs = inputs_of(graph, sizes_of(graph, {}, ())[0], 0)
    for tensor in graph.inputs:
        assert inputs[tensor.name].dtype == tensor.dtype


def test_a_device_copies_floats_in_and_outputs_out_but_not_the_cache() -> None:
    graph, memory = GRAPHS["llm"], Gpu()
    engine = FakeEngine(graph, fake_config(), Log())
    engine.memory = memory
    (sizes,) = sizes_of(graph, {}, ())
    inputs = inputs_of(graph, sizes, 0)
    bound = computation(engine, inputs, sizes)
    assert bound.device is not None
    bound.device.copy_in()
    cache = set(graph.in_place.values())
    floats = [t.name for t in graph.inputs if t.dtype == "float32" and t.name not in cache]
    assert sorted(memory.written) == sorted(inputs[name].nbytes for name in floats)
    memory.counting = True
    bound.device.copy_out()
    outputs = [t for t in graph.outputs if t.name not in graph.in_place]
    assert memory.read_bytes == sum(4 * np.prod(t.resolve(**sizes)) for t in outputs)
    found = measure(bound, QUICK)
    assert found.on_device and all(found.summaries().values())


def test_every_graph_is_measured_at_each_number_of_rows() -> None:
    runtime, log = fake_runtime()
    wanted = [(graph, at) for graph in GRAPHS.values() for at in sizes_of(graph, {}, (1, 2))]
    found = run(runtime, wanted, QUICK)
    assert [(one.graph, one.rows) for one in found] == [(n, r) for n in GRAPHS for r in (1, 2)]
    assert set(log.counts()) == set(GRAPHS)
    two = found[1].to_json()
    assert two["rows_per_second"] == pytest.approx(2 * two["throughput"])
    assert overview(found).row_count == 16
    assert {"graph", "sizes", "latencyMs"} <= found[0].times()[0].keys()


def test_names_and_sizes_that_do_not_exist_are_refused() -> None:
    assert named(ALL, GRAPHS) == list(GRAPHS.values())
    with pytest.raises(ConfigError, match="no graph 'unet'; expected vision_encoder, .* or all"):
        named("unet", GRAPHS)
    with pytest.raises(ConfigError, match="vae_decoder has no dimension t; expected b"):
        sizes_of(GRAPHS["vae_decoder"], {"t": 1}, ())
    with pytest.raises(ConfigError, match="llm cannot be run with t=65; expected 1 to 64"):
        sizes_of(GRAPHS["llm"], {"t": 65}, ())
    with pytest.raises(ConfigError, match="cannot be run with b=9; expected 1 to 8"):
        sizes_of(GRAPHS["llm"], {}, (9,))
    with pytest.raises(ConfigError, match="--rows and --sizes n both set the rows"):
        sizes_of(GRAPHS["llm_values"], {"n": 2}, (1,))


def test_the_largest_sizes_of_a_preset_are_valid() -> None:
    llm = graphs(tiny(), Limits(context=32, images=5, pool=6))["llm"]
    largest = {letter: of.max for letter, of in llm.ranges.items()}
    inputs = inputs_of(llm, largest, 0)
    assert (inputs["write_index"] == 0).all() and inputs["image_slot"].max() == 4
    engine_inputs = {name: HOST.from_array(array) for name, array in inputs.items()}
    assert engine_inputs["token_ids"].shape == (8, 32)


@pytest.fixture
def bundle(exported_once) -> str:
    return str(exported_once("paper").bundle.folder)


BRIEF = ["--warm-up", "5", "--duration", "0.02", "--threads", "1", "--kernels", "none"]


@pytest.mark.slow
def test_a_bundle_is_measured_from_the_command_line(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = tmp_path / "new" / "times.json"
    line = ["bench", "graph", "vae_decoder", bundle, *BRIEF, "--export-times", str(times)]
    assert mmi(line) == 0
    out = capsys.readouterr().out
    assert "Throughput:" in out and "queries/s" in out and "Compute Time" in out
    assert "on the CPU nothing is enqueued or copied" in out and "shorter than trtexec" in out
    runs = json.loads(times.read_text())
    assert len(runs) >= 10 and all(run["latencyMs"] == run["computeMs"] > 0 for run in runs)
    assert mmi(["bench", "graph", "all", bundle, *BRIEF, "--sizes", "t=4,m=1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    by_name = {one["graph"]: one for one in report["graphs"]}
    assert by_name["llm"]["sizes"]["t"] == 4 and len(by_name) == 8
    assert by_name["denoise_step"]["h2d_ms"] is None
    assert report["about"]["settings"]["duration"] == 0.02 and report["about"]["kernels"] == "none"
    assert mmi(["bench", "graph", "--list", bundle, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vae_decoder"]["b"]["max"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["unet"], "there is no graph 'unet'; expected vision_encoder, llm_values, llm,"),
        ([], "no graph was given"),
        (["llm", "--sizes", "t=0"], "llm cannot be run with t=0; expected 1 to"),
        (["llm", "--sizes", "t=" + "9" * 40], "llm cannot be run with t=9"),
        (["llm", "--sizes", "q=1"], "--sizes: 'q=1' is not a size"),
        (["llm", "--sizes", "t=-1"], "--sizes: 't=-1' is not a size"),
        (["llm", "--rows", "0"], "Invalid value for '--rows'"),
        (["llm", "--rows", "99"], "cannot be run with b=99"),
        (["llm", "--duration", "0"], "--duration is out of range"),
        (["llm", "--duration", "nan"], "--duration is out of range"),
        (["llm", "--warm-up", "-1"], "--warm-up is out of range"),
        (["llm", "--iterations", "0"], "--iterations is out of range"),
        (["llm", "--threads", "0"], "Invalid value for '--threads'"),
        (["llm", "--target", "tensorrt-sm00-fp16"], "has no target 'tensorrt-sm00-fp16'"),
        (["llm", "--export-times", "FOLDER"], "is there already, and would be lost"),
        (["llm", "-o", "FOLDER/file/below.json"], "is not a folder"),
    ],
)
def test_hostile_arguments_are_one_readable_line(
    bundle: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    (tmp_path / "file").write_text("mine")
    words = [word.replace("FOLDER", str(tmp_path)) for word in options]
    if words[:1] and not words[0].startswith("-"):
        words.insert(1, bundle)
    assert mmi(["bench", "graph", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("mmi: ") == 1 and "Traceback" not in err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_bundle_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a bundle")
    for folder in (tmp_path / "none", tmp_path / "file", tmp_path):
        assert mmi(["bench", "graph", "llm", str(folder)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
