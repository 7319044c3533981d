"""The driver's library: versions, GPUs and memory, and what is said without them."""

from __future__ import annotations

import pytest

from deploy.system.fake_driver import FakeDriver, install
from mmi_deploy.system.nvidia_driver import Gpu, NvidiaDriver, gpus_here, visible_device

MIXED = [("NVIDIA L4", (8, 9), 3 << 30, 24 << 30), ("NVIDIA H100", (9, 0), 70 << 30, 80 << 30)]


def test_gpus_and_their_memory_are_read() -> None:
    library = FakeDriver(MIXED, 12080)
    driver = NvidiaDriver(library)
    assert driver.cuda_version() == (12, 8)
    assert driver.gpus() == [Gpu(0, "NVIDIA L4", "sm89"), Gpu(1, "NVIDIA H100", "sm90")]
    assert driver.memory(0) == (3 << 30, 24 << 30)
    assert driver.memory(1) == (70 << 30, 80 << 30)
    assert driver.memory(2) is None and library.retained == 0


def test_a_machine_without_a_gpu_or_a_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert NvidiaDriver(FakeDriver()).gpus() == []
    assert NvidiaDriver(FakeDriver()).memory(0) is None
    assert NvidiaDriver(FakeDriver(cuda=0)).cuda_version() is None
    install(monkeypatch, None)
    assert gpus_here() == []


@pytest.mark.parametrize(
    ("before", "index", "after"),
    [
        (None, 1, "1"),
        ("", 1, "1"),
        ("3,5", 1, "5"),
        ("GPU-5eb, GPU-8fd", 1, "GPU-8fd"),
        ("2", 0, "2"),
    ],
)
def test_a_child_sees_the_chosen_gpu_alone(before: str | None, index: int, after: str) -> None:
    assert visible_device(before, index) == after
