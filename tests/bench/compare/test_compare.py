"""Comparison of backends: in turns, after a warm-up, on equal outputs; its report."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mmi_bench.compare import compare, plot, remote, report, worker
from mmi_bench.compare.backends import (
    COMPILED,
    PYTORCH,
    RUNTIME,
    BackendName,
    Settings,
    backend_name,
)
from mmi_bench.compare.cases import Case, Plan, text_after
from mmi_bench.compare.compare import Comparison, _measure
from mmi_bench.compare.remote import Answer, Remote
from mmi_bench.compare.samples import Output, Sample
from mmi_deploy.errors import MmiError
from mmi_deploy.system.progress import silent

PLAN = Plan(
    (
        Case("document", 4, 8, 4, 3),
        Case("text", 4, 8, 4),
        Case(text_after(0), 0, 8, 4),
        Case(text_after(8), 8, 8, 4),
    ),
    repeats=3,
)
BACKENDS: tuple[BackendName, ...] = (RUNTIME, PYTORCH, COMPILED)


def sample(seconds: float) -> Sample:
    stages = {"encode": [seconds / 8], "prefill": [seconds / 16, seconds / 16]}
    return Sample(seconds, seconds / 2, [seconds / 10], [seconds / 5], stages)


@dataclass
class Broken:
    """A backend that fails at its run number `at`."""

    backend: BackendName
    at: int
    runs: int = 0

    def run(self, case: Case) -> Answer:
        self.runs += 1
        if self.runs == self.at:
            raise MmiError(f"no {case.name}")
        return Answer(sample(1.0), Output("text", [np.zeros((2, 2, 3), np.uint8)]), 1)


@dataclass
class Fake:
    """A backend that takes ever longer and writes down who was asked for what."""

    backend: BackendName
    log: list[tuple[BackendName, str]]
    factor: float = 1.0
    output: Output = field(default_factory=lambda: Output("text", [np.zeros((2, 2, 3), np.uint8)]))

    def run(self, case: Case) -> Answer:
        self.log.append((self.backend, case.name))
        return Answer(sample(self.factor * len(self.log)), self.output, 1000 * len(self.log))


def fakes(log: list[tuple[BackendName, str]]) -> dict[BackendName, Fake]:
    return {backend: Fake(backend, log) for backend in BACKENDS}


def comparison(compiled: bool = True) -> Comparison:
    """PyTorch takes six times as long, compiled four times; a token with eight images takes twice
    as long as one with none."""
    factors: dict[BackendName, int] = {RUNTIME: 1, PYTORCH: 6, COMPILED: 4}
    if not compiled:
        del factors[COMPILED]
    seconds = {"document": 1.0, "text": 0.5, text_after(0): 0.2, text_after(8): 0.4}
    about = {
        "model": "tiny",
        "threads": 2,
        "schedule": "ddim:20",
        "guidance": 3.5,
        "repeats": 3,
        "clock": "wall",
        "left_out": {},
        "machine": {"processor": "a processor"},
    }
    return Comparison(
        about,
        PLAN,
        {
            backend: {
                name: [sample(factor * s * r) for r in (1, 2, 3)] for name, s in seconds.items()
            }
            for backend, factor in factors.items()
        },
        {"runtime": 100_000_000, "pytorch": 400_000_000, "pytorch-compiled": 900_000_000},
        {"runtime": 1.0, "pytorch": 3.0, "pytorch-compiled": 3.0},
        1,
    )


def test_the_backends_take_turns_and_the_first_round_is_not_counted() -> None:
    log: list[tuple[BackendName, str]] = []
    answers, _ = _measure(fakes(log), PLAN, silent)
    turns = list(zip(log[::3], log[1::3], log[2::3], strict=True))
    assert len(turns) == 4 * len(PLAN.cases)
    for turn in turns:
        assert len({case for _, case in turn}) == 1 and {who for who, _ in turn} == set(BACKENDS)
    assert {turn[0][0] for turn in turns} == {RUNTIME, COMPILED}  # none always goes first
    for backend in BACKENDS:
        assert {name: len(runs) for name, runs in answers[backend].items()} == {
            case.name: 3 for case in PLAN.cases
        }
    warm_up = 3 * len(PLAN.cases)
    assert min(a.sample.seconds for a in answers["runtime"]["document"]) > warm_up


@pytest.mark.parametrize(
    "other",
    [
        Output("another text", [np.zeros((2, 2, 3), np.uint8)]),
        Output("text", [np.full((2, 2, 3), 2, np.uint8)]),
        Output("text", []),
    ],
    ids=["text", "pixels", "pictures"],
)
@pytest.mark.parametrize("who", [PYTORCH, COMPILED])
def test_backends_that_disagree_are_not_compared(other: Output, who: BackendName) -> None:
    backends = fakes([])
    backends[who].output = other
    with pytest.raises(MmiError, match="nothing to compare"):
        _measure(backends, PLAN, silent)


def test_a_difference_of_one_level_is_let_pass_and_reported() -> None:
    backends = fakes([])
    backends["pytorch"].output = Output("text", [np.ones((2, 2, 3), np.uint8)])
    assert _measure(backends, PLAN, silent)[1] == 1


def test_a_target_that_rounds_may_choose_another_word_but_draws_as_many_pictures() -> None:
    backends = fakes([])
    backends["pytorch"].output = Output("another text", [np.full((2, 2, 3), 9, np.uint8)])
    assert _measure(backends, PLAN, silent, exact=False)[1] == 9
    backends["pytorch"].output = Output("text", [])
    with pytest.raises(MmiError, match="nothing to compare"):
        _measure(backends, PLAN, silent, exact=False)


@pytest.mark.parametrize("at", [1, 3])
def test_without_a_compiler_the_others_are_measured(at: int) -> None:
    """Compilation fails in the warm-up, at once or at a later case."""
    left_out: dict[BackendName, str] = {}
    backends = {**fakes([]), COMPILED: Broken(COMPILED, at)}
    answers, _ = _measure(backends, PLAN, silent, left_out=left_out)
    assert list(answers) == [RUNTIME, PYTORCH]
    assert all(len(runs) == 3 for cases in answers.values() for runs in cases.values())
    assert left_out == {COMPILED: f"no {PLAN.cases[at - 1].name}"}


@pytest.mark.parametrize(("who", "at"), [(PYTORCH, 1), (RUNTIME, 2), (COMPILED, 5)])
def test_any_other_failure_ends_the_comparison(who: BackendName, at: int) -> None:
    """PyTorch as published and the runtime at any time; the compiled one after the warm-up."""
    with pytest.raises(MmiError, match="no "):
        _measure({**fakes([]), who: Broken(who, at)}, PLAN, silent, left_out={})


def test_settings_reach_the_other_process_whole() -> None:
    for target, exact in (("cpu", True), ("tensorrt-sm89-fp32", True), ("cpu-int8", False)):
        settings = Settings(Path("b"), Path("m"), "ddim:20", 1, None, False, target, 1, "cpu")
        assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
        assert settings.exact is exact


def test_the_report_says_ratios_goals_and_memory() -> None:
    console = Console(file=io.StringIO(), width=80)
    report.print_report(console, comparison())
    lines = console.file.getvalue().splitlines()
    document = next(line for line in lines if line.strip().startswith("whole document"))
    assert document.split()[-5:] == ["12000", "6.00", ">=", "5", "reached"]
    compiled = lines[next(i for i, line in enumerate(lines) if "U-Net compiled" in line) :]
    row = next(line for line in compiled if line.strip().startswith("whole document"))
    assert row.split()[3:6] == ["8000", "6000–10000", "4.00"]
    images = next(line for line in lines if "8 images over none" in line)
    assert "2.00" in images and "missed" in images
    memory = next(line for line in lines if "peak memory, MB" in line)
    assert memory.split()[3:6] == ["100", "400", "4.00"] and "reached" in memory


def test_every_measure_has_one_line_of_at_most_80_columns() -> None:
    """In both tables, with numbers as long as they get."""
    console = Console(file=io.StringIO(), width=80)
    slow = comparison()
    for name, samples in slow.samples["pytorch"].items():
        slow.samples["pytorch"][name] = [
            replace(one, seconds=2.5 * one.seconds, token_gaps=[2.5]) for one in samples
        ]
    report.print_report(console, slow)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    names = [line.strip().split(",")[0] for line in lines if ", ms" in line]
    count = len(slow.metrics())
    assert len(names) == 3 * count and names[:count] == names[count : 2 * count]
    assert names[:count] == names[2 * count :]


def test_without_the_compiled_backend_the_report_says_why() -> None:
    console = Console(file=io.StringIO(), width=80)
    without = comparison(compiled=False)
    without.about["left_out"][COMPILED] = "torch.compile failed: [no] C++ compiler"
    report.print_report(console, without)
    *_, last = console.file.getvalue().splitlines()
    assert last == (
        "not measured: PyTorch, U-Net compiled: torch.compile failed: [no] C++ compiler"
    )
    assert "against PyTorch with its fastest MMFS" not in console.file.getvalue()
    assert "speedup over compiled" not in without.to_json()["metrics"]["whole document"]


def test_cpu_time_is_named_and_has_no_measures_of_stages() -> None:
    """Backends time their stages by the clock."""
    console, in_cpu_time = Console(file=io.StringIO(), width=80), comparison()
    in_cpu_time.about["clock"] = "cpu"
    report.print_report(console, in_cpu_time)
    assert " ".join(console.file.getvalue().split()).endswith("3 repeats in turns; CPU time")
    stages = {"encoding the images", "prefill"}
    assert not stages & in_cpu_time.to_json()["metrics"].keys()
    assert stages < comparison().to_json()["metrics"].keys()


@pytest.mark.parametrize(("model", "goal"), [("released_small", "15"), ("released_large", "8")])
def test_the_released_reading_has_goals_of_its_own(model: str, goal: str) -> None:
    one_turn = comparison()
    one_turn.about["model"] = model
    cases = (replace(PLAN.cases[0], turns=1), *PLAN.cases[1:])
    console = Console(file=io.StringIO(), width=80)
    report.print_report(console, replace(one_turn, plan=Plan(cases, 3)))
    lines = console.file.getvalue().splitlines()
    turn = next(line for line in lines if line.strip().startswith("whole turn"))
    assert turn.split()[-3:] == [">=", goal, "missed"]
    first = next(line for line in lines if line.strip().startswith("first token"))
    assert first.split()[-4:] == ["6.00", ">=", "2", "reached"]


def test_the_json_holds_every_raw_sample() -> None:
    written = json.loads(json.dumps(comparison().to_json()))
    assert written["metrics"]["whole document"]["speedup"]["median"] == 6.0
    assert written["metrics"]["whole document"]["speedup over compiled"]["median"] == 4.0
    assert written["metrics"]["encoding the images"]["runtime"]["median"] == 0.125
    assert written["metrics"]["prefill"]["pytorch"]["median"] == 0.75
    assert written["cost_of_images"]["pytorch"]["median"] == 2.0
    runs = written["samples"]["runtime"]["document"]
    assert [run["seconds"] for run in runs] == [1.0, 2.0, 3.0]
    assert runs[0]["token_gaps"] == [0.1]
    assert set(written["samples"]) == set(BACKENDS)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_plot_is_written_in_the_format_of_its_name(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"bench{suffix}"
    plot.draw(comparison(), path)
    start = path.read_bytes()[:200]
    assert b"<?xml" in start if suffix == ".svg" else start.startswith(b"\x89PNG")


def test_a_bundle_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(MmiError, match="there is no bundle"):
        compare.run(tmp_path / "none", tmp_path)


@pytest.mark.parametrize("before", ["", "echo '{\"load_seconds\": 1}'; exec <&-; "])
def test_a_backend_that_is_killed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """While it loads, or while it waits for a case."""
    monkeypatch.setattr(remote.sys, "executable", str(tmp_path / "killed"))
    (tmp_path / "killed").write_text(f"#!/bin/sh\n{before}kill -9 $$\n")
    (tmp_path / "killed").chmod(0o755)
    settings = Settings(tmp_path, tmp_path, "ddim:20", 1, None, False)
    killed = pytest.raises(MmiError, match="pytorch backend .* signal 9")
    with killed, Remote("pytorch", settings) as backend:
        backend._process.wait()
        backend.run(PLAN.cases[0])


def test_an_error_of_a_backend_reaches_the_caller_as_its_line(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "none", tmp_path, "ddim:20", 1, None, False)
    with pytest.raises(MmiError, match="there is no bundle"), Remote("runtime", settings):
        pass


@pytest.mark.parametrize(
    ("backend", "answered"), [(COMPILED, True), (PYTORCH, False), (RUNTIME, False)]
)
def test_only_the_compiled_backend_answers_an_error_of_its_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: BackendName, answered: bool
) -> None:
    """In one line, for `left_out`; elsewhere the error is a fault and is raised."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(worker.Bundle, "open", fail)
    settings, answers = Settings(tmp_path, tmp_path, "ddim:20", 1, None, False), io.StringIO()
    if not answered:
        with pytest.raises(RuntimeError, match="no C"):
            worker.serve(backend, settings, io.StringIO(), answers)
        return
    worker.serve(backend, settings, io.StringIO(), answers)
    (line,) = answers.getvalue().splitlines()
    message = "torch.compile failed: RuntimeError: no C++ compiler"
    assert json.loads(line) == {"error": message}


def test_a_name_that_is_no_backend_is_refused() -> None:
    assert [backend_name(name) for name in BACKENDS] == list(BACKENDS)
    with pytest.raises(ValueError, match="'torch'"):
        backend_name("torch")
