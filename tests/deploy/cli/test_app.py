"""The command line: what it prints, what it leaves behind, and how it fails."""

from __future__ import annotations

import errno
import inspect
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from deploy.bundle.test_bundle import fill
from deploy.runtime.fake_model import fake_runtime
from mmi_deploy.bundle import manifest
from mmi_deploy.bundle.bundle import write_bundle
from mmi_deploy.cli import generate_output
from mmi_deploy.cli import verify as verify_command
from mmi_deploy.cli.app import run
from mmi_deploy.cli.command_table import COMMANDS, VIEWS
from mmi_deploy.cli.console import duration, flops
from mmi_deploy.cli.generate import generate as generate_command
from mmi_deploy.cli.generate_output import ENDS
from mmi_deploy.cli.inspect.app import RENAMED
from mmi_deploy.cli.inspect.memory import _residency
from mmi_deploy.cli.program import one_line
from mmi_deploy.cli.target_options import resident_groups
from mmi_deploy.documents.files import read_document
from mmi_deploy.documents.images import to_png
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.runtime.generation import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.config import from_json, to_json
from mmi_deploy.spec.graphs import Limits
from mmi_deploy.spec.presets import PRESETS, tiny
from mmi_deploy.system.output_folder import MARKER
from mmi_plugins.onnxruntime import library

REPOSITORY = Path(__file__).resolve().parents[3]
WORDS = [*COMMANDS, *(f"{command} {view}" for command in VIEWS for view in VIEWS[command])]


class Screen:
    """Runs a command line and keeps what it printed."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *arguments: object) -> int:
        self._capture.readouterr()
        code = run([str(argument) for argument in arguments])
        self.out, self.err = self._capture.readouterr()
        return code


@pytest.fixture
def mmi(capsys: pytest.CaptureFixture[str]) -> Screen:
    return Screen(capsys)


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """A document with a given picture and one to draw, in the words of the fake model."""
    (tmp_path / "a.png").write_bytes(to_png(np.full((8, 8, 3), 90, np.uint8)))
    path = tmp_path / "story.md"
    path.write_text("![a grey square](a.png)\n\nw5 w6\n\n![]()\n\nw7\n")
    return path


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose engines are the fake model's."""
    with write_bundle(tmp_path / "bundle", tiny(), Limits(context=64)) as writer:
        fill(writer)
    monkeypatch.setattr(Runtime, "open", classmethod(lambda cls, *_, **__: fake_runtime()[0]))
    monkeypatch.setattr(library, "ensure", lambda **_: None)  # nothing is compiled
    return tmp_path / "bundle"


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", WORDS)
def test_every_command_explains_itself_with_an_example(mmi: Screen, command: str) -> None:
    assert mmi(*command.split(), "--help") == 0
    assert f"mmi {command}" in mmi.out and "Example" in mmi.out


def test_help_lists_every_command(mmi: Screen) -> None:
    assert mmi("--help") == 0
    assert all(f" {command} " in mmi.out for command in COMMANDS)


