"""`mmi generate` with a JSONL: a line for each document, resumed after any end, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.cli import test_app
from deploy.cli.test_app import Screen, left_in, program
from deploy.cli.test_generate_many import NO_NINE, SLOW, break_at_nine, tree
from deploy.runtime.fake_model import fake_runtime
from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.cli import generate_lines as command
from mmi_deploy.documents.images import to_png
from mmi_deploy.documents.json_lines import DocumentLines
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.system import temporary_folder
from mmi_deploy.system.result_lines import RECORD

mmi, bundle = test_app.mmi, test_app.bundle

DOCUMENTS: list[dict[str, Any]] = [
    {"id": "given", "parts": [{"image": "a.png", "alt": "grey"}, {"text": "w5"}, {"draw": True}]},
    {"parts": [{"text": "w6 w7"}], "seed": 3, "max_tokens": 4},
    {"id": 17, "parts": [{"draw": True}, {"text": "w8"}, {"draw": True}], "guidance": 2},
    {"id": "stop", "parts": [{"text": "w10 w11"}], "logit_bias": {"12": 100}, "stop": [" w12 w12"]},
]
OPTIONS = ("--max-tokens", 8, "--top-p", 0.8)
TIMED = {"seconds", "stages"}


def write(path: Path, documents: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(to_png(np.full((8, 8, 3), 90, np.uint8)))
    write(folder / "all.jsonl", DOCUMENTS)
    return folder / "all.jsonl"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "results.jsonl"


def results(out: Path) -> dict[int, dict[str, Any]]:
    """Results by their line, without times."""
    lines = [json.loads(line) for line in out.read_bytes().splitlines(keepends=True)]
    found = {line["line"]: {k: line[k] for k in line.keys() - TIMED} for line in lines}
    assert len(found) == len(lines)
    return found


def pictures(out: Path) -> dict[str, bytes | None]:
    return {name: data for name, data in tree(out.parent).items() if name.endswith(".png")}


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Documents that a batch engine has begun."""
    found: list[object] = []
    submit = BatchEngine.submit

    def kept(self: BatchEngine, document: object, *arguments: Any) -> Any:
        found.append(document)
        return submit(self, document, *arguments)

    monkeypatch.setattr(BatchEngine, "submit", kept)
    return found


def test_each_line_gets_the_parts_and_pictures_that_it_gets_alone(
    mmi: Screen, documents: Path, bundle: Path, out: Path, tmp_path: Path
) -> None:
    assert mmi("generate", documents, "-o", out, "-b", bundle, *OPTIONS) == 0
    assert mmi.out == "" and "4 documents in " in mmi.err
    found = results(out)
    assert {number: line["id"] for number, line in found.items()} == {
        1: "given", 2: 2, 3: 17, 4: "stop",
    }  # fmt: skip
    assert left_in(out.parent) == {"results.jsonl", "results.files"}
    drawn = set()
    for number, document in enumerate(DOCUMENTS, start=1):
        line = found[number]
        (documents.parent / "one.json").write_text(json.dumps(document["parts"]))
        options = ["-b", bundle, *OPTIONS, "--json", "-o", tmp_path / "alone"]
        for name in ("seed", "max_tokens", "guidance"):
            if name in document:
                options += [f"--{name.replace('_', '-')}", document[name]]
        if number == 4:
            options += ["--logit-bias", "12=100"]
        assert mmi("generate", documents.parent / "one.json", *options) == 0
        alone = json.loads(mmi.out)
        assert line.keys() == alone.keys() - TIMED - {"out"} | {"line", "id"}
        if number == 4:
            assert (line["reason"], line["tokens"]) == ("stop", 2)
            continue
        for name in ("reason", "tokens", "images", "seed", "schedule"):
            assert line[name] == alone[name]
        for part, one in zip(line["parts"], alone["parts"], strict=True):
            if "text" in one:
                assert part == one
                continue
            assert part["generated"] == one["generated"]
            given = out.parent / part["image"]
            assert not os.path.isabs(part["image"])
            assert given.read_bytes() == (tmp_path / "alone" / one["image"]).read_bytes()
            drawn |= {given} if part["generated"] else set()
    assert len(drawn) >= 3
    assert {*drawn, out.parent / "results.files" / RECORD} == {
        *(out.parent / "results.files").iterdir()
    }


