"""`mmi generate` with several documents: the files of each alone, and nobody else's touched."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from deploy.cli import test_app
from deploy.cli.test_app import Screen, left_in, program
from deploy.runtime import fake_model
from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.cli import documents_at_once
from mmi_deploy.documents.files import read_document
from mmi_deploy.documents.images import to_png
from mmi_deploy.runtime.events import ImageProgress, ImageStarted, TextDelta
from mmi_deploy.system.output_folder import MARKER
from mmi_deploy.system.progress import LogLines

mmi, bundle = test_app.mmi, test_app.bundle

# No w9 is generated.
NO_NINE = ("--logit-bias", "9=-100")


@pytest.fixture
def documents(tmp_path: Path) -> list[Path]:
    """Documents of all kinds: a given picture, places to draw, text alone, JSON."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.png").write_bytes(to_png(np.full((8, 8, 3), 90, np.uint8)))
    texts = {
        "given.md": "![a grey square](a.png)\n\nw5 w6\n\n![]()\n\nw7\n",
        "deep/text.txt": "w8 w5",
        "parts.json": '[{"text": "w10"}, {"draw": true}, {"image": "a.png"}]',
        "drawn.md": "![]()\n\nw11 w12\n\n![]()\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]


def files(folder: Path) -> dict[str, bytes]:
    """Files of an output folder, the page without the lines of its times."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MARKER}
    found["index.html"] = re.sub(
        rb"<dd>[^<]*(?: ms each| s, )[^<]*</dd>", b"<dd></dd>", found["index.html"]
    )
    return found


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def break_at_nine(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make every run of the LLM over w9 fail."""
    real = fake_model.llm

    def llm(config: Any, x: dict[str, Any]) -> dict[str, Any]:
        if (x["token_ids"] == 9).any():
            raise error
        return real(config, x)

    monkeypatch.setitem(fake_model._GRAPHS, "llm", llm)


@pytest.mark.parametrize("slots", [(), ("--slots", 1), ("--slots", 3)], ids=["auto", "1", "3"])
def test_each_document_gets_the_files_that_it_gets_alone(
    mmi: Screen, documents: list[Path], bundle: Path, tmp_path: Path, slots: tuple[object, ...]
) -> None:
    options = ("-b", bundle, "--max-tokens", 9, "--seed", 5, "--top-p", 0.8, *slots)
    out = tmp_path / "out"
    assert mmi("generate", *documents, "-o", out, *options) == 0
    assert mmi.out == ""
    assert left_in(out) == {"given", "text", "parts", "drawn"}
    for document in documents:
        (line,) = [line for line in mmi.err.splitlines() if line.startswith(f"{document}: ")]
        assert line.endswith(str(out / document.stem / "index.html")) and "tokens" in line
    pictures = 0
    for document in documents:
        alone = tmp_path / "alone" / document.stem
        assert mmi("generate", document, "-o", alone, *options) == 0
        written = files(out / document.stem)
        assert written == files(alone)
        assert len(re.findall(rb"<dd></dd>", written["index.html"])) >= 3  # its times
        pictures += sum(name.startswith("picture") for name in written)
    assert pictures >= 5


def test_a_second_run_replaces_the_folders_and_nothing_else(
    mmi: Screen, documents: list[Path], bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    (out / "mine" / "thesis.tex").write_text("precious")
    (out / "notes.txt").write_text("mine too")
    run = ("generate", *documents, "-o", out, "-b", bundle, "--max-tokens", 4)
    assert mmi(*run) == 0
    first = tree(out)
    assert mmi(*run, "--seed", 3) == 0
    second = tree(out)
    assert second.keys() >= {"mine/thesis.tex", "notes.txt"} and first != second
    assert {n: first[n] for n in ("mine/thesis.tex", "notes.txt")} == {
        "mine/thesis.tex": b"precious",
        "notes.txt": b"mine too",
    }
    (out / "text" / "thesis.tex").touch()
    before = tree(out)
    assert mmi(*run, "--force") == 2
    assert "holds thesis.tex, which mmi did not write" in mmi.err and mmi.err.count("\n") == 1
    assert tree(out) == before


def test_an_output_folder_of_one_document_is_not_filled_with_others(
    mmi: Screen, documents: list[Path], bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert mmi("generate", documents[1], "-o", out, "-b", bundle) == 0
    before = tree(out)
    assert mmi("generate", *documents, "-o", out, "-b", bundle) == 2
    assert mmi.err.startswith(f"mmi: {out} is an output folder of another run")
    assert tree(out) == before


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["given.md", "deep/given.md"], "would both be written to"),
        (["given.md", "given.txt"], "would both be written to"),
        (["given.md", "GIVEN.md"], "would both be written to"),
        (["given.md", "parts.json", "given.md"], "would both be written to"),
        (["given.md", "..md"], "has no name to call a folder by"),
        (["given.md", "...md"], "has no name to call a folder by"),
        (["given.md", ".mmi.md"], "has no name to call a folder by"),
        (["given.md", "all.jsonl"], "holds many documents"),
        (["given.md", "out/drawn/story.md", "drawn.md"], "which is read to write it"),
    ],
)
def test_names_that_make_no_folders_apart_are_refused_before_any_work(
    mmi: Screen,
    documents: list[Path],
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    says: str,
) -> None:
    folder = documents[0].parent
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("w5")
    before = tree(folder)
    monkeypatch.setattr(Bundle, "open", pytest.fail)
    paths = [folder / name for name in names]
    assert mmi("generate", *paths, "-o", folder / "out", "-b", bundle) == 2
    assert says in mmi.err and mmi.err.count("\n") == 1
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("bad.md", None, "cannot read {path}"),
        ("bad.md", "w5 nonsense", "{path}: the model does not know 'nonsense'"),
        ("bad.md", "![](missing.png)", "{path}: there is no picture"),
        ("bad.md", "w5 " * 100, "{path}: the document is too long for the model"),
        ("bad.md", "![]() " * 9, "{path}: the document has too many pictures"),
        ("bad.md", "![](../secret.png)", "{path}: the picture ../secret.png lies outside"),
        ("bad.json", '[{"texts": 1}]', "{path}: part 1 of the document is not understood"),
        ("bad.docx", "w5", "{path} is of an unknown kind"),
    ],
)
def test_a_document_that_does_not_fit_is_named_before_an_engine_is_loaded(
    mmi: Screen,
    documents: list[Path],
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    text: str | None,
    says: str,
) -> None:
    monkeypatch.setattr(BatchEngine, "__init__", lambda *_, **__: pytest.fail("engines loaded"))
    (tmp_path / "secret.png").write_bytes(to_png(np.zeros((8, 8, 3), np.uint8)))
    path = documents[0].parent / name
    if text is not None:
        path.write_text(text)
    assert mmi("generate", *documents, path, "-o", tmp_path / "out", "-b", bundle) == 2
    assert mmi.err.startswith(f"mmi: {says.format(path=path)}") and mmi.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (RuntimeError("a broken\nengine"), 1, "mmi: unexpected RuntimeError"),
        (MemoryError(), 2, "mmi: "),
    ],
)
def test_an_error_of_one_document_lets_the_others_finish(
    mmi: Screen,
    documents: list[Path],
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    last: str,
) -> None:
    bad = documents[0].parent / "nine.md"
    bad.write_text("w9 w5")
    options = ("-b", bundle, "--max-tokens", 6, *NO_NINE)
    out, alone = tmp_path / "out", tmp_path / "alone"
    assert mmi("generate", *documents, "-o", alone, *options) == 0
    break_at_nine(monkeypatch, error)
    assert mmi("generate", documents[0], bad, *documents[1:], "-o", out, *options) == code
    lines = mmi.err.splitlines()
    (told,) = [line for line in lines if line.startswith(f"{bad}: ")]
    assert type(error).__name__ in told
    assert lines[-1].startswith(last) and "Traceback" not in mmi.err
    assert left_in(out) == {document.stem for document in documents}
    for document in documents:
        assert files(out / document.stem) == files(alone / document.stem)


