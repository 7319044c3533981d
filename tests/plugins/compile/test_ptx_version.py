"""PTX versions: the written `.version` is the lowest that the instructions need.

NVIDIA's assemblers decide: `ptxas` of triton's wheel (CUDA 12.9 and 13), and nvJitLink of NVRTC's
own version where it is installed.
"""

import ctypes
import importlib.util
import itertools
import re
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mmi_deploy.errors import EngineError
from mmi_plugins.compile import nvrtc
from mmi_plugins.compile.ptx_version import (
    check_driver,
    driver_version,
    lowered,
    lowest_version,
    version_of,
)
from mmi_plugins.operator import TOLERANCES
from mmi_plugins.tensorrt.ahead_of_time import PTX_TARGETS, AheadOfTimeVariant, choose_variant

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")

# Driver and assembler that know an architecture first: CUDA 11.0, 11.8, 12.7 and 12.8.
FIRST = {80: (7, 0), 90: (7, 8), 100: (8, 6), 120: (8, 7)}
# GPUs that run the PTX of each target.
GPUS = {80: (80, 86, 87, 89), 90: (90,), 100: (100,), 120: (120,)}


def variants() -> list[AheadOfTimeVariant]:
    fields = {
        "level_heights": np.array([16, 8], np.int32),
        "level_widths": np.array([16, 8], np.int32),
        "base_grid": np.array([16.0], np.float32),
        "null_slot": np.array([1], np.int32),
    }
    kinds = itertools.product(TOLERANCES, (1, 10**6), (64, None))
    found = [choose_variant(d, fields, opt_rows=r, channels=c) for d, r, c in kinds]
    return list(dict.fromkeys(found))


@cache
def original(variant: AheadOfTimeVariant, target: int) -> str:
    """PTX as NVRTC writes it."""
    return nvrtc._run_nvrtc(variant.source, f"compute_{target}", "PTX").decode()


def as_version(ptx: str, version: tuple[int, int]) -> str:
    major, minor = version
    return re.sub(r"\.version\s+\S+", f".version {major}.{minor}", ptx, count=1)


@pytest.mark.parametrize("target", PTX_TARGETS)
def test_every_kernel_gets_the_first_version_of_its_architecture(target: int) -> None:
    for variant in variants():
        ptx = nvrtc.compile_ptx(variant, target)
        assert version_of(ptx) == FIRST[target]
        assert ptx == as_version(original(variant, target), FIRST[target]), "one line differs"


def ptxas() -> dict[str, Path]:
    """Assemblers of triton's wheel, by name."""
    found = importlib.util.find_spec("triton")
    folders = [Path(place) for place in (found.submodule_search_locations or ())] if found else []
    files = [file for folder in folders for file in folder.glob("backends/nvidia/bin/ptxas*")]
    return {file.name: file for file in files if file.is_file()}


def newest_of(tool: Path) -> tuple[int, int]:
    """Newest PTX version of an assembler: CUDA 12.9 has 8.8, 13.N has 9.N."""
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = map(int, re.findall(r"release (\d+)\.(\d+)", said)[0])
    return {(12, 8): (8, 7), (12, 9): (8, 8)}.get((major, minor), (major - 4, minor))


def assembled(tool: Path, ptx: str, gpu: int, folder: Path) -> bytes:
    source, out = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx)
    subprocess.run([tool, f"-arch=sm_{gpu}", source, "-o", out], check=True, capture_output=True)
    return out.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not ptxas(), reason="no ptxas: pip install triton")
@pytest.mark.parametrize("target", PTX_TARGETS)
def test_assemblers_take_it_and_make_the_same_machine_code(target: int, tmp_path: Path) -> None:
    """Machine code equals that of the newest version that each assembler takes, on every GPU that
    runs the target."""
    for tool, gpu in itertools.product(ptxas().values(), GPUS[target]):
        for variant in variants():
            low = nvrtc.compile_ptx(variant, target)
            newest = min(newest_of(tool), version_of(original(variant, target)))
            high = as_version(low, newest)
            assert low != high
            code = assembled(tool, low, gpu, tmp_path)
            assert code == assembled(tool, high, gpu, tmp_path)


@pytest.mark.skipif(not ptxas(), reason="no ptxas: pip install triton")
def test_a_version_lower_still_is_refused(tmp_path: Path) -> None:
    """The version is the lowest: with the one before it, the assembler refuses the kernel."""
    (variant, *_) = variants()
    for target, (major, minor) in FIRST.items():
        before = (major, minor - 1) if minor else (major - 1, 5)
        ptx = as_version(original(variant, target), before)
        for tool in ptxas().values():
            with pytest.raises(subprocess.CalledProcessError):
                assembled(tool, ptx, target, tmp_path)


def nvjitlink() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("nvidia")
    for place in (found.submodule_search_locations or ()) if found else ():
        for file in sorted(Path(place).glob("cu*/lib/libnvJitLink.so.*")):
            return ctypes.CDLL(str(file))
    return None


