"""`mmi bench --reading released`: configurations, the drawn model and its bundle, options."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from export import small_models
from mmi_bench.compare import compare
from mmi_bench.compare import released_reading as released_reading_module
from mmi_bench.compare.backends import PYTORCH, RUNTIME
from mmi_bench.compare.cases import DOCUMENT
from mmi_bench.compare.compare import run
from mmi_bench.compare.released_reading import Size, placeholder_bundle, released_reading
from mmi_deploy.cli import app
from mmi_deploy.errors import MmiError
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.presets import released_13b
from mmi_deploy.system.progress import Progress
from mmi_export.tracing.fake_weights_model import FakeWeightsModel


@pytest.mark.parametrize("size", ["small", "large"])
def test_each_size_keeps_the_released_reading(size: Size) -> None:
    config, released = released_reading(size), released_13b()
    assert config.vision_resampler.form == config.image_decoder.resampler.form == "qformer"
    assert config.image_decoder.unet.mmfs_at == "skips"
    assert config.llm_mmfs.null_slot and config.image_decoder.mmfs.null_slot
    assert config.image_decoder.mmfs.images_seen == released.image_decoder.mmfs.images_seen == 1
    assert config.vision.layers == 24
    # The CPU and CUDA kernels take multiples of 8 channels per head, up to 128.
    for mmfs in (config.llm_mmfs, config.image_decoder.mmfs):
        channels = mmfs.value_width // mmfs.heads
        assert channels % 8 == 0 and channels <= 128


def test_sizes_are_those_of_the_documentation() -> None:
    small, large = released_reading("small"), released_reading("large")
    assert (small.llama.width, small.llama.layers, small.vision.width) == (128, 6, 128)
    assert (large.llama.width, large.llama.layers, large.vision.width) == (1024, 8, 512)


@pytest.mark.parametrize(("size", "millions"), [("small", 12.0), ("large", 367.6)])
def test_sizes_have_the_parameters_that_are_written(size: Size, millions: float) -> None:
    weights = FakeWeightsModel(released_reading(size)).weights
    assert round(sum(weight.numel() for weight in weights.values()) / 1e6, 1) == millions


def smallest() -> ModelConfig:
    """The released reading with few layers and small pictures, so that its export takes seconds."""
    config = small_models.released_reading()
    return replace(config, name="released_smallest", llama=replace(config.llama, context=160))


@pytest.mark.slow
def test_a_drawn_model_is_exported_and_measured_in_one_turn() -> None:
    said: list[str] = []
    with placeholder_bundle(smallest(), lambda what, *_, **__: said.append(what)) as (
        bundle,
        model,
    ):
        result = run(bundle, model, quick=True, one_turn=True, unproved=True, threads=1)
        folder = bundle.parent
    assert not folder.exists()
    assert said[0] == "drawing weights" and "exporting denoise_step" in said
    assert [case.turns for case in result.plan.cases if case.turns] == [1]
    assert result.about["model"] == "released_smallest"
    for samples in result.samples.values():
        assert len(samples[DOCUMENT][0].step_gaps) == 19
    # The four images are encoded once by the runtime, and again for the picture by PyTorch.
    encoded = {
        name: len(samples[DOCUMENT][0].stages["encode"]) for name, samples in result.samples.items()
    }
    assert encoded == {RUNTIME: 1, PYTORCH: 2}


def test_a_drawn_model_leaves_nothing_behind_if_the_export_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MmiError("no room")

    monkeypatch.setattr(released_reading_module, "export_bundle", fail)
    monkeypatch.setattr(released_reading_module.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(MmiError, match="no room"), placeholder_bundle(smallest()):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--reading", "paper", "--size", "small"],
            "--reading cannot be measured; expected released; got paper",
        ),
        (["--reading", "released"], "expected --size small or --size large; got none"),
        (
            ["--reading", "released", "--size", "huge"],
            "expected --size small or --size large; got huge",
        ),
        (["--size", "small"], "--size is the size of a reading. give --reading released"),
        (
            ["bundles/x", "--reading", "released", "--size", "small"],
            "makes its own model and bundle; got bundles/x",
        ),
        (["--cpu-time"], "counts threads that wait; expected --threads 1 and --target cpu"),
        (
            ["-m", "m", "--reading", "released", "--size", "small"],
            "makes its own model and bundle; got --model m",
        ),
        (
            ["--reading", "released", "--size", "small", "--target", "cpu-int8"],
            "has no engines; expected --target cpu; got cpu-int8",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_reading_is_measured_in_one_turn_with_the_options_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: dict[str, object] = {}

    @contextmanager
    def made(config: ModelConfig, progress: Progress) -> Iterator[tuple[Path, Path]]:
        asked["config"] = config.name
        yield tmp_path / "bundle", tmp_path / "model"

    class Result:
        def to_json(self) -> dict[str, str]:
            return {"a": "report"}

    def measure(bundle: Path, model: Path, **options: object) -> Result:
        asked.update(options, bundle=bundle.name, model=model.name)
        return Result()

    monkeypatch.setattr(released_reading_module, "placeholder_bundle", made)
    monkeypatch.setattr(compare, "run", measure)
    out = tmp_path / "bench.json"
    words = ["--reading", "released", "--size", "large", "--threads", "1", "--repeats", "3"]
    assert app.run(["bench", *words, "--kernels", "none", "--json", "-o", str(out)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text()) == {"a": "report"}
    wanted = {
        "config": "released_large",
        "bundle": "bundle",
        "model": "model",
        "threads": 1,
        "repeats": 3,
        "one_turn": True,
        "compiled": True,
        "unproved": True,
        "quick": False,
    }
    assert {name: asked[name] for name in wanted} == wanted
    assert app.run(["bench", *words, "--kernels", "none", "--json", "--quick"]) == 0
    assert asked["quick"] is True and asked["compiled"] is False and asked["clock"] == "wall"
    assert app.run(["bench", *words, "--kernels", "none", "--json", "--cpu-time"]) == 0
    assert asked["clock"] == "cpu"
