"""An emulator of PTX: what nvcc and NVRTC emit, executed on a CPU with every access checked."""

from mmi_emulator.ptx.machine import Counts, Machine
from mmi_emulator.ptx.memory import Fault, GlobalMemory
from mmi_emulator.ptx.parser import Instruction, Kernel, PtxError, parse

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