def test_defaults_of_generate_are_those_of_the_library() -> None:
    """The command's module may not import the runtime for them, so they stand twice. That of the
    temperature depends on the beams."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(generate_command).parameters.items()
    }
    library = GenerationOptions()
    assert defaults.pop("temperature") is None
    shared = {field.name for field in fields(GenerationOptions)} & defaults.keys()
    assert len(shared) >= 9
    assert {n: defaults[n] for n in shared} == {n: getattr(library, n) for n in shared}


# --- generate -------------------------------------------------------------------------------------


def test_generate_writes_a_folder_that_can_be_read_and_looked_at(
    mmi: Screen, story: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out"
    seed = ("--seed", 123456789)
    assert mmi("generate", story, "-o", out, "-b", bundle, "--max-tokens", 12, *seed) == 0
    assert {"story.md", "index.html", "picture-01.png", "picture-02.png"} <= left_in(out)
    assert len(read_document(out / "story.md").images) >= 2
    assert "w5 w6" in mmi.out and "[picture 2: drawn]" in mmi.out
    assert mmi.out.index("w5 w6") < mmi.out.index("[picture 2: drawn]") < mmi.out.index("w7")
    assert str(out / "index.html") in mmi.err
    html = (out / "index.html").read_text()
    assert "w5 w6" in html and "seed" in html and "plain:4" in html
    (again,) = re.findall(r"<code>(.*)</code>", html)
    words = shlex.split(unescape(again))
    assert words[:3] == ["mmi", "generate", str(story)] and str(bundle) in words
    assert words[words.index("--seed") + 1] == "123456789"
    assert words[words.index("--schedule") + 1] == "plain:4"
    assert left_in(out.parent) == {"out"}


def test_sampling_options_reach_the_text_and_the_command_of_the_page(
    mmi: Screen, bundle: Path, tmp_path: Path
) -> None:
    story = tmp_path / "words.md"
    story.write_text("w5 w6\n")
    out = tmp_path / "out"
    options = ("--max-images", 0, "--max-tokens", 3, "--min-p", 1, "--presence-penalty", 0.5)
    more = ("--frequency-penalty", -0.25, "--logit-bias", "8=100", "--logit-bias", "7=-2.5")
    assert mmi("generate", story, "-b", bundle, "-o", out, *options, *more) == 0
    assert "w8 w8 w8" in mmi.out
    (again,) = re.findall(r"<code>(.*)</code>", (out / "index.html").read_text())
    command = unescape(again)
    assert "--min-p 1.0 --presence-penalty 0.5 --frequency-penalty -0.25" in command
    assert command.endswith("--logit-bias 7=-2.5 --logit-bias 8=100.0")


def test_generated_text_goes_on_from_the_given_text(
    mmi: Screen, bundle: Path, tmp_path: Path
) -> None:
    """With the space that the tokenizer puts between words, and none after a picture."""
    story = tmp_path / "words.md"
    story.write_text("w5 w6\n")
    arguments = ("-b", bundle, "-o", tmp_path / "out", "--max-images", 0, "--max-tokens", 3)
    assert mmi("generate", story, *arguments, "--json") == 0
    given, generated = (part["text"] for part in json.loads(mmi.out)["parts"])
    assert given == "w5 w6" and re.fullmatch(r"( w\d+){1,3}", generated)
    story.write_text("w5 ![]()\n")
    assert mmi("generate", story, *arguments, "--json") == 0
    *_, generated = (part["text"] for part in json.loads(mmi.out)["parts"] if "text" in part)
    assert re.fullmatch(r"w\d+( w\d+){0,2}", generated)


def test_generate_as_json_tells_what_is_in_the_folder(
    mmi: Screen, story: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert mmi("generate", story, "-o", out, "-b", bundle, "--max-tokens", 5, "--json") == 0
    report = json.loads(mmi.out)
    assert mmi.err == ""
    assert report["reason"] in ENDS and report["tokens"] <= 5 and report["images"] >= 1
    pictures = [part["image"] for part in report["parts"] if "image" in part]
    assert sorted(name for name in left_in(out) if name.startswith("picture")) == pictures
    assert [part["generated"] for part in report["parts"]][:4] == [False, False, True, False]
    assert report["stages"]["denoise"]["count"] == 4 * report["images"]


def test_the_same_seed_gives_the_same_story(
    mmi: Screen, story: Path, bundle: Path, tmp_path: Path
) -> None:
    written = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        out = tmp_path / name
        assert mmi("generate", story, "-o", out, "-b", bundle, "--seed", seed) == 0
        written[name] = {
            path.name: path.read_bytes()
            for path in out.iterdir()
            if path.name not in ("index.html", MARKER)
        }
    assert written["a"] == written["b"] != written["c"]


def test_a_folder_of_somebody_else_is_refused_before_any_work(
    mmi: Screen, story: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "thesis.tex").touch()
    assert mmi("generate", story, "-o", out, "-b", bundle) == 2
    line = f"mmi: {out} holds thesis.tex, which mmi did not write. move it elsewhere, or give "
    assert mmi.out == "" and mmi.err == f"{line}another output folder\n"
    assert mmi("generate", story, "-o", out, "-b", bundle, "--force") == 2
    assert left_in(out) == {"thesis.tex"}
    (out / "thesis.tex").unlink()
    for _ in range(2):
        assert mmi("generate", story, "-o", out, "-b", bundle) == 0


def test_the_home_folder_is_never_written(
    mmi: Screen, story: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By no command, with any option; nor is the current folder, or what is above it."""
    home = tmp_path / "people" / "me"
    (home / "work" / "here").mkdir(parents=True)
    (home / "thesis.txt").write_text("precious")
    before = left_in(home) | left_in(home / "work" / "here")
    monkeypatch.setenv("HOME", str(home))
    commands = (
        ("generate", story, "-b", bundle, "--force"),
        ("export", REPOSITORY / "assets" / "tiny", "--force"),
        ("convert", tmp_path, "--force"),
        ("init", "--llm", tmp_path, "--force"),
        ("train", REPOSITORY / "assets" / "tiny", "--data", story),
        ("train-tiny",),
    )
    for current, outs in ((tmp_path, (home, home.parent)), (home / "work" / "here", (".", ".."))):
        monkeypatch.chdir(current)
        for command in commands:
            for out in outs:
                assert mmi(*command, "-o", out) == 2
                assert f"mmi: {out} is " in mmi.err
                assert "home folder" in mmi.err or "the folder you are in" in mmi.err
    left = left_in(home) | left_in(home / "work" / "here")
    assert left - {".cache"} == before  # libraries keep theirs there


