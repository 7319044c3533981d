"""`mmi push` against a stub of the Hub: what is uploaded and what stays, cards, refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deploy.hub import stub_hub
from deploy.hub.stub_hub import TOKEN, Files, Hub, constants, contents, names, offline
from mmi_deploy.bundle.bundle import Bundle, write_target
from mmi_deploy.cli.app import run
from mmi_deploy.cli.hub_folders import local_folder
from mmi_deploy.hub import kinds
from mmi_deploy.hub.card import CARD, is_unedited
from mmi_deploy.system.output_folder import MARKER, new_folder

if TYPE_CHECKING:
    from exports import Exported

WRITTEN_BY_MMI = {"config.json", "model.safetensors", "tokenizer.json"}
ATTRIBUTES = ".gitattributes"


@pytest.fixture(autouse=True)
def login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The token of the stub, whatever the user is logged in with."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants(), "HF_TOKEN_PATH", str(tmp_path / "token"))


@pytest.fixture
def bundle(exported_once: object, tmp_path: Path) -> Bundle:
    """A copy of a bundle of one's own, with a file that mmi did not write."""
    exported: Exported = exported_once("shipped")  # type: ignore[operator]
    folder = tmp_path / "bundle"
    shutil.copytree(exported.bundle.folder, folder, copy_function=_linked)
    (folder / ".env").write_text("password")
    return Bundle.open(folder)


@pytest.fixture
def model(exported_once: object, tmp_path: Path) -> Path:
    """A model folder as a command writes it, with a file that mmi did not write."""
    exported: Exported = exported_once("shipped")  # type: ignore[operator]
    with new_folder(tmp_path / "model", kind="model") as work:
        for name in WRITTEN_BY_MMI:
            shutil.copyfile(exported.folder / name, work / name)
    (tmp_path / "model" / "secrets.txt").write_text("password")
    return tmp_path / "model"


def _linked(source: str, to: str) -> None:
    """Hard links for large files, copies of others."""
    if os.path.getsize(source) < 2**16:
        shutil.copy2(source, to)
    else:
        shutil.copyfile(source, to)


Capture = pytest.CaptureFixture[str]


