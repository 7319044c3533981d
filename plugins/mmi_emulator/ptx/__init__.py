"""PTX emulator: run what nvcc and NVRTC emit on a CPU, with every memory access checked."""

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
