"""`mmi generate` with several documents: each into a folder of its own, all at once."""

from __future__ import annotations

import json
import os
import time
import unicodedata
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from mmi_deploy.cli.console import counted, results
from mmi_deploy.cli.documents_at_once import (
    AHEAD,
    Board,
    Failures,
    check_fits,
    generated,
    most_images,
    named,
    of_all,
    opened_engine,
    run_all,
)
from mmi_deploy.cli.generate_lines import is_lines
from mmi_deploy.cli.machine import Machine
from mmi_deploy.documents.document import Document
from mmi_deploy.documents.files import read_document
from mmi_deploy.documents.story import PAGE_NAME
from mmi_deploy.errors import MmiError
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.system.output_folder import MARKER, check_replaceable, new_folder


def generate_many(
    documents: Sequence[Path],
    out: Path,
    machine: Machine,
    options: GenerationOptions,
    force: bool,
    as_json: bool,
) -> None:
    """Generate documents into folders in `out`: those that each alone would be written to.

    All of them are read and checked before an engine is loaded. One that fails later does not stop
    the others; `MmiError` names it at the end.
    """
    folders = _folders(documents, out)
    for document, folder in folders.items():
        check_replaceable(folder, force, kind="story", inputs=(document, machine.bundle))
    bundle = machine.open_bundle()
    started, failures, reports = time.perf_counter(), Failures(), results()
    with closing(machine.open_runtime(bundle, machine.find_kernels())) as runtime:
        for document in documents:
            _read(document, options, runtime)
        with (
            Board(len(documents), as_json) as board,
            opened_engine(runtime, machine, board) as engine,
        ):

            async def generate(document: Path) -> None:
                folder, inputs = folders[document], (document, machine.bundle)
                name = str(document)
                try:
                    source = _read(document, options, runtime)  # not kept: there may be many
                    with new_folder(folder, force, kind="story", inputs=inputs) as work:
                        output, seconds = await generated(engine, name, source, options, board)
                        spent = f"{seconds:.1f} s, beside other documents"
                        output.write(work, document, machine.called, machine.target, spent)
                except Exception as error:
                    if of_all(error):
                        raise
                    line = failures.add(name, error)
                    board.end(name, line if name in line else f"{name}: {line}")
                    if as_json:
                        reports.print(json.dumps({"document": name, "error": line}))
                    return
                board.end(name, f"{name}: {output.summary(seconds)} {folder / PAGE_NAME}")
                if as_json:
                    report = {"document": name, **output.report(folder, seconds)}
                    reports.print(json.dumps(report))

            run_all(documents, generate, engine.stats().slots + AHEAD)
    failures.check(len(documents))
    if not as_json:
        seconds = time.perf_counter() - started
        board.print(f"{counted(len(documents), 'document')} in {seconds:.1f} s, in {out}")


def _folders(documents: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Output folder of each document. Raises `MmiError` for names that do not make folders apart,
    and for a folder that holds a document."""
    found: dict[str, Path] = {}
    for document in documents:
        if is_lines(document):
            raise MmiError(
                f"{document} holds many documents", fix="give it alone, with -o results.jsonl"
            )
        if document.stem.startswith("."):  # a folder `.` or `..` would be another one
            raise MmiError(
                f"{document} has no name to call a folder by", fix="give it one without a dot"
            )
        name = unicodedata.normalize("NFC", document.stem).casefold()  # some disks see no case
        if name in found:
            raise MmiError(
                f"{found[name]} and {document} would both be written to {out / document.stem}",
                fix="rename one, or generate it in a run of its own",
            )
        found[name] = document
    if os.path.lexists(out / MARKER):
        raise MmiError(f"{out} is an output folder of another run", fix="give another folder")
    folders = {document: out / document.stem for document in documents}
    places = {folder.resolve(): folder for folder in folders.values()}
    for document in documents:
        for above in document.resolve().parents:
            if above in places:
                raise MmiError(
                    f"{places[above]} holds {document}, which is read to write it",
                    fix="give another output folder",
                )
    return folders


def _read(path: Path, options: GenerationOptions, runtime: Runtime) -> Document:
    """Read a document that fits the model; raises `MmiError` that names its file."""
    with named(path):
        document = read_document(path, runtime.limits.context, most_images(runtime))
        check_fits(document, options, runtime)
    return document
