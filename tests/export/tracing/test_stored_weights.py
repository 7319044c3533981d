"""Model folders are looked at before the work: what is wrong with one is said in a line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.small_models import paper_reading
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import ConfigError, MmiError, WeightsError
from mmi_deploy.spec.presets import tiny
from mmi_export import plan
from mmi_export.export import prepare_export, run_export
from mmi_export.parity.small_model import slice_of
from mmi_export.placeholder_model import cut, write_placeholder_model
from mmi_export.plan import plan_export
from mmi_export.tracing import stored_weights
from mmi_export.tracing.fake_weights_model import FakeWeightsModel
from mmi_export.tracing.stored_weights import INDEX, link_file, load_stored
from mmi_train.weights.model_folder import TOKENIZER, WEIGHTS, load_model


@pytest.fixture(scope="module")
def fake_model() -> FakeWeightsModel:
    return FakeWeightsModel(paper_reading())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    write_placeholder_model(paper_reading(), folder, "random", torch.bfloat16)
    return folder


@pytest.fixture
def folder(drawn: Path, tmp_path: Path) -> Path:
    return shutil.copytree(drawn, tmp_path / "model")


Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("head.head.weight"), "lacks 1 tensors: head.head.weight"),
        (lambda state: state.update(more=torch.zeros(1)), "has 1 unknown tensors: more"),
        (
            lambda state: state.update({"llm.norm.weight": torch.zeros(7)}),
            r"llm.norm.weight has the wrong shape; expected \[192\]; got \[7\]",
        ),
        (
            lambda state: state.update({"llm.norm.weight": torch.zeros(192, dtype=torch.int32)}),
            "llm.norm.weight has the wrong data type; expected floating point; got int32",
        ),
    ],
)
def test_other_weights_than_the_models_are_refused(
    folder: Path, tmp_path: Path, change: Change, says: str
) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)
    with pytest.raises(WeightsError, match=says):
        prepare_export(folder, tmp_path / "bundle")


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_file_that_is_cut_short_is_refused(folder: Path, tmp_path: Path, kept: int) -> None:
    path = folder / WEIGHTS
    os.truncate(path, kept if kept >= 0 else path.stat().st_size + kept)
    with pytest.raises(WeightsError, match=r"model\.safetensors (is cut off|is not a safetensors)"):
        prepare_export(folder, tmp_path / "bundle")


def test_numbers_that_are_not_finite_are_found_before_any_graph_is_made(
    folder: Path, tmp_path: Path
) -> None:
    state = load_file(folder / WEIGHTS)
    state["head.head.weight"][3, 5] = torch.inf
    save_file(state, folder / WEIGHTS)
    stages: list[str] = []
    export = prepare_export(folder, tmp_path / "bundle")
    with pytest.raises(WeightsError, match=r"head\.head\.weight holds NaN or infinity"):
        run_export(
            export, tmp_path / "bundle", progress=lambda what, *_, **_more: stages.append(what)
        )
    assert not any("exporting" in what for what in stages)
    assert not (tmp_path / "bundle").exists()


def test_weights_in_several_files_are_found_by_their_index(
    folder: Path, fake_model: FakeWeightsModel
) -> None:
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    found = stored_weights.stored_weights(folder, fake_model.weights)
    assert [file.name for file in found.files] == sorted(parts)
    assert all(torch.equal(found.read(name), state[name].float()) for name in names[:20])


def test_a_model_is_loaded_from_its_places_as_from_its_folder(
    drawn: Path, fake_model: FakeWeightsModel
) -> None:
    loaded = load_stored(paper_reading(), stored_weights.stored_weights(drawn, fake_model.weights))
    wanted = load_model(drawn).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
    buffers = dict(load_model(drawn).named_buffers())
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in loaded.named_buffers())


def test_a_full_disk_is_told_before_the_work(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    export = prepare_export(drawn, tmp_path / "bundle")
    with pytest.raises(MmiError, match=r"does not fit on the disk; expected .* MB; got 1.0 kB"):
        run_export(export, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_what_does_not_fit_into_memory_is_proved_by_a_slice(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare_export(drawn, tmp_path / "bundle").plan.scope == "full"
    monkeypatch.setattr(plan, "free_memory", lambda swap: 10**6)
    assert prepare_export(drawn, tmp_path / "bundle").plan.scope == "slice"
    with pytest.raises(ConfigError, match="too large for a full proof.*--prove slice"):
        prepare_export(drawn, tmp_path / "bundle", scope="full")


def test_another_disk_gets_a_copy_and_the_plan_says_so(
    drawn: Path, tmp_path: Path, fake_model: FakeWeightsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    stored = stored_weights.stored_weights(drawn, fake_model.weights)
    arguments = (paper_reading(), fake_model.weights, stored, tmp_path / "new" / "bundle")
    near = plan_export(*arguments, "linked", None)
    monkeypatch.setattr(os, "link", elsewhere)
    far = plan_export(*arguments, "linked", None)
    assert not near.copies and far.copies and far.disk == near.disk + stored.bytes
    assert link_file(drawn / WEIGHTS, tmp_path) == WEIGHTS
    assert (tmp_path / WEIGHTS).read_bytes() == (drawn / WEIGHTS).read_bytes()
    assert list(tmp_path.iterdir()) == [tmp_path / WEIGHTS]


def test_empty_weights_have_sizes_and_take_no_disk(
    tmp_path: Path, fake_model: FakeWeightsModel
) -> None:
    write_placeholder_model(paper_reading(), tmp_path, "empty", torch.float16)
    status = (tmp_path / WEIGHTS).stat()
    assert status.st_size > 2 * sum(tensor.numel() for tensor in fake_model.weights.values())
    assert status.st_blocks * 512 < 200_000
    state = load_file(tmp_path / WEIGHTS)
    assert {name: value.shape for name, value in state.items()} == {
        name: tensor.shape for name, tensor in fake_model.weights.items()
    }
    Tokenizer.open(tmp_path / TOKENIZER, paper_reading().tokens)


def test_a_cut_keeps_all_but_the_language_models_depth() -> None:
    config = paper_reading()
    short = cut(config, 1)
    assert short.llama.layers == 1 and short.vision == config.vision
    with pytest.raises(ConfigError, match="expected 1 to 2"):
        cut(config, 3)


def test_cuts_and_slices_keep_the_settings_of_llamas_descendants() -> None:
    llama = replace(
        tiny().llama,
        width=192,
        heads=6,
        kv_heads=3,
        channels_per_head=48,
        layers=9,
        mmfs_every=2,
        rope_divisors=(1.0,) * 12 + (8.0,) * 12,
        layers_without_rope=(3, 7),
        qkv_bias=True,
        qk_norm=True,
    )
    config = replace(tiny(), llama=llama)
    assert cut(config, 7).llama.layers_without_rope == (3,)
    assert cut(config, 3).llama == replace(llama, layers=3, layers_without_rope=())
    small = slice_of(config).llama
    assert (small.layers, small.layers_without_rope) == (4, (3,))
    assert (small.width, small.heads, small.head_width) == (128, 4, 48)
    assert small.rope_divisors == llama.rope_divisors and small.qkv_bias and small.qk_norm


@pytest.mark.parametrize("name", ["ablation_3b", "paper_13b", "released_13b"])
def test_a_slice_is_small_and_keeps_what_decides_the_code(name: str) -> None:
    from mmi_deploy.spec.presets import preset

    config, small = preset(name), slice_of(preset(name))
    assert sum(tensor.numel() for tensor in FakeWeightsModel(small).weights.values()) < 30e6
    assert small.vision.level_sides == config.vision.level_sides
    assert len(small.llama.mmfs_layers) == 2 and small.llama.layers > 2
    assert small.llama.head_width == config.llama.head_width
    for mine, theirs in (
        (small.llm_mmfs, config.llm_mmfs),
        (small.image_decoder.mmfs, config.image_decoder.mmfs),
    ):
        assert (mine.points, mine.levels, mine.base_grid) == (
            theirs.points,
            theirs.levels,
            theirs.base_grid,
        )
        assert (mine.null_slot, mine.head_width) == (theirs.null_slot, theirs.head_width)
    assert small.vision_resampler.form == config.vision_resampler.form
    assert small.vision_resampler.queries == config.vision_resampler.queries
    assert small.image_decoder.unet.mmfs_at == config.image_decoder.unet.mmfs_at
    assert small.image_decoder.resampler.form == config.image_decoder.resampler.form
