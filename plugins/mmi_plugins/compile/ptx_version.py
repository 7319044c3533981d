"""Lowest PTX version of a kernel, so that drivers older than the compiler take it.

NVRTC and nvcc write their own newest `.version`, and a driver refuses PTX that is newer than itself
(error 222): CUDA's compatibility of minor versions covers machine code alone. The instructions of
our kernels are far older. `lowered` writes the version that introduced the newest of them, and
leaves the text as it is where it has anything that is not in the tables below.
"""

from __future__ import annotations

import re

from mmi_deploy.errors import EngineError

Version = tuple[int, int]

# First PTX version for each `.target`.
_TARGETS: dict[str, Version] = {
    "sm_80": (7, 0),
    "sm_86": (7, 1),
    "sm_87": (7, 4),
    "sm_89": (7, 8),
    "sm_90": (7, 8),
    "sm_100": (8, 6),
    "sm_120": (8, 7),
}

_TYPE = r"(?:[bus](?:8|16|32|64)|f(?:16|32|64))"
_COMPARISON = r"(?:eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan)"

# First PTX version with instructions of these whole names. 3.2 stands for all that are older than
# every driver in question.
_INSTRUCTIONS: tuple[tuple[Version, re.Pattern[str]], ...] = tuple(
    (version, re.compile(pattern))
    for version, pattern in (
        (
            (3, 2),
            r"(?:abs|add|div|fma|mad|max|min|mul|neg|rem|sub)"
            rf"(?:\.(?:rn|rz|rm|rp|ftz|sat|lo|hi|wide|approx|full))*\.{_TYPE}",
        ),
        ((3, 2), rf"(?:and|or|xor|not|shl|shr|mov|selp|popc|clz|prmt)\.(?:{_TYPE}|pred)"),
        (
            (3, 2),
            rf"cvt(?:\.(?:rn|rz|rm|rp|rni|rzi|rmi|rpi|ftz|sat))*\.{_TYPE}\.{_TYPE}",
        ),
        ((3, 2), rf"setp\.{_COMPARISON}(?:\.ftz)?\.{_TYPE}"),
        ((3, 2), r"(?:ex2|lg2|rcp|rsqrt|sqrt)\.approx(?:\.ftz)?\.f32"),
        ((3, 2), rf"(?:ld|st)\.(?:global|shared|local|param)(?:\.v[24])?\.{_TYPE}"),
        ((3, 2), rf"ld\.global\.nc(?:\.v[24])?\.{_TYPE}"),
        ((3, 2), r"cvta\.to\.global\.u64|bar\.sync|bra|bra\.uni|ret"),
        ((6, 0), r"(?:shfl\.sync\.(?:bfly|idx|up|down)|vote\.sync\.ballot)\.b32|bar\.warp\.sync"),
        ((7, 0), r"cvt\.rn\.(?:f16x2|bf16x2|bf16)\.f32"),
        ((7, 0), r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(?:f16\.f16|bf16\.bf16)\.f32"),
    )
)

# First PTX version with pragmas of these first words.
_PRAGMAS: dict[str, Version] = {"nounroll": (3, 2), "used_bytes_mask": (8, 3)}

# Directives and special registers that are older than every driver in question.
_DIRECTIVES = frozenset(
    "version target address_size visible entry param reg shared local global align "
    "maxntid minnctapersm extern func noreturn pred b8 b16 b32 b64 f32 f64 s32 s64 u8 u16 u32 "
    "u64 s8 s16 ptr const weak pragma".split()
)
_SPECIAL = frozenset("tid ntid ctaid nctaid laneid warpid".split())

# A label, an optional guard, and the name of an instruction.
_STATEMENT = re.compile(r"(?:\$?\w+:\s*)?(?:@!?%\w+\s+)?([a-z][\w.:]*)")


def version_of(ptx: str) -> Version:
    """`.version` of `ptx`."""
    found = re.search(r"^\s*\.version\s+(\d+)\.(\d+)", ptx, re.MULTILINE)
    if found is None:
        raise ValueError("this PTX has no .version")
    return int(found[1]), int(found[2])


def lowest_version(ptx: str) -> Version:
    """Lowest PTX version that has everything in `ptx`; its own where something is not known."""
    own = version_of(ptx)
    body = re.sub(r"/\*.*?\*/", " ", re.sub(r"//[^\n]*", " ", ptx), flags=re.DOTALL)
    targets = re.findall(r"\.target\s+(\w+)", body)
    registers = set(re.findall(r"%([a-z_]+)\b(?!\d|<)", body)) - _declared(body)
    # After white space or a bracket: the dots inside an instruction's name are not directives.
    directives = set(re.findall(r"(?:^|[\s(])\.([a-z]\w*)", body))
    pragmas = set(re.findall(r"\.pragma\s+\"\s*(\w*)", body))
    needed = [
        *(_TARGETS.get(target, own) for target in targets),
        *(_PRAGMAS.get(pragma, own) for pragma in pragmas),
        *(_since(name, own) for name in _instructions(body)),
    ]
    if not targets or directives - _DIRECTIVES or registers - _SPECIAL:
        needed.append(own)
    return min(own, max(needed))


def lowered(ptx: str) -> str:
    """`ptx` with the lowest `.version` that has everything in it."""
    major, minor = lowest_version(ptx)
    return re.sub(
        r"^(\s*\.version\s+)\d+\.\d+", rf"\g<1>{major}.{minor}", ptx, count=1, flags=re.MULTILINE
    )


def check_driver(ptx: str, cuda: Version | None) -> None:
    """Raise `EngineError` where a driver that supports CUDA up to version `cuda` refuses `ptx`,
    because it has something newer. cuda: None where there is no driver."""
    if cuda is None or version_of(ptx) <= (newest := driver_version(cuda)):
        return
    major, minor = cuda
    install = (
        f"pip install 'nvidia-cuda-nvrtc=={major}.{minor}.*'"
        if major >= 13
        else "pip uninstall -y nvidia-cuda-nvrtc && "
        f"pip install 'nvidia-cuda-nvrtc-cu{major}=={major}.{minor}.*'"
    )
    raise EngineError(
        "the NVIDIA driver is older than the PTX that NVRTC writes",
        expected=f"PTX {newest[0]}.{newest[1]} or older, for CUDA {major}.{minor}",
        got="PTX {}.{}".format(*version_of(ptx)),
        fix=f"Install the driver's NVRTC: {install}",
    )


def driver_version(cuda: Version) -> Version:
    """Newest PTX version that a driver for CUDA version `cuda` takes."""
    major, minor = cuda
    if major == 12:  # 12.6 added none
        return 8, minor if minor < 6 else minor - 1
    return major - 4, minor


def _since(name: str, otherwise: Version) -> Version:
    found = (version for version, pattern in _INSTRUCTIONS if pattern.fullmatch(name))
    return min(found, default=otherwise)


def _instructions(body: str) -> set[str]:
    """Names of the instructions in the bodies of functions, without their operands."""
    statements = (part.strip() for part in re.split(r"[;{}]", body))
    matches = (_STATEMENT.match(part) for part in statements)
    return {match[1] for match in matches if match}


def _declared(body: str) -> set[str]:
    """Prefixes of the registers that the code declares, such as `rd` of `%rd<9>`."""
    return set(re.findall(r"%([a-z_]+)<\d+>", body))
