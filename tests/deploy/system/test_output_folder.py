"""Nothing is removed that mmi did not write, and no result is lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmi_deploy.bundle.manifest import FileEntry, cache_hashes, check_files
from mmi_deploy.errors import MmiError
from mmi_deploy.system import output_folder
from mmi_deploy.system.output_folder import (
    CHECKED,
    MARKER,
    check_replaceable,
    main,
    new_folder,
    remove_folder,
    rewrite_file,
    run_folder,
)

ODD = [
    "plain",
    "with space",
    "-o",
    "a[1]*?",
    "ünï 日本",
    "new\nline",
    "'\"$(x)`",
    ".hidden",
    "n" * 255,
]


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder that may be lost, and a current folder elsewhere."""
    home = tmp_path_factory.mktemp("people") / "home"
    (home / "documents").mkdir(parents=True)
    (home / "documents" / "thesis.txt").write_text("precious")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path_factory.mktemp("current"))
    return home


def tree(folder: Path) -> dict[str, str]:
    """The contents of all files under `folder`, hidden ones and markers too."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARKER
    }


def fill(
    folder: Path, text: str, force: bool | None = False, kind: str = "story", **more: object
) -> None:
    with new_folder(folder, force, kind=kind, **more) as work:
        (work / "a.txt").write_text(text)
        (work / "deep" / "empty").mkdir(parents=True)
        (work / "deep" / "b.txt").write_text(text)


def refuse_renames(monkeypatch: pytest.MonkeyPatch, refused: Callable[[Path, Path], bool]) -> None:
    rename = Path.rename

    def some(self: Path, target: Path) -> Path:
        if refused(self, Path(target)):
            raise OSError(errno.EBUSY, "busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", some)


WHOLE = {"a.txt": "new", "deep/b.txt": "new"}


# An output folder of our own.


def test_a_folder_appears_whole_and_its_marker_lists_it(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out, kind="story") as work:
        (work / "a.txt").write_text("a")
        assert not out.exists()
    assert tree(tmp_path) == {"deep/out/a.txt": "a"}
    about = json.loads((out / MARKER).read_text())
    assert (about["kind"], about["folder"]) == ("story", "out")
    assert about["files"]["a.txt"]["size"] == 1
    assert about["files"]["a.txt"]["sha256"] == (
        "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    )


@pytest.mark.parametrize("name", ODD)
def test_our_own_folder_is_replaced_without_leftovers(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    with new_folder(out, kind="story") as work:
        (work / "old.txt").touch()
        (work / "gone").mkdir()
        (work / "\udcff odd\n").touch()
        (work / "link").symlink_to(tmp_path)
    check_replaceable(out, kind="story")
    fill(out, "new")
    assert tree(out) == WHOLE and os.listdir(tmp_path) == [name]


def test_names_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    """Their hidden names cannot hold all of it."""
    one, two = tmp_path / ("n" * 254 + "1"), tmp_path / ("n" * 254 + "2")
    with new_folder(one) as work:
        (work / "a").touch()
        fill(two, "new")
    assert sorted(os.listdir(tmp_path)) == [one.name, two.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_whatever_goes_wrong_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException]
) -> None:
    fill(tmp_path / "out", "before")
    before = tree(tmp_path)
    with pytest.raises(error), new_folder(tmp_path / "out", kind="story") as work:
        (work / "a.txt").write_text("half")
        raise error
    assert tree(tmp_path) == before and os.listdir(tmp_path) == ["out"]


def test_a_folder_that_was_moved_or_copied_is_still_ours(tmp_path: Path) -> None:
    fill(tmp_path / "out", "before")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    (tmp_path / "out").rename(tmp_path / "moved")
    for name in ("copy", "moved"):
        fill(tmp_path / name, "new")
        assert tree(tmp_path / name) == WHOLE


def test_missing_files_are_no_reason_to_refuse(tmp_path: Path) -> None:
    fill(tmp_path / "out", "before")
    shutil.rmtree(tmp_path / "out" / "deep")
    fill(tmp_path / "out", "new")
    assert tree(tmp_path / "out") == WHOLE


def test_another_kind_is_replaced_with_force_alone(tmp_path: Path) -> None:
    out = tmp_path / "made"
    fill(out, "precious", kind="bundle")
    with pytest.raises(MmiError, match="holds a bundle, not a story.*--force"):
        fill(out, "new")
    with pytest.raises(MmiError, match="holds a bundle, not a story; *|another output folder$"):
        fill(out, "new", force=None)
    assert tree(out)["a.txt"] == "precious"
    fill(out, "new", force=True)
    assert tree(out) == WHOLE


# What is somebody else's.


def put_file(out: Path) -> str:
    (out / "notes.txt").write_text("mine")
    return "notes.txt, which mmi did not write"


def put_deep(out: Path) -> str:
    (out / "deep" / "empty" / "notes.txt").write_text("mine")
    return "deep/empty/notes.txt, which mmi did not write"


def put_folder(out: Path) -> str:
    (out / "keep").mkdir()
    return "keep, which mmi did not write"


def put_hidden(out: Path) -> str:
    (out / ".zzz").write_text("mine")
    return ".zzz, which mmi did not write"


def put_link(out: Path) -> str:
    (out / "link").symlink_to(Path.home())
    return "link, which mmi did not write"


def put_link_for_folder(out: Path) -> str:
    shutil.rmtree(out / "deep")
    (out / "deep").symlink_to(Path.home() / "documents")
    return "deep, which mmi did not write"


def put_link_for_file(out: Path) -> str:
    (out / "a.txt").rename(out.parent / "a.txt")
    (out / "a.txt").symlink_to(out.parent / "a.txt")
    return "a.txt, which was changed since mmi wrote it"


def put_edit(out: Path) -> str:
    (out / "a.txt").write_text("edited")
    return "a.txt, which was changed since mmi wrote it"


def put_edit_of_one_size(out: Path) -> str:
    size = (out / "deep" / "b.txt").stat()
    (out / "deep" / "b.txt").write_text("BEFORE")
    os.utime(out / "deep" / "b.txt", ns=(size.st_atime_ns, size.st_mtime_ns))
    return "deep/b.txt, which was changed since mmi wrote it"


def put_folder_for_file(out: Path) -> str:
    (out / "a.txt").unlink()
    (out / "a.txt").mkdir()
    return "a.txt, which mmi did not write"


def put_pipe(out: Path) -> str:
    (out / "a.txt").unlink()
    os.mkfifo(out / "a.txt")
    return "a.txt, which was changed since mmi wrote it"


def put_odd_name(out: Path) -> str:
    (out / "new\nline").write_text("mine")
    return r"'new\nline', which mmi did not write"


def put_archive(out: Path) -> str:
    """An earlier story, which mmi wrote elsewhere and the user keeps here."""
    fill(out.parent / "earlier", "before")
    (out.parent / "earlier").rename(out / "earlier")
    return "earlier, which mmi did not write"


def put_remembered(out: Path) -> str:
    (out / CHECKED).write_text('{"a": "my own"}')
    return f"{CHECKED}, which mmi did not write"


def put_marker_of_nothing(out: Path) -> str:
    (out / "deep" / MARKER).write_text("story\n")
    return f"deep/{MARKER}, which mmi did not write"


PUT = [
    put_file, put_deep, put_folder, put_hidden, put_link, put_link_for_folder, put_link_for_file,
    put_edit, put_edit_of_one_size, put_folder_for_file, put_pipe, put_odd_name, put_archive,
    put_remembered, put_marker_of_nothing,
]  # fmt: skip


def listed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("put", PUT, ids=lambda put: put.__name__)
def test_a_folder_with_anything_else_in_it_is_refused_before_the_work(
    tmp_path: Path, home: Path, put: Callable[[Path], str], force: bool
) -> None:
    out = tmp_path / "out"
    fill(out, "before")
    why = put(out)
    before = listed(tmp_path)
    for act in (
        lambda: check_replaceable(out, force, kind="story"),
        lambda: fill(out, "new", force),
        lambda: remove_folder(out),
    ):
        with pytest.raises(MmiError) as refused:
            act()
        assert f"{out} holds {why}. move it elsewhere" in str(refused.value)
        assert "\n" not in str(refused.value)
    assert listed(tmp_path) == before
    assert tree(home) == {"documents/thesis.txt": "precious"}


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    fill(out, "an empty folder is free")
    (out / MARKER).unlink()
    with pytest.raises(MmiError, match="holds a.txt, which mmi did not write"):
        fill(out, "x", force)
    assert tree(out)["a.txt"] == "an empty folder is free"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["story", "bundle"])
def test_a_folder_of_an_earlier_mmi_is_refused(tmp_path: Path, force: bool, kind: str) -> None:
    """The marker of an earlier version names a kind and lists no files."""
    out = tmp_path / "out"
    out.mkdir()
    (out / MARKER).write_text(kind + "\n")
    (out / "story.md").write_text("who knows whose")
    with pytest.raises(MmiError, match=f"a {kind} of an earlier mmi, which kept no list"):
        fill(out, "x", force)
    assert tree(out) == {"story.md": "who knows whose"}


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", "{", "\0", "[" * 100_000, '{"format": 1, "kind": "story"}',
     '{"format": 1, "kind": "story", "folder": "out", "files": ["a.txt"], "folders": []}',
     '{"format": 99, "kind": "story", "folder": "out", "files": {}, "folders": []}'],
)  # fmt: skip
def test_a_marker_that_cannot_be_understood_protects_the_folder(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    fill(out, "before")
    (out / MARKER).write_text(text)
    with pytest.raises(MmiError, match="cannot be understood"):
        fill(out, "x", True)
    assert tree(out)["a.txt"] == "before"


def test_a_marker_that_is_a_link_protects_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "before")
    (out / MARKER).rename(tmp_path / "elsewhere")
    (out / MARKER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MmiError, match=f"holds {MARKER}, which mmi did not write"):
        fill(out, "x", True)


def test_a_marker_cannot_name_files_outside(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    out = tmp_path / "out"
    fill(out, "before")
    about = json.loads((out / MARKER).read_text())
    about["files"] |= {"../mine.txt": about["files"]["a.txt"], str(tmp_path / "mine.txt"): {}}
    about["folders"] += ["..", "../..", "/"]
    (out / MARKER).write_text(json.dumps(about))
    fill(out, "new")
    assert (tmp_path / "mine.txt").read_text() == "mine" and tree(out) == WHOLE


# Places that are never replaced.


@pytest.mark.parametrize("force", [False, True])
def test_home_and_what_is_above_it_are_never_written(home: Path, force: bool) -> None:
    before = tree(home)
    for folder in (home, home.parent, home / "documents" / "..", Path("/"), home / "."):
        with pytest.raises(MmiError, match="is your home folder|root of the file|the folder you"):
            fill(folder, "x", force)
        with pytest.raises(MmiError):
            remove_folder(folder)
        with pytest.raises(MmiError), run_folder(folder, "training"):
            raise AssertionError("must not begin")
    assert tree(home) == before
    assert [path.name for path in home.parent.iterdir()] == ["home"]


def test_an_empty_home_is_not_written_under_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real" / "me").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("HOME", str(tmp_path / "link" / "me"))
    monkeypatch.chdir("/")
    monkeypatch.setattr(Path, "cwd", lambda: Path("/usr"))
    for folder in ("real/me", "link/me", "real", "link/me/../../real"):
        with pytest.raises(MmiError, match="is your home folder, or above it"):
            check_replaceable(tmp_path / folder)
    monkeypatch.setenv("HOME", str(tmp_path / "not" / "there"))
    with pytest.raises(MmiError, match="is your home folder, or above it"):
        check_replaceable(tmp_path / "not")
    check_replaceable(tmp_path / "real" / "me")


def test_home_is_known_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    monkeypatch.delenv("HOME")
    own = Path(pwd.getpwuid(os.getuid()).pw_dir)
    if not own.is_dir() or own == Path("/"):
        pytest.skip("this user has no home folder")
    with pytest.raises(MmiError, match="is your home folder|the folder you are in"):
        check_replaceable(own)  # looks, and does nothing


@pytest.mark.parametrize("name", [".git", ".hg", ".svn"])
@pytest.mark.parametrize("as_file", [False, True])
def test_the_root_of_a_repository_is_never_written(
    tmp_path: Path, name: str, as_file: bool
) -> None:
    """Not even one that mmi wrote and that became one; a work tree's `.git` is a file."""
    out = tmp_path / "work"
    fill(out, "before")
    (out / name).touch() if as_file else (out / name).mkdir()
    with pytest.raises(MmiError, match=f"is the root of a repository: {name} is in it"):
        fill(out, "x", True)
    fill(out / "out", "new")
    assert tree(out / "out") == WHOLE


