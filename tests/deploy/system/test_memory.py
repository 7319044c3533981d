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
    groups = (("", tmp_path, *files), ("memory", tmp_path / "v1", *files))
    monkeypatch.setattr(module, "_CGROUPS", groups)
    monkeypatch.setattr(module, "_MEMBERSHIP", tmp_path / "cgroup")
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


@pytest.mark.parametrize(
    ("version", "membership"),
    [
        ("", "0::/system.slice/job_7/step_0\n"),
        ("v1", "12:cpu,cpuacct:/other\n9:memory:/system.slice/job_7/step_0\n1:name=systemd:/x\n"),
        ("v1", "9:hugetlb,memory:/system.slice/job_7/step_0\n0::/system.slice\n"),
    ],
)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_tightest_group_from_ones_own_upwards_counts(
    machine: Path, version: str, membership: str, depth: int
) -> None:
    """A limit on the group, on the one above or on the one above that: Slurm, systemd-run."""
    (machine / "cgroup").write_text(membership)
    names = ("system.slice", "job_7", "step_0")
    for count in range(1, 4):
        folder = machine.joinpath(version, *names[:count])
        folder.mkdir(parents=True)
        container(folder, 3 * GB if count == depth else 30 * GB, 2 * GB, GB // 2)
    foreign = machine / version / "system.slice" / "job_8"
    foreign.mkdir()
    container(foreign, 1, 0, 0)
    assert free_memory() == 3 * GB - 2 * GB + GB // 2


def test_a_group_that_is_not_to_be_seen_leaves_the_roots_limit(machine: Path) -> None:
    """In a container the path may be the host's, or lie above what is mounted."""
    container(machine, 5 * GB, GB, 0)
    for path in ("/docker/0123", "/../../init.scope", "/"):
        (machine / "cgroup").write_text(f"0::{path}\n")
        assert free_memory() == 4 * GB


def test_a_group_over_its_limit_leaves_nothing(machine: Path) -> None:
    container(machine, 5 * GB, 6 * GB, 0)
    assert free_memory() == 0
