"""One target on a GPU beside the portable graphs in ONNX Runtime: graph by graph, whole documents,
and how long everything takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmi_bench.compare.cases import DOCUMENT, IMAGES, Case
from mmi_bench.compare.samples import Output, Sample, take
from mmi_bench.statistics import Spread
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.manifest import PORTABLE
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.parity import Proof
from mmi_deploy.runtime.events import Event, ImageDone
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.tensorrt.backend import TensorRtBackend
from mmi_deploy.spec.backends import NONE
from mmi_deploy.targets.verify_target import (
    compare_target,
    write_receipts,
)

EXACT = "fp32"
"""The precision whose documents must be those of the CPU; a narrower one may choose another word
where two are as likely."""

Detail = tuple[str, dict[str, Any]]


@dataclass
class Tried:
    """A target, open on a GPU. `again(record)` opens it once more, with or without CUDA graphs."""

    bundle: Bundle
    precision: str
    target: TensorRtBackend
    runtime: Runtime
    again: Callable[[bool], TensorRtBackend]

    @classmethod
    def open(cls, bundle: Bundle, precision: str, make: Callable[[bool], TensorRtBackend]) -> Tried:
        target = make(True)
        return cls(bundle, precision, target, Runtime.from_backend(bundle, target), make)


def compare(tried: Tried) -> tuple[str, dict[str, Any], list[Proof]]:
    """Every graph on recorded and random inputs, as `mmi verify` compares them; writes the receipts
    into the target. A line, all errors, and the proofs."""
    proofs = compare_target(tried.bundle, tried.target.manifest, tried.runtime)
    tried.target.manifest = write_receipts(tried.bundle, tried.target.manifest, proofs)
    detail = {proof.graph: [asdict(case) for case in proof.cases] for proof in proofs}
    line = ", ".join(f"{proof.graph} {proof.error:.1e}" for proof in proofs)
    return f"relative rms at worst: {line}", {"cases": detail}, proofs


def document(tried: Tried) -> Detail:
    """A whole document on both: text and pictures, greedy and with the same noise."""
    case = case_for(tried)
    schedule = tried.bundle.schedules[0]
    on_cpu = Runtime.open(tried.bundle, target=PORTABLE, kernels=NONE)
    (_, expected), (_, got) = (_taken(r, case, schedule)[:2] for r in (on_cpu, tried.runtime))
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
            "another number of pictures", expected=len(expected.pictures), got=len(got.pictures)
        )
    if tried.precision == EXACT and not (same and max(differences, default=0) <= 1):
        raise EngineError(
            "the document is not the one that ONNX Runtime makes",
            expected="equal text, pixels within 1/255",
            got=line,
        )
    return line, detail


def measure(tried: Tried, repeats: int) -> Detail:
    """Whole documents with CUDA graphs and without: stages, tokens, steps, first token and
    picture."""
    case, schedule = case_for(tried), tried.bundle.schedules[0]
    detail: dict[str, Any] = {"case": case.to_json(), "schedule": schedule, "repeats": repeats}
    lines = []
    for record in (True, False):
        runtime = (
            tried.runtime if record else Runtime.from_backend(tried.bundle, tried.again(False))
        )
        _taken(runtime, case, schedule)  # to warm up
        taken = [_taken(runtime, case, schedule) for _ in range(repeats)]
        recorded = runtime.recordings()
        numbers = _numbers([sample for sample, _, _ in taken], [first for *_, first in taken])
        detail["cuda graphs" if record else "without"] = numbers | recorded
        decode, step = (numbers[name]["median"] for name in ("per token", "per step"))
        lines.append(f"{1 / decode:.1f} tokens/s and {1000 * step:.2f} ms per step")
        if not record:
            runtime.close()
    return f"{lines[0]}; without CUDA graphs {lines[1]}", detail


def case_for(tried: Tried) -> Case:
    """The benchmark's document, or a shorter one where the bundle is too small for it."""
    config, context = tried.bundle.config, tried.runtime.limits.context
    room = tried.runtime.limits.images
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
    """One run of a case, and when its first picture was there."""
    first: list[float] = []
    start = time.perf_counter()

    def watched(events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            if isinstance(event, ImageDone) and not first:
                first.append(time.perf_counter() - start)
            yield event

    given = case.document(runtime.tokenizer, runtime.config)
    sample, output = take(watched(generate(runtime, given, case.options(schedule))))
    return sample, output, first[0]


def _numbers(samples: list[Sample], firsts: list[float]) -> dict[str, Any]:
    """Seconds: median, quartiles and extremes of each thing that was measured."""
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
    return {name: Spread.of(seconds).to_json() for name, seconds in named.items()}


def _gaps(found: list[list[float]], stage: list[float]) -> list[float]:
    """From one to the next, as a person sees them; of documents too short for that, the stage."""
    return [gap for gaps in found for gap in gaps] or stage


def _alike(some: str, other: str) -> int:
    """Characters at the beginning that are the same."""
    pairs = zip(some, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(some), len(other)))
