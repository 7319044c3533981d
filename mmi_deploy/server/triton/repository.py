"""Writer of a model in a Triton model repository."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mmi_deploy.errors import ConfigError
from mmi_deploy.server.triton.settings import ModelSettings
from mmi_deploy.spec.backends import backend_of
from mmi_deploy.system.output_folder import new_folder

# Kind of the output folder.
KIND = "triton model"

MODEL = '''"""The model is in mmi_deploy, which the server's Python must have."""

from mmi_deploy.server.triton.model import TritonPythonModel as TritonPythonModel
'''


def write_model(
    repository: Path,
    name: str,
    settings: ModelSettings,
    *,
    device: int = 0,
    force: bool = False,
    inputs: tuple[Path, ...] = (),
) -> Path:
    """Write the model `name` into a model repository; returns its folder.

    Other models of the repository stay. device: GPU of a GPU target. Raises `MmiError`: the folder
    holds what mmi did not write, or any of `inputs`.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name):
        raise ConfigError(
            "the model's name is malformed",
            expected="at most 64 letters, digits, points, _ and -",
            got=name,
        )
    folder = repository / name
    text = config_text(name, settings, device)
    with new_folder(folder, force, kind=KIND, inputs=inputs) as work:
        (work / "config.pbtxt").write_text(text, encoding="utf-8")
        (work / "1").mkdir()
        (work / "1" / "model.py").write_text(MODEL, encoding="utf-8")
        # A file where Python would write bytecode, so that the server leaves the folder as it is.
        (work / "1" / "__pycache__").touch()
    return folder


def config_text(name: str, settings: ModelSettings, device: int = 0) -> str:
    """Model configuration, a protocol buffer as text."""
    on_gpu = backend_of(settings.target).on_gpu
    place = f"kind: KIND_GPU\n    gpus: [ {device} ]" if on_gpu else "kind: KIND_CPU"
    parameters = "".join(
        f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}\n"
        for key, value in settings.parameters().items()
    )
    return f"""\
# Written by `mmi triton`, which replaces this file only as long as it is unchanged.
name: {_text(name)}
backend: "python"
max_batch_size: 0

# A stream of responses for each request; requests that are running together share their runs.
model_transaction_policy {{ decoupled: true }}

# The JSON of a document.
input {{
  name: "request"
  data_type: TYPE_STRING
  dims: [ 1 ]
}}

# An event, JSON, and with some events a picture, [height, width, 3].
output {{
  name: "event"
  data_type: TYPE_STRING
  dims: [ 1 ]
}}
output {{
  name: "image"
  data_type: TYPE_UINT8
  dims: [ -1, -1, 3 ]
}}

# One instance for each device: a second one would hold the weights once more.
instance_group {{
    count: 1
    {place}
}}

{parameters}"""


def _text(value: str) -> str:
    """A string of the text format."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            "a model configuration holds UTF-8 alone", expected="a path of it", got=ascii(value)
        ) from None
    return json.dumps(value, ensure_ascii=False)
