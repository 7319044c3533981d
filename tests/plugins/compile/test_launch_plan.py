"""`mmi::launch`, compiled by nvcc: what it says where a call or a machine is not as it must be."""

from __future__ import annotations

import subprocess

import pytest

from mmi_plugins.compile import nvrtc
from mmi_plugins.compile.compilers import find_nvcc
from mmi_plugins.constants import CSRC

if reason := nvrtc.missing("nvcc"):
    pytest.skip(reason, allow_module_level=True)

_MAIN = """
#include <cstdio>
#include "launch.h"

int main() {
  alignas(16) static char memory[1 << 16];
  mmi::MmfsCall call{};
  call.type = mmi::DataType::kFloat16;
  call.value = call.offsets = call.logits = call.output = memory;
  call.image_slot = call.image_position = reinterpret_cast<const int32_t*>(memory);
  call.offset_table = call.logit_table = reinterpret_cast<const float*>(memory);
  call.reference = call.null_value = reinterpret_cast<const float*>(memory);
  call.b = call.q = call.m = call.h = call.l = call.n = 1;
  call.p = 8, call.d = 64, call.s = 16, call.r = 2;
  call.position_queries = call.reference_queries = 1;
  call.level_height[0] = call.level_width[0] = 4;
  call.base_grid = 4;
  auto say = [](const char* name, const mmi::MmfsCall& call, void* workspace) {
    const char* text = mmi::launch(call, workspace, nullptr);
    std::printf("%s: %zu: %s\\n", name, mmi::workspace_bytes(call), text ? text : "launched");
  };
  say("one block", call, nullptr);
  mmi::MmfsCall other = call;
  other.m = 90;
  say("no workspace", other, nullptr);
  say("crooked workspace", other, memory + 4);
  say("many images", other, memory);
  other = call;
  other.value = memory + 2;
  say("crooked value", other, nullptr);
  other = call;
  other.d = 60;
  say("head size", other, nullptr);
  other = call;
  other.q = other.b = 2048;
  say("many queries", other, nullptr);
}
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """By call, the workspace's bytes and what `launch` said, with every GPU hidden."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "main.cpp").write_text(_MAIN)
    program = folder / "launch"
    sources = [str(CSRC / "mmfs.cu"), str(folder / "main.cpp")]
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]
    command = [str(find_nvcc()), "-std=c++17", "-arch=sm_80", *strict, f"-I{CSRC}", *sources]
    subprocess.run([*command, "-o", str(program)], check=True, capture_output=True)
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([str(program)], env=hidden, check=True, capture_output=True, text=True)
    lines = [line.split(": ", 2) for line in done.stdout.splitlines()]
    return {name: (int(room), text) for name, room, text in lines}


@pytest.mark.slow
@pytest.mark.parametrize("call", ("one block", "many images", "many queries"))
def test_cudas_own_error_is_reported(said: dict[str, tuple[int, str]], call: str) -> None:
    assert "CUDA" in said[call][1]  # no device, or a driver that is missing or too old


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("no workspace", "workspace"),
        ("crooked workspace", "not aligned to 16"),
        ("crooked value", "not aligned to 16"),
        ("head size", "multiple of 8"),
    ],
)
def test_a_bad_call_is_refused(said: dict[str, tuple[int, str]], call: str, words: str) -> None:
    assert words in said[call][1]


@pytest.mark.slow
def test_the_workspace_holds_the_parts_of_the_blocks(said: dict[str, tuple[int, str]]) -> None:
    assert said["one block"][0] == said["many queries"][0] == 0
    assert said["many images"][0] == 23 * (64 + 2) * 4  # a block for every 32 of 720 pairs
