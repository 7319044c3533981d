"""Every instruction does what the PTX manual says: against exact fractions, and Python's integers.

Expected values never come from the emulator's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from emulator.ptx_programs import evaluate
from mmi_emulator.ptx import Fault, PtxError

# Bits of the significand, and the exponent of the smallest subnormal.
FORMATS = {"f16": (11, -24), "bf16": (8, -133), "f32": (24, -149)}


def nearest(exact: Fraction, form: str) -> float:
    """`exact` rounded to nearest, ties to even: the definition of IEEE 754."""
    if exact == 0:
        return 0.0
    bits, least = FORMATS[form]
    exponent = 0
    while abs(exact) / Fraction(2) ** exponent >= 2:
        exponent += 1
    while abs(exact) / Fraction(2) ** exponent < 1:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - bits + 1, least)
    steps = exact / unit
    whole = steps.numerator // steps.denominator
    rest = steps - whole
    whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    return float(whole * unit)


def bits_of(values: np.ndarray, form: str) -> np.ndarray:
    """float64 values that are numbers of the format, as its bits."""
    if form == "f16":
        return values.astype(np.float16).view(np.uint16)
    single = values.astype(np.float32).view(np.uint32)
    return (single >> 16).astype(np.uint16) if form == "bf16" else single


def values_of(bits: np.ndarray, form: str) -> np.ndarray:
    """The other way round."""
    if form == "bf16":
        bits = bits.astype(np.uint32) << 16
    return bits.view({"f16": np.float16, "bf16": np.float32, "f32": np.float32}[form]).astype(float)


def numbers_of(form: str, count: int, seed: int) -> np.ndarray:
    """Bits of random numbers of all moderate sizes, and of small whole ones, which make ties."""
    rng = np.random.default_rng(seed)
    spread = {"f16": 5, "bf16": 20, "f32": 40}[form]
    values = rng.normal(size=count) * 2.0 ** rng.integers(-spread, spread, count)
    values[::3] = rng.integers(-(2**12), 2**12, len(values[::3])) / 16
    if form == "bf16":
        return bits_of(values, form)  # cut off
    return bits_of(values.astype(np.float16 if form == "f16" else np.float32), form)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_float_arithmetic_is_rounded_once(form: str, name: str) -> None:
    count = 3 if name == "fma" else 2
    bits = [numbers_of(form, 3000, seed) for seed in range(count)]
    if name == "fma":  # sums that nearly cancel, and ties far below
        product = values_of(bits[0], form) * values_of(bits[1], form)
        bits[2][::2] = bits_of(-product.astype(np.float32), "f32" if form == "f32" else form)[::2]
    operands = ", ".join(f"${index + 1}" for index in range(count))
    got = evaluate(f"{name}.rn.{form} $0, {operands}", bits[0].dtype.str, *bits)
    exact = [[Fraction(float(x)) for x in values_of(each, form)] for each in bits]
    compute: dict[str, Callable[..., Fraction]] = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "fma": lambda a, b, c: a * b + c,
    }
    expected = np.array([nearest(compute[name](*row), form) for row in zip(*exact, strict=True)])
    largest = {"f16": 65504.0, "bf16": 3e38, "f32": 3e38}[form]
    kept = np.abs(expected) <= largest
    assert kept.mean() > 0.9
    np.testing.assert_array_equal(values_of(got, form)[kept], expected[kept])


@pytest.mark.parametrize("form", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["add", "mul", "fma", "max"])
def test_packed_halves_are_two_numbers(form: str, name: str) -> None:
    halves = [
        numbers_of(form, 512, seed).reshape(-1, 2) for seed in range(3 if name == "fma" else 2)
    ]
    operands = ", ".join(f"${index + 1}" for index in range(len(halves)))
    rounding = "" if name == "max" else ".rn"
    packed = [np.ascontiguousarray(each).view(np.uint32).reshape(-1) for each in halves]
    both = evaluate(f"{name}{rounding}.{form}x2 $0, {operands}", "u4", *packed)
    one = [
        evaluate(
            f"{name}{rounding}.{form} $0, {operands}", "u2", *(each[:, half] for each in halves)
        )
        for half in (0, 1)
    ]
    np.testing.assert_array_equal(both.view(np.uint16).reshape(-1, 2), np.stack(one, 1))


def test_packed_floats_are_two_floats() -> None:
    a, b, c = (numbers_of("f32", 256, seed).view(np.uint64) for seed in range(3))
    got = evaluate("fma.rn.f32x2 $0, $1, $2, $3", "u8", a, b, c).view(np.uint32)
    one = evaluate("fma.rn.f32 $0, $1, $2, $3", "u4", *(x.view(np.uint32) for x in (a, b, c)))
    np.testing.assert_array_equal(got, one)


def test_a_fused_product_is_not_rounded_on_the_way() -> None:
    """(1 + 2^-12)^2 - 1 - 2^-11 is 2^-24 exactly; with a rounded product it is 0."""
    a = np.full(1, 1 + 2.0**-12, np.float32)
    c = np.full(1, -1 - 2.0**-11, np.float32)
    assert evaluate("fma.rn.f32 $0, $1, $1, $2", "f4", a, c)[0] == 2.0**-24


def test_a_tie_after_a_tie_is_broken_by_the_exact_sum() -> None:
    """1 + 2^-24 + 2^-80 lies above the tie, which float64 cannot see: rounding twice gives 1."""
    a = np.array([2.0**-40], np.float32)
    b = np.array([2.0**-40], np.float32)
    c = np.array([1 + 2.0**-23], np.float32)
    half = np.array([2.0**-24], np.float32)
    top = evaluate("fma.rn.f32 $0, $1, $2, $3", "f4", half, np.ones(1, "f4"), np.ones(1, "f4"))
    assert top[0] == 1.0  # the tie itself, to even
    # 2^-24 (1 + 2^-23) = 2^-24 + 2^-47, above the tie
    above = evaluate("fma.rn.f32 $0, $1, $2, $3", "f4", half, c, np.ones(1, "f4"))
    assert above[0] == np.float32(1 + 2.0**-23)
    assert evaluate("fma.rn.f32 $0, $1, $2, $3", "f4", a, b, np.ones(1, "f4"))[0] == 1.0
    # a product of 48 bits that ends beyond float64's last bit beside 1: just above and below
    x, y = np.array([1 + 2.0**-23], "f4"), np.array([2.0**-24 * (1 + 2.0**-23)], "f4")
    exact = Fraction(float(x[0])) * Fraction(float(y[0])) + 1
    got = evaluate("fma.rn.f32 $0, $1, $2, $3", "f4", x, y, np.ones(1, "f4"))[0]
    assert got == nearest(exact, "f32")


def test_subnormals_are_kept_or_flushed() -> None:
    small = np.array([2.0**-130, -(2.0**-130), 2.0**-149], np.float32)
    one = np.ones(3, np.float32)
    np.testing.assert_array_equal(evaluate("mul.f32 $0, $1, $2", "f4", small, one), small)
    flushed = evaluate("mul.ftz.f32 $0, $1, $2", "f4", small, one)
    np.testing.assert_array_equal(flushed.view(np.uint32), [0, 0x80000000, 0])


@pytest.mark.parametrize(
    ("instruction", "function", "ulps"),
    [
        ("ex2.approx.f32", np.exp2, 2),
        ("ex2.approx.ftz.f32", np.exp2, 2),
        ("rcp.approx.ftz.f32", lambda x: 1 / x, 1),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), 2),
        ("sqrt.approx.f32", np.sqrt, 1),
        ("lg2.approx.f32", np.log2, 2),
    ],
)
def test_approximations_are_off_within_their_bound(
    instruction: str, function: Callable[[np.ndarray], np.ndarray], ulps: int
) -> None:
    x = np.random.default_rng(0).uniform(0.01, 30, 4096).astype(np.float32)
    got = evaluate(f"{instruction} $0, $1", "f4", x)
    exact = function(x.astype(np.float64))
    error = (got - exact) / np.spacing(np.abs(exact).astype(np.float32))
    assert 0.6 < np.abs(error).max() <= ulps + 0.5
    again = evaluate(f"{instruction} $0, $1", "f4", x)
    np.testing.assert_array_equal(got, again)


def test_special_values_of_approximations_are_exact() -> None:
    inf, nan = np.inf, np.nan
    x = np.array([0, 1, -3, -inf, inf, nan, -200], np.float32)
    got = evaluate("ex2.approx.ftz.f32 $0, $1", "f4", x)
    np.testing.assert_array_equal(got, np.array([1, 2, 0.125, 0, inf, nan, 0], np.float32))
    got = evaluate("rcp.approx.f32 $0, $1", "f4", np.array([0, 1, 4, inf], np.float32))
    np.testing.assert_array_equal(got, np.array([inf, 1, 0.25, 0], np.float32))


INTEGERS: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "rem": lambda a, b: abs(a) % abs(b) * (1 if a >= 0 else -1),
}


def integers_of(type_: str, count: int, seed: int) -> np.ndarray:
    """Random integers of all sizes, with the limits among them."""
    dtype = np.dtype(f"{'i' if type_[0] == 's' else 'u'}{int(type_[1:]) // 8}")
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(seed)
    values = rng.integers(limits.min, limits.max, count, dtype, endpoint=True)
    values >>= rng.integers(0, limits.bits, count, dtype)
    values[:4] = [limits.min, limits.max, 1, limits.max // 2]
    return values


def wrapped(values: list[int], dtype: np.dtype) -> np.ndarray:
    """Python's integers cut to the width."""
    bits = np.iinfo(dtype).bits
    return np.array([value % 2**bits for value in values], f"u{bits // 8}").view(dtype)


