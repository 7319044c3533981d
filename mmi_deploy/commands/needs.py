"""What a command needs to be installed, said in one line when it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmi_deploy.errors import MmiError

_EXTRAS = {
    "onnxruntime": "cpu",
    "torch": "train",
    "diffusers": "train",
    "transformers": "train",
    "tensorboard": "train",
    "tqdm": "train",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
}
"""Which extra of the package brings a module."""


@contextmanager
def extras(command: str) -> Iterator[None]:
    """Around the imports of `command`: a missing module becomes a `MmiError` naming the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRAS:
            raise
        raise MmiError(
            f"`mmi {command}` needs {module}, which is not installed",
            fix=f"install it with: pip install 'mmi_deploy[{_EXTRAS[module]}]'",
        ) from None
