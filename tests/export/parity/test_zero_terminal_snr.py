"""Models of zero terminal SNR and v-prediction draw through the same graphs: only tables differ."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest

from export.parity.test_parity import DOCUMENTS, WAYS, Implementations, assert_same
from exports import Exported
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.config import DiffusionConfig, to_json
from mmi_deploy.spec.schedule import Schedule
from mmi_export.export import prepare_export, with_time_table
from mmi_export.parity.receipts import onnx_runner, prove
from mmi_export.schedules import parse_schedule
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights.model_folder import CONFIG, TOKENIZER, WEIGHTS

ZERO_SNR = DiffusionConfig("v_prediction", rescale_betas_zero_snr=True, min_snr_gamma=5.0)


@pytest.fixture(scope="module")
def model(exported: Exported) -> MMInterleaved:
    """The weights of the exported model, trained to predict v from pure noise."""
    changed = copy.deepcopy(exported.model)
    changed.change_diffusion(ZERO_SNR)
    return changed


@pytest.mark.parametrize("name", ["denoise_step", "denoise_shallow"])
def test_the_exported_step_draws_what_the_model_does(
    exported: Exported, model: MMInterleaved, name: str
) -> None:
    """In ONNX Runtime with UniPC, the ancestral sampler and DDIM, as every receipt compares them:
    one picture, and several at different steps."""
    run = onnx_runner(exported.bundle.graph_file(name))
    proof = prove(model, exported.bundle.graphs[name], exported.bundle.limits, run)
    assert all(case.passed for case in proof.cases)


@pytest.mark.parametrize("key", ["unipc-trailing:4", "ddpm-trailing:4", "dpmpp_2m-linspace:4"])
def test_documents_are_drawn_as_pytorch_draws_them(
    exported: Exported, model: MMInterleaved, key: str
) -> None:
    own = Implementations.of(model, exported.bundle)

    def schedule(asked: str | None) -> Schedule:
        table = with_time_table(model, parse_schedule(asked or key, ZERO_SNR))
        assert table.timesteps[0] == 999
        return table

    backend, tokenizer = own.runtime.backend, own.tokenizer
    own.runtime = Runtime(model.config, tokenizer, backend, schedule, (key,))
    options = replace(WAYS["drawing at once"], schedule=key, guidance=1.7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(exported.bundle), "schedule", lambda _, asked: schedule(asked))
        got = assert_same(own, DOCUMENTS["an image"], options)
    assert got.last.images == len(got.pictures) == 1


def test_a_bundle_gets_a_schedule_that_the_model_can_take(
    exported: Exported, model: MMInterleaved, tmp_path: Path
) -> None:
    """By default; one of the published spacing is refused in a line that names another."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (WEIGHTS, TOKENIZER):
        (folder / name).symlink_to(exported.folder / name)
    (folder / CONFIG).write_text(to_json(model.config))
    (schedule,) = prepare_export(folder, tmp_path / "bundle").schedules
    assert schedule.key == "unipc-trailing:20" and schedule.timesteps[0] == 999
    with pytest.raises(ConfigError, match=r"unipc:20 cannot draw.*write unipc-trailing:20"):
        prepare_export(folder, tmp_path / "bundle", None, ("unipc:20",))
