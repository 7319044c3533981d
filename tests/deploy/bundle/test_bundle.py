"""Bundles are whole, proved and unchanged, or refused with a readable line."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from mmi_deploy.bundle import manifest
from mmi_deploy.bundle.bundle import Bundle, BundleWriter, write_bundle, write_target
from mmi_deploy.bundle.manifest import sha256_of
from mmi_deploy.errors import BundleError
from mmi_deploy.parity import Case
from mmi_deploy.spec.graphs import GRAPHS, STATE, TERMS, Limits
from mmi_deploy.spec.presets import tiny
from mmi_deploy.spec.schedule import Schedule

NAMES = tuple(make.__name__ for make in GRAPHS)
GOOD = Case(sizes={"n": 1}, error=1e-6, tolerance=1e-4)


def fill(writer: BundleWriter, proved: tuple[str, ...] = NAMES, case: Case = GOOD) -> None:
    """Stand-ins for what an exporter writes: a bundle does not look into its files."""
    for name in NAMES:
        writer.graph_file(name).write_bytes(name.encode() * 10)
    (writer.folder / "graphs" / "llm.safetensors").write_bytes(b"weights")
    writer.tokenizer.write_text("{}")
    for steps in (4, 2):
        coefficients = np.ones((steps, STATE, TERMS), np.float32)
        schedule = Schedule("ddim", np.arange(steps), coefficients)
        writer.add_schedule(schedule.with_time_table(np.zeros((steps, 3))))
    for name in proved:
        writer.add_receipt(name, "the model", [case])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with write_bundle(tmp_path / "bundle", tiny(), Limits(context=64)) as writer:
        fill(writer)
    return tmp_path / "bundle"


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_bundle_reads_back_as_it_was_written(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.config == tiny() and bundle.limits == Limits(context=64)
    assert bundle.schedules == ("ddim:4", "ddim:2")
    assert bundle.schedule().steps == 4 and bundle.schedule("ddim:2").steps == 2
    assert bundle.graph_file("llm").read_bytes().startswith(b"llm")
    assert bundle.graphs["llm"]["token_ids"].dtype == "int64"
    assert bundle.manifest.versions["numpy"] == np.__version__
    assert "graphs/llm.safetensors" in bundle.manifest.files
    bundle.verify()


@pytest.mark.parametrize("name", ["graphs/llm.onnx", "tokenizer.json", "graphs/llm.safetensors"])
def test_a_missing_or_changed_file_is_refused(folder: Path, name: str) -> None:
    Bundle.open(folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + b"~")  # as long as before
    with pytest.raises(BundleError, match=rf"{name} has changed .* `mmi export`"):
        Bundle.open(folder)
    (folder / name).write_bytes(content + b"~")
    with pytest.raises(BundleError, match=rf"{name} has changed"):
        Bundle.open(folder)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=rf"not complete: {name} is missing"):
        Bundle.open(folder)


def test_hashes_are_remembered_until_a_file_is_touched(folder: Path) -> None:
    """A second opening hashes nothing; `verify` always hashes."""
    Bundle.open(folder)
    hashed: list[str] = []

    def spy(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of(path)

    bundle = Bundle.open(folder, hash_file=spy)
    assert hashed == []
    (folder / "graphs/llm.onnx").touch()
    Bundle.open(folder, hash_file=spy)
    assert hashed == ["llm.onnx"]
    bundle.verify(spy)
    assert sorted(hashed[1:]) == sorted(Path(name).name for name in bundle.manifest.files)


def test_a_bundle_that_cannot_be_written_to_is_hashed_each_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def refuse_to_hash(path: Path) -> str:
        raise RuntimeError("it was hashed")

    (folder / ".checked.json").unlink()
    monkeypatch.setattr(manifest, "write_file", refuse)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="hashed"):
            Bundle.open(folder, hash_file=refuse_to_hash)
        Bundle.open(folder)


def test_a_change_that_keeps_size_and_time_is_found(folder: Path) -> None:
    """As `cp --preserve` or `touch --reference` leave behind."""
    import os

    Bundle.open(folder)
    path = folder / "graphs/vae_decoder.onnx"
    status = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"~")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BundleError, match="vae_decoder.onnx has changed"):
        Bundle.open(folder)


def test_verify_finds_what_a_disk_forgot(folder: Path) -> None:
    """A change that no time tells of: here the memory of the last check is made to fit it."""
    bundle = Bundle.open(folder)
    path = folder / "graphs/vae_decoder.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"~")
    checked = json.loads((folder / ".checked.json").read_text())
    status = path.stat()
    checked["graphs/vae_decoder.onnx"][1:3] = status.st_mtime_ns, status.st_ctime_ns
    (folder / ".checked.json").write_text(json.dumps(checked))
    Bundle.open(folder)
    with pytest.raises(BundleError, match="vae_decoder.onnx has changed"):
        bundle.verify()


def test_another_format_is_refused(folder: Path) -> None:
    edit_manifest(folder, format=99)
    with pytest.raises(BundleError, match="another format version; expected 2; got 99"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": 3}, "damaged: tokenizer"),
        ({"surprise": 1}, "damaged: surprise"),
        ({"graphs": {"llm": "../llm.onnx"}}, "leaves the folder"),
        ({"graphs": {"llm": "graphs/llm.onnx"}}, "it has no vision_encoder, llm_values"),
        ({"schedules": {}}, "it has no schedule"),
        ({"tokenizer": "other.json"}, "has no hash of other.json"),
    ],
)
def test_a_damaged_manifest_is_refused(folder: Path, changes: dict, message: str) -> None:
    edit_manifest(folder, **changes)
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no bundle .*absent"):
        Bundle.open(tmp_path / "absent")
    with pytest.raises(BundleError, match="it holds no bundle.json"):
        Bundle.open(tmp_path)
    (tmp_path / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match="cannot read"):
        Bundle.open(tmp_path)


def test_unknown_schedules_are_refused(folder: Path) -> None:
    with pytest.raises(BundleError, match="no schedule 'unipc:9'; expected ddim:4 or ddim:2"):
        Bundle.open(folder).schedule("unipc:9")


@pytest.mark.parametrize(
    ("proved", "error", "message"),
    [
        (NAMES[:-1], 0.0, "vae_decoder .* no receipt"),
        (NAMES, 1.0, "vision_encoder .* too large an error"),
        (NAMES, float("nan"), "vision_encoder .* too large an error"),
    ],
)
def test_an_unproved_graph_is_refused_unless_told_otherwise(
    tmp_path: Path, proved: tuple[str, ...], error: float, message: str
) -> None:
    case = Case(sizes={}, error=error, tolerance=1e-4)
    with write_bundle(tmp_path / "bundle", tiny(), Limits(context=64)) as writer:
        fill(writer, proved, case)
    with pytest.raises(BundleError, match=message):
        Bundle.open(tmp_path / "bundle")
    assert Bundle.open(tmp_path / "bundle", unproved=True).unproved


@pytest.mark.parametrize("name", ["llm.onnx", "llm.safetensors", "llm.onnx.data"])
def test_a_receipt_does_not_vouch_for_another_graph_or_other_weights(
    tmp_path: Path, name: str
) -> None:
    with write_bundle(tmp_path / "bundle", tiny(), Limits(context=64)) as writer:
        fill(writer)
        (writer.folder / "graphs" / name).write_bytes(b"written after the comparison")
    with pytest.raises(BundleError, match="llm in .* has no receipt"):
        Bundle.open(tmp_path / "bundle")


def test_a_receipt_holds_the_hash_that_sha256sum_gives(folder: Path) -> None:
    lines = "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("graphs/llm.onnx", "graphs/llm.safetensors")
    )
    receipt = Bundle.open(folder).manifest.receipt("llm")
    assert receipt and receipt.sha256 == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failed_export_leaves_what_was_there(folder: Path, failure: type[BaseException]) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with (
        pytest.raises(failure),
        write_bundle(folder, tiny(), Limits(context=32)) as writer,
    ):
        writer.graph_file("llm").write_bytes(b"half")
        raise failure
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_an_incomplete_export_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(BundleError, match="it has no vision_encoder"),
        write_bundle(tmp_path / "bundle", tiny(), Limits(context=32)) as writer,
    ):
        writer.graph_file("llm").write_bytes(b"only one")
    assert list(tmp_path.iterdir()) == []


def test_targets_are_checked_and_never_stale(folder: Path) -> None:
    bundle = Bundle.open(folder)
    with write_target(bundle, "cpu", {"precision": "int8"}) as writer:
        writer.engine_file("llm", ".onnx").write_bytes(b"rewritten")
        writer.add_receipt("llm", "the portable graph", [GOOD])
    assert bundle.targets == ("cpu",)
    assert bundle.target("cpu").recipe == {"precision": "int8"}
    bundle.verify()
    Bundle.open(folder)
    engine = folder / "engines/cpu/llm.onnx"
    engine.write_bytes(b"rewritteN")
    with pytest.raises(BundleError, match=r"llm.onnx has changed .* `mmi build .* --target cpu`"):
        bundle.target("cpu")
    with pytest.raises(BundleError, match="llm.onnx has changed"):
        bundle.verify()
    engine.write_bytes(b"rewritten")
    edit_manifest(folder, versions={"mmi_deploy": "another"})
    with pytest.raises(BundleError, match="built from another export"):
        Bundle.open(folder).target("cpu")


def test_engines_that_were_never_run_are_whole_all_the_same(folder: Path) -> None:
    """No receipt is not a flaw of the files, so `verify` tells it; running them is refused."""
    bundle = Bundle.open(folder)
    with write_target(bundle, "tensorrt-sm89-fp16", {}, "float16") as writer:
        writer.engine_file("llm", ".engine").write_bytes(b"engine")
    assert bundle.verify() == ("tensorrt-sm89-fp16",)
    with pytest.raises(BundleError, match="llm in .* has no receipt"):
        bundle.target("tensorrt-sm89-fp16")
    (folder / "engines/tensorrt-sm89-fp16/llm.engine").write_bytes(b"enginE")
    with pytest.raises(BundleError, match="llm.engine has changed"):
        bundle.verify()


def test_a_bundle_may_have_a_map_of_previews(folder: Path) -> None:
    """Bundles of earlier exports have none; a map of another model is refused."""
    manifest = json.loads((folder / "bundle.json").read_text())
    del manifest["preview"]
    (folder / "bundle.json").write_text(json.dumps(manifest))
    assert Bundle.open(folder).manifest.preview is None
    row = [0.1, 0.2, 0.3, 0.4]
    preview = {"weights": [row] * 3, "bias": [0, 0, 0], "error": 0.1, "compared_with": "it"}
    edit_manifest(folder, preview=preview)
    found = Bundle.open(folder).manifest.preview
    assert found is not None and found.weights == (tuple(row),) * 3
    for wrong in ([row[:3]] * 3, [row] * 2, [[*row[:3], "x"]] * 3):
        edit_manifest(folder, preview={**preview, "weights": wrong})
        with pytest.raises(BundleError, match="is damaged: .*preview"):
            Bundle.open(folder)
