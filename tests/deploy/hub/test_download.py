"""References to the Hub against a stub of it: what is downloaded, what is checked, what is said."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deploy.hub.stub_hub import Hub, constants, names, offline
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.cli import hub_folders
from mmi_deploy.cli.app import run
from mmi_deploy.cli.hub_folders import existing_folder, local_folder, model_name
from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.hub import commit, kinds
from mmi_deploy.hub.reference import Reference, parse

if TYPE_CHECKING:
    from exports import Exported

MODEL = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}"}


def error(given: str, kind: kinds.Kind = kinds.MODEL) -> str:
    """The one line that a reference is refused with."""
    with pytest.raises(MmiError) as caught:
        local_folder(Path(given), kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://org/name", Reference("org/name")),
        ("hf://org/name/", Reference("org/name")),
        ("hf://org/name@v1.0/a/b", Reference("org/name", "v1.0", "a/b")),
        ("hf://org/name@refs/pr/3/a", Reference("org/name", "refs/pr/3", "a")),
        ("hf://models/org/name", Reference("org/name")),
        ("hf://org/na-me_1.5@0a1b", Reference("org/na-me_1.5", "0a1b")),
    ],
)
def test_a_reference_is_read_also_after_pathlib(text: str, expected: Reference) -> None:
    assert parse(text) == parse(Path(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "hf://name",
        "hf://org/name@",
        "hf://org/name/../x",
        "hf://datasets/a/b",
        "hf://",
        "hf://a/b c",
    ],
)
def test_a_malformed_reference_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected hf://org/name"):
        parse(text)


def test_only_the_files_of_a_model_are_downloaded_and_only_once(hub: Hub) -> None:
    others = {"pytorch_model.bin": b"p", "README.md": b"#", "onnx/model.safetensors": b"o"}
    hub.add("org/model", {f"sub/{name}": data for name, data in (MODEL | others).items()})
    given = Path("hf://org/model/sub")
    folder = local_folder(given, kinds.MODEL)
    assert names(folder) == {*MODEL}
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    before = hub.downloads()
    assert local_folder(given, kinds.MODEL) == folder and hub.downloads() == before
    assert model_name(given) == "org/model/sub"


def test_a_bundle_runs_from_the_cache_and_restarts_without_the_hub(
    hub: Hub,
    exported_once: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Files of the manifest alone, through the links of the cache; `mmi verify` runs the graphs."""
    exported: Exported = exported_once("paper")  # type: ignore[operator]
    source = exported.bundle.folder
    files = {n: (source / n).read_bytes() for n in exported.bundle.manifest.files}
    manifest = {"bundle.json": (source / "bundle.json").read_bytes()}
    hub.add("org/bundle", files | manifest | {"README.md": b"#", "more.safetensors": b"x"})
    assert run(["verify", "hf://org/bundle", "--run"]) == 0, capsys.readouterr().err
    folder = local_folder(Path("hf://org/bundle"), kinds.BUNDLE)
    assert names(folder) == {*files, "bundle.json"}
    assert Bundle.open(folder).identity == exported.bundle.identity
    hub.requests.clear()
    offline(monkeypatch)
    assert local_folder(Path("hf://org/bundle"), kinds.BUNDLE) == folder
    assert not hub.requests
    assert "no engines for cuda-fp16; expected cpu" in _targets_error()


def _targets_error() -> str:
    with pytest.raises(MmiError) as caught:
        local_folder(Path("hf://org/bundle"), kinds.BUNDLE, targets=["cuda-fp16"])
    return str(caught.value)


def test_a_language_model_is_its_indexed_shards_without_copies(hub: Hub) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    files |= {"model-1.safetensors": b"1", "model-2.safetensors": b"2", "tokenizer.model": b"t"}
    hub.add("org/llm", files | {"consolidated.safetensors": b"12", "model-1.bin": b"p"})
    assert names(local_folder(Path("hf://org/llm"), kinds.LANGUAGE_MODEL)) == {*files}


def test_a_gguf_file_is_named_itself(hub: Hub) -> None:
    hub.add("org/gguf", {"a-q4.gguf": b"4", "a-q8.gguf": b"8"})
    path = local_folder(Path("hf://org/gguf/a-q4.gguf"), kinds.LANGUAGE_MODEL)
    assert path.read_bytes() == b"4" and names(path.parent) == {"a-q4.gguf"}


def test_pickles_are_chosen_for_the_published_checkpoint_alone(hub: Hub) -> None:
    files = {"pytorch_model-1.bin": b"1", "tokenizer.model": b"t"}
    hub.add("org/old", files | {"config.json": b"{}", "optimizer.bin": b"o"})
    assert "pickles alone" in error("hf://org/old", kinds.LANGUAGE_MODEL)
    assert hub.downloads() == 0
    assert names(local_folder(Path("hf://org/old"), kinds.CHECKPOINT)) == {*files}


def test_a_pipeline_is_downloaded_without_its_second_precision(hub: Hub) -> None:
    weights = "diffusion_pytorch_model"
    files = {f"{part}/config.json": b"{}" for part in ("unet", "vae", "text_encoder")}
    files |= {f"{part}/{weights}.safetensors": part.encode() for part in ("unet", "vae")}
    files |= {"text_encoder/model.safetensors": b"t", "tokenizer/vocab.json": b"{}"}
    half = {"unet/diffusion_pytorch_model.fp16.safetensors": b"h", "v2-1.ckpt": b"p"}
    hub.add("org/sd", files | half)
    assert names(local_folder(Path("hf://org/sd"), kinds.DIFFUSION)) == {*files}


