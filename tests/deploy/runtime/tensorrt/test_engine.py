"""TensorRT's engines on a GPU that checks its user: where they read and write, what is recorded,
and what they refuse."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploy.runtime.onnxruntime.test_engine import CACHE, SLOTS, inputs, onnx_file
from deploy.runtime.tensorrt.fake_cuda import FakeCuda
from deploy.runtime.tensorrt.fake_tensorrt import FakeTensorRt, IExecutionContext, write_plan
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.runtime.buffers import HOST
from mmi_deploy.runtime.device_memory import Cuda, DeviceMemory
from mmi_deploy.runtime.onnxruntime.engine import OnnxOptions, OnnxRuntimeEngine
from mmi_deploy.runtime.tensorrt.cuda_graph import CudaGraphs
from mmi_deploy.runtime.tensorrt.engine import Residency, TensorRtEngine, Workspace
from mmi_deploy.runtime.tensorrt.module import TensorRt
from mmi_deploy.spec.backends import TENSORRT, TENSORRT_RTX
from mmi_deploy.spec.graphs import Graph, Range, Tensor

FIX = "mmi build it"


class Bench:
    """A fake GPU with one TensorRT."""

    def __init__(self, folder: Path, rtx: bool = False, **module: Any) -> None:
        self.folder = folder
        self.cuda = FakeCuda()
        self.memory = DeviceMemory(Cuda(self.cuda))
        self.module = FakeTensorRt(self.cuda, rtx=rtx, **module)
        runtime = TENSORRT_RTX if rtx else TENSORRT
        self.tensorrt = TensorRt(self.module, runtime, cache=folder / "kernels")
        self.scratch = Workspace(self.memory)

    def engine(self, graph: Graph = CACHE, **fields: Any) -> TensorRtEngine:
        options = {name: fields.pop(name) for name in ("record", "residency") if name in fields}
        path, onnx = self.folder / f"{graph.name}.engine", self.folder / f"{CACHE.name}.onnx"
        fields.setdefault("onnx", onnx if onnx.exists() else onnx_file(onnx))
        write_plan(path, graph, **fields)
        return TensorRtEngine(
            path, graph, self.tensorrt, self.memory, self.scratch, fix=FIX, **options
        )


@pytest.fixture(params=[False, True], ids=["tensorrt", "rtx"])
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(tmp_path, rtx=request.param)
    yield bench
    assert not bench.cuda.faults


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntimeEngine:
    path = onnx_file(tmp_path_factory.mktemp("onnx") / "cache.onnx")
    return OnnxRuntimeEngine(path, CACHE, OnnxOptions(threads=1))


def on_device(bench: Bench, given: dict[str, Any]) -> dict[str, Any]:
    """The cache in the GPU's memory, the rest as arrays."""
    return {**given, "past": bench.memory.from_array(given["past"].read())}


@pytest.mark.parametrize("record", [True, False])
def test_it_computes_what_onnx_runtime_does(
    bench: Bench, on_cpu: OnnxRuntimeEngine, record: bool
) -> None:
    """Batch 1 and 2, several tokens and one, run after run on one cache."""
    engine = bench.engine(record=record)
    for batch in (1, 2, 1):
        here = HOST.allocate((batch, 2, SLOTS, 3), np.float32)
        there = bench.memory.from_array(here.read())
        for at, count in ((0, 2), (2, 1), (3, 1), (4, 1)):
            given = inputs(batch, count, at)
            expected = on_cpu.run({**given, "past": here})
            out = engine.run({**given, "past": there})
            np.testing.assert_array_equal(out["total"].read(), expected["total"].read())
            np.testing.assert_array_equal(there.read(), here.read())


