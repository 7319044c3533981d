"""Threads diverge and meet, share memory, wait for one another; and every misuse is a fault."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from emulator.ptx_programs import entry, launch
from mmi_emulator.ptx import Fault, GlobalMemory, Machine, parse

STORE = "mad.wide.u32 %a0, %t1, 4, %a0; st.global.u32 [%a0], %r1;"


def run(body: str, grid: int = 1, block: int = 64, before: str = "") -> np.ndarray:
    """Contents of %r1 after `body`, for every thread."""
    text = entry(f"{body}\n{STORE}", 1, before)
    return launch(text, [], np.zeros(grid * block, np.uint32), grid, block)


def test_threads_leave_a_loop_one_after_another() -> None:
    """Collatz steps of 1..128: data-dependent loops with a branch inside."""
    body = """
    add.u32 %r2, %t1, 1; mov.u32 %r1, 0;
AGAIN:
    setp.eq.u32 %p1, %r2, 1; @%p1 bra DONE;
    add.u32 %r1, %r1, 1; and.b32 %r3, %r2, 1; setp.eq.u32 %p2, %r3, 0; @%p2 bra EVEN;
    mad.lo.u32 %r2, %r2, 3, 1; bra AGAIN;
EVEN:
    shr.u32 %r2, %r2, 1; bra.uni AGAIN;
DONE:
"""

    def steps(number: int) -> int:
        count = 0
        while number != 1:
            number = 3 * number + 1 if number % 2 else number // 2
            count += 1
        return count

    expected = [steps(number) for number in range(1, 129)]
    np.testing.assert_array_equal(run(body, 2, 64), expected)


def test_threads_meet_behind_code_that_stands_later() -> None:
    """The branch target lies before the branch: the shuffle needs all 32 threads together."""
    body = """
    and.b32 %r2, %t0, 1; setp.eq.u32 %p1, %r2, 0; bra START;
MEET:
    shfl.sync.bfly.b32 %r1|%p2, %r3, 1, 31, -1; bra END;
START:
    mov.u32 %r3, %t0; @%p1 bra MEET;
    add.u32 %r3, %r3, 100; bra MEET;
END:
"""
    lane = np.arange(32)
    np.testing.assert_array_equal(run(body, 1, 32), np.where(lane % 2, lane ^ 1, (lane ^ 1) + 100))


SHUFFLES = {
    "bfly": lambda lane, by: lane ^ by,
    "up": lambda lane, by: lane - by if lane >= by else lane,
    "down": lambda lane, by: lane + by if lane + by < 32 else lane,
    "idx": lambda lane, by: by,
}


@pytest.mark.parametrize("mode", SHUFFLES)
def test_shuffles(mode: str) -> None:
    clamp = 0 if mode == "up" else 31
    body = f"mul.lo.u32 %r2, %t0, 7; shfl.sync.{mode}.b32 %r1|%p1, %r2, 5, {clamp}, -1;"
    got = run(body, 1, 64)
    lane = np.arange(64)
    source = [SHUFFLES[mode](each % 32, 5) + each // 32 * 32 for each in lane]
    np.testing.assert_array_equal(got, np.array(source) * 7)


def test_shuffles_within_segments() -> None:
    """width 8: the control operand is (32 - 8) << 8 | 7."""
    body = "shfl.sync.down.b32 %r1|%p1, %t0, 3, 6151, -1; selp.u32 %r2, 100, 0, %p1;"
    got = run(body + " add.u32 %r1, %r1, %r2;", 1, 32)
    lane = np.arange(32)
    inside = lane % 8 + 3 < 8
    np.testing.assert_array_equal(got, np.where(inside, lane + 3 + 100, lane))


def test_part_of_a_warp_shuffles_by_itself() -> None:
    body = """
    setp.lt.u32 %p1, %t0, 16; mov.u32 %r1, 5; @!%p1 bra END;
    shfl.sync.bfly.b32 %r1, %t0, 1, 31, 65535;
