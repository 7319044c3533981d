"""Export of a model folder to a bundle with receipts; a wrong graph gets none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from export.small_models import paper_reading, random_model
from exports import Exported
from mmi_deploy.errors import BundleError, ConfigError, EngineError, WeightsError
from mmi_deploy.parity import EXPORT_TOLERANCES
from mmi_deploy.spec.graphs import GRAPHS, Limits, graphs
from mmi_export.export import MODULES, export_bundle
from mmi_export.parity.receipts import Arrays, onnx_runner, prove
from mmi_train.weights.model_folder import TOKENIZER

NAMES = [make.__name__ for make in GRAPHS]


@pytest.mark.parametrize("name", NAMES)
def test_every_graph_is_proved_alone_and_in_a_batch(exported: Exported, name: str) -> None:
    receipt = exported.bundle.manifest.receipt(name)
    assert receipt is not None and receipt.passed
    batch = "n" if name in ("vision_encoder", "llm_values", "unet_values") else "b"
    several = {"denoise_step": {3}, "denoise_shallow": {3}, "llm": {2, 3}, "image_condition": {2}}
    assert {case.sizes[batch] for case in receipt.cases} == {1} | several.get(name, {2, 8})
    assert all(
        0 < case.error <= case.tolerance == EXPORT_TOLERANCES[name].relative
        for case in receipt.cases
    )


def test_the_language_model_is_proved_from_prefill_to_the_end_of_its_context(
    exported: Exported,
) -> None:
    receipt = exported.bundle.manifest.receipt("llm")
    assert receipt is not None
    context = exported.model.config.llama.context
    tokens = {case.sizes["t"] for case in receipt.cases}
    assert 1 in tokens and max(tokens) == context - 3
    assert {1, 4} <= {case.sizes["m"] for case in receipt.cases}


def test_time_tables_are_the_unets_projections(exported: Exported) -> None:
    assert exported.bundle.schedules == ("unipc:4", "ddpm:3")
    for key in exported.bundle.schedules:
        schedule = exported.bundle.schedule(key)
        with torch.no_grad():
            unet = exported.model.image_decoder.unet
            rows = [unet.time_rows(torch.tensor([step])) for step in schedule.timesteps]
        np.testing.assert_allclose(schedule.time_table, torch.cat(rows).numpy(), atol=1e-5)


def test_progress_names_every_graph_and_never_goes_back(exported: Exported) -> None:
    text = " ".join(stage for stage, _, _ in exported.stages)
    assert all(f"exporting {name}" in text and f"proving {name}" in text for name in NAMES)
    done = [done for _, done, _ in exported.stages]
    assert done == sorted(done) and exported.stages[-1][1] == exported.stages[-1][2]


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_with_a_slightly_wrong_output_gets_no_receipt(
    exported: Exported, name: str
) -> None:
    run = onnx_runner(exported.bundle.graph_file(name))
    first = exported.bundle.graphs[name].outputs[0].name

    def wrong(inputs: Arrays) -> Arrays:
        outputs = run(inputs)
        bent = outputs[first].copy()
        bent.flat[-1] += 1e-3 * np.abs(bent).max()
        return outputs | {first: bent}

    arguments = (exported.model, exported.bundle.graphs[name], exported.bundle.limits)
    with pytest.raises(BundleError, match=f"{name} does not compute what the model does"):
        prove(*arguments, wrong)


@pytest.mark.parametrize("name", ["llm", "image_condition"])
def test_the_shortest_context_is_proved_too(name: str) -> None:
    """A picture and two words; the modules themselves are run in place of the exported files."""
    model = random_model(paper_reading())
    limits = Limits(context=model.config.visual_tokens + 4)
    graph = graphs(model.config, limits)[name]
    module = MODULES[name](model, graph)

    def run(inputs: Arrays) -> Arrays:
        tensors = {key: torch.from_numpy(value.copy()) for key, value in inputs.items()}
        return {key: value.numpy() for key, value in module(tensors).items()}

    assert all(case.passed for case in prove(model, graph, limits, run).cases)


def test_a_file_that_is_no_onnx_is_a_readable_error(tmp_path: Path) -> None:
    (tmp_path / "llm.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match="llm.onnx"):
        onnx_runner(tmp_path / "llm.onnx")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"context": 65}, ConfigError, r"expected 8 tokens .* to 64 "),
        ({"context": 7}, ConfigError, r"8 tokens \(one image and two words\) to 64 "),
        ({"context": 1}, ConfigError, r"expected 8 tokens .* to 64 "),
        ({"schedules": ()}, ConfigError, "at least one schedule"),
        ({"schedules": ("euler:4",)}, ConfigError, "euler"),
        ({"rows": 0}, ConfigError, "at least 1 row"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_any_work(
    exported: Exported, tmp_path: Path, options: dict[str, object], error: type, says: str
) -> None:
    with pytest.raises(error, match=says):
        export_bundle(exported.folder, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()


def test_a_model_folder_without_tokenizer_is_refused(exported: Exported, tmp_path: Path) -> None:
    folder = shutil.copytree(exported.folder, tmp_path / "model")
    (folder / TOKENIZER).unlink()
    with pytest.raises(WeightsError, match=TOKENIZER):
        export_bundle(folder, tmp_path / "bundle")


def test_a_bundles_tokenizer_neither_cuts_nor_pads(exported: Exported) -> None:
    """The model folder's does: see `exports.export`. It begins with `<s>` where it is asked to, as
    transformers ask it; see test_tokenizer_files.py."""
    given = json.loads((exported.folder / TOKENIZER).read_text(encoding="utf-8"))
    written = json.loads(exported.bundle.tokenizer.read_text(encoding="utf-8"))
    assert given["truncation"] and given["padding"]
    assert "TemplateProcessing" in json.dumps(written["post_processor"])
    changed = {"truncation": None, "padding": None, "post_processor": written["post_processor"]}
    assert written == {**given, **changed}
