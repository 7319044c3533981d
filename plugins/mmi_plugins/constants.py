"""Integer constants that the kernels' sources and Python share: `csrc/constants.def`.

C++ includes that file and Python reads it, so no number is written twice. The format is chosen
for both: a C++ compiler, NVRTC among them, includes it without a generated header, and every line
has one form, so that reading it takes no C parser.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from mmi_deploy.errors import EngineError

CSRC = Path(__file__).with_name("csrc")

_LINE = re.compile(r"MMI_CONSTANT\((k\w+), (\d+)\)\s*(//.*)?")


def read_constants(path: Path) -> Mapping[str, int]:
    """Constants by name. Raises `EngineError` for a line that is neither a constant nor a comment,
    and for a name that occurs twice."""
    constants: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line or line.startswith("//"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or match[1] in constants:
            raise EngineError(
                f"{path}: line {number} cannot be read",
                expected="MMI_CONSTANT(kName, decimal number), each name once",
                got=line,
            )
        constants[match[1]] = int(match[2])
    return MappingProxyType(constants)


@cache
def _constants() -> Mapping[str, int]:
    return read_constants(CSRC / "constants.def")


def constant(name: str) -> int:
    """Value of a constant of `csrc/constants.def`."""
    return _constants()[name]
