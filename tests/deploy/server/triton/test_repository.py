"""`mmi triton`: what it writes, and what it leaves alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cli import test_app
from deploy.cli.test_app import Screen
from mmi_deploy.errors import ConfigError
from mmi_deploy.server.triton.repository import config_text, write_model
from mmi_deploy.server.triton.settings import ModelSettings

mmi, bundle = test_app.mmi, test_app.bundle


def parameters(text: str) -> dict[str, str]:
    """Parameters of a model configuration."""
    found = re.findall(
        r'^parameters \{ key: (".*?") value \{ string_value: (".*") \} \}$', text, re.M
    )
    return {json.loads(key): json.loads(value) for key, value in found}


def handed_over(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """The configuration as the backend hands it to the model."""
    values = {key: {"string_value": value} for key, value in parameters(text).items()}
    return {"parameters": values}


@pytest.mark.parametrize(
    "settings",
    [
        ModelSettings("/b"),
        ModelSettings('/a b/"quoted"\\ö', slots=3, kernels="none", threads=2),
        ModelSettings("/b", target="tensorrt-sm90-fp16", kernels="/k/libmmfs.so"),
    ],
)
def test_settings_come_back_from_the_configuration(settings: ModelSettings) -> None:
    assert ModelSettings.of(handed_over(config_text("mmi", settings))) == settings


def test_the_configuration_asks_for_a_stream_and_one_instance() -> None:
    text = config_text("mmi", ModelSettings("/b"))
    assert "model_transaction_policy { decoupled: true }" in text
    assert "count: 1" in text and "KIND_CPU" in text and "gpus" not in text
    on_gpu = config_text("mmi", ModelSettings("/b", target="tensorrt-sm90-fp16"), device=2)
    assert "KIND_GPU" in on_gpu and "gpus: [ 2 ]" in on_gpu and "count: 1" in on_gpu


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "a b", "ö", "a" * 65, ".hidden", "a\n"])
def test_a_name_that_is_no_folder_of_a_repository_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name is malformed"):
        write_model(tmp_path, name, ModelSettings("/b"))
    assert not list(tmp_path.iterdir())


def test_other_models_and_changed_files_stay(mmi: Screen, bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    other = repository / "other" / "config.pbtxt"
    other.parent.mkdir(parents=True)
    other.write_text("name: 'other'")
    for slots in ("2", "3"):  # its own output is replaced
        assert mmi("triton", repository, bundle, "--slots", slots) == 0
    config = repository / "mmi" / "config.pbtxt"
    assert parameters(config.read_text())["slots"] == "3"
    assert parameters(config.read_text())["bundle"] == str(bundle.resolve())
    assert mmi("triton", repository, bundle, "--name", "second") == 0
    before = config.read_text() + "# mine\n"
    config.write_text(before)
    assert mmi("triton", repository, bundle) == 2
    assert "was changed since mmi wrote it" in mmi.err
    assert config.read_text() == before and other.read_text() == "name: 'other'"
    (repository / "third").mkdir()
    (repository / "third" / "notes.txt").write_text("mine")
    assert mmi("triton", repository, bundle, "--name", "third") == 2
    assert (repository / "third" / "notes.txt").read_text() == "mine"


def test_what_is_no_bundle_or_target_is_refused(mmi: Screen, bundle: Path, tmp_path: Path) -> None:
    assert mmi("triton", tmp_path / "models", tmp_path / "none") == 2
    assert mmi("triton", tmp_path / "models", bundle, "--target", "tensorrt-sm90-fp16") == 2
    assert not (tmp_path / "models").exists()


def test_the_report_and_the_path_on_the_server(mmi: Screen, bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    assert mmi("triton", repository, bundle, "--server-bundle", "/bundle", "--json") == 0
    report = json.loads(mmi.out)
    assert report["model"] == str(repository / "mmi")
    assert report["parameters"]["bundle"] == "/bundle"


def test_python_imports_the_model_and_leaves_its_folder_as_it_was(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "mmi", ModelSettings("/b"))
    code = "import model; assert model.TritonPythonModel.execute; print(model.__file__)"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, '1'); {code}"],
        cwd=folder,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in folder.rglob("*")) == [
        ".mmi", "1", "__pycache__", "config.pbtxt", "model.py"
    ]  # fmt: skip
    write_model(tmp_path, "mmi", ModelSettings("/c"))
