"""The engine cache: whole entries or none, the oldest go first, and two builds do not clash."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.targets import cache as cache_module
from mmi_deploy.targets.cache import EngineCache, key_of


def writes(name: str = "a.engine", data: bytes = b"engine") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return make


def never(folder: Path) -> None:
    raise AssertionError("built although it was there")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines", 1000)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def left(cache: EngineCache) -> set[str]:
    """Names in the cache's folder besides its locks."""
    return {path.name for path in cache.folder.iterdir()} - {".locks"}


def test_what_was_made_once_is_found_again(cache: EngineCache, out: Path, tmp_path: Path) -> None:
    assert not cache.has("k")
    assert cache.obtain("k", writes(), out, key_parts={"precision": "fp16"}) is False
    assert cache.has("k") and left(cache) == {"k"}
    again = tmp_path / "again"
    again.mkdir()
    assert cache.obtain("k", never, again) is True
    assert (again / "a.engine").read_bytes() == b"engine"
    assert [path.name for path in again.iterdir()] == ["a.engine"]
    about = json.loads((cache.folder / "k" / "entry.json").read_text())
    assert about["key"] == {"precision": "fp16"}


def test_files_are_linked_not_copied(cache: EngineCache, out: Path) -> None:
    cache.obtain("k", writes(), out)
    assert (out / "a.engine").stat().st_ino == (cache.folder / "k" / "a.engine").stat().st_ino


def test_a_file_system_without_links_gets_a_copy(
    cache: EngineCache, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another device")

    monkeypatch.setattr(os, "link", refuse)
    cache.obtain("k", writes(), out)
    assert (out / "a.engine").read_bytes() == b"engine"


def test_the_key_depends_on_every_part_and_not_on_their_order() -> None:
    key_parts = {"source": "1", "precision": "fp16", "tensorrt": "11.1", "plugin": "x"}
    assert key_of(key_parts) == key_of(dict(reversed(key_parts.items())))
    keys = {key_of(key_parts)} | {key_of({**key_parts, name: "other"}) for name in key_parts}
    assert len(keys) == len(key_parts) + 1


def test_afresh_replaces_what_is_there(cache: EngineCache, out: Path, tmp_path: Path) -> None:
    cache.obtain("k", writes(), out)
    again = tmp_path / "again"
    again.mkdir()
    assert cache.obtain("k", writes(data=b"newer"), again, rebuild=True) is False
    assert (again / "a.engine").read_bytes() == b"newer"
    assert (out / "a.engine").read_bytes() == b"engine", "a bundle's engine never changes"


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing", "entry"])
def test_a_damaged_entry_is_made_again(cache: EngineCache, out: Path, damage: str) -> None:
    cache.obtain("k", writes(), out)
    (out / "a.engine").unlink()
    engine = cache.folder / "k" / "a.engine"
    if damage == "missing":
        engine.unlink()
    elif damage == "entry":
        (cache.folder / "k" / "entry.json").write_text("{")
    else:
        engine.write_bytes(b"~~~~~~" if damage == "changed" else b"eng")
    assert cache.obtain("k", writes(), out) is False
    assert (out / "a.engine").read_bytes() == b"engine"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()]
)
def test_a_build_that_fails_leaves_nothing(
    cache: EngineCache, out: Path, error: BaseException
) -> None:
    def make(folder: Path) -> None:
        (folder / "a.engine").write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        cache.obtain("k", make, out)
    assert not cache.has("k") and left(cache) == set() and not list(out.iterdir())
    assert cache.obtain("k", writes(), out) is False, "and the lock is free"


KILLED = """
import os, signal, sys
from pathlib import Path
from mmi_deploy.targets.cache import EngineCache
def make(folder):
    (folder / "a.engine").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
EngineCache(Path(sys.argv[1]), 1000).obtain("k", make, Path(sys.argv[2]))
"""


def test_a_killed_build_leaves_no_entry_and_its_rest_goes_with_the_next(
    cache: EngineCache, out: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(cache.folder), str(out)]
    assert subprocess.run(command, check=False).returncode == -9
    assert not cache.has("k") and not list(out.iterdir())
    assert len(left(cache)) == 1, "the half-written engine"
    assert cache.obtain("k", writes(), out) is False
    assert left(cache) == {"k"}


def test_the_entries_used_longest_ago_go_first(tmp_path: Path) -> None:
    def obtain(cache: EngineCache, key: str) -> None:
        folder = tmp_path / f"{key}-{time.monotonic_ns()}"
        folder.mkdir()
        cache.obtain(key, writes(data=b"x" * 200), folder)

    roomy = EngineCache(tmp_path / "engines", 10**6)
    for age, key in enumerate("abc"):
        obtain(roomy, key)
        os.utime(roomy.folder / key / "entry.json", (age, age))
    one = sum(path.stat().st_size for path in (roomy.folder / "a").iterdir())
    obtain(roomy, "a")  # used again: now the newest
    obtain(EngineCache(roomy.folder, int(2.5 * one)), "d")
    assert {key for key in "abcd" if roomy.has(key)} == {"a", "d"}