def test_repeated_runs_are_launched_from_a_recording(bench: Bench) -> None:
    """The first is ordinary, the second recorded and launched; what small inputs hold is new each
    time, and other shapes or addresses are other recordings."""
    bench.module.recordable_after = 0
    engine = bench.engine()
    given = on_device(bench, inputs())
    total = bench.memory.allocate((1, 2, 3), np.float32)
    for index in range(SLOTS):
        given["write_index"] = np.array([index])
        given["new"] = np.full((1, 2, 1, 3), index + 1, np.float32)
        engine.run(given, {"total": total})
        expected = 0.5 * sum(range(1, index + 2)) + 2
        np.testing.assert_allclose(total.read(), expected)
        assert engine.launches == index
    runs = [call for call in bench.module.used if call[1] == "execute_async_v3"]
    assert len(runs) == 2  # ordinary, and while it was recorded
    other = bench.memory.allocate((1, 2, 3), np.float32)
    engine.run({**given, "write_index": np.array([0])}, {"total": other})
    np.testing.assert_array_equal(other.read()[0, 0], total.read()[0, 0] + 0.5 * 4)
    assert engine.launches == SLOTS - 1 and engine.refusal == ""


def test_shapes_that_are_new_are_not_recorded(bench: Bench) -> None:
    """TensorRT must have run once after a shape changed: the fake refuses anything else. Shapes
    that alternate have a context each, so neither's recording is lost."""
    bench.module.recordable_after = 0
    engine = bench.engine(scratch=256)  # a block that never moves
    caches = {batch: bench.memory.allocate((batch, 2, SLOTS, 3), np.float32) for batch in (1, 2)}
    totals = {batch: bench.memory.allocate((batch, 2, 3), np.float32) for batch in (1, 2)}
    launches = []
    for batch in (1, 2, 1, 2, 1, 1, 2, 2, 2, 1, 1, 1):
        engine.run({**inputs(batch), "past": caches[batch]}, {"total": totals[batch]})
        launches.append(engine.launches)
    assert launches == [0, 0, *range(1, 11)]


def test_rtx_is_asked_whether_it_can_be_recorded(tmp_path: Path) -> None:
    bench = Bench(tmp_path, rtx=True)
    bench.module.recordable_after = 3  # it still compiles
    engine, given = bench.engine(), on_device(bench, inputs())
    total = bench.memory.allocate((1, 2, 3), np.float32)
    for _ in range(6):
        engine.run(given, {"total": total})
    assert engine.launches == 2


