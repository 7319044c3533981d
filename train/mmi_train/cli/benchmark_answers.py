"""`mmi evaluate MODEL --benchmark`: a model answers a benchmark, many questions at once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmi_deploy.cli.console import counted, remarks
from mmi_deploy.cli.documents_at_once import Board, Failures, of_all, run_all
from mmi_deploy.documents.document import Image, Text
from mmi_deploy.documents.images import Rgb, to_png
from mmi_deploy.documents.story import Story
from mmi_deploy.errors import ConfigError, DocumentError, MmiError
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.system.files import prepare_file
from mmi_deploy.system.result_lines import ResultLines, check_results, result_lines
from mmi_train.cli.benchmark_models import BenchmarkModel
from mmi_train.cli.benchmark_scores import score_predictions
from mmi_train.data.readers.data_set import DataSet
from mmi_train.data.readers.sample import Sample, Skipped
from mmi_train.evaluation.benchmarks.prompts import (
    CAPTIONED,
    caption_of,
    described,
    document_of,
    generation_of,
    id_of,
    is_drawn,
)
from mmi_train.evaluation.benchmarks.report import Questions
from mmi_train.evaluation.benchmarks.scores import Options
from mmi_train.evaluation.benchmarks.seen_pictures import SEEN, check_seen, seen
from mmi_train.evaluation.benchmarks.table import SEGMENTED, Benchmark, benchmark


@dataclass(frozen=True)
class Shard:
    """Every `of`-th question, from question `number` (from 1)."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse `2/8`. Raises `ConfigError`."""
        number, slash, of = text.partition("/")
        if slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of):
            return cls(int(number), int(of))
        raise ConfigError("--shard cannot be read", expected="1/N to N/N, such as 2/8", got=text)


@dataclass(frozen=True)
class Candidates:
    """Pictures that are drawn of each caption; that whose CLIP embedding is nearest to the
    caption's is kept. weights: folder of CLIP."""

    count: int = 1
    weights: Path | None = None

    def record(self) -> dict[str, Any]:
        """Values that answers depend on, for JSON."""
        if self.count == 1:
            return {}
        from mmi_train.evaluation.metrics.clip_similarity import Reranker

        return {"candidates": self.count, "clip": Reranker.checksum(self.weights)}

    def chooser(self) -> Callable[[str, Sequence[Rgb]], int] | None:
        """Number of the best picture of a caption; None if there is no choice."""
        if self.count == 1:
            return None
        from mmi_train.evaluation.metrics.clip_similarity import Reranker

        return Reranker(self.weights)

    def seeds(self, index: int) -> list[int]:
        """Seed of each candidate of a question; the first is that of a single picture."""
        return [(candidate << 32) + index for candidate in range(self.count)]


def answer_and_score(
    model: BenchmarkModel,
    name: str,
    data: Path,
    split: str | None,
    out: Path,
    options: Options,
    *,
    prompt: str | None,
    beams: int | None,
    shard: Shard | None,
    candidates: int,
    against: Path | None,
    submission: Path | None,
    as_json: bool,
) -> None:
    """Answer benchmark `name` with a model, then score the answers and print the report.

    What the score needs is looked at before the first answer. Answers of a shard, of a split
    without published answers, and pictures without the networks of `options` are not scored; a line
    says how they will be. Raises `MmiError`.
    """
    row = benchmark(name)
    generation_of(row, beams)  # raises for beams of pictures
    if against is not None and not against.is_file():
        raise ConfigError(f"there is no file {against} to compare with")
    if submission is not None:
        prepare_file(submission)
    if candidates > 1 and name not in CAPTIONED:
        raise ConfigError(f"--candidates is of {' and '.join(CAPTIONED)}", fix="leave it out")
    opened = row.open(data, split, prompt)
    questions = Questions.in_set(row, opened)
    drawn = Candidates(candidates, options.weights)
    used = answer_benchmark(
        model, row, opened, out, beams=beams, shard=shard, candidates=drawn, quiet=as_json
    )
    later = f"mmi evaluate --predictions {out} --benchmark {name} --data {data}"
    if shard is not None:
        return
    if name == SEGMENTED and options.segmenter is None:
        remarks().print(f"to score them: {later} --segmenter FILE.onnx")
    elif is_drawn(row) and name != SEGMENTED and options.weights is None:
        remarks().print(f"to score them: {later} --weights DIR")
    elif submission is None and not questions.answered:
        remarks().print(
            f"answers of the {split} split are not published; for the server of the set: {later} "
            f"--split {split} --submission FILE.json"
        )
    else:
        score_predictions(
            out,
            questions,
            options,
            against=against,
            submission=submission,
            as_json=as_json,
            generation=described(used) if row.kind == "text" else None,
        )


