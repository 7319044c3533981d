"""Errors for users: one readable line with what is wrong, expected, got, and the fix."""

from __future__ import annotations


class MmiError(Exception):
    """An error that the user can fix. The command line prints it as one line and exits with
    `exit_code`."""

    exit_code = 2

    def __init__(
        self, what: str, *, expected: object = None, got: object = None, fix: str = ""
    ) -> None:
        parts = [what]
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        line = "; ".join(parts)
        super().__init__(f"{line}. {fix}" if fix else line)


class ConfigError(MmiError):
    """A configuration or an option that is unknown or contradicts another."""


class DocumentError(MmiError):
    """A document, or an image in it, that cannot be read or does not fit the model."""


class WeightsError(MmiError):
    """Weights that are missing, extra, wrongly shaped or not finite."""


class BundleError(MmiError):
    """A bundle that is incomplete, changed since it was written, or of another version."""


class EngineError(MmiError):
    """An engine that cannot be loaded or refused its inputs."""


class BusyError(MmiError):
    """A service that cannot take the document now: try again later."""