def test_a_run_that_ended_anywhere_is_resumed_with_what_is_left(
    mmi: Screen, documents: Path, bundle: Path, out: Path, submitted: list[object]
) -> None:
    """Cut after any number of bytes: whole lines stay, a torn one is generated again."""
    run = ("generate", documents, "-o", out, "-b", bundle, *OPTIONS)
    assert mmi(*run) == 0
    whole, expected, drawn = out.read_bytes(), results(out), pictures(out)
    ends = [index + 1 for index, byte in enumerate(whole) if byte == 10]
    for cut in (1, 9, ends[0] - 1, ends[0], ends[1] + 1, ends[2] - 30, ends[3] - 1, ends[3]):
        out.write_bytes(whole[:cut])
        submitted.clear()
        assert mmi(*run) == 0
        kept = sum(end <= cut for end in ends)
        assert len(submitted) == 4 - kept
        assert out.read_bytes().startswith(whole[: ([0, *ends])[kept]])
        assert results(out) == expected and pictures(out) == drawn
    out.unlink()
    assert mmi(*run) == 0
    assert results(out) == expected and pictures(out) == drawn


def test_a_finished_run_loads_no_engine(
    mmi: Screen, documents: Path, bundle: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("generate", documents, "-o", out, "-b", bundle, *OPTIONS)
    assert mmi(*run) == 0
    before = tree(out.parent)
    monkeypatch.setattr(BatchEngine, "__init__", lambda *_, **__: pytest.fail("engines loaded"))
    assert mmi(*run, "--json") == 0
    report = json.loads(mmi.out)
    assert mmi.err == "" and report.pop("seconds") >= 0
    assert report == {
        "out": str(out), "documents": 4, "skipped": 4, "generated": 0, "failed": 0,
    }  # fmt: skip
    assert tree(out.parent) == before


def test_a_killed_process_leaves_what_the_next_one_goes_on_from(
    mmi: Screen, bundle: Path, tmp_path: Path, out: Path
) -> None:
    """SIGKILL while pictures are drawn, after the first results; then Ctrl-C; then to the end."""
    documents = tmp_path / "all.jsonl"
    drawn = [{"parts": [{"text": f"w{n}"}, {"draw": True}]} for n in range(5, 11)]
    write(documents, drawn)
    options = ("-b", bundle, "--kernels", "none", "--max-images", 0, "--max-tokens", 2)
    arguments = ("generate", documents, "-o", out, *options, "--slots", 1)
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)):
        before = out.read_bytes() if out.exists() else b""
        process = program(SLOW, *arguments)
        end = time.monotonic() + 60
        while not out.exists() or len(out.read_bytes()) <= len(before):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert process.returncode == code, err
        assert out.read_bytes().startswith(before)
        if number != signal.SIGKILL:
            assert err.splitlines()[-1] == "mmi: stopped" and "exception" not in err
            assert not [
                n for n in left_in(out.parent / "results.files") if n.startswith(".results")
            ]
    assert 3 <= len(results(out)) < 6
    assert mmi(*arguments) == 0
    assert set(results(out)) == {*range(1, 7)}
    assert left_in(out.parent) == {"results.jsonl", "results.files"}
    names = {f"{n:06d}-01.png" for n in range(1, 7)}
    assert left_in(out.parent / "results.files") == {RECORD, *names}
    whole = tmp_path / "whole.jsonl"
    assert mmi("generate", documents, "-o", whole, *options) == 0
    for number, line in results(whole).items():
        other = results(out)[number]
        assert (line["id"], line["tokens"], line["reason"]) == (
            other["id"], other["tokens"], other["reason"],
        )  # fmt: skip
        data = (tmp_path / "whole.files" / f"{number:06d}-01.png").read_bytes()
        assert data == (out.parent / "results.files" / f"{number:06d}-01.png").read_bytes()


def test_two_runs_do_not_write_the_same_results(
    mmi: Screen, documents: Path, bundle: Path, out: Path
) -> None:
    run = ("generate", documents, "-o", out, "-b", bundle, *OPTIONS)
    assert mmi(*run) == 0
    before = tree(out.parent)
    folder = out.parent / "results.files"
    with temporary_folder.temporary_folder(folder, ".results-", alone=str(out)):
        assert mmi(*run) == 2
        assert "another process of mmi writes" in mmi.err
    assert tree(out.parent) == before


