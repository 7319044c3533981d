"""Receipts of answers: the quality of a target beside another one, on questions of a benchmark.

A receipt of a graph bounds the error of its outputs. This one says what that error does to whole
answers: the paired difference of each metric, from a file that `mmi evaluate --predictions A
--against B -o FILE` wrote of two files of answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.manifest import AnswerDifference, AnswerReceipt, Shown, TargetManifest
from mmi_deploy.errors import BundleError, ConfigError
from mmi_deploy.spec.config import first_flaw
from mmi_deploy.system.files import open_regular
from mmi_deploy.targets.rewriting import rewrite_target

# Largest file that is read, in bytes.
_MOST = 1 << 24


# Fewest answers of a receipt: the bootstrap's interval of fewer questions is too narrow.
LEAST_ANSWERS = 100

# What may differ between the two runs: who answers. All else that both say must be the same.
_WHO = ("bundle", "model", "target", "engines")


class _Fields(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Run(_Fields):
    """Bundle, target and engines that gave the answers of a file, or the model folder that PyTorch
    ran; the other settings of the run are kept beside."""

    model_config = ConfigDict(extra="allow", frozen=True)

    target: Shown
    bundle: str | None = None
    engines: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {key: value for key, value in self.model_dump().items() if key not in _WHO}


class _Against(_Fields):
    differences: dict[Shown, AnswerDifference]
    answers: int
    different: int
    missing: int
    run: _Run | None = None


class _Comparison(_Fields):
    benchmark: Shown
    split: Shown
    missing: int
    against: _Against
    run: _Run | None = None


def read_comparison(path: Path, bundle: Bundle, manifest: TargetManifest) -> AnswerReceipt:
    """The receipt that the comparison in `path` gives the engines of `manifest`.

    Raises `ConfigError` for another file, for answers of another bundle, target or build, for
    answers to other questions or with other settings than those of the other target, and for
    questions that one of them left out.
    """
    found = _read(path)
    run, other = found.run, found.against.run
    if run is None or other is None:
        raise ConfigError(
            f"{path} does not say which targets gave the answers",
            fix="score the files where `mmi evaluate --benchmark` of bundles wrote them",
        )
    answered = (
        f"`mmi evaluate BUNDLE --benchmark NAME --data DIR --target {manifest.target} "
        "-o FILE.jsonl`"
    )
    if run.target != manifest.target:
        raise ConfigError(
            f"{path} is about answers of another target",
            expected=manifest.target,
            got=run.target,
            fix=f"answer the benchmark with this one: {answered}",
        )
    for what, own, expected in (
        ("bundle", run.bundle, bundle.identity),
        ("build of the engines", run.engines, manifest.engines),
    ):
        if own != expected:
            raise ConfigError(
                f"{path} is about answers of another {what}",
                expected=f"{expected:.16}",
                got=f"{own!s:.16}",
                fix=f"answer the benchmark with this one: {answered}",
            )
    same = other.bundle == bundle.identity
    if same and other.target == manifest.target:
        raise ConfigError(f"{path} compares {manifest.target} with itself")
    _check_questions(path, found, run, other)
    if other.bundle is None:
        against = f"{other.target} of a model folder"
    else:
        against = other.target if same else f"{other.target} of bundle {other.bundle[:16]}"
    try:
        return AnswerReceipt(
            benchmark=found.benchmark,
            split=found.split,
            against=against,
            sha256=manifest.engines,
            answers=found.against.answers,
            different=found.against.different,
            differences=found.against.differences,
        )
    except ValidationError as error:
        raise ConfigError(f"{path} cannot be right: {first_flaw(error)}") from None


def _check_questions(path: Path, found: _Comparison, run: _Run, other: _Run) -> None:
    """Raise `ConfigError` unless both answered all of the same questions in the same way."""
    own, others = run.settings, other.settings
    about = {"benchmark": found.benchmark, "split": found.split, "shard": "1/1"}
    for settings in (own, others):
        for name, expected in about.items():
            if (got := settings.get(name, expected)) != expected:
                raise ConfigError(
                    f"the answers of {path} are of another {name}",
                    expected=expected,
                    got=f"{got!s:.100}",
                    fix="answer all questions of the split in one run",
                )
    other_ways = [name for name in sorted(own.keys() & others.keys()) if own[name] != others[name]]
    if other_ways:
        raise ConfigError(
            f"the two runs of {path} answered with other settings",
            got=f"{', '.join(other_ways):.200}",
            fix="answer with the same settings, so that the targets alone differ",
        )
    if left_out := found.missing + found.against.missing:
        raise ConfigError(
            f"{left_out} answers are missing in {path}",
            fix="go on with the runs until every question is answered",
        )
    if found.against.answers < LEAST_ANSWERS:
        raise ConfigError(
            f"{path} has too few answers for an interval that can be relied on",
            expected=f"at least {LEAST_ANSWERS}",
            got=found.against.answers,
        )


def _read(path: Path) -> _Comparison:
    fix = "write one with `mmi evaluate --predictions A --against B … -o FILE`"
    try:
        with open_regular(path) as file:
            value = json.loads(file.read(_MOST))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", fix=fix) from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path} is no comparison of two files of answers", fix=fix) from None
    try:
        return _Comparison.model_validate(value)
    except ValidationError as error:
        raise ConfigError(
            f"{path} is no comparison of two files of answers: {first_flaw(error)}", fix=fix
        ) from None


def write_answers(bundle: Bundle, manifest: TargetManifest, receipt: AnswerReceipt) -> None:
    """Put the receipt into the target's manifest, atomically, in the place of one of the same
    benchmark and split, and of those of earlier builds. Raises `BundleError` where the target has
    been rebuilt since `manifest` was read."""
    key = receipt.benchmark, receipt.split

    def with_receipt(present: TargetManifest) -> TargetManifest:
        if present.engines != manifest.engines:
            raise BundleError(
                f"{manifest.target} was built again meanwhile",
                fix="answer the benchmark with the new engines",
            )
        kept = [one for one in present.valid_answers if (one.benchmark, one.split) != key]
        return present.model_copy(update={"answers": (*kept, receipt)})

    rewrite_target(bundle, manifest.target, with_receipt)
