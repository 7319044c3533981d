"""Receipts of answers: an int8 target beside the fp32 graphs, on questions of VQAv2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exports import SHIPPED, Exported
from mmi_deploy.bundle.build_report import REPORT
from mmi_deploy.bundle.bundle import TARGET_MANIFEST, Bundle
from mmi_deploy.bundle.manifest import AnswerDifference, AnswerReceipt, FileEntry, TargetManifest
from mmi_deploy.cli.app import run
from mmi_deploy.errors import BundleError, ConfigError
from mmi_deploy.targets import answer_receipts
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
    about = {"bundle": bundle.identity, "benchmark": "vqav2", "shard": "1/1", "beams": 1}
    engines = bundle.target(INT8).engines
    run_of_int8 = {**about, "target": INT8, "engines": engines}
    against = {
        "differences": {"accuracy": DIFFERENCE},
        "answers": 200,
        "different": 3,
        "missing": 0,
        "band": {"levels": None, "texts": 0.04},
        "run": {**about, "target": "cpu", "engines": None},
    }
    found = {"benchmark": "vqav2", "split": "val", "missing": 0, "against": against}
    return {**found, "run": run_of_int8, **changes}


@pytest.mark.slow
def test_answers_of_two_targets_become_a_receipt(
    bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
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
    assert run(["verify", folder, "--target", INT8, "--answers", str(report)]) == 2
    assert "too few answers" in capsys.readouterr().err
    monkeypatch.setattr(answer_receipts, "LEAST_ANSWERS", 12)
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
    one = AnswerDifference(value=None, interval=(None, None), verdict="not told apart")
    receipt = AnswerReceipt(
        benchmark="nocaps", split="val", against="cpu", sha256="0", answers=9, different=0,
        differences={"accuracy": AnswerDifference.model_validate(DIFFERENCE), "CIDEr": one},
    )  # fmt: skip
    assert receipt.in_words() == (
        "nocaps, val: 9 answers, 0 others than cpu gives; accuracy -0.50 (-1.25 to 0.25), "
        "not told apart; CIDEr unknown (unknown to unknown), not told apart"
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
        (lambda value: value["run"].update(beams=3), "with other settings; got beams"),
        (lambda value: value["run"].update(prompt="chat"), None),
        (lambda value: value["run"].update(benchmark="okvqa"), "are of another benchmark"),
        (lambda value: value["against"]["run"].update(shard="1/8"), "are of another shard"),
        (lambda value: value.update(missing=3), "3 answers are missing"),
        (lambda value: value["against"].update(missing=2), "2 answers are missing"),
        (lambda value: value["against"].update(answers=99), "too few answers"),
        (lambda value: value["against"].update(different=201), "more answers are different"),
        (lambda value: value["against"].update(different=-1), "cannot be right: different"),
        (lambda value: value.update(benchmark="a\x1b[2Jb"), "is no comparison"),
        (lambda value: value.update(benchmark="<img onerror=x>"), "is no comparison"),
        (lambda value: value.update(benchmark="a\ud800b"), "is no comparison"),
        (lambda value: value.update(split="v" * 101), "is no comparison"),
        (lambda value: value["against"]["run"].update(target="[x](y)"), "is no comparison"),
        (lambda value: change_difference(value, value=float("nan")), "is no comparison"),
        (lambda value: change_difference(value, interval=[0.5, -0.5]), "ends before it begins"),
        (lambda value: change_difference(value, verdict="lower"), "the verdict lower"),
        (lambda value: change_difference(value, verdict="certified"), "is no comparison"),
    ],
)
def test_comparisons_of_something_else_are_refused(
    change: Callable[[dict[str, Any]], object], message: str | None, bundle: Bundle, tmp_path: Path
) -> None:
    """None: a setting that one of the two does not have."""
    value = comparison(bundle)
    change(value)
    if message is None:
        read_comparison(write(tmp_path, value), bundle, bundle.target(INT8))
        return
    with pytest.raises(ConfigError, match=message):
        read_comparison(write(tmp_path, value), bundle, bundle.target(INT8))


def change_difference(report: dict[str, Any], **changes: object) -> None:
    report["against"]["differences"] = {"accuracy": {**DIFFERENCE, **changes}}


def test_a_model_folder_is_named(bundle: Bundle, tmp_path: Path) -> None:
    """PyTorch's run has a model and no bundle, and steps that a bundle has in its sampler."""
    value = comparison(bundle)
    del value["against"]["run"]["bundle"]
    value["against"]["run"].update(target="pytorch-fp32", model={"model.safetensors": "0"}, steps=9)
    found = read_comparison(write(tmp_path, value), bundle, bundle.target(INT8))
    assert found.against == "pytorch-fp32 of a model folder"


def test_receipts_that_are_written_together_are_all_kept(bundle: Bundle, tmp_path: Path) -> None:
    """Each writer read the manifest before any wrote."""
    manifest = bundle.target(INT8)
    path = write(tmp_path, comparison(bundle))
    receipt = read_comparison(path, bundle, manifest)
    names = [f"set {number}" for number in range(8)]
    receipts = [receipt.model_copy(update={"benchmark": name}) for name in names]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(partial(answer_receipts.write_answers, bundle, manifest), receipts))
    assert {one.benchmark for one in bundle.target(INT8).valid_answers} >= set(names)
    other = manifest.files | {next(iter(manifest.graphs.values())): FileEntry(sha256="0", size=1)}
    with pytest.raises(BundleError, match="was built again meanwhile"):
        answer_receipts.write_answers(bundle, manifest.model_copy(update={"files": other}), receipt)


def test_a_copy_of_a_target_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    """Its manifest names the other one, into which a receipt would go."""
    folder = tmp_path / "copied"
    shutil.copytree(bundle.folder, folder)
    target = Bundle.open(folder).target_folder(INT8)
    shutil.copytree(target, target.with_name("cpu-int8-old"))
    answers = str(write(tmp_path, comparison(bundle)))
    before = (target / TARGET_MANIFEST).read_bytes()
    assert run(["verify", str(folder), "--target", "cpu-int8-old", "--answers", answers]) != 0
    assert (target / TARGET_MANIFEST).read_bytes() == before


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
        benchmark="vqav2", split="val", against="cpu", sha256=manifest.engines,
        answers=1, different=0, differences={},
    )  # fmt: skip
    own = manifest.model_copy(update={"answers": (receipt,)})
    assert own.valid_answers == (receipt,)

    def changed(name: str) -> TargetManifest:
        entry = own.files[name].model_copy(update={"sha256": "0" * 64})
        return own.model_copy(update={"files": {**own.files, name: entry}})

    assert changed(own.graphs["llm"]).valid_answers == ()
    assert REPORT in own.files and changed(REPORT).valid_answers == (receipt,)  # times of a build


def write(folder: Path, value: object) -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps(value))
    return path
