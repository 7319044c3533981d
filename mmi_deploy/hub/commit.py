"""A commit of a repository in `huggingface_hub`'s cache: its listing, downloads and hashes."""

from __future__ import annotations

import glob
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha1
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from mmi_deploy.bundle.bundle import EXPORT
from mmi_deploy.bundle.manifest import FileEntry, check_files
from mmi_deploy.errors import BundleError
from mmi_deploy.hub.readable_errors import HubError
from mmi_deploy.hub.reference import Reference
from mmi_deploy.system.files import sha256_of, size

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Remark = Callable[[str], object]

# Name of this program in requests to the Hub.
LIBRARY = "mmi_deploy"

_SHOWN = 5

# Names of the cache's blobs: the SHA-256 of files in large file storage, Git's hash of others.
_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Listed:
    """A file of a repository. sha256: as the Hub states it; None where it is not known."""

    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Commit:
    """A commit, and the folder of it that a reference names.

    revision: what was asked for, with the commit as `resolved`. listing: every file of the
    repository by its path. remark: receives a line before a download.
    """

    reference: Reference
    revision: Any  # `huggingface_hub.ResolvedRevision`
    listing: Mapping[str, Listed]
    remark: Remark

    @classmethod
    def of(cls, reference: Reference, remark: Remark) -> Commit:
        """Ask the Hub for the commit of a reference; without a connection, the cache."""
        from huggingface_hub import HfApi

        api = HfApi(library_name=LIBRARY)
        revision = api.resolve_revision(reference.repository, revision=reference.revision)
        listing = _listing(api, reference.repository, revision.resolved)
        return cls(reference, revision, listing, remark)

    @property
    def page(self) -> str:
        """A line that says where the files of the commit are listed."""
        from huggingface_hub import constants

        at = f"{constants.ENDPOINT}/{self.reference.repository}/tree/{self.revision.resolved}"
        return f"Look at {at}"

    @property
    def folder(self) -> Path:
        """Folder of the cache that stands for the reference."""
        return _snapshot(self.reference.repository, self.revision.resolved) / self.reference.folder

    @property
    def files(self) -> list[str]:
        """Files below the folder, as paths in it."""
        prefix = self.reference.path("")
        return [name.removeprefix(prefix) for name in self.listing if name.startswith(prefix)]

    def read_json(self, name: str) -> Mapping[str, object]:
        """Download and read a JSON file of the folder; empty for one that is no JSON object."""
        self.fetch([name])
        try:
            found = json.loads((self.folder / name).read_bytes())
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def fetch(self, names: Iterable[str]) -> None:
        """Download the files of the folder that the cache lacks, and compare each with the Hub's
        hash. Raises `HubError`, and errors of `huggingface_hub`."""
        self.fetch_paths([self.reference.path(name) for name in names])

    def fetch_paths(self, paths: list[str]) -> None:
        """Download files by their paths in the repository, as `fetch` does."""
        if lacking := [path for path in paths if path not in self.listing]:
            raise HubError(
                f"{self.reference.repository} is not complete: it has no {first(lacking)}",
                fix=self.page,
            )
        missing = [path for path in paths if not (self._root / path).is_file()]
        if not missing:
            return
        self._announce(missing)
        known = self._blobs()
        _download(self.reference.repository, self.revision, missing, self.remark)
        for path in missing:
            self._check_arrived(path, known)

    @property
    def _root(self) -> Path:
        return _snapshot(self.reference.repository, self.revision.resolved)

    def _announce(self, missing: list[str]) -> None:
        """Say what is downloaded. Raises `HubError` where the disk has no room for it."""
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return
        needed = sum(self.listing[path].size for path in missing)
        cache = Path(constants.HF_HUB_CACHE).expanduser().absolute()
        there = next(path for path in (cache, *cache.parents) if path.exists())
        free = shutil.disk_usage(there).free
        if needed > free:
            raise HubError(
                f"{self.reference} takes {size(needed)}, and the disk of {cache} has {size(free)}",
                fix="Free some space, or set HF_HOME to a folder on another disk",
            )
        count = f"{len(missing)} files" if len(missing) > 1 else missing[0]
        self.remark(
            f"downloading {count}, {size(needed)}, of {self.reference} at "
            f"{self.revision.resolved:.12} into {cache}"
        )

    def _blobs(self) -> set[Path]:
        """Contents of the repository's files that the cache holds, for whichever commit."""
        return {path.resolve() for path in (self._root.parents[1] / "blobs").glob("*")}

    def _check_arrived(self, path: str, known: set[Path]) -> None:
        """Raise `HubError` for a damaged file, and remove it from the cache if it was downloaded
        just now: its name there is the hash that it does not have. One of `known`, which were there
        before, may be another program's and stays."""
        found = self._root / path
        if not found.is_file() or self._is_as_stated(path):
            return
        blob = found.resolve()
        found.unlink()  # the link of this download, or the file itself where links are off
        if blob in known:
            raise self._changed(blob, path)
        blob.unlink(missing_ok=True)
        raise HubError(
            f"{path} of {self.reference.repository} arrived damaged, with another hash than the "
            "Hub states, and was removed",
            fix="Run the command again",
        )

    def _is_as_stated(self, path: str) -> bool:
        """True if a cached file has the hash that the Hub states, or if none is known."""
        blob = (self._root / path).resolve()
        if stated := self._sha256(path):
            return sha256_of(blob) == stated
        if _GIT.fullmatch(blob.name):
            data = blob.read_bytes()
            return sha1(b"blob %d\0" % len(data) + data).hexdigest() == blob.name
        return True

    def _sha256(self, path: str) -> str | None:
        """SHA-256 of a cached file as the Hub states it; None for one of Git itself."""
        blob = (self._root / path).resolve()
        return blob.name if _SHA256.fullmatch(blob.name) else self.listing[path].sha256

    def _changed(self, blob: Path, path: str) -> HubError:
        return HubError(
            f"{blob}, in the cache for {path} of {self.reference.repository}, was changed",
            fix="Remove it and run the command again",
        )

    def check(self, names: Iterable[str]) -> None:
        """Compare cached files with the SHA-256 that the Hub states, as `check_listed` does."""
        stated = {name: self._sha256(self.reference.path(name)) for name in names}
        self.check_listed(
            "",
            {
                name: FileEntry(sha256=sha256, size=self.listing[self.reference.path(name)].size)
                for name, sha256 in stated.items()
                if sha256
            },
        )

    def check_listed(self, prefix: str, entries: Mapping[str, FileEntry]) -> None:
        """Compare cached files below `prefix` with hashes, unless their size and times are those of
        the last check. Raises `HubError` for a file that was changed in the cache, and
        `BundleError` for one that the Hub has so, but a manifest has not."""
        if not entries:
            return
        try:
            check_files(self.folder / prefix, entries, EXPORT)
        except BundleError:
            for name in entries:
                path = self.reference.path(f"{prefix}{name}")
                if not self._is_as_stated(path):
                    raise self._changed((self._root / path).resolve(), path) from None
            raise BundleError(
                f"{self.reference} has other files than its manifest lists: it was changed "
                "after `mmi export`",
                fix=self.page,
            ) from None


