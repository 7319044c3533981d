"""`mmi bench serve` as a command: its files, exit codes and refusals."""

from __future__ import annotations

import csv
import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.serve.mock_server import Mock, running
from mmi_bench.serve import session as session_module
from mmi_bench.serve.definitions import BY_KEY, MEASURES, definitions_table, translations_table
from mmi_deploy.cli.app import run as mmi

if TYPE_CHECKING:
    from exports import Exported

pytestmark = pytest.mark.timing

QUICK = ["--min-seconds", "0.5", "--max-seconds", "20", "--warm-up", "0", "--image-side", "16"]


def serve(mock: Mock, *arguments: str) -> int:
    return mmi(["bench", "serve", mock.url, *QUICK, *arguments])


def test_every_form_of_the_result_tells_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with running(Mock()) as mock:
        code = serve(mock, "-c", "2", "-w", "story", "-w", "caption", "--requests", "12", "-o",
                     str(out), "--json", "--goodput", "ttft=10s,gap_p99=10s")  # fmt: skip
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "result.json").read_text())
    assert found["complete"] and found["valid"] and found["kind"] == "mmi bench serve"
    assert found["argv"] and found["machine"]["processor"] and "load_before" in found["machine"]
    assert found["server"]["models_entry"]["id"] == "mock" and found["server"]["target"] == "cpu"
    assert found["workload"]["name"] == "story+caption" and len(found["workload"]["sha256"]) == 64
    assert found["runs"][0]["goodput_fraction"] == 1.0
    assert found["rates"]["goodput"]["value"] == pytest.approx(
        found["rates"]["requests_per_second"]["value"]
    )
    assert found["server_stages"] == {"decode": 0.5}
    lines = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    window = [line for line in lines if line["phase"] == "window"]
    assert len(window) == found["runs"][0]["counts"]["sent"]
    assert all(line["events"][-1]["kind"] == "end" for line in lines)
    rows = list(csv.DictReader((out / "summary.csv").open()))
    end = next(row for row in rows if row["measure"] == "end_to_end")
    assert float(end["mean"]) == pytest.approx(found["measures"]["end_to_end"]["mean"])
    assert end["p99"] == "", "blank: the sample does not carry it"
    assert found["measures"]["end_to_end"]["p99"] is None
    assert "| end to end |" in (out / "report.md").read_text()
    page = (out / "index.html").read_text()
    assert page.count("<svg") == 3 and "http" not in page.split("<h2>Distributions")[0].replace(
        mock.url, ""
    ).replace("http-equiv", "")
    assert not (out / "plot.svg").exists()
    assert mmi(["bench", "compare", str(out), str(out)]) == 0


def test_a_folder_of_somebody_else_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with running(Mock()) as mock:
        assert serve(mock, "-o", str(tmp_path)) == 2
    assert not mock.bodies and "mine.txt" in capsys.readouterr().err


def test_an_invalid_run_exits_with_3_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    spoil = lambda level, flying: level + 9 * (flying > 1)  # noqa: E731
    with running(Mock(spoil=spoil)) as mock:
        assert serve(mock, "-c", "3", "-w", "story", "--check-every", "1") == 3
        assert "INVALID" in capsys.readouterr().out
        assert serve(mock, "-c", "3", "-w", "story", "--check-every", "1", "--band", "9") == 0
        assert serve(mock, "-c", "3", "-w", "story", "--check-every", "0") == 0


def test_the_key_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys: list[str | None] = []
    real = session_module.Client

    def client(url: str, key: str | None) -> Any:
        keys.append(key)
        return real(url, key)

    monkeypatch.setattr(session_module, "Client", client)
    monkeypatch.setenv("MMI_API_KEY", "from-environment")
    file = tmp_path / "key"
    file.write_text("from-file\n")
    with running(Mock()) as mock:
        assert serve(mock, "-w", "caption", "--json") == 0
        shown = capsys.readouterr().out
        assert serve(mock, "-w", "caption", "--key-file", str(file)) == 0
    assert keys == ["from-environment", "from-file"] and "from-environment" not in shown
    assert mmi(["bench", "serve", mock.url, "--key-file", str(tmp_path / "absent")]) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rate", "2", "-c", "2"],
        ["-w", "poem"],
        ["--endpoint", "images"],
        ["--transport", "ftp"],
        ["--goodput", "speed=1s"],
        ["--burstiness", "2"],
        ["--min-seconds", "50"],
        ["--plain", "-w", "story"],
    ],
)
def test_options_that_make_no_sense_are_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with running(Mock()) as mock:
        assert serve(mock, *arguments) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmi: ")]
    assert len(err) == 1 and not mock.bodies


def test_a_stopped_benchmark_writes_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the window: the folder is whole, its result marked as incomplete."""
    import _thread

    out = tmp_path / "run"
    with running(Mock()) as mock:

        def interrupt() -> None:
            end = time.monotonic() + 60
            while len(mock.bodies) < 12 and time.monotonic() < end:
                time.sleep(0.05)
            _thread.interrupt_main()

        # A process that a script starts in the background ignores Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            threading.Thread(target=interrupt, daemon=True).start()
            code = mmi(["bench", "serve", mock.url, "-w", "caption", "--warm-up", "0",
                        "--min-seconds", "90", "--max-seconds", "90", "-o", str(out)])  # fmt: skip
        finally:
            signal.signal(signal.SIGINT, before)
    assert code == 130
    found = json.loads((out / "result.json").read_text())
    assert not found["complete"] and found["runs"][0]["counts"]["done"] > 0
    assert "INCOMPLETE" in found["notes"][0]
    assert mmi(["bench", "compare", str(out), str(out)]) == 2
    assert "is incomplete" in capsys.readouterr().err


def test_the_docs_have_the_words_of_the_module(repository: Path) -> None:
    page = (repository / "docs" / "serving_benchmarks.md").read_text(encoding="utf-8")
    for row in (*definitions_table(), *translations_table()):
        assert row in page.splitlines()
    assert len(BY_KEY) == len(MEASURES), "keys are unique"
    for code in (" 3 ", " 4 ", " 5 "):
        assert code in page.split("## Exit codes")[1]


@pytest.mark.slow
def test_a_bundle_is_served_measured_and_compared_with_itself_in_process(
    exported_once: Callable[[str], Exported], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = exported_once("shipped").bundle.folder
    out = tmp_path / "run"
    code = mmi(["bench", "serve", str(bundle), "-w", "caption", "-w", "conversation", "-c", "2",
                "--requests", "10", "--min-seconds", "0", "--warm-up", "0", "--check-every", "3",
                "--image-side", "64", "--json", "-o", str(out)])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["valid"] and found["check"]["compared"] >= 3
    assert found["check"]["reference"] == "outputs of the bundle in process"
    assert found["check"]["largest_picture_difference"] == 0
    assert found["server"]["bundle_sha256"] and found["server_stages"]
    counted = [note for note in found["notes"] if note.startswith("text tokens")]
    assert len(counted) == 1 and "THEY DIFFER" not in counted[0]
