"""Unfinished work goes with its process, and no sooner."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmi_deploy.errors import MmiError
from mmi_deploy.system.output_folder import new_folder
from mmi_deploy.system.temporary_folder import UNFINISHED, temporary_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from mmi_deploy.system.output_folder import new_folder
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


def test_only_folders_of_ours_are_cleared(tmp_path: Path) -> None:
    """By their file, which names its folder and its work: not by their names."""
    names = (".out.new-ideas", ".out.new-abcdefgh", ".out.new-b.new-12345678", ".out.new-copy")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    said = {"folder": ".out.new-12345678", "work": ".out.new-"}
    (tmp_path / names[1] / UNFINISHED).write_text("")
    # The work of a folder called "out.new-b", and a copy of what a killed process left.
    (tmp_path / names[2] / UNFINISHED).write_text(
        json.dumps({"folder": names[2], "work": ".out.new-b.new-"})
    )
    (tmp_path / names[3] / UNFINISHED).write_text(json.dumps(said))
    os.mkfifo(tmp_path / names[0] / UNFINISHED)
    with temporary_folder(tmp_path, ".out.new-"):
        pass
    assert all((tmp_path / name / "mine.txt").read_text() == "mine" for name in names)


def test_work_that_one_may_do_at_a_time_refuses_the_second(tmp_path: Path) -> None:
    with temporary_folder(tmp_path, ".w-", alone="out"):
        with pytest.raises(MmiError, match="another process of mmi writes out just now"):
            with temporary_folder(tmp_path, ".w-", alone="out"):
                raise AssertionError("must not begin")
        assert len(list(tmp_path.iterdir())) == 1
    with temporary_folder(tmp_path, ".w-", alone="out"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_somebody_keeps_on_the_parent_does_not_stop_us(tmp_path: Path) -> None:
    """As `flock FOLDER mmi ...` does."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with temporary_folder(tmp_path, ".w-", alone="out") as work:
        assert work.is_dir()
    os.close(descriptor)