def _snapshot(repository: str, commit: str) -> Path:
    """Folder of the cache with the files of a commit."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    name: str = repo_folder_name(repo_id=repository, repo_type="model")
    return cache / name / "snapshots" / commit


def _listing(api: HfApi, repository: str, commit: str) -> dict[str, Listed]:
    """Every file of a commit: from the cache, which keeps listings; else from the Hub; else, for
    what other programs downloaded and without a connection, the files that are there."""
    import httpx2
    from huggingface_hub import errors, get_cached_repo_tree
    from huggingface_hub.hf_api import RepoFile

    try:
        tree: Iterable[Any] = get_cached_repo_tree(repository, revision=commit)
    except errors.CachedRepoTreeNotFoundError:
        try:
            tree = list(api.list_repo_tree(repository, recursive=True, revision=commit))
        except (errors.OfflineModeIsEnabled, httpx2.TransportError):
            root = _snapshot(repository, commit)
            found = {
                path.relative_to(root).as_posix(): Listed(path.stat().st_size)
                for path in root.rglob("*")
                if path.is_file() and not path.name.startswith(".")
            }
            if not found:
                raise
            return found
    return {
        file.path: Listed(file.size, file.lfs.sha256 if file.lfs else None)
        for file in tree
        if isinstance(file, RepoFile)
    }


def _download(repository: str, revision: Any, paths: list[str], remark: Remark) -> None:
    """Download files; Ctrl-C ends the transfers that run, which the library would let end first."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    stop = Event()

    class Stoppable(tqdm):
        """The library's progress bar, which every piece that arrives passes; on terminals alone."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{"disable": None, **options})

        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise InterruptedError("stopped")
            return super().update(n)

    work = partial(
        snapshot_download,
        repository,
        revision=revision,
        allow_patterns=[glob.escape(path) for path in paths],
        library_name=LIBRARY,
        tqdm_class=Stoppable,
    )
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work)
        try:
            running.result()
        except KeyboardInterrupt:
            stop.set()
            remark("stopped: files that were downloaded whole are kept for the next run")
            raise


def first(names: list[str]) -> str:
    """The first few names, for an error."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
