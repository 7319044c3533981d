"""A release: an archive that is the same wherever it is made, that opens as a bundle, and sums."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from deploy.bundle.test_bundle import fill
from mmi_deploy.bundle.bundle import Bundle, write_bundle
from mmi_deploy.cli.program import program
from mmi_deploy.spec.graphs import Limits
from mmi_deploy.spec.presets import tiny
from mmi_export.release import main

run = program("release", main)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    with write_bundle(tmp_path / "tiny", tiny(), Limits(context=64)) as writer:
        fill(writer)
    Bundle.open(tmp_path / "tiny")  # remembers here what it has checked
    return tmp_path / "tiny"


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "story.md").write_text("a story")
    (folder / ".swap").write_text("an editor's")
    return folder


def wheel(folder: Path, version: str = "1.2.3") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"mmi_deploy-{version}-py3-none-any.whl"
    path.write_bytes(b"wheel")
    return path


def released(bundle: Path, examples: Path, out: Path) -> Path:
    wheel(out)
    assert run([str(bundle), "-o", str(out), "--examples", str(examples)]) == 0
    return out / "mmi_tiny_bundle-1.2.3.tar.gz"


def test_the_archive_opens_as_the_bundle_without_what_is_of_this_machine(
    bundle: Path, examples: Path, tmp_path: Path
) -> None:
    (bundle / "engines" / "cpu-int8").mkdir(parents=True)
    (bundle / "engines" / "cpu-int8" / "llm.onnx").write_bytes(b"engine")
    made = released(bundle, examples, tmp_path / "dist")
    with tarfile.open(made) as tar:
        names = tar.getnames()
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert "tiny/bundle.json" in names and "examples/story.md" in names
    assert not [name for name in names if "engines" in name or "/." in name]
    opened = Bundle.open(tmp_path / "unpacked" / "tiny")
    assert opened.verify() == () and opened.identity == Bundle.open(bundle).identity


def test_the_archive_is_the_same_byte_for_byte(
    bundle: Path, examples: Path, tmp_path: Path
) -> None:
    first = released(bundle, examples, tmp_path / "one").read_bytes()
    shutil.copytree(bundle, tmp_path / "copy" / "tiny")
    (tmp_path / "copy" / "tiny" / "bundle.json").chmod(0o600)
    os.utime(tmp_path / "copy" / "tiny" / "bundle.json", (0, 0))
    assert released(tmp_path / "copy" / "tiny", examples, tmp_path / "two").read_bytes() == first


def test_the_sums_are_those_of_the_files(bundle: Path, examples: Path, tmp_path: Path) -> None:
    made = released(bundle, examples, tmp_path / "dist")
    lines = dict(
        reversed(line.split("  ")) for line in (made.parent / "SHA256SUMS").read_text().splitlines()
    )
    assert set(lines) == {made.name, "mmi_deploy-1.2.3-py3-none-any.whl"}
    for name, digest in lines.items():
        assert hashlib.sha256((made.parent / name).read_bytes()).hexdigest() == digest


def test_a_damaged_bundle_or_a_second_wheel_is_refused_and_nothing_is_written(
    bundle: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dist"
    wheel(out)
    second = wheel(out, "1.2.4")
    options = [str(bundle), "-o", str(out), "--examples", str(examples)]
    assert run(options) == 2 and "does not hold one wheel" in capsys.readouterr().err
    second.unlink()
    (bundle / "graphs" / "llm.safetensors").write_bytes(b"Weights")
    assert run(options) == 2 and "has changed" in capsys.readouterr().err
    assert [path.suffix for path in out.iterdir()] == [".whl"]
