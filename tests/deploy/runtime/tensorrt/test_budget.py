"""Budget of CUDA calls: what a token, a denoising step, a prefill and a picture may cost.

`cuda_budget.json` holds the counts on the fake GPU, which may only fall: whoever saves a call
writes the lower number. The counts: `allocations` and `frees` of device or pinned memory;
`waits`, in which the host waits for the device (a free is one as well); `to_device`, `to_host` and
`within`, copies; `fills`; `enqueues`, runs of engines kernel by kernel; `replays` of recordings;
`calls` of CUDA's runtime in all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deploy.runtime.fake_model import fake_config, picture
from deploy.runtime.tensorrt.fake_cuda import FakeCuda, cudaMemcpyKind
from deploy.runtime.tensorrt.gpu_targets import Machine, add_target, fake_bundle, machine
from mmi_deploy.runtime.session import Session
from mmi_deploy.spec.graphs import Limits

LIMITS = Limits(context=64, images=9)

BUDGET: dict[str, dict[str, int]] = json.loads(
    (Path(__file__).parent / "cuda_budget.json").read_text()
)
COUNTS = ("allocations", "frees", "waits", "to_device", "to_host", "within", "fills", "enqueues",
          "replays", "calls")  # fmt: skip
KINDS = {
    "cudaMalloc": "allocations",
    "cudaMallocHost": "allocations",
    "cudaEventCreate": "allocations",
    "cudaFree": "frees",
    "cudaFreeHost": "frees",
    "cudaStreamSynchronize": "waits",
    "cudaEventSynchronize": "waits",
    "cudaMemsetAsync": "fills",
    "cudaGraphLaunch": "replays",
}
COPIES = {
    cudaMemcpyKind.cudaMemcpyHostToDevice: "to_device",
    cudaMemcpyKind.cudaMemcpyDeviceToHost: "to_host",
    cudaMemcpyKind.cudaMemcpyDeviceToDevice: "within",
}


def counted(gpu: Machine, work: Callable[[], object]) -> dict[str, int]:
    """Counts of what `work` calls."""
    cuda: FakeCuda = gpu.cuda
    first, used = len(cuda.calls), len(gpu.tensorrt.used)
    work()
    calls = cuda.calls[first:]
    found: Counter[str] = Counter(KINDS[name] for name, _ in calls if name in KINDS)
    found.update(COPIES[words[3]] for name, words in calls if name == "cudaMemcpyAsync")
    runs = [name for _, name, _ in gpu.tensorrt.used[used:] if name == "execute_async_v3"]
    found["enqueues"], found["calls"] = len(runs), len(calls)
    return {name: found[name] for name in COUNTS}


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Counts of each kind of work, in the state in which most of it is done: engines loaded, shapes
    known, runs recorded."""
    bundle = fake_bundle(tmp_path_factory.mktemp("budget") / "bundle", fake_config(), LIMITS)
    gpu = machine(bundle, add_target(bundle, "float32"))
    gpu.runtime.load()
    session = Session(gpu.runtime)
    tokens = gpu.runtime.config.tokens
    found: dict[str, dict[str, int]] = {}

    def text(*ids: int) -> None:
        session.append_text(ids)
        assert np.isfinite(session.next_logits()).all()

    def image() -> None:
        session.append_text([tokens.boi])
        session.append_image(picture(3))
        session.next_logits()

    def draw() -> None:
        session.draw("plain:4")
        session.next_logits()

    for _ in range(6):
        text(tokens.bos, 5, 6)
    found["prefill of 3 tokens"] = counted(gpu, lambda: text(5, 6, 7))
    for token in (5, 6, 7):
        text(token)
    found["token"] = counted(gpu, lambda: text(8))
    image()
    image()
    found["image and its prefill"] = counted(gpu, image)
    text(5, tokens.boi)
    draw()
    text(6, tokens.boi)
    steps: list[dict[str, int]] = []

    def drawing() -> None:
        run = session.draw_steps("plain:4", 1.0, 0)
        next(run)
        next(run)
        steps.append(counted(gpu, lambda: next(run)))
        for _ in run:
            pass

    drawing()
    found["denoising step"] = steps[0]
    draw()
    text(5, 6, 7, tokens.boi)
    draw()
    text(5, tokens.boi)
    found["picture of 4 steps"] = counted(gpu, lambda: session.draw("plain:4"))
    assert not gpu.cuda.faults
    return found


@pytest.mark.parametrize("work", list(BUDGET))
def test_no_work_costs_more_than_its_budget(costs: dict[str, dict[str, int]], work: str) -> None:
    got, budget = costs[work], BUDGET[work]
    more = {name: (budget[name], got[name]) for name in COUNTS if got[name] > budget[name]}
    assert not more, f"{work}: more than the budget (budget, counted): {more}"
    less = {name: (budget[name], got[name]) for name in COUNTS if got[name] < budget[name]}
    assert not less, f"{work}: fewer calls: write them into cuda_budget.json: {less}"


def test_the_budget_is_complete_and_lean(costs: dict[str, dict[str, int]]) -> None:
    """Bounds that no number in the file may exceed."""
    assert costs.keys() == BUDGET.keys()
    for counts in BUDGET.values():
        assert tuple(counts) == COUNTS
        assert counts["allocations"] == counts["frees"] == counts["fills"] == 0
    assert BUDGET["token"]["waits"] == 1, "for the logits"
    assert BUDGET["token"]["replays"] == 1 and BUDGET["token"]["enqueues"] == 0
    assert BUDGET["token"]["to_host"] == 1 and BUDGET["token"]["within"] == 1, "the hidden state"
    assert BUDGET["denoising step"]["waits"] == 1, "for the step before"
    assert BUDGET["denoising step"]["to_host"] == 0


def test_the_host_is_one_step_ahead_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is prepared while the device computes the one before, and no earlier."""
    bundle = fake_bundle(tmp_path / "bundle", fake_config(), LIMITS)
    gpu = machine(bundle, add_target(bundle, "float32"))
    session = Session(gpu.runtime)
    session.append_text([gpu.runtime.config.tokens.bos, 5, gpu.runtime.config.tokens.boi])
    steps = session.draw_steps("plain:4", 1.0, 0)
    next(steps)
    (stream,) = gpu.cuda.streams.values()
    assert stream.waiting, "nobody has waited for the first step"
    first = stream.waiting[-1]
    next(steps)
    assert stream.waiting and first not in stream.waiting
    steps.close()


def test_timings_are_those_of_the_device(tmp_path: Path) -> None:
    bundle = fake_bundle(tmp_path / "bundle", fake_config(), LIMITS)
    gpu = machine(bundle, add_target(bundle, "float32"))
    session = Session(gpu.runtime)
    session.append_text([gpu.runtime.config.tokens.bos, 5])
    session.next_logits()
    for _ in range(42):
        session.append_text([6])
        session.next_logits()
    runs = session.timings.runs
    assert [run.stage for run in runs] == ["prefill", *["decode"] * 42]
    assert all(run.seconds > 0 for run in runs) and [run.count for run in runs][:2] == [2, 1]
    assert session.timings.totals()["decode"][1] == 42
    # A few dozen runs are unread at a time: their events are used again.
    assert len(gpu.cuda.events) < 2 * len(runs)
