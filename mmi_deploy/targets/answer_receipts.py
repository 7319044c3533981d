"""Receipts of answers: the quality of a target beside another one, on questions of a benchmark.

A receipt of a graph bounds the error of its outputs. This one says what that error does to whole
answers: the paired difference of each metric, from a file that `mmi evaluate --predictions A
--against B -o FILE` wrote of two files of answers.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from mmi_deploy.bundle.bundle import TARGET_MANIFEST, Bundle
from mmi_deploy.bundle.manifest import (
    AnswerDifference,
    AnswerReceipt,
    TargetManifest,
    hash_of_files,
    manifest_text,
)
from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import first_flaw
from mmi_deploy.system.files import open_regular
from mmi_deploy.system.output_folder import rewrite_file

# Largest file that is read, in bytes.
_MOST = 1 << 24


class _Fields(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Run(_Fields):
    """Bundle, target and engines that gave the answers of a file."""

    bundle: str
    target: str
    engines: str | None


class _Against(_Fields):
    differences: dict[str, AnswerDifference]
    answers: int
    different: int
    run: _Run | None = None


class _Comparison(_Fields):
    benchmark: str
    split: str
    against: _Against
    run: _Run | None = None


def read_comparison(path: Path, bundle: Bundle, manifest: TargetManifest) -> AnswerReceipt:
    """The receipt that the comparison in `path` gives the engines of `manifest`. Raises
    `ConfigError` for another file, and for answers of another bundle, target or build."""
    found = _read(path)
    run, other = found.run, found.against.run
    if run is None or other is None:
        raise ConfigError(
            f"{path} does not say which targets gave the answers",
            fix="score the files where `mmi evaluate --benchmark` of bundles wrote them",
        )
    wanted = {
        "bundle": (run.bundle, bundle.identity),
        "target": (run.target, manifest.target),
        "build of the engines": (run.engines, hash_of_files(manifest.files)),
    }
    for what, (own, expected) in wanted.items():
        if own != expected:
            raise ConfigError(
                f"{path} is about answers of another {what}",
                expected=f"{expected:.16}",
                got=f"{own!s:.16}",
                fix="answer the benchmark with this one: `mmi evaluate BUNDLE --benchmark NAME "
                f"--data DIR --target {manifest.target} -o FILE.jsonl`",
            )
    same = other.bundle == bundle.identity
    if same and other.target == manifest.target:
        raise ConfigError(f"{path} compares {manifest.target} with itself")
    return AnswerReceipt(
        benchmark=found.benchmark,
        split=found.split,
        against=other.target if same else f"{other.target} of bundle {other.bundle[:16]}",
        sha256=hash_of_files(manifest.files),
        answers=found.against.answers,
        different=found.against.different,
        differences=found.against.differences,
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
    benchmark and split, and of those of earlier builds."""
    key = receipt.benchmark, receipt.split
    kept = [one for one in manifest.valid_answers if (one.benchmark, one.split) != key]
    changed = manifest.model_copy(update={"answers": (*kept, receipt)})
    rewrite_file(bundle.target_folder(manifest.target), TARGET_MANIFEST, manifest_text(changed))