def test_what_cannot_be_recorded_runs_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an engine that waits for the GPU inside a run."""
    bench.module.recordable_after = 0
    engine, given = bench.engine(), on_device(bench, inputs())
    total = bench.memory.allocate((1, 2, 3), np.float32)
    engine.run(given, {"total": total})
    expected = total.read().copy()
    real = engine._enqueue

    def waits(context: Any) -> None:
        real(context)
        bench.memory.cuda("cudaStreamSynchronize", bench.memory.stream)

    monkeypatch.setattr(engine, "_enqueue", waits)
    for _ in range(3):
        total.write(np.zeros((1, 2, 3), np.float32))
        engine.run(given, {"total": total})
        np.testing.assert_array_equal(total.read(), expected)
    assert engine.launches == 0 and "StreamCaptureUnsupported" in engine.refusal


def test_recordings_are_few_and_given_back(bench: Bench) -> None:
    bench.module.recordable_after = 0
    engine = bench.engine()
    places = [bench.memory.allocate((1, 2, 3), np.float32) for _ in range(4)]
    given = on_device(bench, inputs())
    engine.run(given, {"total": places[0]})
    (context,) = engine._contexts.values()
    context.graphs._capacity = 2
    for place in places:
        for _ in range(3):
            engine.run(given, {"total": place})
    assert len(bench.cuda.graphs) == 2
    engine.close()
    assert not bench.cuda.graphs


def test_ctrl_c_does_not_leave_the_stream_recording(bench: Bench) -> None:
    graphs = CudaGraphs(bench.memory)

    def run() -> None:
        if bench.cuda.recording:
            raise KeyboardInterrupt

    assert not graphs.enqueue("key", run, may_record=True)
    with pytest.raises(KeyboardInterrupt):
        graphs.enqueue("key", run, may_record=True)
    assert not bench.cuda.recording
    assert bench.memory.from_array(np.arange(3)).read().tolist() == [0, 1, 2]


def test_addresses_that_tensorrt_does_not_take_are_gone_round(
    bench: Bench, on_cpu: OnnxRuntimeEngine
) -> None:
    """Rows in the midst of a buffer, as inputs, outputs and cache: 256 bytes is the least step."""
    engine, memory = bench.engine(), bench.memory
    given = inputs()
    here = {**given, "past": HOST.allocate((1, 2, SLOTS, 3), np.float32)}
    store, pairs = memory.allocate((3, 2, 3), np.float32), memory.allocate((3, 1), np.float32)
    caches = memory.allocate((3, 2, SLOTS, 3), np.float32)
    memory.copy(memory.from_array(given["pair"]), pairs.rows(1, 3))
    for at in (0, 1, 2):
        here["write_index"] = np.array([at])
        expected = on_cpu.run(here)["total"].read()
        there = {**here, "pair": pairs.rows(1, 3), "past": caches.rows(1, 2)}
        engine.run(there, {"total": store.rows(1, 2)})
        np.testing.assert_array_equal(store.read()[1:2], expected)
        np.testing.assert_array_equal(caches.read()[1:2], here["past"].read())
    assert not store.read()[[0, 2]].any() and not caches.read()[[0, 2]].any()


def test_an_input_that_is_the_same_again_is_copied_where_its_place_has_changed(
    bench: Bench, on_cpu: OnnxRuntimeEngine
) -> None:
    """Its place held another buffer meanwhile, or is the cache, which the run wrote into."""
    engine, given = bench.engine(), inputs()
    pair, others = given["pair"], bench.memory.from_array(np.full((3, 1), 7, np.float32))
    for there in (pair, others.rows(1, 3), pair, pair):
        past = np.zeros((1, 2, SLOTS, 3), np.float32)
        here = pair if there is pair else np.full((2, 1), 7, np.float32)
        expected = on_cpu.run({**given, "pair": here, "past": past.copy()})["total"].read()
        given["write_index"] = (given["write_index"] + 1) % SLOTS
        total = engine.run({**given, "pair": there, "past": past})["total"].read()
        np.testing.assert_array_equal(total, expected)


def test_buffers_on_the_host_are_brought_over(bench: Bench, on_cpu: OnnxRuntimeEngine) -> None:
    given = inputs()
    expected = on_cpu.run(given)["total"].read()
    given["new"] = HOST.from_array(given["new"])
    given["past"] = bench.memory.allocate((1, 2, SLOTS, 3), np.float32)
    np.testing.assert_array_equal(bench.engine().run(given)["total"].read(), expected)


@pytest.mark.parametrize("name", ["scale", "write_index"])
def test_inputs_that_shapes_depend_on_stay_on_the_host(bench: Bench, name: str) -> None:
    """They are part of what a recording is made for: TensorRT reads them when it enqueues."""
    bench.module.recordable_after = 0
    engine = bench.engine(host=(name,))
    given = on_device(bench, inputs())
    total = bench.memory.allocate((1, 2, 3), np.float32)
    for step in range(6):
        value = np.array(0.5 + step // 3, np.float32) if name == "scale" else np.array([step // 3])
        on_gpu = bench.memory.from_array(value) if step % 2 else value
        given["past"].write(np.zeros((1, 2, SLOTS, 3), np.float32))
        engine.run({**given, name: on_gpu}, {"total": total})
        factor = value if name == "scale" else 0.5
        expected = factor * given["new"][:, :, 0] + 2
        np.testing.assert_allclose(total.read(), expected, rtol=1e-6)
    assert engine.launches >= 2


def test_the_narrowest_profile_that_fits_is_taken(bench: Bench) -> None:
    decode = {"t": Range(1, 1, 1)}
    engine = bench.engine(profiles=[{}, decode, {"b": Range(1, 1, 1)}])
    for batch, count in ((1, 1), (2, 1), (1, 3), (2, 2), (1, 1)):
        engine.run(on_device(bench, inputs(batch, count)))
    assert [context.profile for context in engine._contexts.values()] == [2, 1, 2, 0]
    chosen = [u[2][0] for u in bench.module.used if u[1] == "set_optimization_profile_async"]
    assert chosen == [2, 1, 2]  # a context begins with profile 0


def test_a_request_beyond_the_profiles_is_refused(bench: Bench) -> None:
    engine = bench.engine(profiles=[{"t": Range(1, 1, 2)}, {"t": Range(1, 1, 1)}])
    with pytest.raises(EngineError) as error:
        engine.run(on_device(bench, inputs(1, 3)))
    assert str(error.value) == (
        "cache: new does not fit any profile of the engine; expected (1, 2, 1, 3) to (2, 2, 2, 3); "
        "got (1, 2, 3, 3). build it for larger shapes with `mmi build it`"
    )


def test_engines_share_one_block_to_compute_in(bench: Bench) -> None:
    """Greatest need of all engines; after a move, contexts are told and graphs recorded again."""
    bench.module.recordable_after = 0
    first = bench.engine(scratch=1000)
    given, total = on_device(bench, inputs()), bench.memory.allocate((1, 2, 3), np.float32)
    for _ in range(3):
        first.run(given, {"total": total})
    other = Graph("other", CACHE.inputs, CACHE.outputs, CACHE.ranges, CACHE.in_place)
    second = bench.engine(other, scratch=5000)
    smaller = bench.engine(scratch=10)
    assert bench.scratch.bound == 5000
    for _ in range(3):
        for engine in (first, second, smaller):
            engine.run(given, {"total": total})
    # `second` moves the block at its first run, so the next run of `first` is not launched.
    assert [engine.launches for engine in (first, second, smaller)] == [2 + 1 + 0 + 1, 2, 2]


def test_the_block_is_as_large_as_the_shapes_need(bench: Bench) -> None:
    """In quarters of the bound, so that it moves at most four times."""
    engine, sizes = bench.engine(scratch=4000), []
    for b, t in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 1)):
        engine.run(shaped(bench, b, t))
        sizes.append(bench.scratch.size)
    assert sizes == [2000, 2000, 3000, 3000, 3000]
    assert not bench.cuda.faults


def test_a_tensorrt_that_wants_its_bound_gets_it(bench: Bench) -> None:
    bench.module.wants_bound = True
    engine = bench.engine(scratch=4000)
    for _ in range(3):
        engine.run(shaped(bench, 1, 1))
    assert bench.scratch.size == 4000 and not bench.cuda.faults


def test_a_tensorrt_that_does_not_know_the_size_of_shapes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(IExecutionContext, "update_device_memory_size_for_shapes")
    bench.engine(scratch=4000).run(shaped(bench, 1, 1))
    assert bench.scratch.size == 4000


def test_engines_run_on_where_another_has_no_room(bench: Bench, on_cpu: OnnxRuntimeEngine) -> None:
    engine = bench.engine(scratch=1000)
    given, expected = on_device(bench, inputs()), on_cpu.run(inputs())["total"].read()
    engine.run(given)
    bench.cuda.capacity = bench.cuda.held() + 2**20
    other = bench.engine(replace(CACHE, name="other"), scratch=2**24)
    with pytest.raises(EngineError, match="memory is full"):
        other.run(given)
    np.testing.assert_array_equal(engine.run(given)["total"].read(), expected)


def test_engines_that_do_not_stay_take_turns(bench: Bench) -> None:
    graphs = {
        name: Graph(name, CACHE.inputs, CACHE.outputs, CACHE.ranges, CACHE.in_place)
        for name in ("llm", "vae_decoder", "denoise_step", "denoise_shallow")
    }
    residency = Residency(["llm"])
    engines = {name: bench.engine(graph, residency=residency) for name, graph in graphs.items()}
    assert engines["vae_decoder"]._engine is None and engines["llm"]._engine is not None
    given = on_device(bench, inputs())
    bench.module.loads.clear()
    expected = engines["llm"].run(given)["total"].read()
    for name in ("denoise_step", "denoise_shallow", "denoise_step", "llm", "vae_decoder", "llm"):
        np.testing.assert_array_equal(engines[name].run(given)["total"].read(), expected)
        weights = sum(engine._engine is not None for engine in engines.values())
        assert weights == (3 if engines["denoise_step"]._engine else 2)
    assert bench.module.loads == ["vae_decoder"]  # the two of one group stay together
    with pytest.raises(ConfigError, match="no engines are called 'unet'; expected encoder, llm"):
        Residency(["unet"])


def test_all_that_an_engine_takes_is_given_back(bench: Bench) -> None:
    before = bench.cuda.held()
    engine, given = bench.engine(scratch=300), on_device(bench, inputs())
    out = engine.run(given)
    engine.close()
    del out, given
    assert bench.cuda.held() == before + bench.scratch.size  # it waits for the next engine
    engine.run(on_device(bench, inputs()))
    del engine
    gc.collect()
    assert bench.cuda.held() == before + bench.scratch.size


def test_kernels_that_rtx_compiled_are_kept(tmp_path: Path) -> None:
    bench = Bench(tmp_path, rtx=True)
    engine = bench.engine()
    engine.run(on_device(bench, inputs()))
    assert not (tmp_path / "kernels").exists()
    engine.close()
    (file,) = (tmp_path / "kernels").iterdir()
    assert file.read_bytes() == b"kernels" and file.name == "cache-11.4.0.cache"
    engine.run(on_device(bench, inputs()))
    assert ("IRuntimeCache", "deserialize", (b"kernels",)) in bench.module.used
    engine.close()


MORE = Graph("cache", (*CACHE.inputs, Tensor("more", "float32", ())), CACHE.outputs, CACHE.ranges)
HALF = Graph(
    "cache", CACHE.inputs, (Tensor("total", "float16", ("b", 2, 3)), *CACHE.outputs[1:]), {}
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": "11.3.0"}, r"cannot load .*not compatible.*build it again .*`mmi build it`"),
        ({"plugin": True}, r"Cannot find plugin.*`mmi plugins build tensorrt`.*--kernels"),
        ({"weights": 1 << 40}, r"OutOfMemory.*--resident.*mmi build it"),
        (
            {"types": {"total": "float32"}},
            r"is not a cache engine: it differs in new, pair, past, present",
        ),
        ({"shapes": {t.name: [2] for t in (*CACHE.inputs, *CACHE.outputs)}}, "new differs"),
        ({"in_place": {"present": "new"}}, "does not write present in place of past"),
    ],
)
def test_engines_that_are_not_the_graph_are_refused(
    bench: Bench, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message) as error:
        bench.engine(**fields)
    assert "\n" not in str(error.value) and "mmi " in str(error.value)
    del error
    gc.collect()
    assert bench.cuda.held() == bench.scratch.size  # nothing of it stays


def test_an_engine_of_another_type_is_refused(bench: Bench) -> None:
    types = {t.name: t.dtype for t in (*CACHE.inputs, *CACHE.outputs)} | {"total": "float16"}
    with pytest.raises(EngineError, match=r"total differs; expected float32 .*; got HALF"):
        bench.engine(types=types)


def test_a_file_that_is_no_engine_is_refused(bench: Bench) -> None:
    path = bench.folder / "none.engine"
    path.write_bytes(b"no engine")
    with pytest.raises(EngineError, match=r"cannot load .*none.engine: .*magicTag.*mmi build it"):
        TensorRtEngine(path, CACHE, bench.tensorrt, bench.memory, bench.scratch, fix=FIX)


@pytest.mark.parametrize(
    ("method", "result", "message"),
    [
        ("execute_async_v3", False, "cache failed"),
        ("set_input_shape", False, r"cache refuses new of shape \(1, 2, 1, 3\)"),
        ("set_tensor_address", False, "cache refuses the address of new"),
        ("infer_shapes", ["new"], "cache does not know the shape of new"),
    ],
)
def test_what_tensorrt_refuses_is_told_with_its_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str, result: Any, message: str
) -> None:
    engine = bench.engine()

    def refuse(*_: Any) -> Any:
        bench.module.error("it is\n  Tuesday")
        return result

    monkeypatch.setattr(IExecutionContext, method, refuse)
    for _ in range(2):  # a context with some of its shapes set is not taken for whole
        with pytest.raises(EngineError, match=f"^{message}: it is Tuesday$"):
            engine.run(on_device(bench, inputs()))
    monkeypatch.undo()
    engine.run(on_device(bench, inputs()))


def test_a_plugin_that_cannot_be_loaded(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("text")
    for path in (tmp_path / "text.so", tmp_path / "none.so"):
        with pytest.raises(EngineError, match="cannot load the plugin .*mmi plugins build tensor"):
            TensorRt(bench.module, TENSORRT, path)


def shaped(bench: Bench, batch: int, count: int, scale: float = 0.5) -> dict[str, Any]:
    given = on_device(bench, inputs(batch, count))
    return {**given, "scale": np.array(scale, np.float32)}


def total_of(given: dict[str, Any]) -> Any:
    """`total` of a run on a cache of zeros."""
    return given["scale"] * given["new"].sum(axis=2) + len(given["pair"])


def test_shapes_beyond_the_contexts_take_the_oldest_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its recordings go with its shapes, the others' stay; every result is right."""
    bench.module.recordable_after = 0
    monkeypatch.setattr("mmi_deploy.runtime.tensorrt.engine.MAX_CONTEXTS", 3)
    engine = bench.engine(scratch=256)  # a block that never moves
    runs = [
        (shaped(bench, b, t), {"total": bench.memory.allocate((b, 2, 3), np.float32)})
        for b, t in ((1, 1), (1, 2), (2, 1), (2, 2))
    ]

    def launched(index: int) -> bool:
        given, out = runs[index]
        given["past"].write(np.zeros(given["past"].shape, np.float32))
        before = engine.launches
        total = engine.run(given, out)["total"].read()
        np.testing.assert_allclose(total, total_of(given), rtol=1e-6)
        assert len(engine._contexts) <= 3
        return engine.launches > before

    assert [launched(index) for index in (0, 1, 2) * 3] == [False] * 3 + [True] * 6
    assert [launched(index) for index in (3, 3, 3)] == [False, True, True]  # takes that of 0
    assert [launched(index) for index in (1, 2)] == [True, True]
    assert not launched(0)  # takes that of 3, whose recording is never launched again
    assert [launched(index) for index in (1, 2, 0)] == [True] * 3
    assert not launched(3)
    made = [use for use in bench.module.used if use[1] == "create_execution_context"]
    assert len(made) == 3