def test_an_entry_beyond_the_limit_is_given_out_but_not_kept(tmp_path: Path, out: Path) -> None:
    cache = EngineCache(tmp_path / "engines", 10)
    cache.obtain("k", writes(data=b"x" * 200), out)
    assert (out / "a.engine").stat().st_size == 200 and not cache.has("k")


def test_an_entry_that_another_process_makes_again_meanwhile_is_passed_over(
    cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_of = cache_module._bytes_of

    def gone(entry: Path) -> int:
        shutil.rmtree(cache.folder / "a", ignore_errors=True)
        return bytes_of(entry)

    for key in "ab":
        (tmp_path / key).mkdir()
        cache.obtain(key, writes(), tmp_path / key)
        monkeypatch.setattr(cache_module, "_bytes_of", gone)
    assert left(cache) == {"b"} and (tmp_path / "b" / "a.engine").exists()


def test_two_that_want_the_same_build_it_once(cache: EngineCache, tmp_path: Path) -> None:
    started, waited, found = threading.Event(), threading.Event(), []

    def slow(folder: Path) -> None:
        started.set()
        assert waited.wait(10)
        writes()(folder)

    def obtain(make: Callable[[Path], None]) -> None:
        folder = tmp_path / str(len(found) + threading.get_ident())
        folder.mkdir()
        found.append(cache.obtain("k", make, folder, on_wait=waited.set))

    first = threading.Thread(target=obtain, args=(slow,))
    first.start()
    assert started.wait(10)
    obtain(never)
    first.join()
    assert sorted(found) == [False, True]


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path, out: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MmiError, match="cannot be written.*MMI_CACHE"):
        EngineCache(tmp_path / "file" / "engines", 10).obtain("k", never, out)


def test_the_users_folder_and_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMI_CACHE", str(tmp_path))
    monkeypatch.setenv("MMI_ENGINE_CACHE_GB", "1.5")
    assert EngineCache.of_user() == EngineCache(tmp_path / "engines", 1_500_000_000)
    monkeypatch.delenv("MMI_ENGINE_CACHE_GB")
    assert EngineCache.of_user().limit == 50_000_000_000
    for wrong in ("much", "-1", "inf"):
        monkeypatch.setenv("MMI_ENGINE_CACHE_GB", wrong)
        with pytest.raises(ConfigError, match=rf"MMI_ENGINE_CACHE_GB is not a size.*got {wrong}"):
            EngineCache.of_user()


def test_what_somebody_put_into_an_entry_stays(
    cache: EngineCache, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cases of an entry that is built again, damaged, or evicted."""
    small = EngineCache(cache.folder, 0)
    for number, act in enumerate(
        (
            lambda: cache.obtain("k", writes(data=b"again"), out, rebuild=True),
            lambda: cache.obtain("k", writes(), out),
            lambda: small.obtain("other", writes("b.engine"), out),
        )
    ):
        shutil.rmtree(out)
        out.mkdir()
        cache.obtain("k", writes(), out, rebuild=number == 0)
        (cache.folder / "k" / "notes.txt").write_text(f"mine {number}")
        if number == 1:
            (cache.folder / "k" / "a.engine").write_bytes(b"damage")
        shutil.rmtree(out)
        out.mkdir()
        act()
    kept = [path for path in cache.folder.iterdir() if path.name.startswith("k-")]
    notes = sorted((path / "notes.txt").read_text() for path in kept)
    assert notes == ["mine 0", "mine 1", "mine 2"]
    assert all(os.listdir(path) == ["notes.txt"] for path in kept)
    assert len(caplog.records) == 3 and "files that mmi did not write" in caplog.text
    again = out / "again"
    again.mkdir()
    small.obtain("other", writes("b.engine"), again)
    assert all(os.listdir(path) == ["notes.txt"] for path in kept)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "mine", '{"files": {"../../thesis": [1, "0"]}, "key": {}}']
)
def test_folders_of_others_never_make_room(
    tmp_path: Path, cache: EngineCache, out: Path, text: str
) -> None:
    """A cache in a folder that holds other things too, as `MMI_CACHE` may name one."""
    (tmp_path / "thesis").write_text("m")
    other = cache.folder / "project"
    other.mkdir(parents=True)
    (other / "entry.json").write_text(text)
    EngineCache(cache.folder, 0).obtain("k", writes(), out)
    assert left(cache) == {"project"} and (other / "entry.json").read_text() == text
    assert (tmp_path / "thesis").read_text() == "m"


def test_an_entry_lists_no_file_outside_itself_without_asserts_too(tmp_path: Path) -> None:
    """With `python -O`, which leaves assert statements out."""
    thesis, entry = tmp_path / "thesis", tmp_path / "engines" / "k"
    thesis.write_text("mine")
    entry.mkdir(parents=True)
    listed = '{"files": {"../../thesis": [1, "0"]}, "key": {}}'
    (entry / "entry.json").write_text(listed)
    code = (
        "import sys; from pathlib import Path; from mmi_deploy.targets import cache; "
        "cache._remove(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-O", "-c", code, str(entry)], check=True)
    assert thesis.read_text() == "mine"
    (kept,) = entry.parent.glob("k*/entry.json")  # the folder is renamed
    assert kept.read_text() == listed
