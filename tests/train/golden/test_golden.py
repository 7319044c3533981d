"""The golden checker: our modules equal published runs, and whatever is wrong is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmi_deploy.spec.config import MmfsConfig
from mmi_train.golden.__main__ import main
from mmi_train.golden.check import Report, check_folder
from mmi_train.golden.compare import FLOOR, TOLERANCES, compare
from mmi_train.golden.gradients import gradient_bounds
from mmi_train.golden.units import KINDS, kind_of
from mmi_train.model.mmfs import Mmfs

# The smallest golden unit: what most tests damage.
UNIT = "mmfs_llm"


def put(source: Path, folder: Path, name: str = "") -> Path:
    """Copy the unit at `source` (a path without suffix) into `folder`, perhaps renamed."""
    base = folder / (name or source.name)
    for suffix in (".json", ".safetensors"):
        shutil.copy(source.parent / (source.name + suffix), f"{base}{suffix}")
    return base


def change(base: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite the unit's tensors."""
    tensors = load_file(f"{base}.safetensors")
    edit(tensors)
    save_file(tensors, f"{base}.safetensors")


def change_config(base: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the side-car's `config`."""
    path = Path(f"{base}.json")
    about = json.loads(path.read_text())
    edit(about["config"])
    path.write_text(json.dumps(about))


@pytest.fixture
def golden_units(repository: Path) -> Path:
    return repository / "tests/golden"


@pytest.fixture
def golden_dir(golden_file: Callable[[str], Path]) -> Path:
    """The folder of all golden files, the whole model's included."""
    return golden_file("full_forward.safetensors").parent


@pytest.fixture
def unit(golden_units: Path, tmp_path: Path) -> Path:
    """One good unit, alone in a folder."""
    return put(golden_units / UNIT, tmp_path)


def verdicts(report: Report) -> dict[str, str]:
    return {f"{line.unit}.{line.tensor}": line.verdict for line in report.lines}


def assert_broken(folder: Path, capsys: pytest.CaptureFixture[str], *said: str) -> None:
    """The command exits with 1 and says each of `said` in one line about the unit."""
    assert main([str(folder)]) == 1
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if ": cannot be run: " in line]
    assert len(lines) == 1
    assert all(text in lines[0] for text in said), lines[0]
    assert "Traceback" not in printed.out + printed.err


@pytest.mark.parametrize("folder", ["golden", "golden_other_sizes"])
def test_published_runs_are_reproduced(repository: Path, folder: str):
    path = repository / "tests" / folder
    report = check_folder(path)
    assert not report.broken
    assert set(verdicts(report).values()) == {"pass"}
    units = {file.stem for file in path.glob("*.safetensors")} - {"preprocess"}
    assert {line.unit for line in report.lines} == units
    for name in units:  # every output was compared
        outputs = [key for key in load_file(path / f"{name}.safetensors") if key.startswith("out.")]
        assert len(outputs) == sum(line.unit == name for line in report.lines)


@pytest.mark.slow
def test_the_whole_model_reproduces_published_runs(golden_dir: Path):
    report = check_folder(golden_dir)
    assert not report.failed
    units = [line for line in report.lines if kind_of(line.unit)]  # beside files of cases
    assert {line.verdict for line in units} == {"pass"}
    assert {kind_of(line.unit) for line in units} == set(KINDS)
    assert {"preprocess.safetensors", "release_state_keys.json"} <= report.ignored.keys()


@pytest.mark.slow
def test_weights_may_come_from_another_folder(golden_dir: Path, tmp_path: Path, capsys):
    put(golden_dir / "full_generate_scores", tmp_path)
    assert_broken(tmp_path, capsys, "full_forward", "--weights")
    assert main([str(tmp_path), "--weights", str(golden_dir)]) == 0


