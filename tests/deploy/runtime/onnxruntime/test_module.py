"""ONNX Runtime's telemetry: off unless the user has asked for it, and nothing of it on the disk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from exports import Exported
from mmi_deploy.runtime.onnxruntime.module import TELEMETRY_OFF

REPOSITORY = Path(__file__).resolve().parents[4]
# Environment variables that name the folders where programs keep caches and settings.
FOLDERS = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "TMPDIR")

REPORT = f"import os; print(repr(os.environ[{TELEMETRY_OFF!r}]))"


def run_python(arguments: list[str], folder: Path, **variables: str) -> str:
    """Output of a fresh Python whose `FOLDERS` are empty ones in `folder`."""
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
    named = {name: str(folder / name) for name in FOLDERS}
    path = os.pathsep.join(str(REPOSITORY / part) for part in (".", "plugins", "train", "export"))
    kept = {name: value for name, value in os.environ.items() if name != TELEMETRY_OFF}
    process = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=kept | named | {"PYTHONPATH": path} | variables,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def left_in(folder: Path) -> list[str]:
    """Every path that lies in the folders of `FOLDERS` now."""
    return [str(path) for name in FOLDERS for path in (folder / name).rglob("*")]


@pytest.mark.parametrize(
    ("given", "expected"), [(None, "1"), ("", "1"), ("1", "1"), ("true", "true"), ("0", "0")]
)
def test_telemetry_is_off_unless_its_variable_says_otherwise(
    given: str | None, expected: str, tmp_path: Path
) -> None:
    variables = {} if given is None else {TELEMETRY_OFF: given}
    program = f"import mmi_deploy.runtime.onnxruntime.module; {REPORT}"
    assert run_python(["-c", program], tmp_path, **variables) == repr(expected)
    if expected != "0":
        assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "module",
    [
        "mmi_deploy.runtime.onnxruntime.engine",
        "mmi_deploy.cli.app",
        "mmi_export.export",
        "mmi_train.training.loop",
        "mmi_plugins.conformance.onnxruntime_kernel",
    ],
)
def test_importing_leaves_nothing_at_home(module: str, tmp_path: Path) -> None:
    """Our modules and, with them, all that they import: torch, transformers, diffusers, onnx."""
    run_python(["-c", f"import {module}"], tmp_path)
    assert left_in(tmp_path) == []


@pytest.mark.slow
def test_a_story_leaves_nothing_at_home(
    exported_once: Callable[[str], Exported], tmp_path: Path
) -> None:
    bundle = exported_once("paper").bundle.folder
    (tmp_path / "story.md").write_text("the red square moves down.\n")
    words = ["generate", str(tmp_path / "story.md"), "-b", str(bundle), "-o", str(tmp_path / "out")]
    limits = ["--max-tokens", "3", "--max-images", "0", "--kernels", "none"]
    run_python(["-m", "mmi_deploy", *words, *limits], tmp_path)
    assert (tmp_path / "out" / "story.md").is_file()
    assert left_in(tmp_path) == []
