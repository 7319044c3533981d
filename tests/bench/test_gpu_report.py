"""The report's folder is replaced as every output folder is."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmi_bench.gpu_check import check
from mmi_deploy.errors import MmiError


def test_a_report_replaces_a_report_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files that a user adds to the folder while the checks run do not cost the report."""
    out, late = tmp_path / "gpu_check", False

    def run(self: check.Check) -> int:
        if late:
            (out / "notes.md").write_text("mine")
        return 0

    monkeypatch.setattr(check, "check_arguments", lambda *_: None)
    monkeypatch.setattr(check.Check, "run", run)
    for _ in range(2):
        assert check.main(bundle=Path("bundle"), out=out, precision=None, device=0) == 0
        assert f"report: {out}/report.md and {out}/report.json" in capsys.readouterr().out
        assert {"report.md", "report.json"} < {path.name for path in out.iterdir()}
    late = True
    with pytest.raises(MmiError, match="holds notes.md.*The new report is in .*gpu_check-new$"):
        check.main(bundle=Path("bundle"), out=out, precision=None, device=0)
    assert (out / "notes.md").read_text() == "mine"
    assert (tmp_path / "gpu_check-new" / "report.json").is_file()


def test_a_folder_of_another_origin_is_refused_before_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "check_arguments", lambda *_: None)
    monkeypatch.setattr(check.Check, "run", pytest.fail)
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(MmiError, match="holds report.md, which mmi did not write"):
        check.main(bundle=Path("bundle"), out=tmp_path, precision=None)
    assert (tmp_path / "report.md").read_text() == "mine"
