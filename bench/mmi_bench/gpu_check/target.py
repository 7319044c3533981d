"""Compare a target on a GPU with the portable graphs in ONNX Runtime, and measure latencies.

Comparisons are graph by graph and of a whole document.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mmi_bench.compare.cases import DOCUMENT, IMAGES, Case
from mmi_bench.compare.samples import Output, Sample, take
from mmi_bench.statistics import Statistics
from mmi_deploy.analysis.gpu_specs import GPUS, Gpu
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.manifest import PORTABLE
from mmi_deploy.errors import ConfigError, EngineError, MmiError
from mmi_deploy.parity import Proof
from mmi_deploy.runtime.events import Event, ImageDone
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.tensorrt.backend import TensorRtBackend
from mmi_deploy.spec.backends import NONE
from mmi_deploy.targets.sample_inputs import Sample as SampleInputs
from mmi_deploy.targets.verify_target import (
    compare_target,
    write_receipts,
)

# Precision whose documents must equal those of the CPU; rounding in a narrower one may decide
# between two words of nearly equal probability.
EXACT = "fp32"

# Stage of a document -> graph whose weights it reads once.
STAGE_GRAPHS = {"decode": "llm", "denoise": "denoise_step", "vae": "vae_decoder"}

# Words of a data sheet's title that name the model; and those of variants of the same name with
# another bandwidth.
_MODELS = {"orin", "l4", "l40s", "4090", "5090", "a100", "h100", "h200", "b200"}
_OTHER_BANDWIDTH = {"laptop", "pcie", "nvl", "d"}

# Line for people, and all numbers.
Detail = tuple[str, dict[str, Any]]


@dataclass
class OpenTarget:
    """Target that is open on a GPU. `reopen(record)` opens it anew, with or without CUDA graphs."""

    bundle: Bundle
    precision: str
    backend: TensorRtBackend
    runtime: Runtime
    reopen: Callable[[bool], TensorRtBackend]

    @classmethod
    def open(
        cls, bundle: Bundle, precision: str, make: Callable[[bool], TensorRtBackend]
    ) -> OpenTarget:
        backend = make(True)
        return cls(bundle, precision, backend, Runtime.from_backend(bundle, backend), make)


class CheckFailed(MmiError):
    """A step that failed, with the numbers that it has found."""

    def __init__(self, line: str, detail: dict[str, Any]) -> None:
        super().__init__(line)
        self.detail = detail


def compare(
    opened: OpenTarget, samples: Mapping[str, Sequence[SampleInputs]] | None = None
) -> tuple[str, dict[str, Any], list[Proof]]:
    """Compare every graph on recorded and random inputs, as `mmi verify` does, or on `samples`, and
    write the receipts into the target. Returns a line, all errors, and the proofs."""
    manifest = opened.backend.manifest
    proofs = compare_target(opened.bundle, manifest, opened.runtime, samples=samples)
    opened.backend.manifest = write_receipts(opened.bundle, opened.backend.manifest, proofs)
    detail = {proof.graph: [asdict(case) for case in proof.cases] for proof in proofs}
    line = ", ".join(f"{proof.graph} {proof.error:.1e}" for proof in proofs)
    return f"relative rms at worst: {line}", {"cases": detail}, proofs


def document(opened: OpenTarget) -> Detail:
    """Generate a document on GPU and CPU, greedy and with the same noise, and compare both."""
    case = case_for(opened)
    schedule = opened.bundle.schedules[0]
    on_cpu = Runtime.open(opened.bundle, target=PORTABLE, kernels=NONE)
    (_, expected), (_, got) = (_taken(r, case, schedule)[:2] for r in (on_cpu, opened.runtime))
    pairs = list(zip(expected.pictures, got.pictures, strict=False))
    differences = [int(np.abs(a.astype(int) - b).max()) for a, b in pairs]
    same, alike = expected.text == got.text, _alike(expected.text, got.text)
    detail = {
        "text_equal": same,
        "characters_alike": alike,
        "pictures": len(got.pictures),
        "pixel_differences": differences,
        "cpu_text": expected.text,
        "gpu_text": got.text,
    }
    line = (
        f"{'the same text' if same else f'the same text for {alike} characters'} and "
        f"{len(got.pictures)} pictures, pixels within {max(differences, default=0)}/255"
    )
    if len(got.pictures) != len(expected.pictures):
        raise EngineError(
            "the GPU draws another number of pictures",
            expected=len(expected.pictures),
            got=len(got.pictures),
        )
    if opened.precision == EXACT and not (same and max(differences, default=0) <= 1):
        raise EngineError(
            "the document differs from that of ONNX Runtime",
            expected="equal text, pixels within 1/255",
            got=line,
        )
    return line, detail


def measure(opened: OpenTarget, repeats: int) -> Detail:
    """Measure documents with and without CUDA graphs: stages, tokens, steps, first token and
    picture."""
    case, schedule = case_for(opened), opened.bundle.schedules[0]
    detail: dict[str, Any] = {"case": case.to_json(), "schedule": schedule, "repeats": repeats}
    lines = []
    for record in (True, False):
        runtime = (
            opened.runtime if record else Runtime.from_backend(opened.bundle, opened.reopen(False))
        )
        _taken(runtime, case, schedule)  # warm-up
        free, _ = opened.backend.memory.gpu.memory()
        taken = [_taken(runtime, case, schedule) for _ in range(repeats)]
        recorded = runtime.recordings()
        numbers = _numbers([sample for sample, _, _ in taken], [first for *_, first in taken])
        detail["cuda graphs" if record else "without"] = numbers | recorded
        decode, step = (numbers[name]["median"] for name in ("per token", "per step"))
        lines.append(f"{1 / decode:.1f} tokens/s and {1000 * step:.2f} ms per step")
        if record:
            detail["sampled"] = _sampled(runtime, case, schedule, repeats)
            detail["limits"] = _limits(opened, numbers)
            detail["memory"] = {"free_bytes": free, "plan": opened.backend.plan().total}
        else:
            runtime.close()
    line = f"{lines[0]}; without CUDA graphs {lines[1]}"
    sampled = 1000 * (detail["sampled"]["median"] - detail["cuda graphs"]["per token"]["median"])
    line += f"; the default sampler adds {sampled:.2f} ms a token"
    if shares := [f"{name} {share:.0%}" for name, share in detail["limits"].items()]:
        line += f"; of the bandwidth limit: {', '.join(shares)}"
    if refused := detail["cuda graphs"]["refusals"]:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise CheckFailed(f"runs could not be recorded as CUDA graphs: {reasons}. {line}", detail)
    return line, detail


def _sampled(runtime: Runtime, case: Case, schedule: str, repeats: int) -> dict[str, float]:
    """Statistics of the seconds per token with the default sampler, which draws at random."""
    default = GenerationOptions()
    options = replace(
        case.options(schedule),
        temperature=default.temperature,
        top_p=default.top_p,
        top_k=default.top_k,
    )
    gaps = []
    for _ in range(repeats):
        given = case.document(runtime.tokenizer, runtime.config)
        sample, _ = take(generate(runtime, given, options))
        gaps += _gaps([sample.token_gaps], sample.stages["decode"])
    return Statistics.of(gaps).to_json()


def _limits(opened: OpenTarget, numbers: Mapping[str, Any]) -> dict[str, float]:
    """Share of the GPU's memory bandwidth that each stage reaches: the time in which its engine's
    weights can be read once, to that on the GPU. Empty for a GPU without a data sheet."""
    sheet = data_sheet(opened.backend.memory.gpu.name, opened.backend.memory.gpu.memory()[1])
    if sheet is None:
        return {}
    found = {}
    for stage, graph in STAGE_GRAPHS.items():
        if f"stage {stage}" in numbers and graph in opened.backend.manifest.graphs:
            file = opened.backend.manifest.graphs[graph]
            least = opened.backend.manifest.files[file].size / sheet.bandwidth
            found[stage] = least / numbers[f"stage {stage}"]["median"]
    return found


def data_sheet(name: str, memory: int) -> Gpu | None:
    """Data sheet of a GPU by the name that its driver gives, and its memory in bytes."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    if words & _OTHER_BANDWIDTH:
        return None
    found = [
        gpu
        for gpu in GPUS.values()
        # The model's own word: `l40s`, `4090`, `orin`.
        if any(w in words and w in _MODELS for w in re.findall(r"[a-z0-9]+", gpu.title.lower()))
    ]
    return min(found, key=lambda gpu: abs(gpu.memory - memory), default=None)


