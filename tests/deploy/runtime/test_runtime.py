"""Opening a bundle: which files run, and what is read from it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.runtime.fake_model import fake_config, fake_schedule, fake_tokenizer
from mmi_deploy.bundle.bundle import Bundle, write_bundle, write_target
from mmi_deploy.errors import BundleError, EngineError
from mmi_deploy.parity import Case
from mmi_deploy.runtime.onnxruntime.backend import graph_files
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.graphs import GRAPHS, Limits
from mmi_deploy.spec.schedule import Schedule

PROVED = [Case(sizes={}, error=0.0, tolerance=1e-4)]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle whose graphs are no graphs: opening one must not load them."""
    config = fake_config()
    with write_bundle(tmp_path / "bundle", config, Limits(context=32)) as writer:
        for make in GRAPHS:
            writer.graph_file(make.__name__).write_bytes(b"no graph")
            writer.add_receipt(make.__name__, "nothing", PROVED)
        fake_tokenizer(config)._inner.save(str(writer.tokenizer))
        for key in ("plain:4", "ancestral:4"):
            writer.add_schedule(fake_schedule(key))
    return Bundle.open(tmp_path / "bundle")


def test_a_runtime_reads_the_bundle_and_loads_engines_when_needed(bundle: Bundle) -> None:
    runtime = Runtime.open(bundle.folder, kernels="none")
    assert runtime.config == bundle.config and runtime.limits == bundle.limits
    assert runtime.tokenizer.encode("w5 w6") == [5, 6]
    assert runtime.schedule().schedule.key == "plain:4"
    assert runtime.schedule("ancestral:4") is runtime.schedule("ancestral:4")
    with pytest.raises(BundleError, match="no schedule"):
        runtime.schedule("unipc:3")
    with pytest.raises(EngineError, match=r"cannot load .*llm\.onnx.* `mmi verify`"):
        runtime.engine("llm")


def test_threads_that_ask_at_once_share_one_sampler(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, loads = Bundle.schedule, []

    def slow(self: Bundle, key: str | None = None) -> Schedule:
        loads.append(key)
        time.sleep(0.05)
        return read(self, key)

    monkeypatch.setattr(Bundle, "schedule", slow)
    runtime = Runtime.open(bundle, kernels="none")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(runtime.schedule, ["plain:4"] * 4))
    assert loads == [None, "ancestral:4"] and all(one is found[0] for one in found)


def test_engines_of_the_target_are_taken_graph_by_graph(bundle: Bundle) -> None:
    assert graph_files(bundle, "cpu")["llm"] == bundle.graph_file("llm")
    with write_target(bundle, "cpu", {}) as writer:
        writer.engine_file("llm", ".onnx").write_bytes(b"faster")
        writer.add_receipt("llm", "the portable graph", PROVED)
    files = graph_files(bundle, "cpu")
    assert files["llm"] == bundle.folder / "engines/cpu/llm.onnx"
    assert files["vae_decoder"] == bundle.graph_file("vae_decoder")
    assert graph_files(bundle, "portable")["llm"] == bundle.graph_file("llm")
    with pytest.raises(BundleError, match="engines/sm90 is not complete"):
        graph_files(bundle, "sm90")


def test_an_engine_of_another_kind_is_refused(bundle: Bundle) -> None:
    with write_target(bundle, "sm90", {}) as writer:
        writer.engine_file("llm", ".plan").write_bytes(b"for a GPU")
        writer.add_receipt("llm", "the portable graph", PROVED)
    with pytest.raises(EngineError, match=r"llm\.plan is not an ONNX file"):
        Runtime.open(bundle, target="sm90", kernels="none").engine("llm")