def test_a_context_of_another_profile_is_destroyed_for_a_new_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.module.recordable_after = 0
    monkeypatch.setattr("mmi_deploy.runtime.tensorrt.engine.MAX_CONTEXTS", 1)
    engine = bench.engine(profiles=[{}, {"t": Range(1, 1, 1)}])
    for count in (1, 2, 1, 2):
        given = shaped(bench, 1, count)
        out = {"total": bench.memory.allocate((1, 2, 3), np.float32)}
        for _ in range(3):
            given["past"].write(np.zeros(given["past"].shape, np.float32))
            total = engine.run(given, out)["total"].read()
            np.testing.assert_allclose(total, total_of(given), rtol=1e-6)
        assert len(engine._contexts) == len(bench.cuda.graphs) == 1
    assert engine.launches == 8
    if bench.module.rtx:  # all contexts share the compiled kernels
        caches = [use for use in bench.module.used if use[1] == "create_runtime_cache"]
        assert len(caches) == 1


def test_a_recording_is_found_by_names_whatever_the_order(bench: Bench) -> None:
    """Two inputs of one shape that exchange their buffers, given in an order that hides it."""
    bench.module.recordable_after = 0
    one = Graph(
        "other", (*CACHE.inputs, Tensor("less", "float32", ())), CACHE.outputs, CACHE.ranges, {}
    )
    bench.module.compute = lambda graph, given: {
        "total": np.full((1, 2, 3), 2 * given["scale"] - given["less"], np.float32),
        "present": given["past"],
    }
    engine = bench.engine(one, onnx=None)
    kept = [bench.memory.allocate(shape, np.float32) for shape in ((1, 2, 3), (1, 2, SLOTS, 3))]
    out = dict(zip(("total", "present"), kept, strict=True))
    three, five = (bench.memory.from_array(np.array(x, np.float32)) for x in (3, 5))
    given = on_device(bench, inputs())
    del given["scale"]
    for _ in range(3):
        engine.run({**given, "scale": three, "less": five}, out)
        assert (kept[0].read() == 1).all()
    engine.run({**given, "less": three, "scale": five}, out)
    assert (kept[0].read() == 7).all()
    assert engine.launches == 2


