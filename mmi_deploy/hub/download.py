"""Local copies of folders on the Hub: which files a use of a folder needs, downloaded and checked.

The files are chosen from the listing of the commit (`kinds.py`); those of a bundle, from its
manifest. A file that is in the cache is not downloaded again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from mmi_deploy.bundle.bundle import BUILD, EXPORT, TARGET_MANIFEST
from mmi_deploy.bundle.manifest import BundleManifest, FileEntry, TargetManifest, read_manifest
from mmi_deploy.hub.commit import Commit, Remark, first
from mmi_deploy.hub.kinds import (
    BUNDLE_FILE,
    WHOLE_BUNDLES,
    WITHOUT_PICKLES,
    Kind,
    is_a,
    only_pickles,
)
from mmi_deploy.hub.readable_errors import HubError, hub_errors
from mmi_deploy.hub.reference import Reference

# Targets of a bundle whose engines are downloaded with it; None for all.
Targets = Collection[str] | None

_ENGINES = "engines"


def _silent(line: str) -> None:
    return None


def local_copy(
    reference: Reference, kind: Kind, *, targets: Targets = (), remark: Remark = _silent
) -> Path:
    """Download what `kind` reads of a folder, or the file that `kind` takes in place of one, and
    return its path in the cache.

    remark: receives a line before a download. Raises `HubError`; `BundleError` for a bundle that
    its manifest does not describe.
    """
    with hub_errors(reference):
        commit = Commit.of(reference, remark)
        if kind.takes and reference.folder in commit.listing:
            return _file(commit, kind.takes)
        files = commit.files
        if not files:
            raise HubError(_no_folder(reference, commit.listing), fix=commit.page)
        if not is_a(kind, files):
            raise HubError(_no_such_kind(reference, kind, commit.listing), fix=commit.page)
        if kind in WHOLE_BUNDLES and BUNDLE_FILE in files:
            _fetch_bundle(commit, targets)
            return commit.folder
        names = sorted({*kind.choose(files, commit.read_json)})
        if kind in WITHOUT_PICKLES:
            _check_safetensors(reference, files)
        commit.fetch(names)
        commit.check(names)
        return commit.folder


def _file(commit: Commit, ending: str) -> Path:
    """Download the single file that a reference names."""
    path = commit.reference.folder
    if not path.endswith(ending):
        raise HubError(
            f"{commit.reference} is a file", expected=f"a folder, or a file that ends in {ending}"
        )
    commit.fetch_paths([path])
    return commit.folder


def _fetch_bundle(commit: Commit, targets: Targets) -> None:
    """Download the files that the manifests of a bundle and of its targets list."""
    commit.fetch([BUNDLE_FILE])
    manifest = read_manifest(commit.folder / BUNDLE_FILE, BundleManifest, EXPORT)
    pattern = re.compile(rf"{_ENGINES}/([^/]+)/{re.escape(TARGET_MANIFEST)}")
    built = {found[1] for name in commit.files if (found := pattern.fullmatch(name))}
    wanted = sorted(built if targets is None else targets)
    if unknown := [target for target in wanted if target not in built]:
        raise HubError(
            f"{commit.reference} holds no engines for {', '.join(unknown)}",
            expected=", ".join(["cpu", *sorted(built)]),
            fix="Engines are built in a local folder: "
            f"`hf download {commit.reference.repository} --local-dir FOLDER`, then `{BUILD}`",
        )
    parts: dict[str, Mapping[str, FileEntry]] = {"": manifest.files}
    for target in wanted:
        prefix = f"{_ENGINES}/{target}/"
        commit.fetch([f"{prefix}{TARGET_MANIFEST}"])
        path = commit.folder / prefix / TARGET_MANIFEST
        parts[prefix] = read_manifest(path, TargetManifest, BUILD).files
    commit.fetch(f"{prefix}{name}" for prefix, entries in parts.items() for name in entries)
    for prefix, entries in parts.items():
        commit.check_listed(prefix, entries)


def _check_safetensors(reference: Reference, files: Collection[str]) -> None:
    """Raise `HubError` for a repository whose weights are pickles alone."""
    if only_pickles(files):
        raise HubError(
            f"{reference} holds its weights as pickles alone, which can hold code and are not "
            "downloaded",
            expected="a repository with safetensors",
            fix=f"Or get them yourself, `hf download {reference.repository}`, and give the folder "
            "that it prints",
        )


def _no_folder(reference: Reference, listing: Iterable[str]) -> str:
    """Say that a folder is not there, and which ones are."""
    if not reference.folder:
        return f"{reference} is empty"
    folders = sorted({name.partition("/")[0] for name in listing if "/" in name})
    known = f"; it has {first(folders)}" if folders else ""
    return f"{reference.repository} has no folder {reference.folder}{known}"


def _no_such_kind(reference: Reference, kind: Kind, listing: Iterable[str]) -> str:
    """Say that a folder is not of `kind`, and which folders of the repository are."""
    inside: dict[str, list[str]] = {}
    for name in listing:
        parts = name.split("/")
        for depth in range(1, len(parts)):
            inside.setdefault("/".join(parts[:depth]), []).append("/".join(parts[depth:]))
    others = [
        str(Reference(reference.repository, reference.revision, folder))
        for folder, files in sorted(inside.items())
        if is_a(kind, files)
    ]
    hint = f"; {kind.called} is at {first(others)}" if others else ""
    return f"{reference} is not {kind.called}: it holds no {' or '.join(kind.marks)}{hint}"