END:
"""
    lane = np.arange(32)
    np.testing.assert_array_equal(run(body, 1, 32), np.where(lane < 16, lane ^ 1, 5))


def test_votes_and_reductions() -> None:
    body = "and.b32 %r2, %t1, 3; setp.eq.u32 %p1, %r2, 1; "
    ballot = run(body + "vote.sync.ballot.b32 %r1, %p1, -1;", 1, 32)
    np.testing.assert_array_equal(ballot, sum(1 << lane for lane in range(1, 32, 4)))
    some = run(body + "vote.sync.any.pred %p2, %p1, -1; selp.u32 %r1, 1, 0, %p2;", 1, 32)
    every = run(body + "vote.sync.all.pred %p2, %p1, -1; selp.u32 %r1, 1, 0, %p2;", 1, 32)
    assert some.all() and not every.any()
    most = run("redux.sync.max.u32 %r1, %t1, -1;", 2, 64)
    np.testing.assert_array_equal(most, np.repeat([31, 63, 95, 127], 32))


def test_tensor_core_product() -> None:
    """m16n8k16 with the fragments of the manual, small integers: exact in every rounding."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 8, (16, 16)), rng.integers(-8, 8, (16, 8))
    c = rng.integers(-99, 99, (16, 8))
    lanes = range(32)

    def half(matrix: np.ndarray, places: list[list[tuple[int, int]]]) -> np.ndarray:
        values = [[matrix[place] for place in register] for register in places]
        return np.array(values, np.float16).view(np.uint32).reshape(-1)

    group, thread = [lane // 4 for lane in lanes], [lane % 4 * 2 for lane in lanes]
    pairs = list(zip(group, thread, strict=True))
    fragments = [
        half(a, [[(g + row, t + k), (g + row, t + k + 1)] for g, t in pairs])
        for k in (0, 8)
        for row in (0, 8)
    ]
    fragments += [half(b, [[(t + k, g), (t + k + 1, g)] for g, t in pairs]) for k in (0, 8)]
    places = [(row, half_) for row in (0, 8) for half_ in (0, 1)]
    fragments += [
        np.array([c[g + row, t + j] for g, t in pairs], np.float32).view(np.uint32)
        for row, j in places
    ]
    loads = [
        f"mad.wide.u32 %rd1, %t1, 4, %a{i}; ld.global.b32 %r{i + 1}, [%rd1];" for i in range(10)
    ]
    names = [f"%r{i}" for i in range(1, 11)]
    product = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    product += f"{{{','.join(names[6:])}}}, {{{','.join(names[:4])}}}, "
    product += f"{{{','.join(names[4:6])}}}, {{{','.join(names[6:])}}};"
    store = "mad.wide.u32 %rd1, %t1, 16, %a10; "
    store += f"st.global.v4.b32 [%rd1], {{{','.join(names[6:])}}};"
    text = entry("\n".join([*loads, product, store]), 11).replace(
        ".reg .b64 %a<8>", ".reg .b64 %a<11>"
    )
    got = launch(text, fragments, np.zeros(128, np.float32), 1, 32).reshape(32, 4)
    expected = a @ b + c
    for lane, (g, t) in enumerate(pairs):
        np.testing.assert_array_equal(got[lane], [expected[g + row, t + j] for row, j in places])


REVERSE = """
    mov.u32 %r2, %t0; shl.b32 %r3, %r2, 2; mov.u32 %r4, table; add.u32 %r5, %r4, %r3;
    st.shared.u32 [%r5], %t1;
    BARRIER
    sub.u32 %r6, 63, %r2; shl.b32 %r6, %r6, 2; add.u32 %r6, %r4, %r6;
    ld.shared.u32 %r1, [%r6];
"""
TABLE = ".shared .align 16 .b8 table[256];"


def test_a_block_shares_memory() -> None:
    got = run(REVERSE.replace("BARRIER", "bar.sync 0;"), 3, 64, TABLE)
    np.testing.assert_array_equal(got, np.arange(192).reshape(3, 64)[:, ::-1].reshape(-1))


def test_a_thread_that_comes_late_to_a_barrier_from_below_it_joins_those_that_wait() -> None:
    """Compilers put a branch that is taken rarely behind the end and jump back before a barrier."""
    late = "setp.lt.u32 %p1, %t0, 32; @%p1 bra LATE; BACK: mov.u32 %r9, 2; bar.sync 0;"
    behind = " bra END; LATE: mov.u32 %r8, 1; bra BACK; END:"
    got = run(REVERSE.replace("BARRIER", late) + behind, 2, 64, TABLE)
    np.testing.assert_array_equal(got, np.arange(128).reshape(2, 64)[:, ::-1].reshape(-1))


@pytest.mark.parametrize("barrier", ["", "bar.warp.sync -1;"])
def test_a_race_between_warps_is_a_fault(barrier: str) -> None:
    """In lockstep the numbers would be right: only race detection sees it."""
    with pytest.raises(Fault, match=r"races with a store.*block 0, thread 0"):
        run(REVERSE.replace("BARRIER", barrier), 1, 64, TABLE)


WITHIN = REVERSE.replace("63, %r2", "31, %r2")


def test_a_warp_barrier_orders_a_warp() -> None:
    got = run(WITHIN.replace("BARRIER", "bar.warp.sync -1;"), 1, 32, TABLE)
    np.testing.assert_array_equal(got, np.arange(32)[::-1])
    with pytest.raises(Fault, match="races with a store"):
        run(WITHIN.replace("BARRIER", ""), 1, 32, TABLE)


def test_writing_what_another_still_reads_is_a_fault() -> None:
    again = WITHIN.replace("BARRIER", "bar.sync 0;") + "SECOND st.shared.u32 [%r5], %r1;"
    run(again.replace("SECOND", "bar.sync 0;"), 1, 32, TABLE)
    with pytest.raises(Fault, match="races with a load"):
        run(again.replace("SECOND", ""), 1, 32, TABLE)


def test_two_writers_are_a_fault() -> None:
    with pytest.raises(Fault, match="two threads write the same shared memory at once"):
        run("st.shared.u32 [table], %t0; mov.u32 %r1, 0;", 1, 32, TABLE)
    with pytest.raises(Fault, match="two threads write the same bytes of output"):
        run("st.global.u32 [%a0], %t0; mov.u32 %r1, 0;", 1, 32)
    apart = "setp.eq.u32 %p1, %t1, 0; @%p1 st.global.u32 [%a0+4], %t0; mov.u32 %r1, 0;"
    with pytest.raises(Fault, match="two threads write the same bytes of output"):
        run(apart, 2, 32)


def test_reading_what_another_thread_wrote_to_global_memory_is_a_fault() -> None:
    body = f"mov.u32 %r1, 1; {STORE} xor.b32 %r2, %t1, 1; sub.u32 %r2, %r2, %t1;"
    body += "mad.wide.s32 %rd1, %r2, 4, %a0; ld.global.u32 %r3, [%rd1];"
    text = entry(body, 1)
    with pytest.raises(Fault, match="races with a store"):
        launch(text, [], np.zeros(32, np.uint32), 1, 32)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.shared.u32 %r1, [table];", "nobody has written"),
        ("ld.global.u32 %r1, [%a0];", "nobody has written"),
        ("mov.u32 %r1, 0; st.shared.u32 [table+256], %r1;", "outside shared memory"),
        ("ld.global.u32 %r1, [%a0+256];", r"4 bytes at 256 are outside output \(256 bytes\)"),
        ("ld.global.u32 %r1, [%a0+-4];", "outside"),
        ("mov.u64 %rd1, 64; ld.global.u32 %r1, [%rd1];", "outside every allocation"),
        ("ld.global.v2.u32 {%r1, %r2}, [%a0+4];", "misaligned 8-byte access"),
        ("st.shared.u32 [table+2], %t0;", "misaligned 4-byte access"),
        ("ld.param.u32 %r1, [p0+8];", "of the parameters"),
        ("L: bra L;", "does not end"),
        ("setp.lt.u32 %p1, %t0, 9; @%p1 bra L; bar.sync 0; L: mov.u32 %r1, 0;", "ended|never come"),
        (
            "setp.lt.u32 %p1, %t0, 9; @%p1 bra L; shfl.sync.bfly.b32 %r1, %t0, 1, 31, -1; L:",
            "ended|never come",
        ),
        ("shfl.sync.bfly.b32 %r1, %t0, 1, 31, 1;", "does not name its own thread"),
        (
            "setp.lt.u32 %p1, %t0, 16; @%p1 bra L; bar.warp.sync -1; bra M;"
            " L: bar.warp.sync -1; M: mov.u32 %r1, 0;",
            "never come",
        ),
        (
            "setp.lt.u32 %p1, %t0, 16; mov.u32 %r1, 0; @!%p1 bra L;"
            " shfl.sync.bfly.b32 %r1, %t0, 16, 31, 65535; L:",
            "does not take part",
        ),
    ],
)
def test_misuse_is_a_fault(body: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        run(body, 1, 64, TABLE)


def test_inputs_are_read_only_and_launches_end_orders() -> None:
    memory = GlobalMemory(4096)
    given, kept = memory.allocate(np.zeros(32, np.uint32), "given"), memory.reserve(128, "kept")
    body = "mad.wide.u32 %a0, %t1, 4, %a0; st.global.u32 [%a0], %t1;"
    kernel = parse(entry(body, 1))["k"]
    with pytest.raises(Fault, match="a store into given, which is an input"):
        Machine(kernel, memory, (1, 1, 1), (32, 1, 1), given.to_bytes(8, "little")).run()
    Machine(kernel, memory, (1, 1, 1), (32, 1, 1), kept.to_bytes(8, "little")).run()
    back = "xor.b32 %r2, %t1, 1; mad.wide.u32 %a0, %r2, 4, %a0; ld.global.u32 %r1, [%a0];"
    reader = parse(entry(back, 1))["k"]
    with pytest.raises(Fault, match="races"):
        Machine(reader, memory, (1, 1, 1), (32, 1, 1), kept.to_bytes(8, "little")).run()
    memory.next_launch()
    Machine(reader, memory, (1, 1, 1), (32, 1, 1), kept.to_bytes(8, "little")).run()


def test_chosen_blocks_alone_are_run() -> None:
    text = entry(f"mov.u32 %r1, %ctaid.x; {STORE}", 1)
    memory = GlobalMemory(4096)
    out = memory.reserve(4 * 128, "output").to_bytes(8, "little")
    counts = Machine(parse(text)["k"], memory, (4, 1, 1), (32, 1, 1), out, blocks=[1, 3]).run()
    values, known = memory.written(int.from_bytes(out, "little"), np.dtype("u4"))
    np.testing.assert_array_equal(known.reshape(4, 32).all(1), [False, True, False, True])
    np.testing.assert_array_equal(values[known], np.repeat([1, 3], 32))
    assert counts.by_name()["st"] == 64
    assert counts.bytes_by_kind()["st", "global", 4] == 256


def test_guards_and_branches_are_counted_as_executed() -> None:
    body = "setp.lt.u32 %p1, %t0, 5; @%p1 mov.u32 %r1, 1; @!%p1 bra L; mov.u32 %r2, 2; L: ret;"
    counts = Machine(
        parse(entry(body, 0))["k"], GlobalMemory(256), (1, 1, 1), (64, 1, 1), b""
    ).run()
    start = len(counts.executed) - 6
    assert counts.executed[start:].tolist() == [64, 5, 59, 5, 64, 0]


KERNEL = """
// Prefix sums of a block by shared memory, a loop that ends at different times, local arrays that
// are indexed, structs by value, 64-bit indices, division, predicates.
struct Shape { int sizes[4]; float scale; };
extern "C" __global__ void work(const float* in, const short* small, float* out, Shape shape) {
  __shared__ float sums[2][128];
  const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  float x = in[i] * shape.scale;
  int from = 0;
  sums[0][t] = x;
  for (int step = 1; step < 128; step *= 2) {
    __syncthreads();
    sums[1 - from][t] = sums[from][t] + (t >= step ? sums[from][t - step] : 0.f);
    from = 1 - from;
  }
  __syncthreads();
  float mine = sums[from][t];
  int n = small[i] < 0 ? -small[i] : small[i];
  int steps = 0;
  while (n > 0) { n = n / (2 + steps % 3); steps++; }
  int table[8];
  for (int k = 0; k < 8; k++) table[k] = shape.sizes[k % 4] * k;
  const unsigned lanes = __ballot_sync(~0u, steps & 1);
  mine += table[(steps + t) % 8] + __popc(lanes) + __shfl_down_sync(~0u, steps, 3);
  out[(long long)i] = fmaf(mine, 0.5f, floorf(x)) / (1.f + steps);
}
"""


def expected_of_work(
    x: np.ndarray, small: np.ndarray, sizes: list[int], scale: float
) -> np.ndarray:
    """The results of KERNEL, in float64 and Python's integers."""
    out = np.zeros(x.size)
    scaled = (x * np.float32(scale)).astype(np.float64)
    steps = []
    for number in np.abs(small.astype(int)).tolist():
        count = 0
        while number > 0:
            number //= 2 + count % 3
            count += 1
        steps.append(count)
    for i in range(x.size):
        t, first = i % 128, i - i % 128
        warp = i - i % 32
        mine = scaled[first : i + 1].sum()
        k = (steps[i] + t) % 8
        mine += sizes[k % 4] * k + sum(s & 1 for s in steps[warp : warp + 32])
        mine += steps[i + 3] if i % 32 + 3 < 32 else steps[i]
        out[i] = (mine * 0.5 + np.floor(scaled[i])) / (1 + steps[i])
    return out


@pytest.mark.parametrize("compute", [80, 120])
def test_a_kernel_of_the_compiler(tmp_path: Path, compute: int) -> None:
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("nvcc is not installed")
    source, made = tmp_path / "work.cu", tmp_path / "work.ptx"
    source.write_text(KERNEL)
    subprocess.run(
        [nvcc, "-ptx", f"-arch=compute_{compute}", str(source), "-o", str(made)], check=True
    )
    rng = np.random.default_rng(0)
    x, small = rng.normal(size=384).astype(np.float32), rng.integers(-999, 999, 384, np.int16)
    memory = GlobalMemory(1 << 16)
    out = memory.reserve(x.nbytes, "out")
    addresses = [memory.allocate(x, "in"), memory.allocate(small, "small"), out]
    sizes, scale = [3, -1, 7, 2], 1.5
    arguments = np.array(addresses, np.uint64).tobytes() + np.array(sizes, np.int32).tobytes()
    arguments += np.float32(scale).tobytes()
    kernel = parse(made.read_text())["work"]
    Machine(kernel, memory, (3, 1, 1), (128, 1, 1), arguments).run()
    got, known = memory.written(out, np.dtype("f4"))
    assert known.all()
    np.testing.assert_allclose(got, expected_of_work(x, small, sizes, scale), rtol=1e-5, atol=1e-5)
