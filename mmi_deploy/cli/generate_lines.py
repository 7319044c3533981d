"""`mmi generate` with a JSONL of documents: a JSONL of results, resumed if it was stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path

from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.cli.console import counted, print_json
from mmi_deploy.cli.documents_at_once import (
    AHEAD,
    Board,
    Failures,
    check_fits,
    generated,
    most_images,
    of_all,
    opened_engine,
    run_all,
)
from mmi_deploy.cli.generate_output import parts_of
from mmi_deploy.cli.machine import Machine
from mmi_deploy.documents.document import Image
from mmi_deploy.documents.images import to_png
from mmi_deploy.documents.json_lines import SUFFIX, DocumentLine, DocumentLines
from mmi_deploy.documents.story import Entry
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.options import GenerationOptions, options_of
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.system.result_lines import ResultLines, check_results, result_lines

# Options that a line may have. Results have no place for log probabilities and previews.
OPTIONS = frozenset(field.name for field in fields(GenerationOptions)) - {"logprobs", "previews"}


def is_lines(document: Path) -> bool:
    """True for a JSONL of documents."""
    return document.suffix.lower() == SUFFIX


def generate_lines(
    path: Path,
    out: Path,
    machine: Machine,
    options: GenerationOptions,
    force: bool,
    as_json: bool,
) -> None:
    """Generate the documents of the JSONL `path`: one line of the JSONL `out` for each.

    Lines that `out` has already, of the same run, are skipped. All others are checked before an
    engine is loaded. A document that fails later has a line with `error`, is tried again in the
    next run, and does not stop the others; `MmiError` names it at the end.
    """
    if force:
        raise ConfigError("--force replaces folders, no results", fix="give another output file")
    check_results(out)
    bundle = machine.open_bundle()
    with closing(machine.open_runtime(bundle, machine.find_kernels())) as runtime:
        lines = DocumentLines(path, runtime.limits.context, most_images(runtime), OPTIONS)
        run = {**machine.record(bundle, options), "input": lines.sha256}
        fresh = not os.path.lexists(out)
        if fresh:  # a file that is refused leaves nothing behind
            _check(lines, lines, options, runtime)
        with result_lines(out, run) as results:
            skipped, started, failures = results.done, time.perf_counter(), Failures()
            if not fresh:
                _check(lines, _left(lines, results), options, runtime)
            left = lines.count - skipped
            with Board(left, as_json) as board:
                if skipped:
                    board.print(f"{skipped} of {counted(lines.count, 'document')}: done before")
                if left:
                    with opened_engine(runtime, machine, board) as engine:
                        _generate(lines, options, out, results, engine, board, failures)
    seconds = time.perf_counter() - started
    if as_json:
        report = {
            "out": str(out),
            "documents": lines.count,
            "skipped": skipped,
            "generated": left - failures.count,
            "failed": failures.count,
            "seconds": round(seconds, 3),
        }
        print_json(report)
    failures.check(left)
    if left:
        board.print(f"{counted(left, 'document')} in {seconds:.1f} s, in {out}")


def _check(
    lines: DocumentLines,
    some: Iterable[DocumentLine],
    options: GenerationOptions,
    runtime: Runtime,
) -> None:
    """Raise `MmiError` for the first of `some` lines that does not fit the model."""
    for line in some:
        with lines.at(line.number):
            check_fits(lines.document(line), options_of(line.options, options), runtime)


def _generate(
    lines: DocumentLines,
    options: GenerationOptions,
    out: Path,
    results: ResultLines,
    engine: BatchEngine,
    board: Board,
    failures: Failures,
) -> None:
    """Generate what has no result yet."""

    async def generate(line: DocumentLine) -> None:
        name = f"line {line.number} of {lines.path}"
        try:
            document, of_line = lines.document(line), options_of(line.options, options)
            output, seconds = await generated(engine, name, document, of_line, board)
            names = _pictures(output.story.entries, line.number, out, results)
        except Exception as error:
            if of_all(error):
                raise
            reason = failures.add(name, error)
            results.add(line.number, {"id": line.id, "error": reason})
            board.end(name, reason if name in reason else f"{name}: {reason}")
            return
        parts = parts_of(output.story.entries, names)
        results.add(line.number, {"id": line.id, "parts": parts, **output.facts(seconds)})
        board.end(name)

    run_all(_left(lines, results), generate, engine.stats().slots + AHEAD)


def _left(lines: DocumentLines, results: ResultLines) -> Iterator[DocumentLine]:
    """Lines that have no result yet."""
    return (line for line in lines if line.number not in results)


def _pictures(
    entries: Sequence[Entry], number: int, out: Path, results: ResultLines
) -> dict[int, str]:
    """Write the drawn pictures; returns the path of each picture from the folder of `out`."""
    names: dict[int, str] = {}
    drawn = 0
    for index, entry in enumerate(entries):
        if not isinstance(entry.part, Image):
            continue
        if entry.generated:
            drawn += 1
            name = f"{number:06d}-{drawn:02d}.png"
            names[index] = results.add_file(name, to_png(entry.part.rgb))
        else:
            source = entry.part.source
            assert isinstance(source, Path), "pictures of a JSONL are files"
            names[index] = Path(os.path.relpath(source, os.path.realpath(out.parent))).as_posix()
    return names