def test_sampled_texts_are_listed_as_not_compared(tmp_path: Path):
    name, config = "full_generate_texts_sampled", {"num_beams": 1, "do_sample": True}
    save_file({"out.text_ids": torch.ones(1, 2)}, tmp_path / f"{name}.safetensors")
    (tmp_path / f"{name}.json").write_text(json.dumps({"config": config}))
    report = check_folder(tmp_path)  # the weights are not even asked for
    assert not report.failed
    assert [line.verdict for line in report.lines] == ["not compared"]
    assert "sampled" in report.lines[0].detail


@pytest.mark.slow
def test_beam_search_is_compared(golden_dir: Path):
    folder = golden_dir.parent / "golden_beam"
    if not folder.is_dir():
        pytest.skip("golden_beam is not here: it lies beside the folder MMI_GOLDEN_DIR")
    report = check_folder(folder, golden_dir)
    assert [(line.tensor, line.verdict) for line in report.lines] == [("text_ids", "pass")]


def test_the_kind_is_the_longest_known_prefix(golden_units: Path, tmp_path: Path):
    assert kind_of("mmfs_unet_at_night") == "mmfs_unet"
    assert kind_of("full_generate_texts") == "full_generate_texts"
    assert kind_of("my_mmfs_llm") is None
    put(golden_units / UNIT, tmp_path, "mmfs_llm_by_another_name")
    assert verdicts(check_folder(tmp_path)) == {"mmfs_llm_by_another_name.output": "pass"}


def test_the_table_says_unit_tensor_error_tolerance_verdict(unit: Path, capsys):
    (unit.parent / "notes.txt").write_text("")
    assert main([str(unit.parent)]) == 0
    header, line, ignored, total = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "unit" and header.endswith("verdict")
    name, tensor, error, tolerance, verdict = line.split()
    assert (name, tensor, verdict) == (UNIT, "output", "pass")
    assert 0 <= float(error) <= float(tolerance)
    assert ignored == "notes.txt: ignored: neither .safetensors nor .json"
    assert total == "1 passed, 0 failed, 0 not compared, 0 units cannot be run"


def test_one_wrong_value_fails_and_is_located(unit: Path, capsys):
    def flip(tensors: dict[str, Tensor]) -> None:
        tensors["out.output"][1, 4, 7] *= -1

    change(unit, flip)
    assert main([str(unit.parent)]) == 1
    line = capsys.readouterr().out.splitlines()[1]
    for text in ("FAIL", "mean error", "worst at [1, 4, 7]", "would pass", "0.0001 is allowed"):
        assert text in line


def test_one_wrong_weight_fails(unit: Path):
    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors["state.query_relpos.weight"][1] += 0.01

    change(unit, nudge)
    assert verdicts(check_folder(unit.parent)) == {"mmfs_llm.output": "FAIL"}


