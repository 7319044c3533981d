"""Errors of `huggingface_hub` as one line each, with what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from mmi_deploy.errors import MmiError
from mmi_deploy.hub.reference import FORM, Reference

LOGIN = "`hf auth login`"


class HubError(MmiError):
    """A repository, revision or file that the Hub does not give, or a Hub that is out of reach."""


@contextmanager
def hub_errors(reference: Reference) -> Iterator[None]:
    """Turn errors of `huggingface_hub` about `reference` into a `HubError`."""
    try:
        yield
    except MmiError:
        raise
    except Exception as error:
        found = _readable(reference, error)
        if found is None:
            raise
        raise found from None


@contextmanager
def push_errors(reference: Reference) -> Iterator[None]:
    """Turn errors of `huggingface_hub` about an upload to `reference` into a `HubError`."""
    with hub_errors(reference):
        try:
            yield
        except Exception as error:
            found = _readable_of_push(reference, error)
            if found is None:
                raise
            raise found from None


def _readable_of_push(reference: Reference, error: BaseException) -> HubError | None:
    """The error for users, or None for one that reads alike in downloads."""
    import httpx2
    from huggingface_hub import constants, errors

    again = "Run the command again: files that arrived whole are not uploaded again"
    status = getattr(getattr(error, "response", None), "status_code", None)
    match error:
        case MmiError():
            return None
        case errors.HfHubHTTPError() if status == 401:
            return not_logged_in()
        case errors.HfHubHTTPError() if status == 403:
            return HubError(
                f"you may not write to {reference.repository} at {constants.ENDPOINT}",
                fix=f"Look at the name, and log in with {LOGIN} with a token that may write there",
            )
        case errors.HfHubHTTPError() if status in (409, 412):
            return HubError(
                f"{reference.repository} was changed by somebody else meanwhile", fix=again
            )
        case errors.HFValidationError():
            return HubError(f"the Hub has no such names: {_line(error)}", expected=FORM)
        case errors.OfflineModeIsEnabled():
            return offline()
        case RuntimeError() if error.__cause__ is not None:  # of the thread of one file
            return _readable_of_push(reference, error.__cause__) or HubError(
                f"{_line(error)} {_line(error.__cause__)}", fix=again
            )
        case ValueError() if "metadata in README.md" in str(error):
            return HubError(
                f"the Hub does not accept README.md: {_line(error)}",
                fix="Correct the lines between --- at its beginning",
            )
        case ValueError() if "LFS" in str(error) and not isinstance(error, errors.HfHubHTTPError):
            return HubError(f"{constants.ENDPOINT} refused a file: {_line(error)}", fix=again)
        case httpx2.HTTPError() if not isinstance(error, errors.HfHubHTTPError):
            return HubError(
                f"the connection to {constants.ENDPOINT} failed: {_line(error)}", fix=again
            )
    return None


def not_logged_in() -> HubError:
    """The error for an upload without a token that the Hub knows."""
    from huggingface_hub import constants

    return HubError(
        f"{constants.ENDPOINT} does not know you, and uploads need a login",
        fix=f"Log in with {LOGIN}, or set HF_TOKEN to a token that may write",
    )


def offline() -> HubError:
    """The error for an upload without a network."""
    return HubError(
        "HF_HUB_OFFLINE is set, and an upload needs the Hub",
        fix="Run it without, or look at what would be uploaded with --dry-run",
    )


def _readable(reference: Reference, error: Exception) -> HubError | None:
    """The error for users, or None for one that is not the Hub's."""
    import httpx2
    from huggingface_hub import constants, errors

    repository = reference.repository
    page = f"{constants.ENDPOINT}/{repository}"
    match error:
        case errors.GatedRepoError():
            return HubError(
                f"{repository} is gated, and you have no access to it",
                fix=f"Accept its conditions at {page}, then log in with {LOGIN}",
            )
        case errors.RepositoryNotFoundError():
            return HubError(
                f"{repository} is no model repository at {constants.ENDPOINT}, or is private",
                fix=f"Look at the name; for a private one log in with {LOGIN}",
            )
        case errors.RevisionNotFoundError():
            return HubError(
                f"{repository} has no revision {reference.revision or 'main'}",
                expected=f"a branch, tag or commit of {page}",
            )
        case errors.DisabledRepoError():
            return HubError(f"{repository} was disabled by its owner or the Hub")
        case (
            errors.OfflineModeIsEnabled()
            | errors.RevisionResolutionError()
            | errors.IncompleteSnapshotError()
            | errors.LocalEntryNotFoundError()
        ):
            return _out_of_reach(reference, error)
        case errors.HfHubHTTPError():
            return _refused(reference, error)
        case httpx2.HTTPError():
            return HubError(
                f"the connection to {constants.ENDPOINT} failed: {_line(error)}",
                fix="Run the command again: files that were transferred whole are kept",
            )
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return HubError(
                f"the disk of {constants.HF_HUB_CACHE} is full",
                fix="Free some space or set HF_HOME to a folder on another disk, and run the "
                "command again: files that were downloaded whole are kept",
            )
        case OSError() if "Consistency check failed" in str(error):
            return HubError(
                f"a file of {reference} arrived with another size than the Hub states",
                fix="Run the command again",
            )
        case PermissionError():
            return HubError(
                f"the cache {constants.HF_HUB_CACHE} cannot be written: {error.strerror}",
                fix="Set HF_HOME to a folder that you can write",
            )
    return None


def _out_of_reach(reference: Reference, error: Exception) -> HubError:
    """The Hub cannot be asked, and the cache does not hold what is needed."""
    from huggingface_hub import constants

    what = f"{reference} is not, or not whole, in the cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return HubError(f"HF_HUB_OFFLINE is set, and {what}", fix="Run once without it")
    cause = error.__cause__ or error.__context__
    reason = f": {_line(cause)}" if cause else ""
    return HubError(f"{constants.ENDPOINT} cannot be reached{reason}; {what}")


def _refused(reference: Reference, error: Exception) -> HubError:
    """The Hub answered with an error status."""
    from huggingface_hub import constants

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401:
        return HubError(
            f"{constants.ENDPOINT} does not know you", fix=f"Log in with {LOGIN}, or set HF_TOKEN"
        )
    said = getattr(error, "server_message", None) or _line(error)
    return HubError(f"{constants.ENDPOINT} answered {status} for {reference}: {said:.200}")


def _line(error: BaseException) -> str:
    """Text of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
