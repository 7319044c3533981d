"""`mmi bench scale` on engines of known speed: points, series, verdicts, the command."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from deploy.runtime.fake_model import (
    SCHEDULES,
    fake_config,
    fake_runtime,
    fake_schedule,
    fake_tokenizer,
)
from exports import Exported
from mmi_bench.scale import measure as module
from mmi_bench.scale.cases import IMAGES, ROWS, STEPS, TOKENS, plan
from mmi_bench.scale.expectations import MET, MISSED
from mmi_bench.scale.measure import CpuTimings, ScaleResult, Series, measure
from mmi_bench.scale.plot import draw
from mmi_bench.scale.report import print_report
from mmi_deploy.cli.app import run
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.backend import HostBackend
from mmi_deploy.runtime.buffers import HOST, Buffer
from mmi_deploy.runtime.engine import Engine
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.graphs import Graph, Limits, graphs
from mmi_deploy.spec.presets import released_13b, tiny

pytestmark = pytest.mark.timing

LIMITS = Limits(context=128, images=6)

# Milliseconds of a run by its sizes.
Speed = Callable[[Mapping[str, int]], float]
SPEEDS: dict[str, Speed] = {
    "vision_encoder": lambda s: 4 * s["n"],
    "llm_values": lambda s: 1 * s["n"],
    "llm": lambda s: 1 + 0.5 * s["b"] if s["t"] == 1 else 2 + 0.25 * s["t"],
    "image_condition": lambda s: 1,
    "unet_values": lambda s: 0.01 * s["n"],
    "denoise_step": lambda s: 10 * s["b"],
    "denoise_shallow": lambda s: 5 * s["b"],
    "vae_decoder": lambda s: 3 * s["b"],
}


class Clock:
    """A clock that stands still while Python works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.visits: list[str] = []


