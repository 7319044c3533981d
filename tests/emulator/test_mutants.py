"""One-token changes of the kernels' PTX do not go unnoticed.

What counts: at least 95 % of the changed kernels that are not equivalent to the original must fail
a case, by a fault or by a result outside what `mutant_trials` allows. A mutant that leaves every
bit of every output as it was counts as equivalent only where `equivalence` can say why.
"""

from __future__ import annotations

import numpy as np
import pytest

from emulator import gemv_trials
from emulator.equivalent_mutants import equivalence
from emulator.mutant_trials import COMPUTE, trials, verdict
from emulator.ptx_programs import entry
from mmi_emulator import emulator
from mmi_emulator.mutants import Mutant, mutants
from mmi_emulator.ptx import Kernel, parse
from mmi_plugins.compile.launch_plan import VARIANTS, Variant
from mmi_plugins.gemv.launch_plan import GEMV_VARIANTS, ROWS_VARIANTS, GemvVariant

WANTED = 0.95

# Of what counts, at most: who explains more explains too much.
MAX_EQUIVALENT = 0.2


def kernel_of(variant: Variant) -> Kernel:
    if reason := emulator.EMULATOR.missing():
        pytest.skip(reason)
    return emulator.compiled(variant, COMPUTE, emulator.compiler() or "")


def tally(
    variant: Variant | GemvVariant, count: int, seed: int
) -> tuple[int, list[str], list[str]]:
    """Run `count` random mutants: the number caught, the missed ones, and the equivalent ones with
    the reason."""
    if isinstance(variant, GemvVariant):
        kernel = gemv_trials.kernel_of(variant)
    else:
        kernel = kernel_of(variant)
    every = list(mutants(kernel, seed))
    chosen = np.random.default_rng(seed).choice(len(every), min(count, len(every)), replace=False)
    caught, missed, equivalent = 0, [], []
    for mutant in (every[index] for index in chosen):
        if isinstance(variant, GemvVariant):
            what, why = gemv_trials.verdict(variant, mutant.of(kernel))
        else:
            what, why = verdict(variant, mutant.of(kernel))
        if what == "caught":
            caught += 1
        elif reason := equivalence(variant, kernel, mutant, what == "same"):
            equivalent.append(f"{mutant}: {reason}")
        else:
            missed.append(f"{mutant}: {what}, {why}")
    return caught, missed, equivalent


def judge(tallies: dict[str, tuple[int, list[str], list[str]]]) -> None:
    """Print what survived, and fail where too much did."""
    caught = sum(each[0] for each in tallies.values())
    missed = [f"{name} {line}" for name, each in tallies.items() for line in each[1]]
    equivalent = [f"{name} {line}" for name, each in tallies.items() for line in each[2]]
    print(f"{caught} caught, {len(missed)} missed, {len(equivalent)} equivalent")
    print(*(f"missed: {line}" for line in missed), sep="\n")
    print(*(f"equivalent: {line}" for line in equivalent), sep="\n")
    assert caught >= WANTED * (caught + len(missed)), "\n".join(missed)
    for name, (found, left, explained) in tallies.items():
        counted = found + len(left)
        assert len(explained) <= MAX_EQUIVALENT * counted, f"{name}: too many called equivalent"


def test_a_sample_of_mutants_is_caught() -> None:
    """The kernels that give a warp to a row, in fp32 and in fp16."""
    chosen = (Variant("float32", "rows"), Variant("float16", "rows"))
    judge({variant.name: tally(variant, 28, 11) for variant in chosen})


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_mutants_are_caught(variant: Variant) -> None:
    judge({variant.name: tally(variant, 150, 5)})


def test_a_sample_of_mutants_of_weight_only_products_is_caught() -> None:
    if reason := emulator.EMULATOR.missing():
        pytest.skip(reason)
    chosen = (GemvVariant("float16", "int4", 32), GemvVariant("bfloat16", "int8"))
    judge({variant.name: tally(variant, 25, 11) for variant in chosen})


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "variant", (*GEMV_VARIANTS, *ROWS_VARIANTS), ids=lambda variant: variant.name
)
def test_mutants_of_weight_only_products_are_caught(variant: GemvVariant) -> None:
    judge({variant.name: tally(variant, 40 if variant.rows else 100, 5)})


def test_unchanged_kernels_pass_every_trial() -> None:
    variant = Variant("float32", "rows")
    assert verdict(variant, kernel_of(variant))[0] == "same"
    assert all(trial.sharp < 1e-6 for trial in trials(variant) if "faint" not in trial.name)


BODY = """
    setp.lt.s32 %p1, %t0, 16; @%p1 bra END;
    add.f32 %r1, %r2, 0f3F800000;
    ld.global.v2.u32 {%r3, %r4}, [%a0+8];
    shfl.sync.bfly.b32 %r5|%p2, %r3, 4, 31, -1;
    cvt.rmi.s32.f32 %r6, %r1;
END:
    shl.b32 %r7, %r6, 2;
"""


@pytest.fixture
def small() -> tuple[Kernel, list[Mutant]]:
    kernel = parse(entry(BODY, 1))["k"]
    return kernel, list(mutants(kernel))


def test_every_kind_of_token_is_changed(small: tuple[Kernel, list[Mutant]]) -> None:
    texts = {mutant.text for mutant in small[1]}
    for expected in (
        "setp.le.s32 %p1, %t0, 16",
        "setp.lt.u32 %p1, %t0, 16",
        "setp.lt.s32 %p1, %t0, 17",
        "@!%p1 bra END",
        "bra END",
        "sub.f32 %r1, %r2, 0f3F800000",
        "add.f32 %r1, %r2, 0fBF800000",
        "add.f32 %r1, %r2, 0f40000000",
        "add.f32 %r1, %r2, 0f3F900000",
        "ld.global.v2.u32 {%r3, %r4}, [%a0+12]",
        "shfl.sync.down.b32 %r5|%p2, %r3, 4, 31, -1",
        "shfl.sync.bfly.b32 %r5|%p2, %r3, 4, 31, -2",
        "cvt.rzi.s32.f32 %r6, %r1",
        "cvt.rpi.s32.f32 %r6, %r1",
        "shl.b32 %r7, %r6, 3",
        "shr.b32 %r7, %r6, 2",
    ):
        assert expected in texts, expected
    assert {mutant.kind for mutant in small[1]} == {
        *("guard", "operation", "comparison", "constant", "register", "offset")
    }


def test_each_mutant_differs_in_one_token(small: tuple[Kernel, list[Mutant]]) -> None:
    kernel, made = small
    assert len({(mutant.index, mutant.text) for mutant in made}) == len(made)
    for mutant in made:
        changed = mutant.of(kernel)
        different = [
            index
            for index, pair in enumerate(
                zip(kernel.instructions, changed.instructions, strict=True)
            )
            if pair[0] != pair[1]
        ]
        assert different == [mutant.index]
        words = [mutant.before.replace(".", " ").split(), mutant.text.replace(".", " ").split()]
        if mutant.kind != "guard":
            assert sum(a != b for a, b in zip(*words, strict=True)) == 1, mutant
