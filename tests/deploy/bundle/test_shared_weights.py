"""Weights of tens of gigabytes: hashed once, vouched for, and never passed off for a model's."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from deploy.bundle.test_bundle import GOOD, NAMES, fill
from mmi_deploy.bundle import manifest
from mmi_deploy.bundle.bundle import Bundle, write_bundle
from mmi_deploy.bundle.manifest import Hashes
from mmi_deploy.cli.app import run
from mmi_deploy.errors import BundleError
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.graphs import Limits
from mmi_deploy.spec.presets import tiny

SHARED = "graphs/model.safetensors"


def write(folder: Path, weights: str = "given") -> Path:
    """A bundle whose graphs `llm` and `vae_decoder` refer to one file; `llm` is proved by a
    slice."""
    with write_bundle(folder, tiny(), Limits(context=64)) as writer:
        (writer.folder / SHARED).write_bytes(b"large")
        for name in ("llm", "vae_decoder"):
            writer.share(name, [SHARED])
        fill(writer, tuple(name for name in NAMES if name != "llm"))
        writer.add_receipt("llm", "the model, of a slice", [GOOD], "slice")
        writer.weights = weights  # type: ignore[assignment]
    return folder


def test_a_file_of_several_names_is_hashed_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").write_bytes(b"12345")
    os.link(tmp_path / "one", tmp_path / "two")
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(manifest, "_BLOCK", 2)
    hashes = Hashes(lambda what, done, size, unit: told.append((what, done, size)))
    wanted = hashlib.sha256(b"12345").hexdigest()
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") == wanted
    assert told == [("hashing one", done, 5) for done in (2, 4, 5)]
    (tmp_path / "two").write_bytes(b"123456")
    assert hashes(tmp_path / "one") == hashlib.sha256(b"123456").hexdigest()


def test_a_receipt_covers_the_weights_that_a_graph_shares(tmp_path: Path) -> None:
    """A receipt for other bytes of the shared file vouches for neither of its graphs."""
    bundle = Bundle.open(write(tmp_path / "bundle"))
    for name in ("llm", "vae_decoder"):
        assert SHARED in bundle.manifest.graph_files(name)
    assert SHARED not in bundle.manifest.graph_files("vision_encoder")
    files = dict(bundle.manifest.files)
    files[SHARED] = files[SHARED].model_copy(update={"sha256": "0" * 64})
    other = bundle.manifest.model_copy(update={"files": files})
    unproved = [name for name in NAMES if other.receipt(name) is None]
    assert sorted(unproved) == ["llm", "vae_decoder"]


def test_inspect_counts_a_shared_file_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["inspect", str(write(tmp_path / "bundle"))]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"{SHARED}, 5 B, is shared by llm, vae_decoder" in lines
    own = sum(path.stat().st_size for path in (tmp_path / "bundle" / "graphs").glob("llm.*"))
    assert any(line.startswith("llm ") and f" {own} B " in line for line in lines)


def test_a_new_bundle_is_opened_without_hashing_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "bundle")

    def never(path: Path) -> str:
        raise AssertionError(f"{path} was hashed again")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "sha256_of", never)
        Bundle.open(folder)
    os.utime(folder / SHARED, (0, 0))
    Bundle.open(folder)
    (folder / SHARED).write_bytes(b"LARGE")
    with pytest.raises(BundleError, match="model.safetensors has changed"):
        Bundle.open(folder)


def test_a_slice_is_never_taken_for_a_whole_proof(tmp_path: Path) -> None:
    bundle = Bundle.open(write(tmp_path / "bundle"))
    receipts = {receipt.graph: receipt.scope for receipt in bundle.manifest.receipts}
    assert receipts.pop("llm") == "slice" and {*receipts.values()} == {"full"}
    assert bundle.remarks == ["proved by a slice, the same code on a smaller model: llm"]


@pytest.mark.parametrize("weights", ["empty", "random"])
def test_weights_that_stand_in_are_refused_by_the_runtime(tmp_path: Path, weights: str) -> None:
    folder = write(tmp_path / "bundle", weights)
    assert f"holds {weights} weights" in Bundle.open(folder).remarks[0]
    with pytest.raises(BundleError, match=f"{weights} weights, which mean nothing.*--unproved"):
        Runtime.open(folder, kernels="none")
    Bundle.open(folder, unproved=True).check_runnable()
