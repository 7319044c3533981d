"""Metric cases of the published code: every one is met, and a changed one is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mmi_train.evaluation.metrics import caption_tokens
from mmi_train.evaluation.metrics.caption_tokens import TOKENIZER, java_archive
from mmi_train.golden import metric_cases
from mmi_train.golden.metric_cases import CHECKS

FILES = ("data_and_metrics.json", "data_and_metrics_2.json")


@cache
def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


@pytest.fixture
def cases(golden_file: Callable[[str], Path]) -> Callable[[str], list[Any]]:
    """Cases of a kind, of both files."""

    def of(kind: str) -> list[Any]:
        found = [read(golden_file(name)).get(kind, []) for name in FILES]
        return [case for entry in found for case in (entry if isinstance(entry, list) else [entry])]

    return of


@pytest.fixture
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Java takes a second for each case."""
    for module in (metric_cases, caption_tokens):
        monkeypatch.setattr(module, "java_archive", lambda name: None)


@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.usefixtures("without_java")
def test_every_case_is_met(kind: str, cases: Callable[[str], list[Any]]) -> None:
    found = cases(kind)
    assert found
    assert [wrong for case in found if (wrong := CHECKS[kind](case))] == []


def changed(value: Any) -> Any:
    """`value` with every number, text and boolean in it another one."""
    if isinstance(value, dict):
        return {key: changed(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [changed(entry) for entry in value]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value} or not" if isinstance(value, str) else value


@pytest.mark.parametrize("kind", sorted(CHECKS.keys() - {"parse_box"}))
@pytest.mark.usefixtures("without_java")
def test_a_changed_case_is_found(kind: str, cases: Callable[[str], list[Any]]) -> None:
    for case in cases(kind):
        if isinstance(case, dict) and "output" in case:
            other = {
                key: changed(value) if key.startswith("output") else value
                for key, value in case.items()
            }
            assert CHECKS[kind](other), case


@pytest.mark.skipif(java_archive(TOKENIZER) is None, reason="needs Java and pycocoevalcap")
def test_captions_are_met_with_java(
    cases: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apart from METEOR."""
    monkeypatch.setattr(metric_cases, "METEOR", "no key of a case")
    for kind in ("vizwiz_accuracy", "ptb"):
        assert CHECKS[kind](cases(kind)[-1]) is None


@pytest.mark.exhaustive
@pytest.mark.skipif(java_archive(TOKENIZER) is None, reason="needs Java and pycocoevalcap")
@pytest.mark.parametrize("kind", ["vizwiz_accuracy", "ptb", "caption_scores"])
def test_every_caption_is_met_with_java(kind: str, cases: Callable[[str], list[Any]]) -> None:
    """METEOR takes half a minute for each set."""
    assert [wrong for case in cases(kind) if (wrong := CHECKS[kind](case))] == []
