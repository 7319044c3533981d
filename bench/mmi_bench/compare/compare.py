"""Compare the backends: they take turns on the same cases, in one run, on this machine."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmi_bench.compare.backends import COMPILED, LABELS, PYTORCH, RUNTIME, BackendName, Settings
from mmi_bench.compare.cases import DOCUMENT, TEXT, Case, Plan, plan, text_after
from mmi_bench.compare.remote import Answer, Remote
from mmi_bench.compare.samples import ClockName, Output, Sample
from mmi_bench.machine import describe
from mmi_bench.statistics import Statistics, ratios
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.spec.backends import CPU
from mmi_deploy.spec.config import to_json
from mmi_deploy.system.progress import Progress, silent

# Denoising steps of a picture, unless a schedule is given by name.
STEPS = 20


@dataclass(frozen=True)
class Metric:
    """One measure of the result: seconds of every repeat by backend, measured in turns."""

    name: str
    seconds: dict[BackendName, tuple[float, ...]]

    def of(self, backend: BackendName) -> Statistics:
        """Seconds of a backend."""
        return Statistics.of(self.seconds[backend])

    def speedup(self, over: BackendName = PYTORCH) -> Statistics:
        """Time of the backend `over` over that of the runtime."""
        return ratios(self.seconds[over], self.seconds[RUNTIME])

    def to_json(self) -> dict[str, Any]:
        report: dict[str, Any] = {"unit": "seconds"}
        report |= {backend: self.of(backend).to_json() for backend in self.seconds}
        report["speedup"] = self.speedup().to_json()
        if COMPILED in self.seconds:
            report["speedup over compiled"] = self.speedup(COMPILED).to_json()
        return report


@dataclass(frozen=True)
class Comparison:
    """All samples by backend and case, with their provenance in `about`."""

    about: dict[str, Any]
    plan: Plan
    samples: dict[BackendName, dict[str, list[Sample]]]
    peak_bytes: dict[BackendName, int]
    load_seconds: dict[BackendName, float]
    pixel_difference: int

    @property
    def backends(self) -> tuple[BackendName, ...]:
        """Backends that were measured, the runtime first."""
        return tuple(self.samples)

    @property
    def image_counts(self) -> list[int]:
        """Numbers of images in context for which the time per token was measured."""
        return [case.images for case in self.plan.cases if case.name == text_after(case.images)]

    def metrics(self) -> list[Metric]:
        """All measures, most important first."""
        whole = "whole document" if self.plan.drawing.turns > 1 else "whole turn"
        return [
            self._metric(whole, DOCUMENT, lambda sample: sample.seconds),
            self._metric("the same without drawing", TEXT, lambda sample: sample.seconds),
            self._metric("time to first token", DOCUMENT, lambda sample: sample.first_token),
            self._metric("per token", TEXT, lambda sample: sample.per_token),
            self._metric("per denoising step", DOCUMENT, lambda sample: sample.per_step),
            *(self._stages() if self.about["clock"] == "wall" else ()),
            *(self.per_token(images) for images in self.image_counts),
        ]

    def _stages(self) -> list[Metric]:
        """Measures of stages, which the backends time themselves, by the wall clock."""
        return [
            self._metric("encoding the images", TEXT, lambda sample: sample.stage("encode")),
            self._metric("prefill", TEXT, lambda sample: sample.stage("prefill")),
        ]

    def per_token(self, images: int) -> Metric:
        """Seconds per token with `images` images in context."""
        name = f"per token, {images} image{'s' * (images != 1)} in context"
        return self._metric(name, text_after(images), lambda sample: sample.per_token)

    def cost_of_images(self, backend: BackendName) -> Statistics:
        """Time per token with the most images over that with none, at equal context."""
        most, none = (
            [sample.per_token for sample in self.samples[backend][text_after(images)]]
            for images in (max(self.image_counts), min(self.image_counts))
        )
        return ratios(most, none)

    def _metric(self, name: str, case: str, of: Callable[[Sample], float]) -> Metric:
        return Metric(
            name,
            {
                backend: tuple(of(sample) for sample in cases[case])
                for backend, cases in self.samples.items()
            },
        )

    def to_json(self) -> dict[str, Any]:
        """Comparison as JSON, raw samples included."""
        return {
            "about": self.about,
            "cases": [case.to_json() for case in self.plan.cases],
            "metrics": {metric.name: metric.to_json() for metric in self.metrics()},
            "cost_of_images": {
                backend: self.cost_of_images(backend).to_json() for backend in self.backends
            },
            "peak_bytes": self.peak_bytes,
            "load_seconds": self.load_seconds,
            "pixel_difference": self.pixel_difference,
            "samples": {
                backend: {name: [s.to_json() for s in samples] for name, samples in cases.items()}
                for backend, cases in self.samples.items()
            },
        }


def run(
    bundle: Path,
    model: Path,
    *,
    threads: int = 2,
    repeats: int = 7,
    quick: bool = False,
    schedule: str | None = None,
    library: Path | None = None,
    unproved: bool = False,
    target: str = CPU,
    device: int = 0,
    one_turn: bool = False,
    compiled: bool = False,
    clock: ClockName = "wall",
    teacher: Path | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Measure the runtime on `bundle` against PyTorch on the folder `model` it was exported from.

    Both get the same threads, fp32 weights, solver, guidance and forced counts. `schedule`: a
    sampler of the bundle; None for its first one of 20 steps, of a distilled model its first.
    `library`: kernel library of the runtime; None to run MMFS as standard operators. `target`:
    engines of the runtime, on GPU `device` if they are for a GPU; PyTorch stays on the CPU.
    `quick`: short documents and two repeats, a smoke test. `one_turn`: as in `plan`. `compiled`:
    measure PyTorch with a compiled U-Net as well; where that fails, `about["left_out"]` says why.
    `clock`: `cpu` measures CPU time, which other work on the machine changes little, in place of
    latency. `teacher`: the model that `model` was distilled from; PyTorch runs it in 20 steps with
    both branches, and only the amounts of text and pictures are compared. Raises `MmiError` if
    another backend fails, or if their outputs differ.
    """
    opened = Bundle.open(bundle, unproved=unproved)
    if teacher is not None and opened.config.image_decoder.distillation is None:
        raise ConfigError(f"{bundle} is not distilled, and has no teacher", fix="omit --teacher")
    key = _schedule(opened, schedule)
    work = plan(opened.config, opened.limits.context, 2 if quick else repeats, quick, one_turn)
    own = f"unipc:{STEPS}" if teacher is not None else ""
    settings = Settings(
        bundle, model, key, threads, library, unproved, target, device, clock, teacher, own
    )
    left_out: dict[BackendName, str] = {}
    about = {
        "argv": sys.argv,
        "quick": quick,
        "threads": threads,
        "clock": clock,
        "repeats": work.repeats,
        "schedule": key,
        **({"teacher": str(teacher), "teacher_schedule": own} if teacher is not None else {}),
        "guidance": opened.config.image_decoder.guidance_of(None),
        "precision": "float32",
        "target": target,
        "model": opened.config.name,
        "config_sha256": hashlib.sha256(to_json(opened.config).encode()).hexdigest(),
        "bundle_sha256": opened.identity,
        "bundle_targets": list(opened.targets),
        "kernels": library.parent.name if library else None,
        "left_out": left_out,
        "machine": describe(),
    }
    with ExitStack() as stack:
        backends = (RUNTIME, PYTORCH, *((COMPILED,) if compiled else ()))
        remotes = {backend: stack.enter_context(Remote(backend, settings)) for backend in backends}
        answers, difference = _measure(
            remotes, work, progress, settings.exact, left_out, same=teacher is None
        )
        return Comparison(
            about,
            work,
            {
                backend: {name: [answer.sample for answer in runs] for name, runs in cases.items()}
                for backend, cases in answers.items()
            },
            {backend: _peak(cases) for backend, cases in answers.items()},
            {backend: remotes[backend].load_seconds for backend in answers},
            difference,
        )


