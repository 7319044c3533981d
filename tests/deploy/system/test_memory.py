"""Memory that is free: what the system has, or what a container leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmi_deploy.system import memory as module
from mmi_deploy.system.memory import free_memory

GB = 10**9


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """64 GB of which 40 are available, 8 GB of swap, and a container without a limit."""
    (tmp_path / "meminfo").write_text(
        f"MemTotal: {64 * GB // 1024} kB\nMemAvailable: {40 * GB // 1024} kB\n"
        f"SwapTotal: {9 * GB // 1024} kB\nSwapFree: {8 * GB // 1024} kB\n"
    )
    container(tmp_path, "max", 20 * GB, 0)
    monkeypatch.setattr(module, "_MEMINFO", tmp_path / "meminfo")
    files = ("memory.max", "memory.current", "inactive_file")
    monkeypatch.setattr(module, "_CGROUPS", ((tmp_path, *files), (tmp_path / "none", *files)))
    return tmp_path


def container(folder: Path, limit: int | str, used: int, files: int) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nactive_file 7\n")


def test_swap_counts_where_it_is_asked_for() -> None:
    assert free_memory() == pytest.approx(48 * GB, abs=2048)
    assert free_memory(swap=False) == pytest.approx(40 * GB, abs=2048)


def test_a_container_leaves_less_and_files_that_were_read_are_in_nobodys_way(machine: Path) -> None:
    container(machine, 32 * GB, 30 * GB, 26 * GB)
    assert free_memory() == free_memory(swap=False) == 28 * GB
    container(machine, 100 * GB, 1, 0)
    assert free_memory(swap=False) == pytest.approx(40 * GB, abs=2048)


def test_what_is_installed_where_the_system_does_not_tell(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert free_memory() > 10**8