def test_a_mount_point_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a container has them: it could be filled, and not be replaced at the end."""
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "disk")
    with pytest.raises(MmiError, match="disk is where a disk is mounted.* give a folder in it"):
        check_replaceable(tmp_path / "disk", force=True)
    fill(tmp_path / "disk" / "out", "new")
    with run_folder(tmp_path / "disk", "training"):
        pass  # it is added to, not replaced


@pytest.mark.parametrize("force", [False, True])
def test_files_links_and_the_current_folder_are_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "real" / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    monkeypatch.chdir(tmp_path / "real" / "inside")
    for folder, why in {
        tmp_path / "file": "is not a folder",
        tmp_path / "nowhere": "is a link, not a folder",
        tmp_path / "real": "is the folder you are in, or above it",
        Path("."): r"^\. is the folder you are in, or above it",
        Path(".."): r"^\.\. is the folder you are in, or above it",
        Path("../inside"): "is the folder you are in, or above it",
        tmp_path / "link": "is the folder you are in, or above it|is a link",
        tmp_path / "file" / "x": "cannot be written: .*/file is not a folder",
        tmp_path / "file" / "x" / "y": "cannot be written: .*/file is not a folder",
        tmp_path / ("n" * 256): "cannot be written: File name too long",
        Path("/proc/self/out"): "cannot be written: ",
        Path("/proc/out"): "cannot be written: ",
    }.items():
        with pytest.raises(MmiError, match=why):
            check_replaceable(folder, force)
        with pytest.raises(MmiError, match=why):
            fill(folder, "x", force)
    assert tree(tmp_path) == {"file": "mine"}


def test_a_current_folder_that_is_gone_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(MmiError, match="out cannot be written: No such file"):
        check_replaceable(Path("out"))
    fill(tmp_path / "out", "new")
    monkeypatch.chdir(tmp_path)


def test_a_folder_that_holds_what_is_read_is_never_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "doc", "precious")
    (tmp_path / "link").symlink_to(tmp_path / "doc" / "a.txt")
    for force in (False, True):
        for document in (tmp_path / "doc" / "a.txt", tmp_path / "link", tmp_path / "doc"):
            with pytest.raises(MmiError, match="is read to write it"):
                fill(tmp_path / "doc", "x", force, inputs=[document])
    assert tree(tmp_path / "doc")["a.txt"] == "precious"


def test_part_of_a_folder_that_is_read_is_never_replaced(tmp_path: Path) -> None:
    """With --force too: a story in the place of a bundle's graphs would be the end of it."""
    part = tmp_path / "bundle" / "graphs"
    fill(part, "precious", kind="bundle")
    for force in (False, True):
        with pytest.raises(MmiError, match="is part of .*, which is read to write it"):
            fill(part, "x", force, inputs=[part.parent])
    assert tree(part)["a.txt"] == "precious"