def test_a_folder_that_is_filled_meanwhile_is_its_documents_error_alone(
    mmi: Screen,
    documents: list[Path],
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    submit = BatchEngine.submit

    def late(self: BatchEngine, *arguments: Any) -> Any:
        (out / "text").mkdir(parents=True, exist_ok=True)
        (out / "text" / "thesis.tex").write_text("precious")
        return submit(self, *arguments)

    monkeypatch.setattr(BatchEngine, "submit", late)
    assert mmi("generate", *documents, "-o", out, "-b", bundle, "--max-tokens", 3) == 2
    assert mmi.err.splitlines()[-1] == f"mmi: 1 of 4 documents failed: {documents[1]}"
    assert left_in(out) >= {"given", "text", "parts", "drawn"}
    assert tree(out)["text/thesis.tex"] == b"precious"
    assert {"story.md", "index.html"} <= left_in(out / "given")


def test_as_json_there_is_a_line_for_each_document_with_the_report_of_one(
    mmi: Screen,
    documents: list[Path],
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = documents[0].parent / "nine.md"
    bad.write_text("w9 w5")
    options = ("-b", bundle, "--max-tokens", 6, "--json", *NO_NINE)
    break_at_nine(monkeypatch, ValueError("odd"))
    assert mmi("generate", *documents, bad, "-o", tmp_path / "out", *options) == 1
    assert mmi.err.count("\n") == 1
    reports = {line["document"]: line for line in map(json.loads, mmi.out.splitlines())}
    assert reports.keys() == {str(path) for path in (*documents, bad)}
    assert reports[str(bad)] == {"document": str(bad), "error": "unexpected ValueError: odd"}
    for document in documents:
        assert mmi("generate", document, "-o", tmp_path / "alone", *options) == 0
        one, report = json.loads(mmi.out), reports[str(document)]
        assert list(report) == ["document", *one]
        assert report["out"] == str(tmp_path / "out" / document.stem)
        timed = {"document", "out", "seconds", "stages"}
        assert {k: report[k] for k in report.keys() - timed} == {
            k: one[k] for k in one.keys() - timed
        }
        assert report["stages"].keys() == one["stages"].keys()


def test_documents_in_flight_are_bounded(
    mmi: Screen, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{name}.md" for name in range(30)]
    for path in paths:
        path.write_text("w5 w6")
    most = 0
    submit = BatchEngine.submit

    def counted(self: BatchEngine, *arguments: Any) -> Any:
        nonlocal most
        stats = self.stats()
        most = max(most, stats.running + stats.waiting + 1)
        assert stats.slots == 2
        return submit(self, *arguments)

    monkeypatch.setattr(BatchEngine, "submit", counted)
    options = ("-b", bundle, "--slots", 2, "--max-tokens", 20, "--max-images", 0)
    assert mmi("generate", *paths, "-o", tmp_path / "out", *options) == 0
    assert 2 < most <= 6
    assert len(left_in(tmp_path / "out")) == 30


# Denoising takes 0.15 s, but not while the engines are loaded.
SLOW = r"""
import time
from deploy.runtime import fake_model
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.batching.batch_engine import BatchEngine
Runtime.open = classmethod(lambda cls, *_, **__: fake_model.fake_runtime()[0])
begun = []
def submit(*arguments, submit=BatchEngine.submit):
    begun.append(1)
    return submit(*arguments)
BatchEngine.submit = submit
def denoise_step(*arguments, step=fake_model.denoise_step):
    if begun:
        time.sleep(0.15)
    return step(*arguments)
fake_model._GRAPHS["denoise_step"] = denoise_step
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_the_finished_documents_whole_and_nothing_else(
    bundle: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Real signals, while the second document is being drawn."""
    (tmp_path / "text.md").write_text("w5 w6")
    (tmp_path / "drawn.md").write_text("![]() w5 " * 4)
    paths = (tmp_path / "drawn.md", tmp_path / "text.md")
    options = ("-b", bundle, "--kernels", "none", "--max-images", 0, "--max-tokens", 2)
    process = program(SLOW, "generate", *paths, "-o", tmp_path / "out", *options)
    assert process.stderr is not None
    while not (line := process.stderr.readline()).startswith(str(paths[1])):
        assert line, process.returncode
    time.sleep(0.1)
    assert len(left_in(tmp_path / "out")) == 2  # one is unfinished
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.splitlines()[-1]) == (code, "mmi: stopped")
    assert "Traceback" not in err and "exception" not in err
    assert left_in(tmp_path / "out") == {"text"}
    assert left_in(tmp_path / "out" / "text") == {"story.md", "index.html", MARKER}
    assert read_document(tmp_path / "out" / "text" / "story.md").parts


def test_a_terminal_shows_a_line_for_each_running_document(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(documents_at_once, "remarks", lambda: console)
    with documents_at_once.Board(3, quiet=False) as board:
        board.show("a.md", TextDelta("w5"))
        board.show("b.md", TextDelta("w5"))
        board.show("b.md", ImageStarted(1, 20))
        board.show("b.md", ImageProgress(1, 7, 20))
        board.end("a.md", "a.md: 5 tokens")
    assert "a.md: 5 tokens\n" in screen.getvalue()
    _, _, last = screen.getvalue().rpartition("documents ")  # frame
    assert last.split()[:4] == ["1", "of", "3", "done"]
    assert re.search(r"b\.md +drawing picture 2 \(7 of 20 steps\)", last)
    assert "a.md" not in last


def test_a_log_has_a_line_from_time_to_time_and_json_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(documents_at_once, "LogLines", partial(LogLines, clock=lambda: now))
    for quiet in (False, True):
        now = 0.0
        with documents_at_once.Board(3, quiet) as board:
            for second in range(20):
                now = float(second)
                board.show("a.md", TextDelta("w5"))
            board.end("a.md", "a.md: 5 tokens")
        lines = capsys.readouterr().err.splitlines()
        expected = ["0 of 3 done, 5 s", "0 of 3 done, 10 s", "0 of 3 done, 15 s"]
        shown = [*(f"generating ({facts})" for facts in expected), "a.md: 5 tokens"]
        assert lines == ([] if quiet else shown)


def test_an_error_of_all_ends_all_and_asyncio_prints_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun, ended = [], []

    async def fail(job: int) -> None:
        begun.append(job)
        try:
            await asyncio.sleep(0 if job < 3 else 60)
            raise OSError(job)
        finally:
            ended.append(job)

    with pytest.raises(OSError):
        documents_at_once.run_all(range(100), fail, 4)
    gc.collect()
    assert begun == [0, 1, 2, 3] and sorted(ended) == begun
    assert not caplog.records