def other_input(documents: Path) -> tuple[object, ...]:
    write(documents, [*DOCUMENTS, {"parts": [{"text": "w5"}]}])
    return ()


def other_bundle(documents: Path) -> tuple[object, ...]:
    manifest = documents.parents[1] / "bundle" / "bundle.json"
    manifest.write_text(manifest.read_text() + "\n")
    return ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_input, "input differs"),
        (other_bundle, "bundle differs"),
        (lambda _: ("--seed", 4), "seed differs; expected 0; got 4"),
        (lambda _: ("--top-p", 0.7), "top_p differs; expected 0.8; got 0.7"),
        (lambda _: ("--logit-bias", "5=1"), "logit_bias differs; expected []; got [[5, 1.0]]"),
    ],
)
def test_results_of_another_run_are_refused(
    mmi: Screen,
    documents: Path,
    bundle: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], tuple[object, ...]],
    says: str,
) -> None:
    run = ("generate", documents, "-o", out, "-b", bundle, *OPTIONS)
    assert mmi(*run) == 0
    before = tree(out.parent)
    monkeypatch.setattr(BatchEngine, "__init__", lambda *_, **__: pytest.fail("engines loaded"))
    assert mmi(*run, *change(documents)) == 2
    assert mmi.err.startswith(f"mmi: {out} holds results of another run: {says}")
    assert mmi.err.count("\n") == 1 and tree(out.parent) == before


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("results.jsonl", '{"mine": 1}\n', "is there already, and holds no results of mmi"),
        ("results.jsonl", "", "is there already, and holds no results of mmi"),
        ("results.files/thesis.tex", "precious", "holds thesis.tex, which mmi did not write"),
        ("results.files/" + RECORD, "[]", "cannot be understood"),
        ("results.files/" + RECORD, '{"seed": 0}', "cannot be understood"),
        ("results.files", "precious", "is not a folder"),
    ],
)
def test_what_mmi_did_not_write_is_refused_and_stays(
    mmi: Screen, documents: Path, bundle: Path, out: Path, name: str, text: str, says: str
) -> None:
    (out.parent / name).parent.mkdir(parents=True)
    (out.parent / name).write_text(text)
    before = tree(out.parent)
    assert mmi("generate", documents, "-o", out, "-b", bundle) == 2
    assert says in mmi.err and mmi.err.count("\n") == 1
    assert tree(out.parent) == before


@pytest.mark.parametrize(
    ("added", "says"),
    [
        (b'{"mine": 1}\n', "line 5 of {out} is not a result of mmi"),
        (b'{"line": true}\n', "line 5 of {out} is not a result of mmi"),
        (b'{"line": 7, \n', "line 5 of {out} is not a result of mmi"),
        (b"notes without an end", "line 5 of {out} is not a result of mmi"),
        (b"\n", "line 5 of {out} is not a result of mmi"),
    ],
)
def test_lines_that_mmi_did_not_write_are_refused_and_stay(
    mmi: Screen, documents: Path, bundle: Path, out: Path, added: bytes, says: str
) -> None:
    run = ("generate", documents, "-o", out, "-b", bundle, *OPTIONS)
    assert mmi(*run) == 0
    out.write_bytes(out.read_bytes() + added)
    before = tree(out.parent)
    assert mmi(*run) == 2
    assert mmi.err.startswith(f"mmi: {says.format(out=out)}") and tree(out.parent) == before


