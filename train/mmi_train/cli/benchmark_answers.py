"""`mmi evaluate BUNDLE --benchmark`: a bundle answers a benchmark, many questions at once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmi_deploy.cli.console import counted, remarks
from mmi_deploy.cli.documents_at_once import (
    AHEAD,
    Board,
    Failures,
    check_fits,
    generated,
    of_all,
    opened_engine,
    run_all,
)
from mmi_deploy.cli.generate_output import Output
from mmi_deploy.cli.machine import Machine
from mmi_deploy.documents.document import Image, Text
from mmi_deploy.documents.images import to_png
from mmi_deploy.errors import ConfigError, DocumentError, MmiError
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.scoring import score
from mmi_deploy.system.files import prepare_file
from mmi_deploy.system.result_lines import ResultLines, check_results, result_lines
from mmi_train.cli.benchmark_scores import score_predictions
from mmi_train.data.readers.data_set import DataSet, Settings
from mmi_train.data.readers.registry import open_set
from mmi_train.data.readers.sample import Sample, Skipped
from mmi_train.evaluation.benchmarks.prompts import (
    described,
    document_of,
    generation_of,
    id_of,
    is_drawn,
    is_numbered,
)
from mmi_train.evaluation.benchmarks.report import Questions
from mmi_train.evaluation.benchmarks.scores import Options
from mmi_train.evaluation.benchmarks.table import benchmark

# Samples whose ids are looked up before the first answer.
_CHECKED = 1000

# Key of an answer in a line, by whether it is drawn.
_KEYS = {False: "text", True: "image"}


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


def answer_and_score(
    machine: Machine,
    name: str,
    data: Path,
    split: str | None,
    out: Path,
    options: Options,
    *,
    prompt: str | None,
    beams: int | None,
    shard: Shard | None,
    against: Path | None,
    submission: Path | None,
    as_json: bool,
) -> None:
    """Answer benchmark `name` with a bundle, then score the answers and print the report.

    What the score needs is looked at before the first answer. Answers of a shard, of a split
    without published answers, and pictures without the networks of `options` are not scored; a line
    says how they will be. Raises `MmiError`.
    """
    row = benchmark(name)
    if against is not None and not against.is_file():
        raise ConfigError(f"there is no file {against} to compare with")
    if submission is not None:
        prepare_file(submission)
    used = answer_benchmark(
        machine, name, data, split, out, prompt=prompt, beams=beams, shard=shard, quiet=as_json
    )
    later = f"mmi evaluate --predictions {out} --benchmark {name} --data {data}"
    if shard is not None:
        return
    if is_drawn(row) and options.weights is None:
        remarks().print(f"to score them: {later} --weights DIR")
    elif submission is None and not Questions.of(row, data, split).answered:
        remarks().print(
            f"answers of the {split} split are not published; for the server of the set: {later} "
            f"--split {split} --submission FILE.json"
        )
    else:
        score_predictions(
            out,
            name,
            data,
            split,
            options,
            against=against,
            submission=submission,
            as_json=as_json,
            generation=described(used) if row.kind == "text" else None,
        )


def answer_benchmark(
    machine: Machine,
    name: str,
    data: Path,
    split: str | None,
    out: Path,
    *,
    prompt: str | None = None,
    beams: int | None = None,
    shard: Shard | None = None,
    quiet: bool = False,
) -> GenerationOptions:
    """Write the bundle's answers to benchmark `name` as the JSONL `out`, one line a question;
    returns the options that they were generated with.

    Questions that `out` answers already, in the same run, are skipped. One whose picture is missing
    or broken has no line, and is counted on stderr. prompt: a named prompt in place of the set's.
    beams: as in `generation_of`. quiet: no progress. Raises `MmiError`.
    """
    row = benchmark(name)
    options, draws, ranks = generation_of(row, beams), is_drawn(row), row.kind == "ranks"
    check_results(out)
    shard = shard or Shard(1, 1)
    chosen = split or row.splits[0]
    questions = open_set(name, data, Settings(split=chosen, prompt=prompt))
    _check_ids(questions, Questions.of(row, data, split))
    numbers = range(shard.number - 1, len(questions), shard.of)
    bundle = machine.open_bundle()
    run = {
        "benchmark": name,
        "split": chosen,
        "prompt": questions.prompt.text,
        "shard": f"{shard.number}/{shard.of}",
        "questions": questions.fingerprint(),
        **machine.record(bundle, options),
    }
    skipped: Counter[str] = Counter()
    written: list[int] = []
    reasons: list[str] = []
    with closing(machine.open_runtime(bundle, machine.find_kernels())) as runtime:
        with result_lines(out, run) as results, Board(len(numbers), quiet) as board:
            before, started, failures = results.done, time.perf_counter(), Failures()
            if before:
                board.print(f"{before} of {counted(len(numbers), 'question')}: answered before")
            side = runtime.config.vision.image_size
            check_beams(options.beams, runtime.limits.batch, "rows in a run")

            async def answer(asked: tuple[int, Sample]) -> None:
                index, sample = asked
                where = f"question {sample.id}"
                try:
                    document = document_of(sample, side, draws)
                    own = replace(options, seed=index)
                    given: object
                    if ranks:
                        scores = score(runtime, document, sample.about["options"])
                        given = [one.logprob for one in scores]
                    else:
                        check_fits(document, own, runtime)
                        output, _ = await generated(engine, where, document, own, board)
                        given = _picture(output, index, results) if draws else _text(output)
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
                    key = "scores" if ranks else _KEYS[draws]
                    results.add(index + 1, {"id": id_of(sample, index, row), key: given})
                    written.append(index)
                board.end(where)

            left = _left(questions, numbers, results)
            if ranks:  # the options of one question share the rows of a run
                run_all(left, answer, 1)
            elif before < len(numbers):
                with opened_engine(runtime, machine, board) as engine:
                    check_beams(options.beams, engine.stats().slots, "slots")
                    run_all(left, answer, engine.stats().slots + AHEAD)
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


def check_beams(beams: int, most: int, what: str) -> None:
    """Raise `ConfigError` for more beams than the bundle or the service has room for."""
    if beams > most:
        raise ConfigError(
            f"the benchmark is answered with {beams} beams, and there are {most} {what}",
            fix=f"give --beams {most}, or --beams 1 for greedy answers",
        )


def _check_ids(questions: DataSet[Any], references: Questions) -> None:
    """Raise `DocumentError` before any work if the answers could not be scored: an id that the
    annotations, as the metrics read them, do not have."""
    row = references.benchmark
    known = {name for one in references.references for name in (one.id, *one.other_ids)}
    numbered = is_numbered(row)
    fits = not numbered or len(questions) == len(references.references)
    for index in range(min(len(questions), _CHECKED)):
        try:
            name = str(id_of(questions.sample(index), index, row))
        except Skipped:
            continue
        fits = fits and (name in known or name.isdecimal() and int(name) < len(known))
        if not fits:
            raise DocumentError(
                f"samples of {row.name} and its annotations do not fit: entries are malformed, or "
                "two files are of different versions",
                fix=f"`mmi data check {row.name} {questions.folder.path}` shows what is left out",
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


def _text(output: Output) -> str:
    """The text that the model wrote."""
    written = (one.part for one in output.story.entries if one.generated)
    return "".join(part.text for part in written if isinstance(part, Text)).strip()


def _picture(output: Output, index: int, results: ResultLines) -> str:
    """Write the drawn picture; returns its path from the folder of the results."""
    (drawn,) = (one.part for one in output.story.entries if one.generated)
    assert isinstance(drawn, Image), "the document asks for a picture alone"
    return results.add_file(f"{index:06d}.png", to_png(drawn.rgb))