# Permissions.


@pytest.fixture
def nobody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of a user whom permissions bind."""
    if os.geteuid():
        yield tmp_path_factory.mktemp("mine")
        return
    import tempfile

    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chown(folder, 65534, 65534)
    os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


def test_what_cannot_be_written_is_said_before_the_work(nobody: Path) -> None:
    closed = nobody / "closed"
    fill(closed / "out", "before")
    closed.chmod(0o555)
    try:
        for folder in (closed / "out", closed / "new", closed / "deep" / "new"):
            with pytest.raises(MmiError, match="cannot be written: Permission denied"):
                check_replaceable(folder, kind="story")
            with pytest.raises(MmiError, match="cannot be written: Permission denied"):
                fill(folder, "x")
    finally:
        closed.chmod(0o755)
    (closed / "out" / "deep").chmod(0o555)
    with pytest.raises(MmiError, match="out/deep cannot be changed: Permission denied"):
        fill(closed / "out", "x")
    (closed / "out" / "deep").chmod(0o755)
    (closed / "out" / "a.txt").chmod(0)
    with pytest.raises(MmiError, match="out cannot be written: Permission denied"):
        fill(closed / "out", "x")
    (closed / "out" / "a.txt").chmod(0o644)
    assert tree(closed / "out")["a.txt"] == "before" and os.listdir(closed) == ["out"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_rules_and_no_mode_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    """A disk without modes refuses to change one."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    for name in ("chmod", "fchmod", "lchmod", "chown"):
        monkeypatch.setattr(os, name, refuse, raising=False)
    before = os.umask(umask)
    try:
        fill(tmp_path / "out", "before")
        fill(tmp_path / "out", "new")
    finally:
        os.umask(before)
    assert tree(tmp_path / "out") == WHOLE
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "out" / MARKER).stat().st_mode & 0o777 == 0o666 & ~umask