def test_a_file_of_the_user_with_the_name_of_a_picture_stays(
    mmi: Screen, documents: Path, bundle: Path, out: Path
) -> None:
    run = ("generate", documents, "-o", out, "-b", bundle, *OPTIONS)
    assert mmi(*run) == 0
    folder = out.parent / "results.files"
    picture = (folder / "000003-01.png").read_bytes()
    (folder / "000003-01.png").write_text("mine")
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(line for line in lines if not line.startswith(b'{"line": 3,')))
    assert mmi(*run) == 0
    assert (folder / "000003-01.png").read_text() == "mine"
    assert results(out)[3]["parts"][0]["image"] == "results.files/000003-01-2.png"
    assert (folder / "000003-01-2.png").read_bytes() == picture


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"parts": ', "not JSON: line 3: "),
        ("[1]", "it is not a document"),
        ('{"text": "w5"}', "it is not a document"),
        ('{"parts": [{"texts": "w5"}]}', "part 1 of the document is not understood"),
        ('{"parts": []}', "the document is empty"),
        ('{"parts": [{"text": "nonsense"}]}', "does not know 'nonsense'"),
        ('{"parts": [{"text": "%s"}]}' % ("w5 " * 80), "too long for the model"),
        ('{"parts": [{"text": "%s"}]}' % ("w5 " * 80_000), "too long for the model"),
        ('{"parts": [{"image": "../secret.png"}]}', "lies outside the document's folder"),
        ('{"parts": [{"image": "/etc/hostname"}]}', "lies outside the document's folder"),
        ('{"parts": [{"image": "b.png"}]}', "there is no picture"),
        ('{"parts": [{"text": "\\ud83d"}]}', "half a character"),
        ('{"id": "given", "parts": [{"text": "w5"}]}', "lines 1 and 3 of {path} have the same id"),
        ('{"id": "2", "parts": [{"text": "w5"}]}', "lines 2 and 3 of {path} have the same id"),
        ('{"id": null, "parts": [{"text": "w5"}]}', "its id is of the wrong type"),
        ('{"id": true, "parts": [{"text": "w5"}]}', "its id is of the wrong type"),
        ('{"sed": 1, "parts": [{"text": "w5"}]}', "'sed' is unknown. the nearest one is seed"),
        ('{"logprobs": 1, "parts": [{"text": "w5"}]}', "'logprobs' is unknown"),
        ('{"seed": -1, "parts": [{"text": "w5"}]}', "seed is out of range"),
        ('{"seed": "1", "parts": [{"text": "w5"}]}', "seed has the wrong type"),
        ('{"top_p": NaN, "parts": [{"text": "w5"}]}', "top_p is out of range"),
        ('{"logit_bias": {"w": 1}, "parts": [{"text": "w5"}]}', "logit_bias is malformed"),
        ('{"logit_bias": {"99": 1}, "parts": [{"text": "w5"}]}', "beyond the model's vocabulary"),
    ],
)
def test_a_line_that_is_wrong_is_named_before_an_engine_is_loaded(
    mmi: Screen,
    documents: Path,
    bundle: Path,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    says: str,
) -> None:
    (tmp_path / "secret.png").write_bytes(to_png(np.zeros((8, 8, 3), np.uint8)))
    good = [json.dumps(document) for document in DOCUMENTS]
    documents.write_text("\n".join([*good[:2], line, *good[2:]]))
    monkeypatch.setattr(BatchEngine, "__init__", lambda *_, **__: pytest.fail("engines loaded"))
    assert mmi("generate", documents, "-o", out, "-b", bundle) == 2
    assert says.format(path=documents) in mmi.err and mmi.err.count("\n") == 1
    assert f"line 3 of {documents}: " in mmi.err or "lines" in says
    assert not out.parent.exists()


def test_a_corrected_file_can_be_run_and_other_options_too_until_there_is_a_result(
    mmi: Screen, documents: Path, bundle: Path, out: Path
) -> None:
    write(documents, [*DOCUMENTS, {"parts": [{"image": "missing.png"}]}])
    run = ("generate", documents, "-o", out, "-b", bundle)
    assert mmi(*run) == 2
    assert not out.parent.exists()
    write(documents, DOCUMENTS)
    assert mmi(*run) == 0
    first = results(out)
    out.write_bytes(b"")
    assert mmi(*run, "--seed", 5) == 0
    assert results(out) != first and mmi(*run) == 2
    drawn = {part["image"] for line in first.values() for part in line["parts"] if "image" in part}
    assert all((out.parent / name).exists() for name in drawn)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-o", "out"), "expected a name that ends in .jsonl"),
        (("-o", "{documents}"), "is there already, and holds no results of mmi"),
        (("-o", "{out}", "--force"), "--force replaces folders, no results"),
    ],
)
def test_outputs_that_cannot_be_are_refused(
    mmi: Screen, documents: Path, bundle: Path, out: Path, arguments: tuple[str, ...], says: str
) -> None:
    filled = [one.format(documents=documents, out=out) for one in arguments]
    before = documents.read_bytes()
    assert mmi("generate", documents, "-b", bundle, *filled) == 2
    assert says in mmi.err and mmi.err.count("\n") == 1
    assert documents.read_bytes() == before