Answers = dict[BackendName, dict[str, list[Answer]]]


def _measure(
    remotes: Mapping[BackendName, Remote],
    work: Plan,
    progress: Progress,
    exact: bool = True,
    left_out: dict[BackendName, str] | None = None,
    same: bool = True,
) -> tuple[Answers, int]:
    """Run a warm-up round of all cases, then `repeats` rounds; backends alternate in order.

    If the compiled backend fails while it warms up, which is when it compiles, the others go on
    without it; `left_out` gets the reason. `same`: their outputs must be.
    """
    answers: Answers = {backend: {case.name: [] for case in work.cases} for backend in remotes}
    total = len(work.cases) * (work.repeats + 1)
    difference = 0
    for round_ in range(work.repeats + 1):
        what = "measuring" if round_ else "warming up"
        for index, case in enumerate(work.cases):
            order = list(answers) if round_ % 2 else list(answers)[::-1]
            got: dict[BackendName, Answer] = {}
            for backend in order:
                compiles = backend == COMPILED and not round_
                doing = "compiling, then " if compiles and case.turns else ""
                progress(
                    what,
                    round_ * len(work.cases) + index,
                    total,
                    detail=f"{case.name}: {doing}{LABELS[backend]}",
                )
                try:
                    got[backend] = remotes[backend].run(case)
                except MmiError as error:
                    if not compiles or left_out is None:
                        raise
                    left_out[backend] = str(error)
                    del answers[backend]
            for backend, answer in got.items():
                if backend != RUNTIME and same:
                    difference = max(
                        difference, _same(case, got[RUNTIME].output, answer.output, exact)
                    )
                if round_:
                    answers[backend][case.name].append(answer)
    return answers, difference


def _same(case: Case, runtime: Output, pytorch: Output, exact: bool) -> int:
    """Compare outputs; return the largest difference of a pixel, of 255. Raises `MmiError` if they
    differ. Not `exact`: text may differ, as rounding decides between words of equal probability."""
    pairs = list(zip(runtime.pictures, pytorch.pictures, strict=False))
    difference = max((int(np.abs(a.astype(int) - b).max()) for a, b in pairs), default=0)
    same_count = len(pairs) == len(runtime.pictures) == len(pytorch.pictures)
    if same_count and (not exact or (runtime.text == pytorch.text and difference <= 1)):
        return difference
    raise MmiError(
        f"outputs of two backends differ for {case.name!r}: nothing to compare",
        expected="equal text, pixels within 1/255",
        got=f"{'equal' if runtime.text == pytorch.text else 'different'} text, "
        f"{difference}/255 in {len(pairs)} pictures",
        fix="export the bundle again from this model",
    )


def _schedule(bundle: Bundle, asked: str | None) -> str:
    if asked is not None:
        return bundle.schedule(asked).key
    if bundle.config.image_decoder.distillation is not None:
        return bundle.schedules[0]
    for key in bundle.schedules:
        if key.endswith(f":{STEPS}"):
            return key
    raise ConfigError(
        f"{bundle.folder} has no schedule of {STEPS} steps",
        got=", ".join(bundle.schedules),
        fix=f"choose one with --schedule, or export with --schedule unipc:{STEPS}",
    )


def _peak(cases: dict[str, list[Answer]]) -> int:
    return max(answer.peak_bytes for runs in cases.values() for answer in runs)
