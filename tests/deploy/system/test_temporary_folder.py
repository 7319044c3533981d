"""Unfinished work goes with its process, and no sooner."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from mmi_deploy.system.files import new_folder
from mmi_deploy.system.temporary_folder import temporary_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from mmi_deploy.system.files import new_folder
with new_folder(Path(sys.argv[1])) as work:
    (work / "half").write_text("")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_folder_in_use_is_not_taken_for_a_killed_process_s(tmp_path: Path) -> None:
    with temporary_folder(tmp_path, ".work-") as first:
        (first / "half").write_text("")
        with temporary_folder(tmp_path, ".work-") as second:
            assert (first / "half").exists() and second != first
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out", "out[1]*"])
def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path: Path, name: str) -> None:
    out, other = tmp_path / name, tmp_path / f".{name}.somebody-else"
    other.mkdir()
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert done.returncode == -9 and len(list(tmp_path.iterdir())) == 2
    with new_folder(out) as work:
        (work / "whole").write_text("")
    assert set(tmp_path.iterdir()) == {out, other} and (out / "whole").exists()


def test_where_there_are_no_locks_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".work-left").mkdir()
    with temporary_folder(tmp_path, ".work-") as work:
        (work / "half").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == [".work-left"]
