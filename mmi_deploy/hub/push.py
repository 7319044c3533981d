"""Upload of a bundle or a model folder to a repository, as one commit. Nothing is deleted there."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmi_deploy.bundle.bundle import MANIFEST
from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.hub.card import CARD, is_unedited
from mmi_deploy.hub.commit import LIBRARY, Commit, Remark, first
from mmi_deploy.hub.kinds import BUNDLE, MODEL
from mmi_deploy.hub.readable_errors import HubError, not_logged_in, offline, push_errors
from mmi_deploy.hub.reference import Reference
from mmi_deploy.hub.upload import Upload
from mmi_deploy.spec.config import from_json
from mmi_deploy.system.files import size

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"

# Files that every repository may hold beside a folder.
_ANYWHERE = (CARD, ".gitattributes")

_MAIN = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Pushed:
    """A commit that holds the folder. url: its page. new: False where the repository held it
    already. others: files of the repository that are not of the folder, and stay."""

    commit: str
    url: str
    new: bool
    others: tuple[str, ...]


def check_destination(reference: Reference) -> None:
    """Raise `ConfigError` for a reference that no folder is uploaded to."""
    if reference.folder:
        raise ConfigError(
            f"{reference} names a folder, and uploads go to the root of a repository",
            expected="hf://org/name[@branch]",
        )
    if reference.revision and _COMMIT.fullmatch(reference.revision):
        raise ConfigError(
            f"{reference} names a commit, which never changes", expected="hf://org/name[@branch]"
        )


def check_login() -> None:
    """Raise `HubError` where an upload cannot work: before files are hashed."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise offline()
    if get_token() is None:
        raise not_logged_in()


def push(
    upload: Upload, reference: Reference, *, private: bool, message: str, remark: Remark
) -> Pushed:
    """Create the repository and the branch unless they are there, and commit files and card.

    A README.md of the repository is replaced by the folder's; by a card that was written from the
    manifest only if it is such a card itself, unedited. remark: receives a line before the upload.
    Raises `HubError`: also for a repository that holds something else, and for a public one with
    `private`.
    """
    check_destination(reference)
    check_login()
    with push_errors(reference):
        from huggingface_hub import CommitOperationAdd, HfApi

        api, repository = HfApi(library_name=LIBRARY), reference.repository
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise HubError(
                f"{repository} is there and public, and --private was given",
                fix="Make it private in its settings on the Hub, or choose another name",
            )
        branch = _branch(api, reference)
        before = Commit.of(Reference(repository, branch), _silent)
        _check_holds_no_other(before, upload)
        contents: dict[str, Any] = {name: str(upload.folder / name) for name in upload.files}
        if upload.own_card or _may_write_card(before, remark):
            contents[CARD] = upload.card
        remark(f"uploading {len(contents)} files, {size(upload.bytes)}, to {reference}")
        with _bars_on_terminals():
            done = api.create_commit(
                repository,
                [CommitOperationAdd(name, given) for name, given in sorted(contents.items())],
                commit_message=message,
                revision=branch,
                parent_commit=before.revision.resolved,
            )
        after = Commit.of(Reference(repository, done.oid), _silent)
        _check_arrived(after, upload)
        others = sorted(after.listing.keys() - contents.keys() - {*_ANYWHERE})
        new = done.oid != before.revision.resolved
        return Pushed(done.oid, done.commit_url, new, tuple(others))


def _silent(line: str) -> None:
    return None


def _branch(api: HfApi, reference: Reference) -> str:
    """Name of the branch to commit to, which is created from the default branch if it is new."""
    branch = reference.revision
    if branch is None or branch == _MAIN or branch.startswith("refs/"):
        return branch or _MAIN
    refs = api.list_repo_refs(reference.repository)
    if branch in {tag.name for tag in refs.tags}:
        raise HubError(
            f"{branch} is a tag of {reference.repository}, which stays at its commit",
            expected="a branch",
        )
    if branch not in {one.name for one in refs.branches}:
        api.create_branch(reference.repository, branch=branch, exist_ok=True)
    return branch


def _check_holds_no_other(commit: Commit, upload: Upload) -> None:
    """Raise `HubError` for a repository that holds something else than an earlier state of the
    folder, which the upload would replace or mingle with."""
    found = _what(commit)
    if found == upload.kind.called:
        return
    replaced = sorted(commit.listing.keys() & upload.files.keys() - {*_ANYWHERE})
    if found is None and not replaced:
        return
    what = found or f"other files of the same names, {first(replaced)}"
    raise HubError(
        f"{commit.reference.repository} holds {what}, and {upload.folder} is {upload.kind.called}",
        fix="Choose another name, or a new branch of a repository of mmi: hf://org/name@branch",
    )


def _what(commit: Commit) -> str | None:
    """Kind of the folder that a commit holds; None where nothing is known of its files."""
    if MANIFEST in commit.listing:
        known = {"graphs", "files", "receipts"} <= commit.read_json(MANIFEST).keys()
        return BUNDLE.called if known else "another program's bundle.json"
    if _CONFIG not in commit.listing:
        return None
    try:
        from_json(json.dumps(commit.read_json(_CONFIG)), _CONFIG)
    except MmiError:
        return "another program's config.json"
    return MODEL.called


def _may_write_card(commit: Commit, remark: Remark) -> bool:
    """True unless the repository has a README.md that somebody else wrote or edited."""
    if CARD not in commit.listing:
        return True
    commit.fetch([CARD])
    if is_unedited((commit.folder / CARD).read_bytes()):
        return True
    remark(f"{CARD} of the repository was not written by mmi, or was edited since, and stays")
    return False


def _check_arrived(commit: Commit, upload: Upload) -> None:
    """Raise `HubError` unless the commit holds every file, by size and by hash where one is
    stated: rules of the repository, as in .gitignore, can leave files out."""
    wrong = [
        name
        for name, entry in upload.files.items()
        if (listed := commit.listing.get(name)) is None
        or listed.size != entry.size
        or listed.sha256 not in (None, entry.sha256)
    ]
    if wrong:
        raise HubError(
            f"{commit.reference.repository} has taken over other contents of {first(wrong)}",
            fix=f"Look at its .gitignore. {commit.page}",
        )


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Let the library show its progress bars on a terminal alone."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
