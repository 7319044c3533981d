"""Messages of errors for clients, who must not learn where files of the server are."""

from __future__ import annotations

from pathlib import Path

from mmi_deploy.errors import MmiError


def public_message(error: MmiError, bundle: Path) -> str:
    """Message of an error, with BUNDLE in place of the bundle's path."""
    return str(error).replace(str(bundle), "BUNDLE")