def test_a_bound_plan_sees_new_contents_and_survives_unloading(bench: Bench) -> None:
    bench.module.recordable_after = 0
    engine, given = bench.engine(), on_device(bench, inputs())
    host = {k: v if k == "past" else HOST.from_array(v) for k, v in given.items()}
    total = bench.memory.allocate((1, 2, 3), np.float32)
    plan = engine.bind(host, {"total": total})
    for index in (1, 2, 3, 4, 0):
        given["past"].write(np.zeros((1, 2, SLOTS, 3), np.float32))
        host["write_index"].write(np.array([index]))
        host["scale"].write(np.array(index, np.float32))
        plan.run()
        np.testing.assert_allclose(total.read(), index * given["new"].sum(axis=2) + 2, rtol=1e-6)
        if index == 3:
            engine.close()
            assert engine._engine is None and not engine._staging
    assert engine.launches == 2 + 1
    host["write_index"].write(np.array([SLOTS]))
    with pytest.raises(EngineError, match="write_index is out of range; expected 0 to 4"):
        plan.run()
    host["write_index"].write(np.array([0]))
    with pytest.raises(EngineError, match="bound outputs differ in total"):
        engine.bind(host, {})


def launched_with(bench: Bench) -> tuple[int, int]:
    """Runs of one engine with RTX's fallback kernels, and those launched from a recording."""
    engine, given = bench.engine(), on_device(bench, inputs())
    total = bench.memory.allocate((1, 2, 3), np.float32)
    for _ in range(12):
        engine.run(given, {"total": total})
    bench.memory.wait()
    return bench.module.fallbacks, engine.launches or 0


