"""A training run costs nobody their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmi_deploy.errors import MmiError
from mmi_deploy.spec.presets import tiny
from mmi_deploy.system.output_folder import run_folder
from mmi_train.training import from_scratch


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_scratch, "load_model", pytest.fail)
    monkeypatch.setattr(from_scratch, "train_autoencoder", pytest.fail)


def test_a_model_of_somebody_else_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("mine")
    with pytest.raises(MmiError, match="model holds model.safetensors, which mmi did not write"):
        from_scratch.train_from_scratch(tiny(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_text() == "mine"


def test_the_model_that_a_run_starts_from_is_not_replaced(tmp_path: Path) -> None:
    start = tmp_path / "model"
    start.mkdir()
    with pytest.raises(MmiError, match="is read to write it"):
        from_scratch.train_from_scratch(tiny(), tmp_path, start=start)


def test_two_runs_do_not_train_in_one_folder(tmp_path: Path) -> None:
    with run_folder(tmp_path, "training"):
        with pytest.raises(MmiError, match="another process of mmi writes"):
            from_scratch.train_from_scratch(tiny(), tmp_path)
