"""Models and bundles that the export tests share: each is made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest

from export.small_models import paper_reading, random_model, released_reading
from mmi_deploy.bundle import Bundle
from mmi_export.bundle_export import export_bundle
from mmi_train.data.vocabulary import build_tokenizer
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights import TOKENIZER, save_model

READINGS = {"paper": paper_reading, "released": released_reading}


@dataclass(frozen=True)
class Exported:
    """A random model and what `export_bundle` made of its folder."""

    model: MMInterleaved
    folder: Path
    bundle: Bundle
    stages: list[tuple[str, int, int]]

    def graph(self, name: str) -> onnx.ModelProto:
        """The file of a graph, its weights not read."""
        return onnx.load(self.bundle.graph_file(name), load_external_data=False)


@pytest.fixture(scope="session", params=["paper", pytest.param("released", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Both readings, exported with their receipts."""
    model = random_model(READINGS[request.param]())
    folder = tmp_path_factory.mktemp(request.param)
    save_model(model, folder / "model")
    build_tokenizer().save(str(folder / "model" / TOKENIZER))
    stages: list[tuple[str, int, int]] = []
    bundle = export_bundle(
        folder / "model",
        folder / "bundle",
        schedules=("unipc:4", "ddpm:3"),
        progress=lambda *stage: stages.append(stage),
    )
    return Exported(model, folder / "model", bundle, stages)
