"""Small PTX programs for the emulator's tests."""

from __future__ import annotations

import numpy as np

from mmi_emulator.ptx import GlobalMemory, Machine, parse

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"

_REGISTERS = {1: "rs", 2: "rs", 4: "r", 8: "rd"}
_DECLARATIONS = """
    .reg .pred %p<8>;
    .reg .b16 %rs<16>;
    .reg .b32 %r<16>;
    .reg .b64 %rd<16>;
    .reg .b64 %a<8>;
    .reg .b32 %t<8>;
"""


def entry(body: str, pointers: int, before: str = "") -> str:
    """A kernel `k` with that many pointers, in %a0, %a1, ...; the thread's number in %t0 (in its
    block) and %t1 (in the grid)."""
    parameters = ", ".join(f".param .u64 p{index}" for index in range(pointers))
    loads = "\n".join(f"    ld.param.u64 %a{index}, [p{index}];" for index in range(pointers))
    thread = "mov.u32 %t0, %tid.x; mov.u32 %t2, %ctaid.x; mov.u32 %t3, %ntid.x;"
    thread += " mad.lo.s32 %t1, %t2, %t3, %t0;"
    return (
        f"{HEAD}.visible .entry k({parameters})\n{{{_DECLARATIONS}{before}\n"
        f"{loads}\n    {thread}\n{body}\n    ret;\n}}"
    )


def launch(
    text: str, inputs: list[np.ndarray], output: np.ndarray, grid: int, block: int
) -> np.ndarray:
    """Run kernel `k` of `text` over `inputs`; what it writes, like `output`, which must be all."""
    kernel = parse(text)["k"]
    memory = GlobalMemory(sum(array.nbytes + 256 for array in (*inputs, output)))
    addresses = [memory.allocate(array, f"input {i}") for i, array in enumerate(inputs)]
    addresses.append(memory.reserve(output.nbytes, "output"))
    arguments = np.array(addresses, np.uint64).tobytes()
    Machine(kernel, memory, (grid, 1, 1), (block, 1, 1), arguments, most_instructions=10_000).run()
    found, known = memory.written(addresses[-1], output.dtype)
    assert known.all()
    return found


def evaluate(instruction: str, result: type | str, *operands: np.ndarray) -> np.ndarray:
    """`instruction` on arrays, one thread a number. Its operands are named $0 (the result), $1,
    $2, ..., registers as wide as the arrays' numbers."""
    count = len(operands[0])
    out = np.zeros(count, result)
    lines = []
    for index, array in enumerate([out, *operands]):
        width = array.dtype.itemsize
        name = f"%{_REGISTERS[width]}{index + 1}"
        instruction = instruction.replace(f"${index}", name)
        address = f"%a{(index - 1) if index else len(operands)}"
        lines.append(f"mad.wide.u32 {address}, %t1, {width}, {address};")
        if index:
            lines.append(f"ld.global.b{8 * width} {name}, [{address}];")
    target = f"%{_REGISTERS[out.dtype.itemsize]}1"
    store = f"st.global.b{8 * out.dtype.itemsize} [%a{len(operands)}], {target};"
    body = "\n".join([*lines, instruction + ";", store])
    block = next(size for size in range(min(count, 256), 0, -1) if count % size == 0)
    text = entry(body, len(operands) + 1)
    return launch(text, list(operands), out, count // block, block)