def case_for(opened: OpenTarget) -> Case:
    """Choose the largest benchmark document that fits the bundle."""
    config, context = opened.bundle.config, opened.runtime.limits.context
    room = opened.runtime.limits.images
    for images, turns, tokens in ((IMAGES, 3, 16), (1, 1, 4), (0, 1, 2)):
        case = Case(DOCUMENT, images, 8 * images, tokens, turns)
        if case.length(config) <= context and images + turns <= room:
            return case
    raise ConfigError(
        "the bundle is too small for a document with a picture",
        got=f"{context} tokens",
        fix="export it with a larger --context",
    )


def _taken(runtime: Runtime, case: Case, schedule: str) -> tuple[Sample, Output, float]:
    """Run a case once; also return the seconds to its first picture."""
    first: list[float] = []
    start = time.perf_counter()

    def timed(events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            if isinstance(event, ImageDone) and not first:
                first.append(time.perf_counter() - start)
            yield event

    given = case.document(runtime.tokenizer, runtime.config)
    sample, output = take(timed(generate(runtime, given, case.options(schedule))))
    return sample, output, first[0]


def _numbers(samples: list[Sample], firsts: list[float]) -> dict[str, Any]:
    """Statistics of every measure, in seconds."""
    stages: Mapping[str, list[float]] = {
        stage: [s for sample in samples for s in sample.stages[stage]]
        for stage in samples[0].stages
    }
    whole = {
        "whole document": [sample.seconds for sample in samples],
        "first token": [sample.first_token for sample in samples],
        "first picture": firsts,
        "per token": _gaps([sample.token_gaps for sample in samples], stages["decode"]),
        "per step": _gaps([sample.step_gaps for sample in samples], stages["denoise"]),
    }
    named = whole | {f"stage {stage}": seconds for stage, seconds in stages.items()}
    return {name: Statistics.of(seconds).to_json() for name, seconds in named.items()}


def _gaps(found: list[list[float]], stage: list[float]) -> list[float]:
    """Gaps between events; for documents too short for gaps, the times of the stage."""
    return [gap for gaps in found for gap in gaps] or stage


def _alike(some: str, other: str) -> int:
    """Length of the common prefix, in characters."""
    pairs = zip(some, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(some), len(other)))
