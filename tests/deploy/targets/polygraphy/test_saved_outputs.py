"""`mmi verify --save-outputs` on one machine, `mmi verify --target --against` on another."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from deploy.runtime.tensorrt.gpu_targets import add_target, machine
from mmi_deploy.bundle.bundle import Bundle, write_target
from mmi_deploy.cli.app import run
from mmi_deploy.errors import BundleError
from mmi_deploy.runtime.onnxruntime.run_graph import Run
from mmi_deploy.spec.backends import CPU
from mmi_deploy.targets.polygraphy import saved_outputs
from mmi_deploy.targets.polygraphy.bundle_files import stored_samples
from mmi_deploy.targets.polygraphy.saved_outputs import (
    COMPARED_WITH_SAVED,
    SavedCase,
    compare_saved,
    read_outputs,
)
from mmi_deploy.targets.precision import recipe, rewrite
from mmi_deploy.targets.verify_target import compare_graph

if TYPE_CHECKING:
    from exports import Exported


@pytest.fixture(scope="module")
def source(exported_once: Callable[[str], Exported]) -> Bundle:
    return exported_once("paper").bundle


@pytest.fixture(scope="module")
def saved(source: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs that `mmi verify --save-outputs` wrote."""
    path = tmp_path_factory.mktemp("saved") / "outputs.json"
    assert run(["verify", str(source.folder), "--save-outputs", str(path)]) == 0
    return path


@pytest.fixture
def bundle(source: Bundle, tmp_path: Path) -> Bundle:
    """Copy of the bundle that a test may build into."""
    folder = tmp_path / "bundle"
    shutil.copytree(source.folder, folder, ignore=shutil.ignore_patterns("engines"))
    return Bundle.open(folder)


def int8_target(bundle: Bundle, *, spoil: bool = False) -> str:
    """An int8 target of the CPU. spoil: one norm is thirty times too large in one channel."""
    with write_target(bundle, "cpu-int8", {"runtime": CPU, "precision": "int8"}) as writer:
        path = writer.engine_file("llm", ".onnx")
        rewrite(recipe("int8"), bundle.graphs["llm"], bundle.graph_file("llm"), path, runtime=CPU)
        if spoil:
            model = onnx.load(path)
            norm = next(t for t in model.graph.initializer if t.name.endswith("norm.weight"))
            values = onnx.numpy_helper.to_array(norm).copy()
            values[3] *= 30
            norm.CopyFrom(onnx.numpy_helper.from_array(values, norm.name))
            onnx.save(model, path)
    return "cpu-int8"


