"""Constants that C++ and Python share: read from one file, strictly."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from mmi_deploy.errors import EngineError
from mmi_plugins import operator
from mmi_plugins.constants import CSRC, constant, read_constants
from mmi_plugins.onnxruntime.library import compiler

CONSTANTS = read_constants(CSRC / "constants.def")


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_a_compiler_sees_the_numbers_that_python_reads(tmp_path: Path) -> None:
    (tmp_path / "main.cpp").write_text(
        '#include <cstdio>\n#include "constants.h"\nint main() {\n'
        + "".join(f'  std::printf("{name} %d\\n", mmi::{name});\n' for name in CONSTANTS)
        + "}\n"
    )
    program = tmp_path / "constants"
    command = [str(compiler()), "-std=c++17", f"-I{CSRC}", "-o", str(program)]
    subprocess.run([*command, str(tmp_path / "main.cpp")], check=True)
    done = subprocess.run([str(program)], check=True, capture_output=True, text=True)
    seen = {name: int(value) for name, value in map(str.split, done.stdout.splitlines())}
    assert seen == dict(CONSTANTS) and len(seen) >= 12


def test_the_limits_of_the_operator_are_those_of_the_kernels() -> None:
    """The runtime needs them without the kernels, so `mmi_deploy.spec.graphs` states them too."""
    names = ("kMaxLevels", "kMaxPoints", "kMaxChannels", "kChannelStep")
    limits = (operator.MAX_LEVELS, operator.MAX_POINTS, operator.MAX_CHANNELS)
    assert (*limits, operator.CHANNEL_STEP) == tuple(map(constant, names)) == (4, 16, 128, 8)
    assert constant("kMaxCount") == 2**31 - 64


def test_no_source_defines_a_constant_of_that_name_again() -> None:
    for path in CSRC.iterdir():
        defined = re.findall(r"constexpr \w+ (k\w+)", path.read_text())
        assert not set(defined) & set(CONSTANTS), path.name


@pytest.mark.parametrize(
    "line",
    [
        "MMI_CONSTANT(kRows, 0x10)",
        "MMI_CONSTANT(kRows, 2 * 8)",
        "MMI_CONSTANT(kRows, 16);",
        " MMI_CONSTANT(kRows, 16)",
        "constexpr int kRows = 16;",
        "MMI_CONSTANT(kLanes, 64)",
        "#if 0",
    ],
)
def test_a_line_of_another_form_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "constants.def"
    path.write_text(f"// A comment.\n\nMMI_CONSTANT(kLanes, 32)  // of a warp\n{line}\n")
    with pytest.raises(EngineError, match=r"constants\.def: line 4 cannot be read; expected MMI_"):
        read_constants(path)