class TimedEngine(Engine):
    """Computes nothing, in a known time."""

    def __init__(self, graph: Graph, clock: Clock, speed: Speed) -> None:
        super().__init__(graph, HOST)
        self._clock, self._speed = clock, speed

    def _execute(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        sizes = {
            side: size
            for tensor in self.graph.inputs
            for side, size in zip(tensor.shape, inputs[tensor.name].shape, strict=True)
            if isinstance(side, str)
        }
        self._clock.now += 1e-3 * self._speed(sizes)


def measured(
    monkeypatch: pytest.MonkeyPatch, quick: bool = True, rounds: int = 2, **speeds: Speed
) -> ScaleResult:
    """Measure engines of `SPEEDS`, or of others by name."""
    clock, config = Clock(), fake_config()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    chosen = {**SPEEDS, **speeds}
    backend = HostBackend(
        graphs(config, LIMITS), LIMITS, lambda graph: TimedEngine(graph, clock, chosen[graph.name])
    )
    runtime = Runtime(config, fake_tokenizer(config), backend, fake_schedule, SCHEDULES)
    return measure(runtime, rounds, quick)


def series(result: ScaleResult, quantity: str, axis: str) -> Series:
    (found,) = (one for one in result.series if (one.quantity, one.axis) == (quantity, axis))
    return found


def test_series_have_the_known_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(monkeypatch, quick=False)
    encode = series(result, "encode", IMAGES)
    assert encode.points == (1, 2, 4, 6)
    assert encode.medians == pytest.approx([5e-3 * x for x in encode.points])
    assert encode.fit.exponent and encode.fit.exponent.value == pytest.approx(1)
    decode = series(result, "decode", IMAGES)
    assert decode.points == (0, 1, 2, 4, 6)
    assert decode.medians == pytest.approx([1.5e-3] * 5)
    assert decode.fit.growth and decode.fit.growth.value == pytest.approx(0, abs=1e-9)
    prefill = series(result, "prefill", TOKENS)
    assert prefill.fit.fixed == pytest.approx(2e-3) and prefill.fit.slope == pytest.approx(25e-5)
    assert series(result, "prefill", IMAGES).medians == pytest.approx([2e-3 + 25e-5 * 26] * 5)
    picture = series(result, "picture", STEPS)
    assert picture.points == (1, 2, 4)
    assert picture.fit.fixed == pytest.approx(4e-3) and picture.fit.slope == pytest.approx(10e-3)
    rows = series(result, "decode", ROWS)
    assert rows.points == (1, 2, 4, 8)
    assert rows.medians == pytest.approx([1.5e-3, 2e-3, 3e-3, 5e-3])
    times = [one for one in result.series if one.quantity != "memory" and one.verdict]
    assert {one.verdict for one in times} == {MET}, [(o.quantity, o.axis) for o in times]


def test_growth_that_should_not_be_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that pays a tenth for each image, and a prefill that pays for pairs of tokens."""

    def llm(sizes: Mapping[str, int]) -> float:
        t = sizes["t"]
        return 1 + 0.1 * sizes["m"] if t == 1 else 2 + 0.001 * t**2

    result = measured(monkeypatch, llm=llm)
    missed = {(one.quantity, one.axis) for one in result.missed}
    assert {("decode", IMAGES), ("prefill", TOKENS)} <= missed
    assert series(result, "denoise", IMAGES).verdict == MET


def test_rounds_go_back_and_forth_and_the_first_is_discarded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    visited: list[tuple[str, int]] = []
    real = module._Work.at

    def at(self: object, axis: str, x: int) -> dict[str, float]:
        visited.append((axis, x))
        return real(self, axis, x)  # type: ignore[arg-type]

    monkeypatch.setattr(module._Work, "at", at)
    result = measured(monkeypatch, rounds=2)
    points = len(visited) // 3
    first, second, third = (visited[i * points : (i + 1) * points] for i in range(3))
    assert first == third == second[::-1] and len(set(first)) == points
    assert all(len(one.rounds) == 2 for one in result.series)


def test_memory_is_measured_and_grows_with_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(monkeypatch)
    for axis in (IMAGES, TOKENS, ROWS, STEPS):
        assert min(series(result, "memory", axis).medians) >= 4096
    assert result.about["memory"] in (
        "peak above the loaded engines",
        "held above the loaded engines",
    )


def test_cpu_time_does_not_count_a_wait() -> None:
    timings = CpuTimings()
    with timings.measure("decode"):
        time.sleep(0.05)
    assert timings.seconds("decode")[0] < 0.04


def test_points_are_those_that_the_model_allows() -> None:
    found = plan(tiny(), Limits(context=512), steps=20)
    assert found.points[IMAGES] == (0, 1, 2, 4, 8, 16, 29) and found.context == 1 + 29 * 17 + 1
    assert found.points[TOKENS] == (16, 32, 64, 128, 256, 499)
    assert found.points[ROWS] == (1, 2, 4, 8) and found.points[STEPS] == (1, 2, 4, 8, 16, 20)
    long = plan(tiny(), Limits(context=1024, batch=4), steps=50)
    assert long.points[IMAGES] == (0, 1, 2, 4, 8, 16, 32, 49)
    assert long.points[ROWS] == (1, 2, 4) and long.points[STEPS][-1] == 50
    published = plan(released_13b(), Limits(context=2048), steps=50)
    assert published.points[IMAGES] == (0, 1, 2, 4, 8, 16, 31)
    quick = plan(tiny(), Limits(context=512), 20, quick=True)
    assert quick.points[IMAGES] == (0, 1, 4, 29) and quick.points[STEPS] == (1, 8, 20)
    for context in range(70, 400, 7):
        try:
            some = plan(tiny(), Limits(context=context), steps=2)
        except ConfigError:
            continue
        assert max(some.points[TOKENS]) + some.decoded + 1 <= context
        assert some.context + some.decoded + 1 <= context


def test_a_context_that_is_too_short_is_refused() -> None:
    with pytest.raises(ConfigError, match="context is too short to measure growth; expected at"):
        plan(tiny(), Limits(context=48), steps=20)
    for rounds in (0, 1):
        with pytest.raises(ConfigError, match=f"--rounds is out of range; .*; got {rounds}"):
            measure(fake_runtime()[0], rounds)


@pytest.fixture(scope="module")
def result() -> ScaleResult:
    """A result with one series missed."""
    with pytest.MonkeyPatch.context() as patch:
        found = measured(patch, llm=lambda s: 1 + 0.1 * s["m"] if s["t"] == 1 else s["t"])
    machine = {"processor": "a processor", "load_before": 0.5}
    about = {"model": "fake", "threads": 1, "target": "cpu", "kernels": "none", "machine": machine}
    # Memory of these engines is noise.
    timed = [one for one in found.series if one.quantity != "memory" or one.axis == ROWS]
    return replace(found, about={**about, **found.about}, series=timed)


def test_the_table_and_the_json_have_all_of_it(result: ScaleResult) -> None:
    out = io.StringIO()
    print_report(Console(file=out, width=220), result)
    text = out.getvalue()
    for words in (
        "images in context", "denoising steps", "flat: <= 2 % per image", "linear: exponent",
        "missed: decode by images", "1 thread", "a run of vae",
    ):  # fmt: skip
        assert words in text, words
    read = json.loads(json.dumps(result.to_json(), allow_nan=False))
    (decode,) = (o for o in read["series"] if (o["quantity"], o["axis"]) == ("decode", IMAGES))
    assert decode["expectation"]["verdict"] == MISSED and decode["unit"] == "seconds"
    assert len(decode["rounds"]) == 2 and len(decode["rounds"][0]) == len(decode["points"])


def test_the_plot_has_axes_with_units(result: ScaleResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "scale.svg"
    draw(result, path)
    text = path.read_text()  # letters are shapes, their texts are comments
    for label in ("milliseconds", "memory, MB", "tokens in context", "rows of a run"):
        assert label in text, label


def test_the_exit_code_says_if_an_expectation_is_missed(
    result: ScaleResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "run", lambda *a, **k: result)
    assert run(["bench", "scale"]) == 0
    out = tmp_path / "scale.json"
    assert run(["bench", "scale", "--check", "-o", str(out)]) == 1
    assert "growth is beyond what is expected: decode by images" in capsys.readouterr().err
    assert json.loads(out.read_text())["about"]["model"] == "fake"  # written all the same
    good = replace(result, series=[one for one in result.series if one not in result.missed])
    monkeypatch.setattr(module, "run", lambda *a, **k: good)
    assert run(["bench", "scale", "--check", "--json"]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["no/such/bundle"], "there is no bundle no/such/bundle"),
        (["--rounds", "x"], "Invalid value for '--rounds'"),
        (["--plot", "scale.gif"], "expected a name that ends in .svg or .png"),
        (["--plot", "FOLDER/a.svg/b.svg"], "is not a folder"),
        (["-o", "FOLDER"], "is there already, and would be lost"),
        (["--cpu-time"], "--cpu-time counts threads that wait; expected --threads 1"),
        (["--threads", "0"], "Invalid value for '--threads'"),
    ],
)
def test_hostile_arguments_are_one_readable_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.svg").write_text("mine")
    words = [word.replace("FOLDER", str(tmp_path)) for word in options]
    assert run(["bench", "scale", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("mmi: ") == 1 and "Traceback" not in err


@pytest.mark.slow
def test_a_bundle_is_measured_from_the_command_line(
    exported_once: Callable[[str], Exported], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(exported_once("paper").bundle.folder)
    out = tmp_path / "scale.json"
    line = ["bench", "scale", bundle, "--quick", "--threads", "1", "--cpu-time", "-o", str(out)]
    assert run([*line, "--kernels", "none"]) == 0
    text = capsys.readouterr().out
    assert "images in context" in text and "CPU time" in text
    report = json.loads(out.read_text())
    assert report["about"]["kernels"] == "none" and report["about"]["clock"] == "CPU"
    found = {(one["quantity"], one["axis"]): one for one in report["series"]}
    assert {("encode", IMAGES), ("decode", TOKENS), ("denoise", ROWS)} <= found.keys()
    assert all(min(one["medians"]) > 0 for one in report["series"])
    # What else the machine does only adds to a round, so the fastest says most.
    encode = [min(times) for times in zip(*found["encode", IMAGES]["rounds"], strict=True)]
    assert encode[-1] > 2 * encode[0]  # of eleven images, and of one