# What happens during the run.


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("put", PUT, ids=lambda put: put.__name__)
def test_what_appears_in_our_folder_during_the_run_stays(
    tmp_path: Path, put: Callable[[Path], str], force: bool
) -> None:
    out = tmp_path / "out"
    fill(out, "before")
    with pytest.raises(MmiError) as kept, new_folder(out, force, kind="story") as work:
        (work / "a.txt").write_text("new")
        why = put(out)
        before = listed(out)
    assert f"{out} was left as it is: {out} holds {why}" in str(kept.value)
    assert str(kept.value).endswith(f"The new story is in {tmp_path / 'out-new'}")
    assert listed(out) == before and tree(tmp_path / "out-new") == {"a.txt": "new"}
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def appear_file(out: Path) -> None:
    out.write_text("mine")


def appear_folder(out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")


def appear_link(out: Path) -> None:
    (out.parent / "elsewhere").mkdir()
    out.symlink_to("elsewhere")


def appear_dangling(out: Path) -> None:
    out.symlink_to("nowhere")


def appear_ours(out: Path) -> None:
    fill(out.with_name("other"), "other")
    out.with_name("other").rename(out)


@pytest.mark.parametrize(
    "appear", [appear_file, appear_folder, appear_link, appear_dangling, appear_ours]
)
@pytest.mark.parametrize("force", [False, True])
def test_what_appears_at_the_destination_during_the_run_stays(
    tmp_path: Path, appear: Callable[[Path], None], force: bool
) -> None:
    out = tmp_path / "out"
    (tmp_path / "out-new").write_text("a name that is taken")
    with pytest.raises(MmiError) as kept, new_folder(out, force, kind="story") as work:
        (work / "a.txt").write_text("new")
        appear(out)
        before = listed(tmp_path)
    assert str(kept.value).endswith(f"The new story is in {tmp_path / 'out-new-2'}")
    added = {"out-new-2", "out-new-2/a.txt", f"out-new-2/{MARKER}"}
    left = {name for name in before if not name.startswith(".out.new-")}
    assert set(listed(tmp_path)) == left | added
    assert tree(tmp_path / "out-new-2") == {"a.txt": "new"}


def test_what_appears_between_check_and_rename_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last moment there is: after the second check, before the folder is moved away."""
    out, rename = tmp_path / "out", Path.rename

    def late(self: Path, target: Path) -> Path:
        if self == out:
            (out / "late.txt").write_text("mine")
        return rename(self, target)

    fill(out, "before")
    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(MmiError, match="holds late.txt, .*The new story is in .*/out-new$"):
        fill(out, "new")
    assert tree(out) == {"a.txt": "before", "deep/b.txt": "before", "late.txt": "mine"}
    assert tree(tmp_path / "out-new") == WHOLE
    assert sorted(os.listdir(tmp_path)) == ["out", "out-new"]


def test_a_destination_that_comes_back_between_the_renames_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", Path.rename

    def late(self: Path, target: Path) -> Path:
        if Path(target) == out and self.name == "new":
            out.mkdir(exist_ok=True)
            (out / "mine.txt").write_text("mine")
        return rename(self, target)

    fill(out, "before")
    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(MmiError, match="The new story is in .*/out-new$"):
        fill(out, "new")
    assert tree(out) == {"mine.txt": "mine"} and tree(tmp_path / "out-new") == WHOLE


def test_what_is_put_into_the_old_folder_after_the_exchange_is_kept_in_sight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By a program that was working in it: its folder has another name, and is the same."""
    out, rename = tmp_path / "out", Path.rename

    def late(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if Path(target) == out:
            (self.parent / "old" / "late.txt").write_text("mine")
        return moved

    fill(out, "before")
    monkeypatch.setattr(Path, "rename", late)
    fill(out, "new")
    assert tree(out) == WHOLE and "late.txt" in tree(tmp_path / "out-old")
    assert "out-old, and is yours" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["out", "out-old"]


def test_a_folder_that_the_user_removes_during_the_run_is_no_fault(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "before")
    with new_folder(out, kind="story") as work:
        (work / "a.txt").write_text("new")
        shutil.rmtree(out)
    assert tree(out) == {"a.txt": "new"} and os.listdir(tmp_path) == ["out"]


def test_a_folder_that_cannot_be_moved_stays_and_so_does_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    fill(out, "before")
    refuse_renames(monkeypatch, lambda source, target: source == out)
    with pytest.raises(MmiError, match="left as it is: busy. The new story is in .*/out-new$"):
        fill(out, "new")
    assert tree(out)["a.txt"] == "before" and tree(tmp_path / "out-new") == WHOLE
    assert sorted(os.listdir(tmp_path)) == ["out", "out-new"]


def test_a_failing_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    fill(out, "before")
    refuse_renames(monkeypatch, lambda source, target: target == out and source.name == "new")
    with pytest.raises(MmiError, match="left as it is: busy"):
        fill(out, "new")
    assert tree(out)["a.txt"] == "before" and tree(tmp_path / "out-new") == WHOLE


def test_where_nothing_can_be_renamed_the_message_names_the_hidden_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        refuse_renames(patch, lambda source, target: True)
        with pytest.raises(MmiError) as kept:
            fill(out, "new")
    hidden = Path(str(kept.value).rpartition(" is in ")[2])
    assert tree(hidden) == WHOLE and not out.exists()
    fill(out, "later")  # it is no unfinished work any more
    assert tree(hidden) == WHOLE


def test_a_full_disk_at_the_end_loses_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output_folder, "write_file", full)
    with pytest.raises(MmiError, match="No space left on device. The new story is in .*/out-new$"):
        fill(tmp_path / "out", "new")
    assert tree(tmp_path / "out-new") == WHOLE


# Two at a time, and those that are killed.

RUN = """
import os, signal, sys, time
from pathlib import Path
from mmi_deploy.system import output_folder
from mmi_deploy.errors import MmiError
out, text, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
rename, count = Path.rename, 0
def counted(self, target):
    global count
    count += 1
    if how == f"before rename {count}":
        die()
    done = rename(self, target)
    if how == f"after rename {count}":
        die()
    return done
Path.rename = counted
def removed(place, entries, remove=output_folder._remove):
    if how == "before removal":
        die()
    if how == "during removal":
        left = dict(list(entries.items())[::2])
        remove(place, {name: seen for name, seen in left.items() if name != ".mmi"})
        die()
    remove(place, entries)
output_folder._remove = removed
try:
    with output_folder.new_folder(out, kind="story") as work:
        (work / "a.txt").write_text(text)
        (work / "deep" / "empty").mkdir(parents=True)
        (work / "deep" / "b.txt").write_text(text)
        print("begun", flush=True)
        if how == "wait":
            sys.stdin.readline()
        if how == "during work":
            die()
except MmiError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def process(out: Path, text: str, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(out), text, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", ["out", "a[1]*?", "n" * 255])
def test_the_second_of_two_runs_is_refused(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    first = process(out, "first", "wait")
    assert first.stdout and first.stdout.readline() == "begun\n"
    with pytest.raises(MmiError, match="another process of mmi writes .* just now. wait until"):
        check_replaceable(out, kind="story")
    said, refused = (second := process(out, "second", "")).communicate()
    assert second.returncode == 2 and not said and "another process of mmi writes" in refused
    fill(tmp_path / "other", "beside it")
    assert first.communicate("\n")[1] == "" and first.returncode == 0
    assert tree(out) == {"a.txt": "first", "deep/b.txt": "first"}
    assert sorted(os.listdir(tmp_path)) == sorted([name, "other"])
    fill(out, "new")


def test_of_many_that_begin_at_once_one_writes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs = [process(out, str(index), "wait") for index in range(4)]
    begun = []
    for run in runs:
        assert run.stdout
        begun.append(run.stdout.readline() == "begun\n")
    errors = [run.communicate("\n")[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2, 2, 2]
    assert [not error for error in errors] == begun
    assert tree(out)["a.txt"] == str(begun.index(True)) and os.listdir(tmp_path) == ["out"]


def test_a_killed_run_does_not_block_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = process(out, "first", "wait")
    assert first.stdout and first.stdout.readline() == "begun\n"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    check_replaceable(out, kind="story")
    fill(out, "new")
    assert tree(out) == WHOLE and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "how",
    ["during work", "before rename 1", "after rename 1", "before rename 2", "after rename 2",
     "before removal", "during removal"],
)  # fmt: skip
@pytest.mark.parametrize("removed", [False, True])
def test_a_crash_at_any_step_loses_nothing(tmp_path: Path, how: str, removed: bool) -> None:
    """At every moment one of the two is whole; the next run puts things right."""
    out = tmp_path / "out"
    fill(out, "before")
    (run := process(out, "after", how)).communicate()
    assert run.returncode == -signal.SIGKILL
    wholes = [
        {text for name, text in tree(path).items()}
        for path in (out, *tmp_path.glob(".out.new-*/old"))
        if len(tree(path)) == 2
    ]
    assert {"before"} in wholes or {"after"} in wholes
    if removed:  # the next run is stopped, and what was there before the crash is back
        with pytest.raises(KeyboardInterrupt), new_folder(out, kind="story"):
            raise KeyboardInterrupt
        late = how in ("after rename 2", "before removal", "during removal")
        assert set(tree(out).values()) == {"after" if late else "before"}
    else:
        fill(out, "new")
        assert tree(out) == WHOLE
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_user_adds_to_the_old_folder_after_a_crash_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    fill(out, "before")
    process(out, "after", "after rename 2").communicate()
    (old,) = tmp_path.glob(".out.new-*/old")
    (old / "mine.txt").write_text("mine")
    fill(out, "new")
    assert tree(out) == WHOLE and tree(tmp_path / "out-old")["mine.txt"] == "mine"
    assert "out-old, and is yours" in caplog.text


def test_without_locks_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs cannot see each other then; the second finds the first's result, and keeps it."""

    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    out = tmp_path / "out"
    fill(out, "before")
    with pytest.raises(MmiError, match="written by somebody else meanwhile.*out-new$"):
        with new_folder(out, kind="story") as work:
            (work / "a.txt").write_text("first")
            fill(out, "second")
    assert tree(out)["a.txt"] == "second" and tree(tmp_path / "out-new") == {"a.txt": "first"}


# What mmi itself adds to a folder of its own.


def bundle(folder: Path) -> None:
    with new_folder(folder, kind="bundle") as work:
        (work / "bundle.json").write_text("{}")
        (work / "graphs").mkdir()
        (work / "graphs" / "llm.onnx").write_text("graph")


def target(folder: Path, name: str, text: str = "engine") -> Path:
    with new_folder(folder / "engines" / name, None, kind="target") as work:
        (work / "llm.engine").write_text(text)
    return folder / "engines" / name


def test_engines_and_what_readers_remember_are_part_of_a_bundle(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    bundle(folder)
    target(folder, "cpu-int8")
    entry = FileEntry(sha256=output_folder.sha256_of(folder / "bundle.json"), size=2)
    cache_hashes(folder, {"bundle.json": entry})
    check_files(folder, {"bundle.json": entry}, "mmi export")
    assert (folder / CHECKED).is_file()
    bundle(folder)
    assert tree(folder) == {"bundle.json": "{}", "graphs/llm.onnx": "graph"}
    target(folder, "cpu-int8")
    remove_folder(folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "put",
    [
        lambda engines: (engines / "notes.txt").write_text("mine"),
        lambda engines: (engines / "cpu-int8" / "notes.txt").write_text("mine"),
        lambda engines: (engines / "cpu-int8" / "llm.engine").write_text("edited"),
        lambda engines: shutil.copytree(engines / "cpu-int8", engines / "kept"),
        lambda engines: shutil.copytree(engines / "cpu-int8", engines.parent / "kept"),
        lambda engines: fill(engines / "story", "mine"),
        lambda engines: (engines / "cpu-int8" / MARKER).write_text("target\n"),
        lambda engines: (engines / "mine").mkdir(),
    ],
)
def test_what_somebody_put_among_the_engines_stays(
    tmp_path: Path, put: Callable[[Path], object]
) -> None:
    folder = tmp_path / "bundle"
    bundle(folder)
    target(folder, "cpu-int8")
    put(folder / "engines")
    before = listed(tmp_path)
    with pytest.raises(MmiError, match="engines|kept"):
        bundle(folder)
    assert listed(tmp_path) == before


def test_a_bundle_is_not_replaced_while_engines_are_built_in_it(tmp_path: Path) -> None:
    from mmi_deploy.system.temporary_folder import temporary_folder

    folder = tmp_path / "bundle"
    bundle(folder)
    (folder / "engines").mkdir()
    with temporary_folder(folder / "engines", ".build-") as work:
        (work / "half").write_text("half")
        with pytest.raises(MmiError, match="another process of mmi writes"):
            bundle(folder)
        code = "import os, sys; from pathlib import Path; "
        code += "from mmi_deploy.system.temporary_folder import temporary_folder as t; "
        code += "c = t(Path(sys.argv[1]), '.build-'); (c.__enter__() / 'x').touch(); os._exit(9)"
        subprocess.run([sys.executable, "-c", code, str(folder / "engines")], check=False)
    assert len(list((folder / "engines").iterdir())) == 1  # what the killed process left
    bundle(folder)
    assert "engines" not in os.listdir(folder)


def test_a_file_that_mmi_writes_anew_is_still_its_own(tmp_path: Path) -> None:
    folder = target(tmp_path, "sm89")
    rewrite_file(folder, "llm.engine", "receipts")
    target(tmp_path, "sm89", "new")
    assert tree(folder) == {"llm.engine": "new"}
    (folder / MARKER).write_text("target\n")  # of an earlier mmi
    rewrite_file(folder, "llm.engine", "receipts")
    assert (folder / "llm.engine").read_text() == "receipts"


def test_large_files_are_not_read_again_unless_they_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def hashed(path: Path) -> str:
        read.append(path.name)
        return "0" * 64 if path.stat().st_size < 8 else "1" * 64

    monkeypatch.setattr(output_folder, "sha256_of", hashed)
    monkeypatch.setattr(output_folder, "_LARGE", 4)
    monkeypatch.setattr(output_folder, "_SETTLED", 10**7)
    out = tmp_path / "out"
    with new_folder(out, hashed=hashed) as work:
        (work / "large").write_text("large")
        (work / "small").write_text("s")
        time.sleep(0.05)
    read.clear()
    check_replaceable(out)
    assert read == ["small"]
    os.utime(out / "large")  # it may have changed
    check_replaceable(out)
    assert read == ["small", "large", "small"]


def test_what_make_clean_removes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "out", "x")
    fill(tmp_path / "mine", "x")
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    folders = [str(tmp_path / name) for name in ("out", "mine", "absent")]
    assert main([*folders, str(Path.home()), "."]) == 2
    assert os.listdir(tmp_path) == ["mine"] and "notes.txt" in tree(tmp_path / "mine")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "mine holds notes.txt" in said[0]


def test_a_run_has_its_folder_for_itself(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    with run_folder(out, "training"):
        (out / "mine.txt").write_text("mine")
        with pytest.raises(MmiError, match="another process of mmi writes"):
            with run_folder(out, "training"):
                raise AssertionError("must not begin")
    assert tree(out) == {"mine.txt": "mine"} and os.listdir(out) == ["mine.txt"]


@pytest.mark.parametrize("change", [{"kind": 1}, {"folders": "all"}, {"format": 99}])
def test_a_marker_of_another_form_is_refused_without_asserts_too(
    tmp_path: Path, change: dict[str, object]
) -> None:
    """With `python -O`, which leaves assert statements out, nothing is removed on its word."""
    folder = tmp_path / "out"
    with new_folder(folder, None, kind="story") as work:
        (work / "a.txt").write_text("a")
    marker = folder / MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), **change}))
    command = [sys.executable, "-O", "-m", "mmi_deploy.system.output_folder", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "cannot be understood" in run.stderr
    assert (folder / "a.txt").read_text() == "a"