def test_values_behind_a_mask_do_not_count(golden_units: Path, tmp_path: Path):
    """Row 1 of the unit ends in padding: what the published code left there means nothing."""
    base = put(golden_units / "llama_mmfs", tmp_path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        padding = tensors["in.attention_mask"] == 0
        assert padding.any()
        tensors["out.logits"][padding] = torch.nan
        tensors["out.hidden_states.3"][~padding] += 1

    change(base, spoil)
    found = verdicts(check_folder(tmp_path))
    assert found["llama_mmfs.logits"] == "pass"
    assert found["llama_mmfs.hidden_states.3"] == "FAIL"


def test_unknown_outputs_are_listed_as_not_compared(unit: Path):
    change(unit, lambda tensors: tensors.update({"out.attention_map": torch.ones(2)}))
    report = check_folder(unit.parent)
    assert not report.failed
    assert verdicts(report)["mmfs_llm.attention_map"] == "not compared"


@pytest.mark.parametrize("name", ["value_proj.weight", "ignore_token", "query_relpos.weight"])
def test_a_missing_weight_is_named(unit: Path, capsys, name: str):
    change(unit, lambda tensors: tensors.pop(f"state.{name}"))
    assert_broken(unit.parent, capsys, name)


@pytest.mark.parametrize("name", ["query", "attention_mask", "input_spatial_shapes"])
def test_a_missing_input_is_named(unit: Path, capsys, name: str):
    change(unit, lambda tensors: tensors.pop(f"in.{name}"))
    assert_broken(unit.parent, capsys, f"in.{name}")


def test_an_extra_weight_is_named(unit: Path, capsys):
    change(unit, lambda tensors: tensors.update({"state.query_proj.weight": torch.ones(1)}))
    assert_broken(unit.parent, capsys, "unknown: query_proj.weight")


def test_a_misshapen_weight_is_named_with_both_shapes(unit: Path, capsys):
    change(unit, lambda tensors: tensors.update({"state.output_proj.bias": torch.ones(3)}))
    assert_broken(unit.parent, capsys, "output_proj.bias has shape [3], expected [64]")


def test_a_configuration_that_the_weights_contradict(unit: Path, capsys):
    change_config(unit, lambda config: config["ctor"].update(n_points=4))
    assert_broken(
        unit.parent, capsys, "sampling_offsets.weight has shape [64, 64], expected [32, 64]"
    )


@pytest.mark.parametrize(
    ("key", "value"), [("d_model", 128), ("ratio", 1.0), ("max_num_image_per_seq", 7)]
)
def test_other_sizes_than_those_of_the_weights(unit: Path, capsys, key: str, value: Any):
    change_config(unit, lambda config: config["ctor"].update({key: value}))
    assert_broken(unit.parent, capsys, "has shape")


def test_what_the_configuration_lacks_is_as_published_or_as_in_the_weights(
    golden_units: Path, tmp_path: Path
):
    base = put(golden_units / "visual_tokenizer_224", tmp_path)

    def forget(config: dict[str, Any]) -> None:
        for key in (
            "patch_size",
            "hidden_act",
            "num_hidden_layers",
            "image_size",
            "projection_dim",
        ):
            del config["clip"][key]
        for key in ("cross_attention_frequency", "qk_normalization"):
            del config["perceiver"][key]

    change_config(base, forget)
    assert set(verdicts(check_folder(tmp_path)).values()) == {"pass"}


@pytest.mark.parametrize("value", ["four", 4.5, [4], {"heads": 4}, 0, -4, True])
def test_a_senseless_configuration(unit: Path, capsys, value: Any):
    change_config(unit, lambda config: config["ctor"].update(n_heads=value))
    assert_broken(unit.parent, capsys, "config.ctor.n_heads")


def test_a_truncated_file(unit: Path, capsys):
    path = Path(f"{unit}.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    assert_broken(unit.parent, capsys, "is cut off")


def test_a_broken_side_car(unit: Path, capsys):
    Path(f"{unit}.json").write_text('{"config": ')
    assert_broken(unit.parent, capsys, "mmfs_llm.json is not JSON")


@pytest.mark.parametrize("about", [{}, {"config": [1]}, [1, 2], {"config": None}])
def test_a_side_car_without_config(unit: Path, capsys, about: Any):
    Path(f"{unit}.json").write_text(json.dumps(about))
    assert_broken(unit.parent, capsys, "has no object `config`")


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_half_a_unit(unit: Path, capsys, suffix: str):
    Path(f"{unit}{suffix}").unlink()
    assert_broken(unit.parent, capsys, f"mmfs_llm{suffix}")


def test_a_unit_of_an_unknown_kind(golden_units: Path, tmp_path: Path, capsys):
    put(golden_units / UNIT, tmp_path, "text_encoder")
    assert_broken(tmp_path, capsys, "does not start with a known kind", "mmfs_llm")


def test_a_unit_that_compares_nothing(unit: Path, capsys):
    change(unit, lambda tensors: tensors.pop("out.output"))
    assert_broken(unit.parent, capsys, "no out.* tensor")


def test_inputs_that_cannot_be_run(unit: Path, capsys):
    change(unit, lambda tensors: tensors.update({"in.query": torch.ones(2, 7, 63)}))
    assert_broken(unit.parent, capsys, "mmfs_llm: cannot be run: RuntimeError: ")


def test_a_broken_unit_does_not_hide_the_others(golden_units: Path, unit: Path):
    put(golden_units / UNIT, unit.parent, "mmfs_llm_good")
    Path(f"{unit}.json").unlink()
    report = check_folder(unit.parent)
    assert report.broken.keys() == {UNIT}
    assert verdicts(report) == {"mmfs_llm_good.output": "pass"}


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_a_folder_without_units(tmp_path: Path, capsys, what: str):
    folder = tmp_path / what
    if what == "empty":
        folder.mkdir()
    assert main([str(folder)]) == 1
    printed = capsys.readouterr()
    assert str(folder) in printed.out + printed.err


def test_the_tolerance_is_a_share_of_the_greatest_expected_value():
    expected = torch.tensor([100.0, 1.0])
    for quantity, tolerance in TOLERANCES.items():
        just = expected + torch.tensor([0.0, 99 * tolerance.relative])
        assert compare("u", "t", just, expected, quantity).verdict == "pass"
        over = expected + torch.tensor([0.0, 101 * tolerance.relative + 1e-5])
        assert compare("u", "t", over, expected, quantity).verdict == "FAIL"
    tiny = torch.full((2,), 1e-9)
    assert compare("u", "t", tiny, torch.zeros(2), "forward").allowed == 1e-4 * FLOOR


def test_gradients_at_the_border_of_a_cell_may_be_those_of_either_side():
    """A point on a cell's centre line: to its left the value falls by 1 per cell, to its right it
    rises by 2. Away from such a point nothing is allowed for."""
    config = MmfsConfig(
        heads=1,
        points=1,
        value_width=1,
        levels=(0,),
        base_grid=4,
        images=2,
        images_seen=1,
        null_slot=False,
        offset_init=0.0,
    )
    mmfs = Mmfs(config, 1, 1, 1, (4,), 4)
    with torch.no_grad():
        mmfs.output_proj.weight.fill_(1.0)
    row = torch.tensor([3.0, 2.0, 1.0, 3.0])
    value = row.repeat(4).view(1, 16, 1, 1)
    slot, position = torch.zeros(1, 1).int(), torch.ones(1, 1, 1).int()

    def slope(x: float) -> dict[str, Tensor]:
        reference = torch.tensor([[x, 0.5]])  # pixel 4 x - 0.5
        out = mmfs(torch.zeros(1, 1, 1), value, slot, position, reference)
        return {"x": torch.autograd.grad(out.sum(), mmfs.offset_proj.bias)[0][0]}

    least, greatest = gradient_bounds(mmfs, lambda: slope(0.625))["x"]
    assert (least.item(), greatest.item()) == pytest.approx((-1.0, 2.0), abs=1e-5)
    least, greatest = gradient_bounds(mmfs, lambda: slope(0.63))["x"]
    assert (least.item(), greatest.item()) == pytest.approx((2.0, 2.0), abs=1e-5)


def test_a_wrong_scalar_is_reported():
    line = compare("u", "loss", torch.tensor(1.5), torch.tensor(1.0), "loss")
    assert line.verdict == "FAIL" and line.error == 0.5
    assert "got 1.5, expected 1" in line.detail


def test_values_that_are_not_finite_fail_unless_expected():
    expected = torch.tensor([1.0, torch.nan, torch.inf])
    assert compare("u", "t", expected.clone(), expected, "forward").verdict == "pass"
    for value in (torch.nan, torch.inf, -torch.inf):
        got = torch.tensor([value, torch.nan, torch.inf])
        assert compare("u", "t", got, expected, "forward").verdict == "FAIL"
    assert compare("u", "t", torch.ones(2), torch.ones(3), "forward").verdict == "FAIL"


def test_a_mask_that_hides_everything_compares_nothing():
    hidden = torch.zeros(2, dtype=torch.bool)
    line = compare("u", "t", torch.zeros(2, 3), torch.ones(2, 3), "forward", hidden)
    assert line.verdict == "not compared"
