"""Numbers in config.json and bundle.json that no model has are refused before they are used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.bundle.test_bundle import fill
from mmi_deploy.bundle.bundle import Bundle, write_bundle
from mmi_deploy.errors import BundleError, ConfigError
from mmi_deploy.spec.config import from_json, to_json
from mmi_deploy.spec.graphs import Limits
from mmi_deploy.spec.presets import preset, tiny

PRESETS = ("tiny", "released_13b", "paper_13b", "ablation_3b")


def numbers(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The places of all numbers in a JSON document."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in pairs:
            yield from numbers(inner, (*path, name))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def changed(document: Any, path: tuple[str | int, ...], value: object) -> Any:
    copy = json.loads(json.dumps(document))
    inner = copy
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return copy


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_within_the_bounds(name: str) -> None:
    assert from_json(to_json(preset(name))) == preset(name)


@pytest.mark.parametrize("value", [10**13, -(10**13), 10**400, float("inf"), float("nan")])
def test_every_number_of_a_configuration_has_bounds(value: float) -> None:
    document = json.loads(to_json(tiny()))
    places = list(numbers(document))
    assert len(places) > 80
    for place in places:
        with pytest.raises(ConfigError, match="is not a valid model configuration") as caught:
            from_json(json.dumps(changed(document, place, value)))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    with write_bundle(tmp_path / "bundle", tiny(), Limits(context=64)) as writer:
        fill(writer)
    return tmp_path / "bundle"


def refused(bundle: Path, document: Any, said: str) -> None:
    (bundle / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=said) as caught:
        Bundle.open(bundle)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [10**16, -(10**16), 10**400, float("inf"), -float("inf")])
def test_every_number_of_a_manifest_has_bounds(bundle: Path, value: float) -> None:
    document = json.loads((bundle / "bundle.json").read_text())
    places = [place for place in numbers(document) if place[0] != "config"]
    assert {place[0] for place in places} >= {"format", "files", "receipts", "limits"}
    for place in places:
        if place[-1] == "error" and value > 0:
            continue  # an error may be of any size: it is no pass
        refused(bundle, changed(document, place, value), "bundle.json")


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("limits", "context"), 513, "limits.context 513 is beyond the model's 512 positions"),
        (("limits", "context"), 0, "limits.context"),
        (("limits", "batch"), 10**6, "limits.batch"),
        (("receipts", 0, "cases", 0, "tolerance"), 1e9, r"tolerance must lie in \(0, 1\]"),
        (("receipts", 0, "cases", 0, "tolerance"), float("nan"), "tolerance"),
        (("receipts", 0, "cases", 0, "tolerance"), 0.0, "tolerance"),
        (("receipts", 0, "cases", 0, "error"), -1.0, "error must not be negative"),
    ],
)
def test_what_a_manifest_may_claim(
    bundle: Path, place: tuple[str | int, ...], value: float, said: str
) -> None:
    document = json.loads((bundle / "bundle.json").read_text())
    refused(bundle, changed(document, place, value), said)


def test_a_field_that_stands_twice_in_a_manifest_is_refused(bundle: Path) -> None:
    text = (bundle / "bundle.json").read_text()
    (bundle / "bundle.json").write_text(text.replace("{", '{"tokenizer": "x", ', 1))
    with pytest.raises(BundleError, match="tokenizer stands in it twice"):
        Bundle.open(bundle)
