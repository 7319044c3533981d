"""Commands that read a folder take a reference in its place; those that write into it do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deploy.hub.stub_hub import Hub, constants, contents, names
from mmi_deploy.cli.app import run

if TYPE_CHECKING:
    from exports import Exported

# Command lines that read `MODEL`, and what else they are given.
READ_A_FOLDER = (
    "ablate mmfs --start MODEL -o OUT",
    "bench MODEL",
    "bench batch MODEL",
    "bench graph --list MODEL",
    "bench graph llm MODEL",
    "bench mmfs MODEL",
    "bench scale MODEL",
    "bench serve MODEL",
    "build MODEL --target cpu --dry-run",
    "delta apply MODEL OUT -o OUT",
    "delta make MODEL OUT -o OUT",
    "evaluate MODEL",
    "evaluate MODEL --benchmark vqav2 --data DATA -o OUT.jsonl",
    "export MODEL -o OUT",
    "generate DOCUMENT -b MODEL -o OUT",
    "inspect MODEL",
    "inspect batch MODEL",
    "inspect cost MODEL",
    "inspect flops-saved MODEL",
    "inspect gpus MODEL",
    "inspect memory MODEL",
    "inspect sensitivity MODEL",
    "inspect target MODEL",
    "serve MODEL",
    "train MODEL --data DOCUMENTS --plan",
    "train MODEL --data DOCUMENTS -o OUT",
    "train-tiny --start MODEL -o OUT",
    "triton OUT MODEL",
    "verify MODEL",
)


@pytest.fixture
def shipped(hub: Hub, exported_once: object) -> Exported:
    """A bundle and its model, as org/bundle and org/model of the stub."""
    exported: Exported = exported_once("shipped")  # type: ignore[operator]
    hub.add("org/bundle", contents(exported.bundle.folder))
    hub.add("org/model", contents(exported.folder))
    return exported


def written(command: str, tmp_path: Path, model: str) -> list[str]:
    """A command line with its placeholders replaced."""
    document = tmp_path / "story.md"
    document.write_text("a red circle")
    lines = tmp_path / "documents.jsonl"
    lines.write_text(json.dumps({"parts": ["a red circle"]}) + "\n")
    places = {
        "MODEL": model,
        "OUT": str(tmp_path / "out"),
        "OUT.jsonl": str(tmp_path / "out.jsonl"),
        "DATA": str(tmp_path),
        "DOCUMENT": str(document),
        "DOCUMENTS": str(lines),
    }
    return [places.get(word, word) for word in command.split()]


@pytest.mark.parametrize("command", READ_A_FOLDER)
def test_a_reference_is_asked_for_at_the_hub(
    hub: Hub, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(written(command, tmp_path, "hf://org/none")) == 2
    assert f"org/none is no model repository at {hub.endpoint}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("inspect hf://org/bundle", "hf://org/bundle: tiny"),
        ("inspect hf://org/model", "hf://org/model: tiny"),
        ("inspect target hf://org/bundle", "hf://org/bundle has no target"),
        ("inspect cost hf://org/bundle", "hf://org/bundle"),
        ("verify hf://org/bundle", "hf://org/bundle is whole"),
        ("build hf://org/bundle --target cpu --dry-run", "cpu-int8: "),
        ("bench graph --list hf://org/bundle", "denoise_step"),
        ("evaluate hf://org/model --count 1 --steps 1 --only-with", "measure"),
    ],
)
def test_results_name_the_reference_and_not_the_cache(
    shipped: Exported, command: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(command.split())
    said = capsys.readouterr()
    assert code == 0, said.err
    assert shown in said.out and constants().HF_HUB_CACHE not in said.out


def test_the_page_names_the_reference_in_the_command_that_made_it(
    shipped: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "generate DOCUMENT -b hf://org/bundle -o OUT --max-images 0 --max-tokens 4"
    code = run([*written(command, tmp_path, ""), "--kernels", "none"])
    assert code == 0, capsys.readouterr().err
    page = (tmp_path / "out" / "index.html").read_text()
    assert "--bundle hf://org/bundle " in page and constants().HF_HUB_CACHE not in page


def test_cost_downloads_the_graphs_without_their_weights(shipped: Exported) -> None:
    manifest = shipped.bundle.manifest
    for view in ("cost", "memory", "gpus"):
        assert run(["inspect", view, "hf://org/bundle", "--json"]) == 0
    cached = Path(constants().HF_HUB_CACHE) / "models--org--bundle" / "snapshots"
    (snapshot,) = cached.iterdir()
    assert names(snapshot) == {"bundle.json", *manifest.graphs.values()}


def test_a_bundle_is_exported_from_a_reference(
    shipped: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan of the export, which reads the model's headers."""
    assert (
        run(["export", "hf://org/model", "-o", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["model"] == shipped.bundle.config.name


@pytest.mark.parametrize("command", ["build", "verify --target cpu-int8"])
def test_a_command_that_writes_into_the_folder_refuses_a_reference(
    hub: Hub, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command.split(), "hf://org/bundle"]) == 2
    assert "`hf download org/bundle --local-dir FOLDER`" in capsys.readouterr().err
    assert not hub.requests
