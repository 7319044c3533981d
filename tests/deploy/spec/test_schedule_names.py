"""A schedule's name has one grammar, so that no message recommends what the next one refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy.bundle.test_bundle import fill
from mmi_deploy.bundle.bundle import Bundle, write_bundle
from mmi_deploy.errors import BundleError, ConfigError
from mmi_deploy.spec.config import DiffusionConfig
from mmi_deploy.spec.graphs import Limits
from mmi_deploy.spec.presets import tiny
from mmi_deploy.spec.schedule import SOLVERS, SPACINGS, parse_schedule_name
from mmi_export.schedules import _SOLVERS, parse_schedule


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    with write_bundle(tmp_path / "bundle", tiny(), Limits(context=64)) as writer:
        fill(writer)
    return Bundle.open(tmp_path / "bundle")


def test_every_solver_has_its_scheduler() -> None:
    assert tuple(_SOLVERS) == SOLVERS


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_missing_schedule_is_recommended_as_export_takes_and_names_it(
    bundle: Bundle, solver: str, spacing: str
) -> None:
    with pytest.raises(BundleError) as caught:
        bundle.schedule(f"{solver}-{spacing}:019")
    (advice,) = re.findall(r"--schedule (\S+?)`", str(caught.value))
    assert parse_schedule(advice, DiffusionConfig("epsilon")).key == advice


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ddim-linspace-20", "'ddim-linspace-20' is not a schedule. write ddim-linspace:20"),
        ("unipc-20", "'unipc-20' is not a schedule. write unipc:20"),
        ("euler:20", "'euler:20' is not a schedule; expected NAME:STEPS"),
        ("ddim-karras:20", "'ddim-karras:20' is not a schedule; expected NAME:STEPS"),
        ("ddim:0", "ddim cannot take 0 steps; expected 1 to 999"),
        ("ddim:1000", "ddim cannot take 1000 steps; expected 1 to 999"),
        ("ddim", "'ddim' is not a schedule"),
        ("ddim:\u0664", "is not a schedule"),
    ],
)
def test_what_export_refuses_is_never_recommended(bundle: Bundle, text: str, reason: str) -> None:
    for read in (bundle.schedule, lambda key: parse_schedule(key, DiffusionConfig("epsilon"))):
        with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
            read(text)
        assert "mmi export" not in str(caught.value)


def test_other_spellings_find_what_is_there(bundle: Bundle) -> None:
    key = bundle.schedules[0]
    solver, _, steps = key.partition(":")
    assert bundle.schedule(f"{solver}-leading:0{steps}").key == bundle.schedule(key).key
    assert parse_schedule_name("ddim-trailing:7", 1000).key == "ddim-trailing:7"