def test_what_cannot_be_written_is_told_before_the_model_is_loaded(
    mmi: Screen, story: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "open", pytest.fail)
    for out, why in (
        (story / "x", f"{story} is not a folder"),
        (Path("/proc/self/out"), "cannot be written: "),
        (tmp_path / ("n" * 300), "File name too long"),
        (story, "is not a folder"),
    ):
        assert mmi("generate", story, "-b", bundle, "-o", out) == 2
        assert why in mmi.err and mmi.err.startswith(f"mmi: {out} ")


def test_a_file_that_comes_into_the_folder_during_the_run_stays(
    mmi: Screen, story: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert mmi("generate", story, "-b", bundle, "-o", out) == 0
    before = (out / "story.md").read_bytes()
    write = generate_output.write_story

    def late(*arguments: Any) -> None:
        (out / "notes.txt").write_text("mine")
        write(*arguments)

    monkeypatch.setattr(generate_output, "write_story", late)
    assert mmi("generate", story, "-b", bundle, "-o", out, "--seed", 5) == 2
    assert "holds notes.txt" in mmi.err and f"The new story is in {out}-new\n" in mmi.err
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "story.md").read_bytes() == before
    assert {"story.md", "index.html"} <= left_in(tmp_path / "out-new")
    assert left_in(tmp_path) == {"story.md", "a.png", "bundle", "out", "out-new"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["missing.md"], "cannot read missing.md"),
        (["{story}", "--temperature", "-1"], "temperature"),
        (["{story}", "--top-p", "0"], "top_p is out of range"),
        (["{story}", "--min-p", "2"], "min_p is out of range; expected 0 to 1; got 2.0"),
        (["{story}", "--presence-penalty", "3"], "presence_penalty is out of range"),
        (["{story}", "--frequency-penalty", "nan"], "frequency_penalty is out of range"),
        (["{story}", "--logit-bias", "5"], "--logit-bias is malformed; expected ID=BIAS"),
        (["{story}", "--logit-bias", "w=1"], "--logit-bias is malformed"),
        (["{story}", "--logit-bias", "5=101"], "logit_bias is out of range"),
        (["{story}", "--logit-bias", "5=1", "--logit-bias", "5=2"], "twice for a token; got 5=2"),
        (["{story}", "--logit-bias", "99999=1"], "beyond the model's vocabulary"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(
    mmi: Screen, story: Path, bundle: Path, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    filled = [argument.format(story=story) for argument in arguments]
    assert mmi("generate", *filled, "-b", bundle, "-o", tmp_path / "out") == 2
    assert reason in mmi.err and "Traceback" not in mmi.err
    assert "out" not in left_in(tmp_path)


def test_a_refused_document_is_not_shown_first(mmi: Screen, bundle: Path, tmp_path: Path) -> None:
    story = tmp_path / "words.md"
    story.write_text("w5 nonsense\n")
    assert mmi("generate", story, "-b", bundle, "-o", tmp_path / "deep" / "out") == 2
    assert mmi.out == "" and "does not know 'nonsense'" in mmi.err
    assert left_in(tmp_path) == {"bundle", "words.md"}


def test_the_page_has_the_documents_heading_as_its_title(
    mmi: Screen, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Title of the page: the file name of a document without a heading."""
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: [5])  # the fake one does not know `#`
    arguments = ("-b", bundle, "-o", tmp_path / "out", "--max-tokens", 2, "--max-images", 0)
    for text, title in (("w5", "words"), ("# A *blue* day\n\nw7", "A blue day")):
        (tmp_path / "words.md").write_text(text)
        assert mmi("generate", tmp_path / "words.md", *arguments) == 0
        assert f"<title>{title}</title>" in (tmp_path / "out" / "index.html").read_text()


# --- failures -------------------------------------------------------------------------------------


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make generation fail after its first event."""

    def arrange(error: BaseException) -> None:
        from mmi_deploy.runtime import generation

        real = generation.generate

        def broken(*arguments: Any) -> Iterator[Any]:
            yield next(iter(real(*arguments)))
            raise error

        monkeypatch.setattr(generation, "generate", broken)

    return arrange


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "mmi: stopped\n"),
        (FULL, 2, "mmi: the disk is full"),
        (RuntimeError("I/O: No space left on device (os error 28)"), 2, "mmi: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "x/y"), 2, "mmi: x/y: Permission"),
        (ValueError("odd\nthing"), 1, "mmi: unexpected ValueError: odd thing. Run it again as"),
    ],
)
def test_whatever_goes_wrong_is_one_line_and_leaves_nothing(
    mmi: Screen,
    story: Path,
    bundle: Path,
    fail: Callable[[BaseException], None],
    error: BaseException,
    code: int,
    says: str,
) -> None:
    folder = story.parent
    before = left_in(folder)
    fail(error)
    assert mmi("generate", story, "-b", bundle, "-o", folder / "out") == code
    assert mmi.err.strip().splitlines()[-1].startswith(says.strip())
    assert mmi.err.count("mmi: ") >= 1 and "Traceback" not in mmi.err
    assert left_in(folder) == before


def test_debug_shows_the_traceback(
    mmi: Screen, story: Path, bundle: Path, fail: Callable[[BaseException], None]
) -> None:
    fail(ValueError("odd"))
    with pytest.raises(ValueError, match="odd"):
        mmi("--debug", "generate", story, "-b", bundle, "-o", story.parent / "out")


def test_an_unknown_command_or_option_exits_2(mmi: Screen) -> None:
    assert mmi("dance") == 2
    assert mmi("generate", "--fast") == 2


def program(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A fresh process that runs `code`, then the command line."""
    script = f"{code}\nfrom mmi_deploy.cli.app import main\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (["generate", "story.md"], "onnxruntime", "cpu"),
        (["train-tiny"], "torch", "train"),
        (["evaluate"], "torch", "train"),
        (["export"], "torch", "export"),
        (["bench"], "torch", "bench"),
    ],
)
def test_a_missing_extra_is_named(
    tmp_path: Path, arguments: list[str], module: str, extra: str
) -> None:
    """In a process that cannot import `module`, as after `pip install mmi_deploy` alone; the line
    may follow the one that a long command begins with."""
    process = program(
        f"import os, sys; sys.modules[{module!r}] = None; os.chdir({str(tmp_path)!r})", *arguments
    )
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, ""), err
    assert err.splitlines()[-1] == (
        f"mmi: `mmi {arguments[0]}` needs {module}, which is not installed. "
        f"install it with: pip install 'mmi_deploy[{extra}]'"
    )
    assert left_in(tmp_path) == set()


def test_every_extra_that_is_named_exists() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    rows = [*COMMANDS.values(), *(row for views in VIEWS.values() for row in views.values())]
    assert {row.extra for row in rows} - {None} <= project["optional-dependencies"].keys()
    assert "torch" not in " ".join(project["dependencies"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_temporary_folder(
    story: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """A real signal in the middle of a generation that has already begun to write."""
    slow = r"""
import time
from deploy.runtime.fake_model import fake_runtime
from mmi_deploy.runtime import generation
from mmi_deploy.runtime.runtime import Runtime
Runtime.open = classmethod(lambda cls, *_, **__: fake_runtime()[0])
def forever(*_):
    print("\nbegun", flush=True)
    time.sleep(60)
    yield
generation.generate = forever
"""
    before = left_in(tmp_path)
    process = program(slow, "generate", story, "-o", tmp_path / "out", "--kernels", "none")
    assert process.stdout is not None
    while (line := process.stdout.readline()).strip() != "begun":
        assert line, process.communicate()[1]
    assert left_in(tmp_path) != before
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, "mmi: stopped\n")
    assert left_in(tmp_path) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_a_library_makes_an_error_of_is_one_still(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """As in an import of compiled code, which ends in an ImportError."""
    importing = f"""
import os
from mmi_deploy.spec import presets
def interrupted(name):
    try:
        os.kill(os.getpid(), {number})
    except BaseException as error:
        raise ImportError("initialization failed") from error
presets.preset = interrupted
"""
    process = program(importing, "inspect", "--preset", "tiny")
    assert process.communicate(timeout=60) == ("", "mmi: stopped\n")
    assert process.returncode == code


# --- inspect and verify ---------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_inspect_prints_a_preset_that_can_be_read_back(mmi: Screen, preset: str) -> None:
    assert mmi("inspect", "--preset", preset) == 0
    assert from_json(mmi.out) == PRESETS[preset]()


def test_inspect_lists_presets(mmi: Screen) -> None:
    assert mmi("inspect", "--json") == 0
    assert set(json.loads(mmi.out)) == set(PRESETS)
    assert mmi("inspect") == 0
    assert all(preset in mmi.out for preset in PRESETS)


def test_inspect_counts_parameters_of_a_model_folder(mmi: Screen, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    (tmp_path / "config.json").write_text(to_json(tiny()))
    weights = {"vision.a": np.zeros((3, 4), np.float32), "llm.b.c": np.zeros(1000, np.float16)}
    save_file({**weights, "llm.d": np.zeros((), np.float32)}, tmp_path / "model.safetensors")
    assert mmi("inspect", tmp_path, "--json") == 0
    assert json.loads(mmi.out)["parameters"] == {"vision": 12, "llm": 1001}
    assert mmi("inspect", tmp_path) == 0
    assert "1,013" in mmi.out and "98.8%" in mmi.out
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert mmi("inspect", tmp_path) == 2
    assert "not a safetensors file" in mmi.err


def test_inspect_shows_graphs_and_receipts_of_a_bundle(
    mmi: Screen, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert mmi("inspect", bundle, "--tensors") == 0
    for word in ("denoise_step", "ddim:4", "the model", "1.0e-06", "1e-04", "past_key.00"):
        assert word in mmi.out
    assert mmi("inspect", bundle, "--json") == 0
    assert json.loads(mmi.out)["limits"]["context"] == 64


def test_inspect_refuses_what_is_neither(mmi: Screen, tmp_path: Path) -> None:
    assert mmi("inspect", tmp_path) == 2
    assert "neither a bundle nor a model folder" in mmi.err
    assert mmi("inspect", tmp_path, "--preset", "tiny") == 2
    assert mmi("inspect", "--preset", "huge") == 2
    assert "there is no preset 'huge'" in mmi.err


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_that_is_nested_without_end_is_told_in_a_line(
    mmi: Screen, bundle: Path, tmp_path: Path, opening: str
) -> None:
    deep = opening * 10_000
    (tmp_path / "deep.json").write_text(deep)
    (bundle / ".checked.json").write_text(deep)  # only remembers, so that it is no error
    assert mmi("generate", tmp_path / "deep.json", "-b", bundle, "-o", tmp_path / "out") == 2
    assert mmi.err.startswith("mmi: the document is not JSON") and mmi.err.count("\n") == 1
    assert mmi("inspect", bundle) == 0
    (bundle / "bundle.json").write_text(deep)
    for command in ("inspect", "verify"):
        assert mmi(command, bundle) == 2
        assert mmi.err.startswith(f"mmi: cannot read {bundle / 'bundle.json'}")
        assert mmi.err.count("\n") == 1


def test_brackets_in_a_name_are_shown_as_they_are(
    mmi: Screen, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    named = bundle.rename(bundle.parent / "b[bold][oops]:bug:")
    for command in ("verify", "inspect"):
        assert mmi(command, named) == 0
        assert mmi.out.startswith(str(named))


@pytest.mark.parametrize("option", [("--images", 3), ("--batch", 1), ("--context", 9)])
def test_inspect_refuses_sizes_that_its_view_does_not_have(
    mmi: Screen, bundle: Path, option: tuple[str, int]
) -> None:
    assert mmi("inspect", bundle, *option) == 2
    assert f"No such option: {option[0]}" in mmi.err


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "--preset", "tiny", "--tensors"),
        ("inspect", "--tensors"),
        ("plugins", "build", "tensorrt", "--cuda"),
        ("plugins", "build", "onnxruntime", "--tensorrt-include", "."),
    ],
)
def test_options_that_mean_nothing_are_refused(mmi: Screen, words: tuple[str, ...]) -> None:
    assert mmi(*words) == 2
    assert mmi.err.startswith("mmi: --") and "does not apply here; expected it with" in mmi.err


@pytest.mark.parametrize("option", RENAMED)
def test_options_that_became_views_are_named(mmi: Screen, option: str) -> None:
    assert mmi("inspect", "bundle", option, "value") == 2
    view, *kept = RENAMED[option].split()
    command = " ".join(["mmi inspect", view, "bundle", *kept, "value"])
    assert f"`{command}`" in mmi.err and mmi.err.count("\n") == 1


def test_a_view_that_is_misspelt_is_told_from_a_folder(mmi: Screen) -> None:
    assert mmi("inspect", "cots", "assets/tiny") == 2
    assert "cots is neither a folder nor a view" in mmi.err and "cost" in mmi.err


def test_help_imports_no_command() -> None:
    """In a fresh process: the list of commands is a table."""
    code = (
        "import sys; from mmi_deploy.cli.app import run; run(['--help']); "
        "print([n for n in sys.modules if n.startswith(('mmi_deploy.cli.', 'mmi_')) "
        "and n.removeprefix('mmi_deploy.cli.') in "
        "('generate', 'build', 'verify', 'inspect.app', 'mmi_train', 'mmi_export', 'numpy')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.rstrip().endswith("[]")


def test_numbers_for_people_have_no_exponents() -> None:
    assert [flops(n) for n in (999, 999_900, 26_200_000_000, 10**16)] == [
        "999", "1 M", "26.2 G", "10000 T"
    ]  # fmt: skip
    assert [duration(s) for s in (1234.5, 0.99996, 0.0079, 0.0)] == [
        "1234 s", "1 s", "7.9 ms", "0 ns"
    ]  # fmt: skip


def test_engines_that_take_turns_are_named_alike_everywhere() -> None:
    """The options that `mmi inspect memory --fit` recommends are accepted by `mmi generate`."""
    assert (
        resident_groups("none") == ()
        and resident_groups("all") is None
        and resident_groups(None) is None
    )
    assert resident_groups("llm, vae") == ("llm", "vae")
    choice = SimpleNamespace(resident=())
    advice = _residency(choice)  # type: ignore[arg-type]
    assert re.findall(r"--resident (\S+)", advice) == ["none"]


def test_verify_finds_a_changed_byte(mmi: Screen, bundle: Path) -> None:
    assert mmi("verify", bundle, "--json") == 0
    assert json.loads(mmi.out)["ok"] is True
    assert mmi("verify", bundle) == 0 and "8 receipts" in mmi.out
    weights = bundle / "graphs" / "llm.safetensors"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    weights.write_bytes(b"Weights")
    os.utime(weights, ns=times)  # only the bytes tell
    assert mmi("verify", bundle) == 2
    assert "llm.safetensors has changed" in mmi.err


def test_verify_shows_a_bar_while_it_hashes_large_files(
    mmi: Screen, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal; a log and a program are spared it."""
    monkeypatch.setattr(manifest, "_BLOCK", 2)
    assert mmi("verify", bundle, "--json") == 0
    assert json.loads(mmi.out)["ok"] is True and mmi.err == ""
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(verify_command, "remarks", lambda: terminal)
    assert mmi("verify", bundle) == 0
    assert re.search(r"hashing \S+\.(json|onnx|safetensors) .*[Bk]B", screen.getvalue())


def test_verify_can_run_every_graph(mmi: Screen, bundle: Path) -> None:
    assert mmi("verify", bundle, "--run", "--json") == 0
    report = json.loads(mmi.out)
    assert (report["tokens"], report["pictures"]) == (4, 1)


def test_names_in_files_cannot_break_the_line_of_an_error() -> None:
    assert one_line("no tensor a\nb \x1b[31mred\x00 née") == "no tensor a b \\x1b[31mred\\x00 née"
    long = one_line("x" * 10_000)
    assert len(long) < 5000 and long.endswith(" and 6000 more")


def test_a_wrong_option_is_one_line_that_names_the_help(mmi: Screen) -> None:
    assert mmi("generate", "--seed", "x") == 2
    assert mmi.err.count("\n") == 1
    assert mmi.err.startswith("mmi: Invalid value for '--seed'")
    assert mmi.err.endswith("See `mmi generate --help`\n")
    assert mmi("plugins", "build", "nope") == 2
    assert mmi.err.endswith("See `mmi plugins build --help`\n")
    assert mmi("--debug", "plugins", "build") == 2  # the choices are not one a line
    assert mmi.err.count("\n") == 1


def test_without_a_command_there_is_help_alone(mmi: Screen) -> None:
    for group in ((), ("plugins",)):
        assert mmi(*group) == 2
        assert "Usage: mmi" in mmi.out and mmi.err == ""


@pytest.mark.parametrize("kind", ["onnxruntime", "tensorrt"])
def test_a_wrong_cache_folder_is_told_before_anything_is_compiled(
    mmi: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MMI_CACHE", str(tmp_path / "file"))
    assert mmi("plugins", "build", kind) == 2
    assert mmi.err.startswith(f"mmi: MMI_CACHE names {tmp_path / 'file'}, which cannot be written")


def test_the_output_never_replaces_the_document_or_the_bundle(
    mmi: Screen, story: Path, bundle: Path
) -> None:
    for out in (bundle, story.parent):
        before = left_in(out)
        assert mmi("generate", story, "-b", bundle, "-o", out, "--force") == 2
        assert "is read to write it" in mmi.err
        assert left_in(out) == before


@pytest.mark.parametrize(
    ("option", "value"), [("--temperature", "inf"), ("--guidance", "inf"), ("--guidance", "1e38")]
)
def test_endless_numbers_are_refused(
    mmi: Screen, story: Path, bundle: Path, option: str, value: str
) -> None:
    out = story.parent / "out"
    assert mmi("generate", story, "-b", bundle, "-o", out, option, value) == 2
    assert "out of range" in mmi.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "option", "name", "reason"),
    [
        ("bench", "--out", "file/a.json", "file/a.json cannot be written: "),
        ("bench", "--plot", "a.gif", "cannot write a.gif; expected a name that ends in .svg or "),
        ("evaluate", "--pictures", "file/a.png", "file/a.png cannot be written: "),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_minutes_of_work(
    mmi: Screen, tmp_path: Path, command: str, option: str, name: str, reason: str
) -> None:
    (tmp_path / "file").touch()
    assert mmi(command, "absent", option, tmp_path / name) == 2  # it would fail later, too
    assert reason in mmi.err and left_in(tmp_path) == {"file"}


def test_letters_that_a_terminal_lacks_do_not_end_the_program(bundle: Path) -> None:
    process = program("", "inspect", bundle, "--tensors", PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    assert "tensor" in out and "\\xd7" in out  # the × of a shape


def test_a_name_in_another_encoding_is_no_fault(
    mmi: Screen, bundle: Path, story: Path, tmp_path: Path
) -> None:
    named = story.rename(story.parent / os.fsdecode(b"\xe9t\xe9.md"))
    assert mmi("generate", named, "-b", bundle, "-o", tmp_path / "out", "--max-tokens", 2) == 0
    assert "<title>?t?</title>" in (tmp_path / "out" / "index.html").read_text()
    assert mmi("generate", named, "-b", bundle, "-o", tmp_path / "été", "--json") == 0
    assert mmi.out.isascii() and json.loads(mmi.out)["out"] == str(tmp_path / "été")


def test_ctrl_c_before_the_command_line_is_there_is_no_fault() -> None:
    code = """
import sys
class Interrupted:
    def find_spec(self, name, *_):
        if name == "mmi_deploy.cli.app":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from mmi_deploy.__main__ import main
main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (130, "mmi: stopped\n")
