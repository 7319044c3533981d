"""Documents at once on a GPU, computed; and the host time, which is measured."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from deploy.runtime.fake_model import fake_config
from exports import Exported
from mmi_bench.batch import host_time
from mmi_bench.batch.host_time import HostTime
from mmi_deploy.cli.app import run

pytestmark = pytest.mark.timing


def test_idle_engines_carry_a_document_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_time, "TOKENS", 4)
    monkeypatch.setattr(host_time, "STEPS", 3)
    found = host_time.host_time(fake_config(), 2, repeats=1)
    assert found.rows == 2 and found.decode > 0 and found.denoise > 0


@pytest.fixture
def bundle(exported_once: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch) -> str:
    def fixed(config: object, rows: int) -> HostTime:
        return HostTime(rows, 0.25, 0.5)

    monkeypatch.setattr(host_time, "host_time", fixed)
    return str(exported_once("paper").bundle.folder)


@pytest.mark.slow
def test_a_run_takes_its_roofline_and_its_host_time(
    bundle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(["inspect", "batch", bundle, "--rows", "8", "--rows", "1", "--gpu", "l4", "--json"])
        == 0
    )
    gpu = json.loads(capsys.readouterr().out)["gpus"]["l4"]
    assert run(["inspect", "gpus", bundle, "--gpu", "l4", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["gpus"][0]["seconds"]
    one, eight = gpu["at_once"]
    assert (one["rows"], eight["rows"]) == (1, 8) and gpu["slots"] >= 8
    assert one["decode_seconds"] == pytest.approx(0.25 + alone["token"], rel=1e-9)
    assert one["step_seconds"] == pytest.approx(0.5 + alone["step"], rel=1e-9)
    assert alone["token"] < eight["decode_seconds"] - 0.25 < 8 * alone["token"]
    assert eight["tokens_per_second"] == 8 / eight["decode_seconds"]


@pytest.mark.slow
def test_the_table_says_that_it_is_computed(
    bundle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", "batch", bundle]) == 0
    out = capsys.readouterr().out
    assert "Computed, not measured on a GPU" in out and "H100" in out and "L4" in out
    assert run(["inspect", "batch", bundle, "--gpu", "abacus"]) == 2
    assert "unknown GPU 'abacus'" in capsys.readouterr().err
