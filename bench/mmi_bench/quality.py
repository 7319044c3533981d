"""How well a bundle's target does what its portable graphs do: held-out questions, asked of both.

    python -m mmi_bench.quality bundles/tiny --target cpu-int8
    python -m mmi_bench.quality bundles/tiny --simulate fp16

Every question is put to both, so that what differs is not the luck of the draw: only questions that
one of them alone gets right tell them apart. Pictures start from the same noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path

import numpy as np
import tokenizers
from rich.console import Console

from mmi_bench.emulated_precision import emulated_runtime
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.manifest import PORTABLE
from mmi_deploy.documents.tokenizer import read_tokenizer_file
from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.session import Session
from mmi_deploy.spec.backends import NONE
from mmi_deploy.system.files import prepare_file, write_new_file
from mmi_deploy.system.progress import Progress, shown, silent
from mmi_deploy.system.temporary_folder import temporary_folder
from mmi_train.data.rows import TokenDocument
from mmi_train.data.synthetic import world as worlds
from mmi_train.data.synthetic.tasks import TaskDocument, TaskImage, grade
from mmi_train.evaluation.synthetic_tasks import (
    KINDS,
    MAX_ANSWER,
    PICTURES,
    TEXTS,
    Question,
    prompt_of,
    questions_of,
)

BAND = {"int8": 1.0, "int4": 3.0}
"""Points by which a recipe may differ from the portable graphs, up or down. Other recipes have the
narrower one."""

SURE = 1.96
"""Standard errors of a 95 % interval."""


@dataclass(frozen=True)
class Paired:
    """Answers of two models to the same questions: how many both got right, the one alone, the
    other alone, neither."""

    both: int
    portable_only: int
    target_only: int
    neither: int

    @property
    def count(self) -> int:
        return self.both + self.portable_only + self.target_only + self.neither

    @property
    def points(self) -> float:
        """Percent right of the target less that of the portable graphs."""
        return 100 * (self.target_only - self.portable_only) / self.count

    @property
    def uncertainty(self) -> float:
        """Half of the 95 % interval of `points`; one question where none tells them apart."""
        differing = self.target_only + self.portable_only
        variance = differing - (self.target_only - self.portable_only) ** 2 / self.count
        return 100 * max(SURE * sqrt(max(variance, 0.0)), 1.0) / self.count

    @classmethod
    def of(cls, portable: Sequence[bool], target: Sequence[bool]) -> Paired:
        pairs = list(zip(portable, target, strict=True))
        return cls(
            *(
                pairs.count(pair)
                for pair in ((True, True), (True, False), (False, True), (False, False))
            )
        )

    def __add__(self, other: Paired) -> Paired:
        return Paired(
            self.both + other.both,
            self.portable_only + other.portable_only,
            self.target_only + other.target_only,
            self.neither + other.neither,
        )

    def verdict(self, band: float) -> str:
        """Whether the difference lies within `band` points: `yes`, `no`, or `unsure` where the
        interval reaches over its edge."""
        least, most = abs(self.points) - self.uncertainty, abs(self.points) + self.uncertainty
        return "yes" if most <= band else "no" if least > band else "unsure"


class Answers:
    """One target of a bundle, asked questions through the runtime."""

    def __init__(self, runtime: Runtime, tokenizer: tokenizers.Tokenizer, guidance: float) -> None:
        self.runtime, self.tokenizer, self.guidance = runtime, tokenizer, guidance

    def prompt(self, document: TaskDocument, target: int) -> TokenDocument:
        """The document up to `target`; for a picture, with its begin-of-image token."""
        return prompt_of(document, target, self.tokenizer, self.runtime.config)

    def right(self, question: Question) -> bool:
        """Whether the answer, or the picture, is exactly what was asked for."""
        session = self._read(question.prompt)
        if isinstance(question.part, TaskImage):
            produced: str | np.ndarray = session.draw(guidance=self.guidance)
        else:
            produced = self._write(session)
        return grade(question.document, question.target, produced).correct

    def _read(self, prompt: TokenDocument) -> Session:
        tokens = self.runtime.config.tokens
        session, images = Session(self.runtime), iter(prompt.images)
        ids = prompt.token_ids.tolist()
        for index, token in enumerate(ids):
            if token == tokens.image:
                continue
            shown = ids[index + 1 : index + 2] == [tokens.image]
            if token == tokens.boi and shown:
                session.append_image(next(images))
            else:
                session.append_text([token])
        return session

    def _write(self, session: Session) -> str:
        """The likeliest continuation, up to and with its first full stop."""
        tokens = self.runtime.config.tokens
        stops = {*tokens.ends, tokens.boi, self.tokenizer.token_to_id(".")}
        written: list[int] = []
        while len(written) < MAX_ANSWER and session.room:
            logits = session.next_logits().copy()
            logits[tokens.image] = -np.inf
            written.append(int(logits.argmax()))
            if written[-1] in stops:
                break
            session.append_text(written[-1:])
        text: str = self.tokenizer.decode(written)
        return text


def compare(
    bundle: Bundle,
    other: Runtime,
    *,
    kinds: Sequence[str] = KINDS,
    count: int = 96,
    pictures: int = 32,
    guidance: float = 3.5,
    seed: int = 0,
    threads: int = 0,
    progress: Progress = silent,
) -> dict[str, Paired]:
    """Ask the portable graphs and `other` the same `count` questions of each kind, `pictures` of
    those that want one drawn. Raises `ConfigError` for a kind that there is not, and for none."""
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ConfigError(
            f"there are no questions of the kind {unknown[0]!r}", expected=" or ".join(KINDS)
        )
    if min(count, pictures) < 1:
        raise ConfigError(
            "there must be a question of each kind",
            expected="at least 1",
            got=min(count, pictures),
            fix="leave kinds out with --kinds",
        )
    tokenizer = read_tokenizer_file(bundle.tokenizer)
    portable = Runtime.open(bundle, target=PORTABLE, kernels=NONE, threads=threads)
    sides = [Answers(runtime, tokenizer, guidance) for runtime in (portable, other)]
    found = {}
    for kind, questions in questions_of(sides[0], worlds.easy(), max(count, pictures), seed):
        if kind not in kinds:
            continue
        chosen = questions[: pictures if kind in PICTURES else count]
        right: tuple[list[bool], list[bool]] = ([], [])
        for index, question in enumerate(chosen):
            progress(kind, index, len(chosen))
            for side, answers in zip(sides, right, strict=True):
                answers.append(side.right(question))
        found[kind] = Paired.of(*right)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mmi_bench.quality", description=__doc__)
    parser.add_argument("bundle", type=Path)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--target", help="such as cpu-int8")
    which.add_argument("--simulate", metavar="PRECISION", help="as a GPU would compute, rounded")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), metavar="KIND")
    parser.add_argument("--count", type=int, default=96, help="questions of each kind")
    parser.add_argument("--pictures", type=int, default=32, help="pictures of each kind")
    parser.add_argument("--band", type=float, help="points that it may differ, up or down")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    given = parser.parse_args(arguments)
    try:
        if given.json:
            prepare_file(given.json)
        bundle = Bundle.open(given.bundle)
        with temporary_folder(given.bundle, ".quality-") as folder:
            if given.simulate:
                other = emulated_runtime(bundle, given.simulate, folder, given.threads)
            else:
                other = Runtime.open(
                    bundle, target=given.target, kernels=NONE, threads=given.threads
                )
            with shown(Console(stderr=True, soft_wrap=True)) as progress:
                found = compare(
                    bundle,
                    other,
                    kinds=given.kinds,
                    count=given.count,
                    pictures=given.pictures,
                    seed=given.seed,
                    threads=given.threads,
                    progress=progress,
                )
    except MmiError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    band = given.band
    if band is None:
        band = BAND.get((given.simulate or given.target).rpartition("-")[2], min(BAND.values()))
    rows = dict(found)
    for name, kinds in (("all texts", TEXTS), ("all pictures", PICTURES)):
        some = [found[kind] for kind in kinds if kind in found]
        if len(some) > 1:
            rows[name] = sum(some[1:], some[0])
    for name, pairs in rows.items():
        print(_line(name, pairs, band))
    if given.json:
        write_new_file(
            given.json, json.dumps({name: asdict(pairs) for name, pairs in rows.items()})
        )
    return int(any(pairs.verdict(band) == "no" for pairs in rows.values()))


def _line(name: str, pairs: Paired, band: float) -> str:
    portable = 100 * (pairs.both + pairs.portable_only) / pairs.count
    target = 100 * (pairs.both + pairs.target_only) / pairs.count
    return (
        f"{name:14} {pairs.count:5} questions  portable {portable:6.2f} %  target {target:6.2f} %  "
        f"difference {pairs.points:+.2f} ± {pairs.uncertainty:.2f} points  "
        f"(only portable {pairs.portable_only}, only target {pairs.target_only})  "
        f"within {band:g}: {pairs.verdict(band)}"
    )


if __name__ == "__main__":
    sys.exit(main())