def test_a_damaged_download_is_refused_removed_and_repeated(hub: Hub) -> None:
    hub.add("org/model", MODEL)
    hub.damaged.add("model.safetensors")
    assert "model.safetensors of org/model arrived damaged" in error("hf://org/model")
    hub.damaged.clear()
    assert names(local_folder(Path("hf://org/model"), kinds.MODEL)) == {*MODEL}


def test_damaged_content_that_another_program_downloaded_stays(hub: Hub) -> None:
    """A file of the cache without its link, as other commits have it, is not downloaded again."""
    hub.add("org/model", MODEL)
    link = local_folder(Path("hf://org/model"), kinds.MODEL) / "model.safetensors"
    blob = link.resolve()
    blob.chmod(0o644)
    blob.write_bytes(b"Weights")
    link.unlink()
    assert re.search("in the cache for model.safetensors .* was changed", error("hf://org/model"))
    assert blob.read_bytes() == b"Weights"


def test_a_file_that_was_changed_in_the_cache_is_refused(hub: Hub) -> None:
    hub.add("org/model", MODEL)
    folder = local_folder(Path("hf://org/model"), kinds.MODEL)
    blob = (folder / "model.safetensors").resolve()
    blob.chmod(0o644)
    blob.write_bytes(b"Weights")
    assert re.search("in the cache for model.safetensors .* was changed", error("hf://org/model"))
    blob.unlink()  # what the error says
    assert names(local_folder(Path("hf://org/model"), kinds.MODEL)) == {*MODEL}


def test_a_broken_connection_goes_on_where_it_broke(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", MODEL)
    hub.cut["model.safetensors"] = 3
    monkeypatch.setattr(constants(), "DOWNLOAD_CHUNK_SIZE", 1)  # pieces that are kept whole
    folder = local_folder(Path("hf://org/model"), kinds.MODEL)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert hub.ranges == ["model.safetensors 3"]


def test_ctrl_c_ends_the_transfer_that_runs(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", MODEL)
    gate = hub.pause["model.safetensors"] = threading.Event()
    monkeypatch.setattr(constants(), "DOWNLOAD_CHUNK_SIZE", 1)
    monkeypatch.setattr(constants(), "HF_HUB_DOWNLOAD_TIMEOUT", 60)  # no second try while it waits
    stop = threading.Event()
    monkeypatch.setattr(commit, "Event", lambda: stop)

    def interrupt() -> None:
        cache, until = Path(constants().HF_HUB_CACHE), time.monotonic() + 20
        hub.paused.wait(20)
        while not [*cache.rglob("config.json")] and time.monotonic() < until:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        stop.wait(20)  # the main thread has to take the signal before more arrives
        gate.set()

    thread = threading.Thread(target=interrupt)
    thread.start()
    # A shell's background jobs, such as these tests may be, start with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            local_folder(Path("hf://org/model"), kinds.MODEL)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    cached = {path.name for path in Path(constants().HF_HUB_CACHE).rglob("*")}
    assert "model.safetensors" not in cached
    assert "config.json" in cached


def test_refusals_of_the_hub_are_one_line_each(hub: Hub) -> None:
    hub.add("org/gated", MODEL, refuses="GatedRepo")
    hub.add("org/model", MODEL)
    hub.add("org/nested", {f"deep/model/{name}": data for name, data in MODEL.items()})
    hub.add("org/empty")
    found = error("hf://org/gated")
    assert (
        f"Accept its conditions at {hub.endpoint}/org/gated" in found and "`hf auth login`" in found
    )
    assert "org/none is no model repository" in error("hf://org/none")
    assert "org/model has no revision v9" in error("hf://org/model@v9")
    assert "org/nested has no folder other; it has deep" in error("hf://org/nested/other")
    assert "a model folder is at hf://org/nested/deep/model" in error("hf://org/nested")
    assert "it holds no bundle.json" in error("hf://org/model", kinds.BUNDLE)
    assert "hf://org/empty is empty" in error("hf://org/empty")


def test_offline_says_what_is_missing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", MODEL)
    offline(monkeypatch)
    found = error("hf://org/model")
    assert "HF_HUB_OFFLINE is set" in found and "Run once without it" in found
    assert not hub.requests


def test_a_full_disk_is_seen_before_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", MODEL)
    usage = type("Usage", (), {"free": 3})
    monkeypatch.setattr(commit.shutil, "disk_usage", lambda path: usage)
    assert "takes 11 B, and the disk of" in error("hf://org/model")
    assert hub.downloads() == 0


def test_without_the_library_the_pip_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub_folders.__dict__["__builtins__"], "__import__", _without_the_library)
    assert "pip install 'mmi_deploy[hub]'" in error("hf://org/model")


def _without_the_library(name: str, *args: object, _real: object = __import__) -> object:
    if name == "huggingface_hub":
        raise ModuleNotFoundError(name=name)
    return _real(name, *args)  # type: ignore[operator]


def test_paths_stay_paths(tmp_path: Path) -> None:
    assert local_folder(tmp_path, kinds.MODEL) == tmp_path and model_name(tmp_path) == tmp_path.name
    with pytest.raises(ConfigError, match="does not exist"):
        existing_folder(tmp_path / "none", kinds.MODEL)