def error(capsys: Capture, *words: object) -> str:
    """The one line that a command is refused with."""
    capsys.readouterr()
    assert run(["push", *map(str, words)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("mmi: ")
    return line


def pushed(hub: Hub, name: str, branch: str = "main") -> Files:
    files = hub.repositories[name].files(branch)
    assert files is not None
    return files


def test_a_bundle_comes_back_equal_to_the_byte(hub: Hub, bundle: Bundle, capsys: Capture) -> None:
    assert run(["push", str(bundle.folder), "hf://org/new", "--private"]) == 0
    said = capsys.readouterr()
    repository = hub.repositories["org/new"]
    assert repository.private and len(repository.commits) == 2  # that of the creation, and one
    assert said.out == (
        f"hf://org/new is at {hub.endpoint}/org/new/commit/{repository.branches['main']}\n"
    )
    assert "1 file of" in said.err and "stays here: .env" in said.err
    files = pushed(hub, "org/new")
    listed = {"bundle.json", *bundle.manifest.files}
    assert files.keys() == {ATTRIBUTES, CARD, *listed}
    folder = local_folder(Path("hf://org/new"), kinds.BUNDLE)
    assert names(folder) == listed
    assert all((folder / n).read_bytes() == (bundle.folder / n).read_bytes() for n in listed)
    assert Bundle.open(folder).identity == bundle.identity
    assert re.fullmatch(r"Upload the bundle tiny with mmi [\w.+]+", repository.messages[0])


def test_a_model_comes_back_equal_to_the_byte(hub: Hub, model: Path, capsys: Capture) -> None:
    assert run(["push", str(model), "hf://org/model", "--message", "Two epochs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["new"] and found["commit"] == hub.repositories["org/model"].branches["main"]
    assert hub.repositories["org/model"].messages == ["Two epochs"]
    assert pushed(hub, "org/model").keys() == {ATTRIBUTES, CARD, *WRITTEN_BY_MMI}
    folder = local_folder(Path("hf://org/model"), kinds.MODEL)
    assert contents(folder) == {n: (model / n).read_bytes() for n in WRITTEN_BY_MMI}


def test_engines_are_uploaded_and_those_of_earlier_bundles_named(
    hub: Hub, bundle: Bundle, capsys: Capture
) -> None:
    with write_target(bundle, "cpu-int8", {"precision": "int8"}) as target:
        target.engine_file("llm", ".onnx").write_bytes(b"graph")
    assert run(["push", str(bundle.folder), "hf://org/new"]) == 0
    assert "### Engines: cpu-int8" in pushed(hub, "org/new")[CARD].decode()
    folder = local_folder(Path("hf://org/new"), kinds.BUNDLE, targets=None)
    assert Bundle.open(folder).target("cpu-int8", unproved=True) == bundle.target(
        "cpu-int8", unproved=True
    )
    shutil.rmtree(bundle.folder / "engines")
    capsys.readouterr()
    assert run(["push", str(bundle.folder), "hf://org/new"]) == 0
    engines = "engines/cpu-int8/llm.onnx, engines/cpu-int8/target.json"
    assert f"does not have: {engines}" in capsys.readouterr().err
    assert "engines/cpu-int8/llm.onnx" in pushed(hub, "org/new")


def test_a_large_file_that_does_not_arrive_leaves_the_repository_as_it_was(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    hub.add("org/model", {"LICENSE": b"text"})
    monkeypatch.setattr(stub_hub, "sha256", lambda data: "another")
    found = error(capsys, model, "hf://org/model")
    assert "Error while uploading 'model.safetensors'" in found and "Run the command again" in found
    assert pushed(hub, "org/model") == {"LICENSE": b"text"}


def test_a_hub_out_of_reach_is_one_line(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(constants(), "ENDPOINT", "http://127.0.0.1:9")
    assert "the connection to http://127.0.0.1:9 failed" in error(capsys, model, "hf://org/model")


def test_the_card_states_graphs_receipts_and_commands(hub: Hub, bundle: Bundle) -> None:
    assert run(["push", str(bundle.folder), "hf://org/new@trial", "--license", "mit"]) == 0
    card = pushed(hub, "org/new", "trial")[CARD]
    text = card.decode()
    front = text.split("---\n")[1].splitlines()
    assert {"license: mit", "library_name: mmi_deploy", "pipeline_tag: any-to-any"} < {*front}
    assert "mmi generate story.md -b hf://org/new@trial -o out" in text
    for receipt in bundle.manifest.receipts:
        assert re.search(rf"^\| {receipt.graph} \| .* \| {len(receipt.cases)} \| ", text, re.M)
    assert is_unedited(card) and not is_unedited(card.replace(b"mit", b"gpl"))
    assert not is_unedited(b"# My model\n") and not is_unedited(b"")
    assert str(bundle.folder) not in text


def test_the_dry_run_prints_files_and_card_without_network(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert run(["push", str(model), "hf://org/model", "--dry-run"]) == 0
    said = capsys.readouterr()
    size = (model / "model.safetensors").stat().st_size
    assert re.search(rf"model\.safetensors +{size:,}", said.out)
    assert "README.md, written from the manifest" in said.out and "library_name:" in said.out
    assert "secrets.txt" in said.err and "secrets.txt" not in said.out
    assert run(["push", str(model), "hf://org/model", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"].keys() == WRITTEN_BY_MMI and is_unedited(found["card"].encode())
    assert not hub.requests


def test_a_card_of_the_folder_is_uploaded_as_it_is(hub: Hub, model: Path, capsys: Capture) -> None:
    own = b"---\nlicense: mit\n---\n# Mine\r\n"
    (model / CARD).write_bytes(own)
    hub.add("org/model", {CARD: b"# Old\n", "LICENSE": b"text"})
    assert run(["push", str(model), "hf://org/model"]) == 0
    assert "keeps 1 file" in capsys.readouterr().err
    files = pushed(hub, "org/model")
    assert files[CARD] == own and files["LICENSE"] == b"text"
    assert "uploaded as it is" in error(capsys, model, "hf://org/model", "--license", "mit")
    (model / CARD).write_bytes(b"---\nlicense: mit\n")
    assert "the Hub does not accept README.md" in error(capsys, model, "hf://org/model")


def test_an_edited_card_of_the_repository_stays(hub: Hub, model: Path, capsys: Capture) -> None:
    assert run(["push", str(model), "hf://org/model"]) == 0
    first = pushed(hub, "org/model")[CARD]
    assert run(["push", str(model), "hf://org/model", "--license", "mit"]) == 0
    second = pushed(hub, "org/model")[CARD]
    assert second != first and is_unedited(second)
    edited = second + b"Of my own.\n"
    hub.repositories["org/model"].commit(pushed(hub, "org/model") | {CARD: edited})
    capsys.readouterr()
    assert run(["push", str(model), "hf://org/model"]) == 0
    said = capsys.readouterr()
    assert "edited since, and stays" in said.err and "was there already" in said.out
    assert pushed(hub, "org/model")[CARD] == edited


def test_a_second_upload_sends_no_large_file_again(hub: Hub, model: Path) -> None:
    assert run(["push", str(model), "hf://org/one"]) == 0
    assert hub.requests["PUT object"] == 1
    assert run(["push", str(model), "hf://org/two"]) == 0
    assert hub.requests["PUT object"] == 1


def test_a_branch_is_created_and_a_tag_refused(hub: Hub, model: Path, capsys: Capture) -> None:
    repository = hub.add("org/model", {"LICENSE": b"text"})
    repository.tags["v1"] = repository.branches["main"]
    assert run(["push", str(model), "hf://org/model@trial"]) == 0
    assert pushed(hub, "org/model").keys() == {"LICENSE"}
    assert pushed(hub, "org/model", "trial").keys() == {"LICENSE", CARD, *WRITTEN_BY_MMI}
    assert "v1 is a tag of org/model" in error(capsys, model, "hf://org/model@v1")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"bundle.json": b'{"graphs": {}, "files": {}, "receipts": []}'}, "holds a bundle, and"),
        ({"config.json": b"{}"}, "holds another program's config.json, and"),
        ({"model.safetensors": b"x"}, "files of the same names, model.safetensors, and"),
    ],
)
def test_a_repository_with_something_else_is_left_alone(
    hub: Hub, model: Path, capsys: Capture, files: Files, said: str
) -> None:
    hub.add("org/other", files)
    assert said in error(capsys, model, "hf://org/other")
    assert pushed(hub, "org/other") == files and not hub.requests["POST commit"]


def test_a_public_repository_is_refused_with_private(
    hub: Hub, model: Path, capsys: Capture
) -> None:
    hub.add("org/model")
    assert "org/model is there and public" in error(capsys, model, "hf://org/model", "--private")
    assert not hub.requests["POST preupload"]


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(
    hub: Hub, model: Path, capsys: Capture
) -> None:
    repository = hub.add("org/model")
    hub.meanwhile = lambda: repository.commit({"LICENSE": b"text"})
    assert "changed by somebody else meanwhile" in error(capsys, model, "hf://org/model")
    assert pushed(hub, "org/model") == {"LICENSE": b"text"}


def test_a_file_that_the_repository_ignores_is_noticed(
    hub: Hub, model: Path, capsys: Capture
) -> None:
    hub.add("org/model").ignored.add("model.safetensors")
    found = error(capsys, model, "hf://org/model")
    assert "other contents of model.safetensors" in found and ".gitignore" in found


def test_logins_and_permissions_are_one_line_each(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    hub.denies.add("theirs")
    assert "you may not write to theirs/model" in error(capsys, model, "hf://theirs/model")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "does not know you" in error(capsys, model, "hf://org/model")
    hub.requests.clear()
    monkeypatch.delenv("HF_TOKEN")
    assert "Log in with `hf auth login`" in error(capsys, model, "hf://org/model")
    offline(monkeypatch)
    assert "HF_HUB_OFFLINE is set" in error(capsys, model, "hf://org/model")
    assert not hub.requests


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("org/model", "expected hf://org/name[@branch]"),
        ("hf://model", "is malformed"),
        ("hf://datasets/org/model", "is no model repository"),
        ("hf://org/model/deep", "names a folder"),
        (f"hf://org/model@{'0a' * 20}", "names a commit"),
    ],
)
def test_a_bad_destination_is_refused(
    hub: Hub, model: Path, capsys: Capture, given: str, said: str
) -> None:
    assert said in error(capsys, model, given)
    assert not hub.requests


def _unmark(model: Path) -> None:
    (model / MARKER).unlink()


def _story(model: Path) -> None:
    about = json.loads((model / MARKER).read_bytes())
    (model / MARKER).write_text(json.dumps({**about, "kind": "story"}))


def _outside(model: Path) -> None:
    about = json.loads((model / MARKER).read_bytes())
    about["files"]["../token"] = about["files"]["config.json"]
    (model / MARKER).write_text(json.dumps(about))


def _change(model: Path) -> None:
    with (model / "tokenizer.json").open("a") as file:
        file.write("\n")


def _remove(model: Path) -> None:
    (model / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_unmark, "is neither a bundle nor a model folder of mmi"),
        (_story, "holds a story; expected a bundle or a model folder"),
        (_outside, "lists ../token, which leaves the folder"),
        (_change, "tokenizer.json has changed since mmi wrote it"),
        (_remove, "tokenizer.json is missing"),
    ],
)
def test_a_folder_that_is_not_as_mmi_wrote_it_is_refused(
    hub: Hub, model: Path, capsys: Capture, change: Callable[[Path], None], said: str
) -> None:
    change(model)
    assert said in error(capsys, model, "hf://org/model")
    assert not hub.requests


def test_a_changed_bundle_is_refused(hub: Hub, bundle: Bundle, capsys: Capture) -> None:
    with (bundle.folder / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert "tokenizer.json has changed" in error(capsys, bundle.folder, "hf://org/new")
    assert "there is no folder" in error(capsys, bundle.folder / "none", "hf://org/new")
    assert "shared and read only" in error(capsys, "hf://org/a", "hf://org/new")
    assert not hub.requests
