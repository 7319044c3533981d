"""Receipts of answers: an int8 target beside the fp32 graphs, on questions of VQAv2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exports import SHIPPED, Exported
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.manifest import AnswerDifference, AnswerReceipt, hash_of_files
from mmi_deploy.cli.app import run
from mmi_deploy.errors import ConfigError
from mmi_deploy.targets.answer_receipts import read_comparison
from mmi_deploy.targets.cpu import build_cpu_target
from mmi_deploy.targets.precision import recipe
from train.evaluation.benchmarks.test_answers import write_questions

INT8 = "cpu-int8"
DIFFERENCE = {"value": -0.5, "interval": [-1.25, 0.25], "verdict": "not told apart"}


@pytest.fixture(scope="module")
def bundle(
    exported_once: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """A copy of the shipped model's bundle with an int8 target."""
    folder = tmp_path_factory.mktemp("built") / "bundle"
    source = exported_once(SHIPPED).bundle.folder
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("engines"))
    build_cpu_target(Bundle.open(folder), recipe("int8"))
    return Bundle.open(folder)


def comparison(bundle: Bundle, **changes: Any) -> dict[str, Any]:
    """A comparison of the int8 target with the fp32 graphs, as `mmi evaluate` writes it."""
    about = {"bundle": bundle.identity, "beams": 1}
    engines = hash_of_files(bundle.target(INT8).files)
    run_of_int8 = {**about, "target": INT8, "engines": engines}
    against = {
        "differences": {"accuracy": DIFFERENCE},
        "answers": 200,
        "different": 3,
        "band": {"levels": None, "texts": 0.04},
        "run": {**about, "target": "cpu", "engines": None},
    }
    found = {"benchmark": "vqav2", "split": "val", "against": against, "run": run_of_int8}
    return {**found, **changes}


@pytest.mark.slow
def test_answers_of_two_targets_become_a_receipt(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_questions(tmp_path / "data", 12, np.random.default_rng(3))
    folder, of_set = str(bundle.folder), ["--benchmark", "vqav2", "--data", str(data)]
    for target in ("cpu", INT8):
        out = ["--target", target, "-o", str(tmp_path / f"{target}.jsonl")]
        asked = ["evaluate", folder, *of_set, "--prompt", "chat", "--beams", "1", "--threads", "1"]
        assert run([*asked, *out]) == 0
    files = [str(tmp_path / f"{name}.jsonl") for name in (INT8, "cpu")]
    report = tmp_path / "report.json"
    compared = ["evaluate", "--predictions", files[0], "--against", files[1], *of_set]
    assert run([*compared, "-o", str(report)]) == 0
    written = json.loads(report.read_text())
    capsys.readouterr()
    assert run(["verify", folder, "--target", INT8, "--answers", str(report)]) == 0
    line = " ".join(capsys.readouterr().out.split())
    different = written["against"]["different"]
    assert line.startswith(f"vqav2, val: 12 answers, {different} others than cpu gives; accuracy ")
    assert run(["inspect", "target", folder, INT8]) == 0
    assert f"answers: {line}" in " ".join(capsys.readouterr().out.split())
    (receipt,) = bundle.target(INT8).valid_answers
    found = written["against"]["differences"]["accuracy"]
    assert receipt.differences["accuracy"].model_dump(mode="json") == found
    # A receipt changes nothing that answers depend on: the run goes on.
    assert run([*asked, "--target", INT8, "-o", files[0]]) == 0
    # Once more is no second one.
    capsys.readouterr()
    assert run(["verify", folder, "--target", INT8, "--answers", str(report), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"]["against"] == "cpu"
    assert len(bundle.target(INT8).answers) == 1


def test_a_receipt_in_words() -> None:
    one = AnswerDifference(value=None, interval=(None, None), verdict="unknown")
    receipt = AnswerReceipt(
        benchmark="nocaps", split="val", against="cpu", sha256="0", answers=9, different=0,
        differences={"accuracy": AnswerDifference.model_validate(DIFFERENCE), "CIDEr": one},
    )  # fmt: skip
    assert receipt.in_words() == (
        "nocaps, val: 9 answers, 0 others than cpu gives; accuracy -0.50 (-1.25 to 0.25), "
        "not told apart; CIDEr unknown (unknown to unknown), unknown"
    )


def test_another_model_is_named(bundle: Bundle, tmp_path: Path) -> None:
    value = comparison(bundle)
    value["against"]["run"]["bundle"] = "ab" * 32
    found = read_comparison(write(tmp_path, value), bundle, bundle.target(INT8))
    assert found.against == f"cpu of bundle {'ab' * 8}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value["run"].update(bundle="0" * 64), "answers of another bundle"),
        (lambda value: value["run"].update(target="cpu"), "answers of another target"),
        (lambda value: value["run"].update(engines=None), "another build of the engines"),
        (lambda value: value["against"].update(run=value["run"]), "compares cpu-int8 with itself"),
        (lambda value: value.update(run=None), "does not say which targets"),
        (lambda value: value["against"].update(run=None), "does not say which targets"),
        (lambda value: value.pop("against"), "is no comparison of two files of answers: against"),
        (lambda value: value["against"].update(answers="many"), "is no comparison"),
    ],
)
def test_comparisons_of_something_else_are_refused(
    change: Callable[[dict[str, Any]], object], message: str, bundle: Bundle, tmp_path: Path
) -> None:
    value = comparison(bundle)
    change(value)
    with pytest.raises(ConfigError, match=message):
        read_comparison(write(tmp_path, value), bundle, bundle.target(INT8))


def test_what_is_no_comparison_is_refused_in_a_line(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "text.json").write_text("no")
    folder = str(bundle.folder)
    for name, why in (
        ("none.json", "cannot read"),
        ("list.json", "is no comparison"),
        ("text.json", "is no comparison"),
    ):
        answers = ["--answers", str(tmp_path / name)]
        assert run(["verify", folder, "--target", INT8, *answers]) == 2
        assert why in capsys.readouterr().err
        assert run(["verify", folder, *answers]) == 2
        assert "--answers goes with --target NAME" in capsys.readouterr().err
        assert run(["verify", folder, "--target", INT8, *answers, "--force"]) == 2
        assert "--force runs engines" in capsys.readouterr().err


def test_a_receipt_is_void_once_an_engine_changes(bundle: Bundle) -> None:
    manifest = bundle.target(INT8)
    receipt = AnswerReceipt(
        benchmark="vqav2", split="val", against="cpu", sha256=hash_of_files(manifest.files),
        answers=1, different=0, differences={},
    )  # fmt: skip
    own = manifest.model_copy(update={"answers": (receipt,)})
    assert own.valid_answers == (receipt,)
    name, entry = next(iter(own.files.items()))
    changed = {**own.files, name: entry.model_copy(update={"sha256": "0" * 64})}
    assert own.model_copy(update={"files": changed}).valid_answers == ()


def write(folder: Path, value: object) -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps(value))
    return path
