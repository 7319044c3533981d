"""Memory of the process: its peak, and the peak from a moment on."""

from __future__ import annotations

import pytest

from mmi_deploy.system.process_memory import (
    anonymous_bytes,
    forget_peak,
    memory_bytes,
    peak_bytes,
    trim,
)


def test_memory_of_a_block_is_its_peak() -> None:
    if anonymous_bytes() is None or not forget_peak():
        pytest.skip("this system does not report it")
    trim()
    forget_peak()
    before = memory_bytes()
    held = bytearray(b"x" * 50_000_000)
    assert peak_bytes() - before > 45_000_000
    del held
    trim()
    forget_peak()
    assert peak_bytes() - before < 25_000_000
