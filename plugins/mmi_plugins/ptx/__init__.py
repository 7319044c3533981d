"""An emulator of PTX: what nvcc and NVRTC emit, executed on a CPU with every access checked."""

from mmi_plugins.ptx.machine import Counts, Machine
from mmi_plugins.ptx.memory import Fault, GlobalMemory
from mmi_plugins.ptx.parser import Instruction, Kernel, PtxError, parse

__all__ = [
    "Counts",
    "Fault",
    "GlobalMemory",
    "Instruction",
    "Kernel",
    "Machine",
    "PtxError",
    "parse",
]