@pytest.mark.parametrize("content", ["", "\n \n", None])
def test_a_file_without_documents_is_refused(
    mmi: Screen, documents: Path, bundle: Path, out: Path, content: str | None
) -> None:
    documents.unlink() if content is None else documents.write_text(content)
    assert mmi("generate", documents, "-o", out, "-b", bundle) == 2
    assert "holds no document" in mmi.err or f"cannot read {documents}" in mmi.err
    assert not out.exists()


def test_a_failed_document_has_a_line_and_is_tried_again(
    mmi: Screen, documents: Path, bundle: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(documents, [{"id": "nine", "parts": [{"text": "w9 w5"}]}, *DOCUMENTS])
    run = ("generate", documents, "-o", out, "-b", bundle, *OPTIONS, *NO_NINE)
    with monkeypatch.context() as patch:
        break_at_nine(patch, ValueError("odd"))
        for _ in range(2):
            assert mmi(*run) == 1
            assert f"line 1 of {documents}: unexpected ValueError: odd" in mmi.err.splitlines()
            lines = results(out)
            assert lines.pop(1) == {"line": 1, "id": "nine", "error": "unexpected ValueError: odd"}
            assert set(lines) == {2, 3, 4, 5} and all("parts" in one for one in lines.values())
    assert mmi(*run) == 0
    assert "parts" in results(out)[1] and {k: results(out)[k] for k in lines} == lines


def test_an_engine_that_stopped_ends_the_run_and_fails_no_further_line(
    mmi: Screen, documents: Path, bundle: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("generate", documents, "-o", out, "-b", bundle, *OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(BatchEngine, "__enter__", lambda self: (self.close(), self)[1])
        assert mmi(*run) == 2
    assert mmi.err.splitlines()[-1].startswith("mmi: the batch engine is closed")
    assert out.read_bytes() == b""
    assert mmi(*run) == 0 and len(results(out)) == 4


def test_a_full_disk_leaves_whole_lines(
    mmi: Screen, documents: Path, bundle: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("generate", documents, "-o", out, "-b", bundle, *OPTIONS)
    written, real = 0, os.write

    def full(descriptor: int, data: Any) -> int:
        nonlocal written
        if bytes(data[:1]) != b"{" or written < 1 or not bytes(data).startswith(b'{"line"'):
            written += bytes(data).startswith(b'{"line"')
            return real(descriptor, data)
        written += 1
        if written == 2:
            return real(descriptor, data[:10]) and _full()
        return _full()

    def _full() -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert mmi(*run) == 2
    assert "the disk is full" in mmi.err
    assert out.read_bytes().count(b"\n") == 1 and out.read_bytes().endswith(b"}\n")
    assert mmi(*run) == 0 and len(results(out)) == 4


def test_a_file_that_changes_meanwhile_is_noticed(
    mmi: Screen, documents: Path, bundle: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = command._generate

    def late(lines: DocumentLines, *arguments: Any) -> None:
        write(documents, [*DOCUMENTS[:3], {"parts": [{"text": "w31"}]}])
        real(lines, *arguments)

    monkeypatch.setattr(command, "_generate", late)
    assert mmi("generate", documents, "-o", out, "-b", bundle, *OPTIONS) == 2
    assert f"{documents} was changed while it was read" in mmi.err


def test_documents_and_lines_in_memory_are_bounded(
    mmi: Screen, bundle: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 400 lines as at 40: the lines that are read are at most 6 ahead of the results."""
    documents = tmp_path / "all.jsonl"
    write(documents, [{"parts": [{"text": f"w{5 + n % 20}"}]} for n in range(400)])
    ahead = []
    submit = BatchEngine.submit

    def kept(self: BatchEngine, *arguments: Any) -> Any:
        begun.append(1)
        ahead.append(len(begun) - out.read_bytes().count(b"\n"))
        return submit(self, *arguments)

    begun: list[int] = []
    monkeypatch.setattr(BatchEngine, "submit", kept)
    options = ("-b", bundle, "--slots", 2, "--max-tokens", 1, "--max-images", 0)
    assert mmi("generate", documents, "-o", out, *options) == 0
    assert len(results(out)) == 400 and 2 < max(ahead) <= 6


def test_a_line_may_have_every_option_that_changes_its_result() -> None:
    runtime: Runtime = fake_runtime()[0]
    assert runtime.schedules
    assert command.OPTIONS == {*GenerationOptions.__dataclass_fields__} - {"logprobs", "previews"}
