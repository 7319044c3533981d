"""The one place where a reference to the Hub, `hf://org/name`, becomes the path of a local folder.

Commands call `local_folder` on every folder that they read; what they call knows paths alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmi_deploy.cli.console import remarks
from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.hub.reference import is_reference, parse

if TYPE_CHECKING:
    from mmi_deploy.hub.download import Targets
    from mmi_deploy.hub.kinds import Kind

INSTALL = "pip install 'mmi_deploy[hub]'"


def local_folder(given: Path, kind: Kind, *, targets: Targets = ()) -> Path:
    """Path of a folder that is given as a path, or as a reference, whose files are downloaded.

    targets: of a bundle, those whose engines are downloaded too, `cpu` aside, which has none; None
    for all. Raises `MmiError`.
    """
    if not is_reference(given):
        return given
    from mmi_deploy.spec.backends import CPU

    reference = parse(given)
    require_hub()
    from mmi_deploy.hub.download import local_copy

    engines = None if targets is None else [name for name in targets if name != CPU]
    return local_copy(reference, kind, targets=engines, remark=remarks().print)


def existing_folder(given: Path, kind: Kind) -> Path:
    """Path of a required folder, as `local_folder` finds it. Raises `MmiError`, also for a missing
    path."""
    if not is_reference(given) and not given.exists():
        raise ConfigError(f"{given} does not exist", expected="a folder, or hf://org/name")
    return local_folder(given, kind)


def local_only(given: Path, why: str) -> None:
    """Raise `ConfigError` for a reference, where a command writes into the folder."""
    if is_reference(given):
        reference = parse(given)
        raise ConfigError(
            f"{why}, and {reference} is a copy that is shared and read only",
            fix="Get a folder of your own: "
            f"`hf download {reference.repository} --local-dir FOLDER`",
        )


def model_name(given: Path) -> str:
    """Name of a model for requests and replies: that of its repository, or of its folder."""
    return parse(given).name if is_reference(given) else given.absolute().name


def spelled(given: Path) -> str:
    """A folder as it was given, for messages: `pathlib` drops a slash of a reference."""
    return str(parse(given)) if is_reference(given) else str(given)


def require_hub() -> None:
    """Raise `MmiError`, which names the pip command, where `huggingface_hub` is not installed."""
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        raise MmiError(
            "references to the Hugging Face Hub need huggingface_hub, which is not installed",
            fix=f"install it with: {INSTALL}",
        ) from None