def answer_benchmark(
    model: BenchmarkModel,
    row: Benchmark,
    questions: DataSet[Any],
    out: Path,
    *,
    beams: int | None = None,
    shard: Shard | None = None,
    candidates: Candidates | None = None,
    quiet: bool = False,
) -> GenerationOptions:
    """Write a model's answers to the `questions` of a benchmark as the JSONL `out`, a line each;
    returns the options that they were generated with.

    Questions that `out` answers already, in the same run, are skipped. One whose picture is missing
    or broken has no line, and is counted on stderr. beams: as in `generation_of`. quiet: no
    progress. Raises `MmiError`.
    """
    options, draws, ranks = generation_of(row, beams), is_drawn(row), row.kind == "ranks"
    _check_beams(options.beams, model.most_beams)
    check_results(out)
    shard, candidates = shard or Shard(1, 1), candidates or Candidates()
    numbers = range(shard.number - 1, len(questions), shard.of)
    run = {
        "benchmark": row.name,
        "split": questions.split,
        "prompt": questions.prompt.text,
        "shard": f"{shard.number}/{shard.of}",
        "questions": questions.fingerprint(),
        **candidates.record(),
        **model.record(options),
    }
    best = candidates.chooser()
    skipped: Counter[str] = Counter()
    written: list[int] = []
    reasons: list[str] = []
    with result_lines(out, run) as results, Board(len(numbers), quiet) as board:
        check_seen(out, questions)
        before, started, failures = results.done, time.perf_counter(), Failures()
        if before:
            board.print(f"{before} of {counted(len(numbers), 'question')}: answered before")

        def add(index: int, sample: Sample, line: dict[str, Any]) -> None:
            results.add(index + 1, {"id": id_of(sample, index, row), **line})
            written.append(index)

        async def answer(asked: tuple[int, Sample]) -> None:
            index, sample = asked
            where = f"question {sample.id}"
            try:
                document = document_of(sample, answering.side, draws)
                looked = seen(sample)
                if ranks:
                    scores = await answering.scores(document, sample.about["options"])
                    add(index, sample, {"scores": scores, SEEN: looked})
                    board.end(where)
                    return
                each = [replace(options, seed=seed) for seed in candidates.seeds(index)]
                answering.check(document, each[0])
                names = [where, *(f"{where}, picture {n}" for n in range(2, len(each) + 1))]
                stories = await asyncio.gather(
                    *(
                        answering.story(called, document, own, board)
                        for called, own in zip(names, each, strict=True)
                    )
                )
            except Skipped as error:
                skipped[error.reason] += 1
            except DocumentError as error:
                skipped["the model cannot take it"] += 1
                reasons.append(str(error))
            except Exception as error:
                if of_all(error):
                    raise
                failures.add(where, error)
            else:
                chosen = 0
                if best is not None:
                    pictures = [_pictures(story)[0] for story in stories]
                    chosen = await asyncio.to_thread(best, caption_of(sample), pictures)
                given = _drawn(stories[chosen], index, results) if draws else _text(stories[chosen])
                add(index, sample, {**given, SEEN: looked})
            board.end(where)

        if before < len(numbers):
            with model.opened(board) as answering:
                _check_beams(options.beams, answering.most_beams)
                run_all(_left(questions, numbers, results), answer, answering.most)
    for reason, count in skipped.most_common():
        remarks().print(f"{counted(count, 'question')} without an answer: {reason}")
    if reasons:
        remarks().print(f"the first that the model cannot take: {reasons[0]}")
    if written:
        seconds = time.perf_counter() - started
        board.print(f"{counted(len(written), 'answer')} in {seconds:.1f} s, in {out}")
    failures.check(len(numbers) - before)
    if numbers and not written and not before:
        raise MmiError(f"{out} has no answer: see the reasons above")
    return options


def _check_beams(beams: int, most: int) -> None:
    """Raise `ConfigError` for more beams than the model has room for."""
    if beams > most:
        raise ConfigError(
            f"the benchmark is answered with {beams} beams, and there is room for {most}",
            fix=f"give --beams {most}, or --beams 1 for greedy answers",
        )


def _left(
    questions: DataSet[Any], numbers: range, results: ResultLines
) -> Iterator[tuple[int, Sample]]:
    """Questions of `numbers` that have no answer yet, with their numbers from 0."""
    for index in numbers:
        if index + 1 in results:
            continue
        try:
            yield index, questions.sample(index)
        except Skipped:
            continue  # a rule of the set leaves it out


def _text(story: Story) -> dict[str, Any]:
    """The text that the model wrote, as values of a line."""
    written = (one.part for one in story.entries if one.generated)
    return {"text": "".join(part.text for part in written if isinstance(part, Text)).strip()}


def _pictures(story: Story) -> Sequence[Rgb]:
    """The pictures that the model drew, in their order."""
    drawn = (one.part for one in story.entries if one.generated)
    return [part.rgb for part in drawn if isinstance(part, Image)]


def _drawn(story: Story, index: int, results: ResultLines) -> dict[str, Any]:
    """Write the drawn pictures; returns their paths from the folder of the results, as values of a
    line."""
    found = _pictures(story)
    ends = [f"-{number}" for number in range(1, len(found) + 1)] if len(found) > 1 else [""]
    names = [
        results.add_file(f"{index:06d}{end}.png", to_png(rgb))
        for end, rgb in zip(ends, found, strict=True)
    ]
    return {"images": names} if len(names) > 1 else {"image": names[0]}
