"""Output is there whole or not at all, and never at the price of somebody's files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.system.files import (
    cache_folder,
    check_replaceable,
    new_folder,
    prepare_file,
    write_file,
)


def names(folder: Path) -> list[str]:
    """All files under `folder`, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def fill(folder: Path, text: str, force: bool = False) -> None:
    with new_folder(folder, force) as work:
        (work / "a.txt").write_text(text)


def refuse_renames(monkeypatch: pytest.MonkeyPatch, refused: Callable[[Path, Path], bool]) -> None:
    rename = Path.rename

    def some(self: Path, target: Path) -> Path:
        if refused(self, target):
            raise OSError("busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", some)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as work:
        (work / "a.txt").write_text("a")
        assert not out.exists()
    assert (out / "a.txt").read_text() == "a"
    assert names(tmp_path) == ["deep/out/.mmi", "deep/out/a.txt"]


def test_our_own_folder_is_replaced_without_leftovers(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as work:
        (work / "old.txt").touch()
    fill(tmp_path / "out", "new")
    assert names(tmp_path) == ["out/.mmi", "out/a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_whatever_goes_wrong_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException]
) -> None:
    fill(tmp_path / "out", "before")
    with pytest.raises(error), new_folder(tmp_path / "out") as work:
        (work / "a.txt").write_text("half")
        raise error
    assert (tmp_path / "out" / "a.txt").read_text() == "before"
    assert names(tmp_path) == ["out/.mmi", "out/a.txt"]


def test_a_mount_point_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a container has them: it could be filled, and not be replaced at the end."""
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "disk")
    with pytest.raises(MmiError, match="disk is where a disk is mounted.* give a folder in it"):
        check_replaceable(tmp_path / "disk", force=True)
    fill(tmp_path / "disk" / "out", "new")


def test_a_folder_that_cannot_be_moved_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    fill(out, "before")
    refuse_renames(monkeypatch, lambda source, target: source == out)
    with pytest.raises(OSError, match="busy"):
        fill(out, "new")
    assert names(tmp_path) == ["out/.mmi", "out/a.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failing_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    fill(out, "before")
    refuse_renames(
        monkeypatch,
        lambda source, target: target == out and not source.parent.name.startswith(".out.old"),
    )
    with pytest.raises(OSError, match="busy"):
        fill(out, "after")
    assert (out / "a.txt").read_text() == "before"
    assert names(tmp_path) == ["out/.mmi", "out/a.txt"]


def test_a_folder_of_somebody_else_needs_force(tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    fill(out, "an empty folder is free")
    (out / ".mmi").unlink()
    with pytest.raises(MmiError, match="holds files that mmi did not write.*--force"):
        fill(out, "x")
    assert (out / "a.txt").read_text() == "an empty folder is free"
    fill(out, "x", force=True)
    assert (out / "a.txt").read_text() == "x"


@pytest.mark.parametrize("force", [False, True])
def test_files_links_and_the_current_folder_are_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "real" / "inside")
    for name in ("file", "link", "real", "real/inside"):
        with pytest.raises(MmiError):
            fill(tmp_path / name, "x", force)
    assert names(tmp_path) == ["file"]


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


def test_a_folder_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with new_folder(folder, kind="bundle") as work:
        (work / "bundle.json").write_text("precious")
    with (
        pytest.raises(MmiError, match="holds a bundle, not a story"),
        new_folder(folder, kind="story"),
    ):
        raise AssertionError("must not begin")
    assert (folder / "bundle.json").read_text() == "precious"
    with new_folder(folder, kind="bundle"):
        pass


def test_a_folder_that_holds_what_is_read_is_never_replaced(tmp_path: Path) -> None:
    document = tmp_path / "doc" / "story.md"
    document.parent.mkdir()
    document.write_text("precious")
    for force in (False, True):
        with (
            pytest.raises(MmiError, match="is read to write it"),
            new_folder(document.parent, force, kind="story", inputs=[document]),
        ):
            raise AssertionError("must not begin")
    assert document.read_text() == "precious"


def test_part_of_a_folder_that_is_read_is_never_replaced(tmp_path: Path) -> None:
    """With --force too: a story in the place of a bundle's graphs would be the end of it."""
    part = tmp_path / "bundle" / "graphs"
    part.mkdir(parents=True)
    (part / "llm.onnx").write_text("precious")
    for force in (False, True):
        with (
            pytest.raises(MmiError, match="is part of .*, which is read to write it"),
            new_folder(part, force, kind="story", inputs=[part.parent]),
        ):
            raise AssertionError("must not begin")
    assert (part / "llm.onnx").read_text() == "precious"


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