def changed(saved: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    found = json.loads(saved.read_bytes())
    change(found)
    out.write_text(json.dumps(found))
    return out


@pytest.mark.slow
def test_a_target_is_proved_against_saved_outputs_without_the_portable_graphs(
    bundle: Bundle, saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = int8_target(bundle)
    monkeypatch.setattr(saved_outputs, "runner", lambda path: pytest.fail(f"{path} was run"))
    monkeypatch.setattr("mmi_deploy.cli.verify._check_memory", lambda b: pytest.fail("memory"))
    words = ["verify", str(bundle.folder), "--target", target, "--against", str(saved), "--json"]
    assert run(words) == 0
    (graph,) = json.loads(capsys.readouterr().out)["graphs"]
    assert graph["verdict"] == "pass" and 1e-4 < graph["relative_rms"] < graph["tolerance"]
    receipt = bundle.target(target).receipt("llm")
    assert receipt is not None and receipt.compared_with == COMPARED_WITH_SAVED
    assert {case.sizes["b"] for case in receipt.cases} == {1, 2}


def test_a_wrong_engine_is_found_against_saved_outputs(
    bundle: Bundle, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = int8_target(bundle, spoil=True)
    assert run(["verify", str(bundle.folder), "--target", target, "--against", str(saved)]) == 2
    assert "llm in int8 is too far from the portable graph" in capsys.readouterr().err


def test_saved_outputs_are_those_that_the_portable_graph_gives_here(
    bundle: Bundle, saved: Path
) -> None:
    """To the bit, caches included, by comparing with tolerance nothing but equality."""
    cases = read_outputs(saved, bundle)
    assert cases.keys() == bundle.graphs.keys()
    for name in ("llm", "denoise_step"):
        samples = list(stored_samples(bundle, bundle.graphs[name]))
        replayed = replay(cases[name])
        graph, portable = bundle.graphs[name], bundle.graph_file(name)
        proof = compare_graph(graph, "fp32", samples, portable, replayed, "")
        assert len(proof.cases) == len(samples) and proof.error == 0.0


def replay(cases: list[SavedCase]) -> Callable[[], Run]:
    """A graph that gives the saved outputs, case after case."""
    found = iter(cases)
    return lambda: lambda inputs: next(found).outputs


@pytest.mark.slow
def test_engines_of_a_gpu_are_compared_with_saved_outputs(bundle: Bundle, saved: Path) -> None:
    """Over the fake GPU, all graphs, KV caches in place: ONNX Runtime runs on both sides."""
    here = machine(bundle, add_target(bundle, onnx=True))
    manifest = here.target.manifest
    proofs = compare_saved(bundle, manifest, here.runtime, read_outputs(saved, bundle))
    assert {proof.graph for proof in proofs} == set(bundle.graphs)
    assert all(proof.passed for proof in proofs), [(p.graph, p.error) for p in proofs]


def test_polygraphy_reads_the_file(bundle: Bundle, saved: Path) -> None:
    results = pytest.importorskip("polygraphy.comparator").RunResults.load(str(saved))
    assert list(results.keys()) == list(bundle.graphs)
    ours = read_outputs(saved, bundle)
    for name, iterations in results.items():
        for theirs, case in zip(iterations, ours[name], strict=True):
            for tensor in set(theirs.keys()) - {"caches", "caches.spans"}:
                np.testing.assert_array_equal(theirs[tensor], case.outputs[tensor])


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was executed",))


def encoded(array: np.ndarray) -> str:
    data = io.BytesIO()
    np.save(data, array, allow_pickle=True)
    return base64.b64encode(data.getvalue()).decode()


def pixels(found: dict[str, Any]) -> dict[str, Any]:
    iterations = dict(found["lst"])["vae_decoder"]
    value: dict[str, Any] = iterations[0]["outputs"]["pixels"]["values"]
    return value


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda f: f["mmi"].update(bundle="0" * 64), "was saved for another bundle"),
        (lambda f: f.pop("mmi"), "not a file of saved outputs"),
        (lambda f: f["mmi"].update(cases=3), "not a file of saved outputs"),
        (lambda f: f["lst"][0].append(1), "not a file of saved outputs"),
        (lambda f: dict(f["lst"])["llm"][0]["outputs"].pop("hidden"), "outputs of llm"),
        (lambda f: pixels(f).update(array=encoded(np.array([Exploit()]))), "array of object"),
        (lambda f: pixels(f).update(array="k05VTVBZAQB2AHsn"), "damaged"),
        (lambda f: pixels(f).update(array="!"), "damaged"),
    ],
)
def test_foreign_and_damaged_files_are_refused_and_never_executed(
    bundle: Bundle, saved: Path, tmp_path: Path, change: Callable[[Any], None], says: str
) -> None:
    path = changed(saved, tmp_path / "changed.json", change)
    with pytest.raises(BundleError, match=says):
        read_outputs(path, bundle)


def test_an_array_that_claims_more_than_it_has_is_refused_before_memory_is_taken(
    bundle: Bundle, saved: Path, tmp_path: Path
) -> None:
    header = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": (2**45,)}
    np.lib.format.write_array_header_1_0(header, about)
    claim = base64.b64encode(header.getvalue() + bytes(16)).decode()
    path = changed(saved, tmp_path / "c.json", lambda f: pixels(f).update(array=claim))
    with pytest.raises(BundleError, match=r"array of float32 .* in 144 bytes"):
        read_outputs(path, bundle)


@pytest.mark.parametrize(
    "spans", [[[-4, 4]], [[0, 2**40]], [[0, 0]], [[4, 4], [0, 2]], [[0, 4], [2, 4]]]
)
def test_spans_outside_the_caches_are_refused(spans: list[list[int]]) -> None:
    values = np.ones(4, np.float32)
    with pytest.raises(ValueError):
        saved_outputs._dense(values, np.array(spans), 100)


def test_changes_of_caches_survive_the_sparse_form() -> None:
    draw = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.5, 1.0):
        changes = draw.standard_normal(500).astype(np.float32) * (draw.random(500) < density)
        sparse = saved_outputs._sparse({"caches": changes})
        assert sparse["caches"].size == np.count_nonzero(changes)
        dense = saved_outputs._dense(sparse["caches"], sparse["caches.spans"], 500)
        np.testing.assert_array_equal(dense, changes)


def test_other_inputs_than_those_of_the_file_are_refused(
    bundle: Bundle, saved: Path, tmp_path: Path
) -> None:
    here = machine(bundle, add_target(bundle, onnx=True))
    cases = read_outputs(saved, bundle)
    other = [SavedCase("0" * 64, case.outputs) for case in cases["vision_encoder"]]
    for wrong in (other, cases["vision_encoder"][:-1], []):
        with pytest.raises(BundleError, match="belong to other inputs"):
            compare_saved(
                bundle, here.target.manifest, here.runtime, {**cases, "vision_encoder": wrong}
            )


@pytest.mark.parametrize(
    "words, says",
    [
        (["--save-outputs", "o.json", "--target", "cpu-int8"], "leave out --target"),
        (["--save-outputs", "o.json", "--run"], "leave out --run"),
        (["--save-outputs", "o.txt"], ".json"),
        (["--against", "o.json"], "--against goes with --target NAME"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    bundle: Bundle, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(bundle.folder), *words]) == 2
    assert says in capsys.readouterr().err