@pytest.mark.parametrize("type_", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("name", INTEGERS)
def test_integer_arithmetic_wraps(name: str, type_: str) -> None:
    a, b = integers_of(type_, 500, 1), integers_of(type_, 500, 2)
    if name in ("div", "rem"):
        b[b == 0] = 3
        a[0] = 5  # the least integer by -1 is not defined
    got = evaluate(f"{name}.{type_} $0, $1, $2", a.dtype.str, a, b)
    expected = [INTEGERS[name](int(x), int(y)) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(got, wrapped(expected, a.dtype))


@pytest.mark.parametrize("type_", ["s32", "u32", "s64", "u64"])
def test_the_upper_half_of_products(type_: str) -> None:
    a, b, c = (integers_of(type_, 500, seed) for seed in range(3))
    bits = int(type_[1:])
    exact = [int(x) * int(y) >> bits for x, y in zip(a, b, strict=True)]
    got = evaluate(f"mul.hi.{type_} $0, $1, $2", a.dtype.str, a, b)
    np.testing.assert_array_equal(got, wrapped(exact, a.dtype))
    got = evaluate(f"mad.hi.{type_} $0, $1, $2, $3", a.dtype.str, a, b, c)
    sums = [x + int(y) for x, y in zip(exact, c, strict=True)]
    np.testing.assert_array_equal(got, wrapped(sums, a.dtype))


@pytest.mark.parametrize("type_", ["s16", "u16", "s32", "u32"])
def test_wide_products(type_: str) -> None:
    a, b = integers_of(type_, 500, 1), integers_of(type_, 500, 2)
    wide = f"{a.dtype.kind}{2 * a.dtype.itemsize}"
    exact = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    got = evaluate(f"mul.wide.{type_} $0, $1, $2", wide, a, b)
    np.testing.assert_array_equal(got, wrapped(exact, np.dtype(wide)))
    got = evaluate(f"mad.wide.{type_} $0, $1, $2, $3", wide, a, b, got)
    np.testing.assert_array_equal(got, wrapped([2 * x for x in exact], np.dtype(wide)))


@pytest.mark.parametrize("type_", ["b16", "b32", "b64", "s32", "u32", "s64", "u64", "s16", "u16"])
def test_shifts_beyond_the_width(type_: str) -> None:
    bits = int(type_[1:])
    a = integers_of(type_.replace("b", "u"), 600, 1)
    count = np.random.default_rng(2).integers(0, 80, 600, np.uint32)
    if type_[0] == "b":
        left = evaluate(f"shl.{type_} $0, $1, $2", a.dtype.str, a, count)
        expected = [int(x) << int(n) for x, n in zip(a, count, strict=True)]
        np.testing.assert_array_equal(left, wrapped(expected, a.dtype))
    right = evaluate(f"shr.{type_} $0, $1, $2", a.dtype.str, a, count)
    expected = [int(x) >> min(int(n), bits) for x, n in zip(a, count, strict=True)]
    np.testing.assert_array_equal(right, wrapped(expected, a.dtype))


def test_funnel_shifts() -> None:
    low, high = integers_of("u32", 400, 1), integers_of("u32", 400, 2)
    count = np.random.default_rng(2).integers(0, 64, 400, np.uint32)
    for form in ("l.wrap", "r.wrap", "l.clamp", "r.clamp"):
        got = evaluate(f"shf.{form}.b32 $0, $1, $2, $3", "u4", low, high, count)
        by = [int(n) % 32 if "wrap" in form else min(int(n), 32) for n in count]
        wide = [int(h) << 32 | int(lo) for lo, h in zip(low, high, strict=True)]
        moved = [x << n >> 32 if form[0] == "l" else x >> n for x, n in zip(wide, by, strict=True)]
        np.testing.assert_array_equal(got, wrapped(moved, np.dtype("u4")), form)


def test_bit_fields() -> None:
    a, b = integers_of("u32", 600, 1), integers_of("u32", 600, 2)
    rng = np.random.default_rng(3)
    position, length = rng.integers(0, 40, (2, 600), np.uint32)

    def sign(value: int, start: int, count: int) -> int:
        if count == 0:
            return 0
        return value >> min(start + count - 1, 31) & 1

    for type_ in ("u32", "s32"):
        got = evaluate(f"bfe.{type_} $0, $1, $2, $3", "u4", a, position, length)
        expected = []
        for value, start, count in zip(a.tolist(), position.tolist(), length.tolist(), strict=True):
            fill = sign(value, start, count) if type_ == "s32" else 0
            bits = [
                value >> start + i & 1 if i < count and start + i < 32 else fill for i in range(32)
            ]
            expected.append(sum(bit << i for i, bit in enumerate(bits)))
        np.testing.assert_array_equal(got, np.array(expected, np.uint32), type_)
    got = evaluate("bfi.b32 $0, $1, $2, $3, $4", "u4", a, b, position, length)
    expected = []
    for f, base, start, count in zip(*(x.tolist() for x in (a, b, position, length)), strict=True):
        for i in range(count):
            if start + i < 32:
                base = base & ~(1 << start + i) | (f >> i & 1) << start + i
        expected.append(base)
    np.testing.assert_array_equal(got, np.array(expected, np.uint32))


def test_bytes_are_permuted() -> None:
    a, b, pick = (integers_of("u32", 500, seed) for seed in range(3))
    got = evaluate("prmt.b32 $0, $1, $2, $3", "u4", a, b, pick)
    expected = []
    for x, y, choice in zip(a.tolist(), b.tolist(), pick.tolist(), strict=True):
        source = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        result = []
        for byte in range(4):
            nibble = choice >> 4 * byte & 15
            value = source[nibble & 7]
            result.append((255 if value & 128 else 0) if nibble & 8 else value)
        expected.append(int.from_bytes(bytes(result), "little"))
    np.testing.assert_array_equal(got, np.array(expected, np.uint32))


@pytest.mark.parametrize("table", [0x80, 0xFE, 0x96, 0xE2, 0x1B])
def test_three_way_logic(table: int) -> None:
    a, b, c = (integers_of("u32", 200, seed) for seed in range(3))
    got = evaluate(f"lop3.b32 $0, $1, $2, $3, {table}", "u4", a, b, c)
    expected = [
        sum(
            (table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | z >> i & 1) & 1) << i
            for i in range(32)
        )
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(got, np.array(expected, np.uint32))


def test_counting_bits() -> None:
    a = integers_of("u32", 300, 1)
    a[5] = 0
    expected: dict[str, list[int]] = {
        "popc.b32": [x.bit_count() for x in a.tolist()],
        "clz.b32": [32 - x.bit_length() for x in a.tolist()],
        "brev.b32": [int(f"{x:032b}"[::-1], 2) for x in a.tolist()],
        "bfind.u32": [x.bit_length() - 1 for x in a.tolist()],
    }
    for name, values in expected.items():
        got = evaluate(f"{name} $0, $1", "u4", a)
        np.testing.assert_array_equal(got, wrapped(values, np.dtype("u4")), name)


@pytest.mark.parametrize(
    ("conversion", "values", "expected"),
    [
        ("rzi.s32.f32", [1.9, -1.9, 3e9, -3e9, np.nan, 2.5], [1, -1, 2**31 - 1, -(2**31), 0, 2]),
        ("rni.s32.f32", [0.5, 1.5, 2.5, -0.5, -1.5, 1e-9], [0, 2, 2, 0, -2, 0]),
        ("rmi.s32.f32", [0.5, -0.5, -1.0, 7.99, -3.2, 0], [0, -1, -1, 7, -4, 0]),
        ("rpi.s32.f32", [0.5, -0.5, -1.0, 7.01, -3.2, 0], [1, 0, -1, 8, -3, 0]),
        ("rzi.u32.f32", [-1, 0.9, 5e9, np.nan, 4e9, 7], [0, 0, 2**32 - 1, 0, 4 * 10**9, 7]),
    ],
)
def test_floats_to_integers_are_clamped(conversion: str, values: list, expected: list) -> None:
    result = "i4" if ".s32" in conversion else "u4"
    got = evaluate(f"cvt.{conversion} $0, $1", result, np.array(values, np.float32))
    np.testing.assert_array_equal(got, np.array(expected, result))


def test_integers_to_floats_are_rounded() -> None:
    a = integers_of("s32", 500, 1)
    got = evaluate("cvt.rn.f32.s32 $0, $1", "f4", a)
    expected = [nearest(Fraction(int(x)), "f32") for x in a]
    np.testing.assert_array_equal(got, np.array(expected, np.float32))
    wide = integers_of("u64", 500, 1)
    got = evaluate("cvt.rn.f32.u64 $0, $1", "f4", wide)
    expected = [nearest(Fraction(int(x)), "f32") for x in wide]
    np.testing.assert_array_equal(got, np.array(expected, np.float32))


@pytest.mark.parametrize("form", ["f16", "bf16"])
def test_narrowing_rounds_to_nearest_even(form: str) -> None:
    x = numbers_of("f32", 3000, 5).view(np.float32)
    x = x[np.abs(x) < 60000]
    x[:3] = [1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-25]
    expected = np.array([nearest(Fraction(float(each)), form) for each in x])
    got = evaluate(f"cvt.rn.{form}.f32 $0, $1", "u2", x)
    np.testing.assert_array_equal(values_of(got, form), expected)
    both = evaluate(f"cvt.rn.{form}x2.f32 $0, $1, $2", "u4", x, x[::-1].copy())
    halves = both.view(np.uint16).reshape(-1, 2)
    np.testing.assert_array_equal(values_of(halves[:, 1].copy(), form), expected)
    np.testing.assert_array_equal(values_of(halves[:, 0].copy(), form), expected[::-1])


@pytest.mark.parametrize("form", ["f16", "bf16"])
def test_widening_is_exact(form: str) -> None:
    bits = numbers_of(form, 1000, 3)
    got = evaluate(f"cvt.f32.{form} $0, $1", "f4", bits)
    np.testing.assert_array_equal(got, values_of(bits, form).astype(np.float32))


def test_integers_change_their_width() -> None:
    a = integers_of("s32", 200, 1)
    np.testing.assert_array_equal(evaluate("cvt.s64.s32 $0, $1", "i8", a), a.astype("i8"))
    zeros = evaluate("cvt.u64.u32 $0, $1", "i8", a)
    np.testing.assert_array_equal(zeros, [x % 2**32 for x in a.tolist()])
    low = evaluate("cvt.s32.s8 $0, $1", "i4", a)
    np.testing.assert_array_equal(low, [(x + 128) % 256 - 128 for x in a.tolist()])
    capped = evaluate("cvt.sat.u8.s32 $0, $1", "u4", a)
    np.testing.assert_array_equal(capped, [min(max(x, 0), 255) for x in a.tolist()])


def test_whole_floats_stay_floats() -> None:
    x = np.array([0.5, -0.5, 2.5, -3.7], np.float32)
    for mode, expected in (
        ("rmi", np.floor),
        ("rzi", np.trunc),
        ("rni", np.rint),
        ("rpi", np.ceil),
    ):
        np.testing.assert_array_equal(evaluate(f"cvt.{mode}.f32.f32 $0, $1", "f4", x), expected(x))


NAN = float("nan")
PAIRS = np.array([(1, 2), (2, 1), (2, 2), (NAN, 1), (1, NAN), (NAN, NAN), (0, -0.0)], np.float32)


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
@pytest.mark.parametrize("unordered", ["", "u"])
def test_comparisons_with_nan(name: str, unordered: str) -> None:
    python: dict[str, Callable[[float, float], bool]] = {
        "eq": lambda a, b: a == b,
        "ne": lambda a, b: a != b,
        "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b,
        "gt": lambda a, b: a > b,
        "ge": lambda a, b: a >= b,
    }
    a, b = PAIRS.T.copy()
    instruction = f"setp.{name}{unordered}.f32 %p1, $1, $2; selp.u32 $0, 1, 0, %p1"
    got = evaluate(instruction, "u4", a, b)
    expected = [
        (unordered == "u") if x != x or y != y else python[name](x, y) for x, y in PAIRS.tolist()
    ]
    np.testing.assert_array_equal(got, np.array(expected, np.uint32))


def test_comparisons_know_signs_and_join_predicates() -> None:
    a, b = np.array([-1, 1, 3], np.int32), np.array([1, -1, 3], np.int32)
    one = "; selp.u32 $0, 1, 0, %p1"
    for name, expected in {"lt.s32": [1, 0, 0], "lt.u32": [0, 1, 0], "hi.u32": [1, 0, 0]}.items():
        got = evaluate(f"setp.{name} %p1, $1, $2{one}", "u4", a, b)
        np.testing.assert_array_equal(got, expected, name)
    start = "setp.gt.s32 %p2, $1, 0; "
    for name, expected in {"and": [0, 0, 0], "or": [1, 1, 1], "xor": [1, 1, 1]}.items():
        got = evaluate(f"{start}setp.lt.{name}.s32 %p1, $1, $2, %p2{one}", "u4", a, b)
        np.testing.assert_array_equal(got, expected, name)
    got = evaluate(f"{start}setp.lt.and.s32 %p1, $1, $2, !%p2{one}", "u4", a, b)
    np.testing.assert_array_equal(got, [1, 0, 0])
    got = evaluate("setp.lt.s32 %p2|%p1, $1, $2; selp.u32 $0, 1, 0, %p1", "u4", a, b)
    np.testing.assert_array_equal(got, [0, 1, 1])
    got = evaluate("set.lt.u32.s32 $0, $1, $2", "u4", a, b)
    np.testing.assert_array_equal(got, [0xFFFFFFFF, 0, 0])


def test_maximum_with_nan() -> None:
    a, b = PAIRS[:6].T.copy()
    np.testing.assert_array_equal(evaluate("max.f32 $0, $1, $2", "f4", a, b), np.fmax(a, b))
    kept = evaluate("max.NaN.f32 $0, $1, $2", "f4", a, b)
    np.testing.assert_array_equal(kept, [2, 2, 2, NAN, NAN, NAN])


def test_guards_leave_others_alone() -> None:
    a = np.arange(6, dtype=np.uint32)
    got = evaluate("mov.u32 $0, 9; setp.gt.u32 %p1, $1, 3; @%p1 mov.u32 $0, $1", "u4", a)
    np.testing.assert_array_equal(got, [9, 9, 9, 9, 4, 5])
    got = evaluate("mov.u32 $0, 9; setp.gt.u32 %p1, $1, 3; @!%p1 add.u32 $0, $1, 1", "u4", a)
    np.testing.assert_array_equal(got, [1, 2, 3, 4, 9, 9])


def test_registers_are_packed_and_unpacked() -> None:
    low, high = integers_of("u16", 50, 1), integers_of("u16", 50, 2)
    whole = evaluate("mov.b32 $0, {$1, $2}", "u4", low, high)
    np.testing.assert_array_equal(whole, low.astype("u4") | high.astype("u4") << 16)
    np.testing.assert_array_equal(evaluate("mov.b32 {_, $0}, $1", "u2", whole), high)
    np.testing.assert_array_equal(evaluate("mov.b32 {$0, _}, $1", "u2", whole), low)


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.f32 $0, $1",
        "add.rz.f32 $0, $1, $1",
        "ex2.approx.tiny.f32 $0, $1",
        "cvt.rz.f16x2.f32 $0, $1, $1",
        "mul.s32 $0, $1, $1",
        "lop3.b64 $0, $1, $1, $1, 3",
        "ld.global.fast.u32 $0, [%a1]",
        "mov.u32 $0, %clock",
        "add.u32 $0, $1",
        "wgmma.mma_async.sync.aligned $0, $1",
        "shfl.bfly.b32 $0, $1, 1, 31",
        "bar.arrive 0, 32",
    ],
)
def test_what_is_not_known_is_never_ignored(instruction: str) -> None:
    with pytest.raises(PtxError):
        evaluate(instruction, "u4", np.ones(4, np.uint32))


def test_division_by_zero_is_a_fault() -> None:
    with pytest.raises(Fault, match="division by zero.*thread 2"):
        evaluate("div.u32 $0, $1, $2", "u4", np.ones(4, "u4"), np.array([1, 2, 0, 4], "u4"))
