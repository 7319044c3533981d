"""Paired evaluation of two targets: its statistics, and its detection of a damaged model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmi_bench.quality import Paired, compare, main
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.runtime import Runtime


def test_pairs_are_counted() -> None:
    pairs = Paired.of([True, True, False, False, True], [True, False, True, False, True])
    assert pairs == Paired(both=2, portable_only=1, target_only=1, neither=1)
    assert pairs.count == 5 and pairs.points == 0


def test_the_interval_is_that_of_paired_proportions() -> None:
    """Against draws: the standard deviation of the difference, where 4 % differ one way and 2 % the
    other."""
    draw = np.random.default_rng(0)
    outcomes = draw.choice(4, (4000, 500), p=[0.7, 0.04, 0.02, 0.24])
    points = 100 * ((outcomes == 2).mean(1) - (outcomes == 1).mean(1))
    typical = Paired(both=350, portable_only=20, target_only=10, neither=120)
    assert typical.points == -2
    assert typical.uncertainty == pytest.approx(1.96 * points.std(), rel=0.05)


def test_no_difference_is_no_certainty() -> None:
    """Twenty questions that do not differ say nothing about one point; two thousand do."""
    assert Paired(20, 0, 0, 0).verdict(1.0) == "unsure"
    assert Paired(1500, 0, 0, 500).verdict(1.0) == "yes"
    assert Paired(1000, 100, 0, 0).verdict(1.0) == "no"
    assert Paired(1000, 0, 100, 0).verdict(1.0) == "no"  # better is different too


def test_a_target_without_its_head_is_found_out(
    exported_once, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal graphs agree in every answer; inverted logits lose the model's knowledge."""
    bundle: Bundle = exported_once("shipped").bundle
    kinds = ("caption",)
    same = Runtime.open(bundle, threads=1, kernels="none")
    found = compare(bundle, same, kinds=kinds, count=2, pictures=1, threads=1)["caption"]
    assert found.portable_only == found.target_only == 0
    if not found.both:
        pytest.skip("this checkout has no trained model")
    broken = Runtime.open(bundle, threads=1, kernels="none")
    run = broken.engine("llm").run

    def backwards(*args, **options):
        outputs = run(*args, **options)
        outputs["logits"].read()[...] *= -1
        return outputs

    monkeypatch.setattr(broken.engine("llm"), "run", backwards)
    found = compare(bundle, broken, kinds=kinds, count=2, pictures=1, threads=1)["caption"]
    assert found.target_only == found.both == 0 and found.portable_only > 0


def test_wrong_questions_and_targets_are_one_line(
    exported_once, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bundle: Bundle = exported_once("shipped").bundle
    with pytest.raises(ConfigError, match="no questions of the kind 'poem'; expected caption or"):
        compare(bundle, Runtime.open(bundle, kernels="none"), kinds=("poem",))
    with pytest.raises(ConfigError, match="question of each kind; expected at least 1; got 0"):
        compare(bundle, Runtime.open(bundle, kernels="none"), pictures=0)
    for arguments, message in (
        ([str(tmp_path / "none"), "--target", "cpu-int8"], "there is no bundle"),
        ([str(bundle.folder), "--target", "cpu-int9"], "cpu-int9"),
        ([str(bundle.folder), "--emulate", "int9"], "there is no precision 'int9'"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