def linked(library: ctypes.CDLL, ptx: str, gpu: int) -> bytes:
    """Machine code of `ptx` for `sm_<gpu>` by nvJitLink, the assembler inside the driver."""
    handle, option = ctypes.c_void_p(), (ctypes.c_char_p * 1)(f"-arch=sm_{gpu}".encode())
    major, minor = ctypes.c_uint(), ctypes.c_uint()
    library.nvJitLinkVersion(ctypes.byref(major), ctypes.byref(minor))
    name = f"_{major.value}_{minor.value}"
    call = {
        word: getattr(library, f"__nvJitLink{word}{name}", None)
        or getattr(library, f"nvJitLink{word}")
        for word in ("Create", "AddData", "Complete", "GetLinkedCubinSize", "GetLinkedCubin")
    }
    assert call["Create"](ctypes.byref(handle), 1, option) == 0
    text, size = ptx.encode() + b"\0", ctypes.c_size_t()
    assert call["AddData"](handle, 2, text, ctypes.c_size_t(len(text)), b"kernel") == 0  # 2: PTX
    assert call["Complete"](handle) == 0
    assert call["GetLinkedCubinSize"](handle, ctypes.byref(size)) == 0
    code = ctypes.create_string_buffer(size.value)
    assert call["GetLinkedCubin"](handle, code) == 0
    return code.raw


@pytest.mark.slow
@pytest.mark.skipif(nvjitlink() is None, reason="pip install nvidia-nvjitlink (45 MB)")
@pytest.mark.parametrize("target", PTX_TARGETS)
def test_the_machine_code_is_that_of_nvrtcs_own_version(target: int) -> None:
    library = nvjitlink()
    assert library
    for variant, gpu in itertools.product(variants(), GPUS[target]):
        low, own = nvrtc.compile_ptx(variant, target), original(variant, target)
        assert low != own
        assert linked(library, low, gpu) == linked(library, own, gpu)


TEXT = """
.version 9.5
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 p_0) {
  .reg .pred %p<2>; .reg .b32 %r<4>; .reg .b64 %rd<3>; .reg .f32 %f<3>;
  mov.u32 %r1, %tid.x;
  setp.eq.s32 %p1, %r1, 7;
$L_1: @!%p1 bra $L_1;
  BODY
  ret;
}
"""


@pytest.mark.parametrize(
    ("body", "version"),
    [
        ("add.s32 %r2, %r1, 1; // tanh.approx.f32 %f1, %f2; in a comment", (7, 0)),
        ("ld.global.nc.v4.f32 {%f1,%f1,%f1,%f1}, [%rd1];", (7, 0)),
        ("add.rn.f32x2 %rd1, %rd1, %rd2;", (9, 5)),
        ("ld.global.v8.f32 {%f1,%f1,%f1,%f1,%f1,%f1,%f1,%f1}, [%rd1];", (9, 5)),
        ("ld.global.L2::128B.b32 %r1, [%rd1];", (9, 5)),
        ("@%p1 cp.async.bulk.wait_group 0;", (9, 5)),
        ("mov.u32 %r1, %cluster_ctaid.x;", (9, 5)),
        ('.pragma "used_bytes_mask 0xfff"; ld.global.b32 %r1, [%rd1];', (8, 3)),
        ('.pragma "enable_smem_spilling";', (9, 5)),
        (".reg .b128 %q<2>;", (9, 5)),
    ],
)
def test_the_version_stays_where_something_is_not_known(
    body: str, version: tuple[int, int]
) -> None:
    text = TEXT.replace("BODY", body)
    assert lowest_version(text) == version
    assert version_of(lowered(text)) == version


def test_an_unknown_target_keeps_its_version() -> None:
    text = TEXT.replace("BODY", "")
    assert lowest_version(text.replace("sm_80", "sm_103a")) == (9, 5)
    assert lowest_version(text.replace("9.5", "6.5")) == (6, 5), "never raised"


def test_a_driver_that_is_older_than_the_ptx_is_told_which_nvrtc_to_install() -> None:
    """PTX with something unknown keeps NVRTC's version, and only a new driver takes it."""
    text = TEXT.replace("BODY", "")
    for driver in (None, (13, 5), (13, 6)):
        check_driver(text, driver)
    check_driver(lowered(text), (11, 0))
    with pytest.raises(EngineError, match=r"got PTX 9\.5\. .*'nvidia-cuda-nvrtc==13\.0\.\*'"):
        check_driver(text, (13, 0))
    with pytest.raises(EngineError, match=r"PTX 8\.7 .*'nvidia-cuda-nvrtc-cu12==12\.8\.\*'"):
        check_driver(text, (12, 8))
    assert [driver_version((12, minor)) for minor in (4, 5, 6, 7, 8, 9)] == [
        (8, 4), (8, 5), (8, 5), (8, 6), (8, 7), (8, 8),
    ]  # fmt: skip