def test_recordings_do_not_hold_the_fallback_kernels_of_rtx(tmp_path: Path) -> None:
    """A lazy context is recorded in its second run, before its own kernels are compiled, and the
    recording keeps the slow ones: all runs have them."""
    bench = Bench(tmp_path, rtx=True)
    bench.module.recordable_after = 0
    assert launched_with(bench) == (0, 11)
    lazy = Bench(tmp_path, rtx=True)
    lazy.module.recordable_after = 0
    strategy = lazy.module.DynamicShapesKernelSpecializationStrategy
    lazy.module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER=strategy.LAZY)
    assert launched_with(lazy) == (12, 11)


def test_kernels_are_saved_while_the_engine_lives_and_not_too_often(tmp_path: Path) -> None:
    """At the first document, then whenever twice as many shapes were compiled."""
    bench = Bench(tmp_path, rtx=True)
    engine = bench.engine()
    engine.save_kernels()
    assert not (tmp_path / "kernels").exists(), "nothing is compiled yet"
    saved = []
    for count in range(1, 9):
        engine.run(shaped(bench, 1 + count % 2, 1 + count // 2))
        before = bench.module.used.count(("IRuntimeCache", "serialize", ()))
        engine.save_kernels()
        saved.append(bench.module.used.count(("IRuntimeCache", "serialize", ())) - before)
    assert saved == [1, 1, 0, 1, 0, 0, 0, 1]
    (file,) = (tmp_path / "kernels").iterdir()
    assert file.read_bytes() == b"kernels"


def test_tensorrt_has_no_kernels_to_save(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    engine = bench.engine()
    engine.run(on_device(bench, inputs()))
    engine.save_kernels()
    assert not (tmp_path / "kernels").exists()
