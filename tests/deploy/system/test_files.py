"""Files are there whole or not at all, and never at the price of somebody's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.system.files import cache_folder, prepare_file, write_file, write_new_file


def names(folder: Path) -> list[str]:
    """All files under `folder`, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_file(path, "one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o644

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, "three")
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == ["a.txt"]


def test_the_folder_of_a_file_that_will_be_written_is_made_first(tmp_path: Path) -> None:
    prepare_file(tmp_path / "deep" / "a.svg", ".svg")
    assert (tmp_path / "deep").is_dir() and names(tmp_path) == []


def test_a_cache_folder_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMI_CACHE", str(tmp_path / "deep" / "cache"))
    assert cache_folder(writes=True) == tmp_path / "deep" / "cache"
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/self")):
        monkeypatch.setenv("MMI_CACHE", str(wrong))
        assert cache_folder() == wrong
        with pytest.raises(ConfigError, match=f"MMI_CACHE names {wrong}, which cannot be written"):
            cache_folder(writes=True)


def test_without_the_variable_the_cache_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMI_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mmi_deploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "mmi_deploy"


def test_a_result_replaces_no_file(tmp_path: Path) -> None:
    """Refused before the work; one that appears during it stays, and the result is beside it."""
    path = tmp_path / "bench.json"
    prepare_file(path)
    path.write_text("mine")
    with pytest.raises(MmiError, match="is there already.* another name"):
        prepare_file(path)
    for number in (2, 3):
        with pytest.raises(MmiError, match=f"appeared meanwhile.* is in .*bench-{number}.json"):
            write_new_file(path, "result")
    assert path.read_text() == "mine"
    assert names(tmp_path) == ["bench-2.json", "bench-3.json", "bench.json"]
    assert (tmp_path / "bench-3.json").read_text() == "result"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MmiError, match="is there already"):
        prepare_file(tmp_path / "link")


def test_a_result_is_written_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    write_new_file(tmp_path / "a", "one")
    with pytest.raises(MmiError, match="result is in .*a-2"):
        write_new_file(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "one" and (tmp_path / "a-2").read_text() == "two"
    assert names(tmp_path) == ["a", "a-2"]


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "n" * 250 + ".json"])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    prepare_file(path)
    write_new_file(path, "x")
    write_file(path, "y")
    with pytest.raises(MmiError, match="appeared meanwhile"):
        write_new_file(path, "z")
    assert path.read_text() == "y" and len(names(tmp_path)) == 2


def test_where_no_file_can_be_made_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MmiError, match="cannot be written: .*/file is not a folder"):
        prepare_file(tmp_path / "file" / "below" / "a.json")
    with pytest.raises(MmiError, match="cannot be written: File name too long"):
        prepare_file(tmp_path / ("n" * 256))
    with pytest.raises(MmiError, match="cannot be written"):
        prepare_file(Path("/proc/self/a.json"))


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_rules_the_mode_of_files(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_file(tmp_path / "a", "x")
        write_new_file(tmp_path / "b", "x")
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
