"""Ranges for a profiler: around each stage where `nvtx` is installed, and nothing without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from mmi_deploy.runtime.timings import Timings
from mmi_deploy.system import nvtx


def test_a_stage_is_a_range_of_the_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def annotate(name: str, domain: str) -> Iterator[None]:
        seen.append(f"{domain}: {name}")
        yield
        seen.append("end")

    monkeypatch.setattr(nvtx, "_nvtx", SimpleNamespace(annotate=annotate))
    with Timings().measure("decode"):
        seen.append("work")
    assert seen == ["mmi: decode", "work", "end"]


def test_without_the_package_every_range_is_the_same_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nvtx, "_nvtx", None)
    with nvtx.profiler_range("a"), nvtx.profiler_range("b"):
        assert nvtx.profiler_range("c") is nvtx.profiler_range("d")
