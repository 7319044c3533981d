"""Hypotheses about the GPU path that were written down before it had met one, and what a run of
gpu-check says about them: confirmed, refuted, or not tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmi_bench.gpu_check.target import EXACT
from mmi_deploy.parity import PRECISION_TOLERANCES

if TYPE_CHECKING:
    from mmi_bench.gpu_check.check import Step

Answer = Literal["confirmed", "refuted", "not tried"]

# Milliseconds that the host may take for a token.
HOST_MS = 0.1


@dataclass(frozen=True)
class Verdict:
    """Answer to hypothesis `number`, with its reason."""

    number: int
    claim: str
    answer: Answer
    reason: str

    @property
    def line(self) -> str:
        return f"{self.number}. {self.claim} **{self.answer}**: {self.reason}"


class _Steps:
    """Results of the steps, by name."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = {step.name: step for step in steps}

    def passed(self, name: str) -> bool:
        return name in self._steps and self._steps[name].state == "passed"

    def line(self, name: str) -> str:
        return self._steps[name].line if name in self._steps else ""

    def of(self, kind: str) -> Iterator[tuple[str, Step]]:
        """(precision, step) of every step `kind PRECISION` that has results."""
        for name, step in self._steps.items():
            if name.startswith(f"{kind} ") and (step.detail or step.state == "passed"):
                yield name.removeprefix(f"{kind} "), step

    def measured(self) -> dict[str, dict[str, Any]]:
        """Numbers of `measure`, by precision."""
        found = {precision: step.detail for precision, step in self.of("measure")}
        return {name: detail for name, detail in found.items() if "cuda graphs" in detail}


_Judged = tuple[Answer, str]


def _ahead_of_time(steps: _Steps) -> _Judged:
    if not steps.line("plugin").startswith("compiled ahead of time"):
        return "not tried", "the engines use the compiled plugin, or there are none"
    loaded = [precision for precision, _ in steps.of("compare")]
    if loaded:
        return "confirmed", f"engines in {', '.join(loaded)} ran with it"
    failed = next((step.line for _, step in steps.of("load") if step.state == "FAILED"), "")
    return ("refuted", failed) if failed else ("not tried", "no engine was loaded")


def _recordings(steps: _Steps) -> _Judged:
    measured = steps.measured()
    if not measured:
        return "not tried", "nothing was measured"
    refused = {n for detail in measured.values() for n in detail["cuda graphs"]["refusals"]}
    if refused:
        return "confirmed", f"refused: {', '.join(sorted(refused))}"
    return "refuted", "all runs were recorded"


def _fp32(steps: _Steps) -> _Judged:
    errors = [
        case["error"]
        for precision, step in steps.of("compare")
        if precision == EXACT
        for cases in step.detail.get("cases", {}).values()
        for case in cases
    ]
    if not errors:
        return "not tried", "no fp32 engine was compared"
    limit = PRECISION_TOLERANCES[EXACT].relative
    answer: Answer = "confirmed" if max(errors) > limit else "refuted"
    return answer, f"the greatest relative error is {max(errors):.1e}"


def _graphs(steps: _Steps) -> _Judged:
    lines = []
    for precision, detail in steps.measured().items():
        fast, slow = (detail[k]["per token"]["median"] for k in ("cuda graphs", "without"))
        lines.append((fast < slow, f"{precision} {1000 * fast:.2f} against {1000 * slow:.2f} ms"))
    if not lines:
        return "not tried", "nothing was measured"
    faster = all(better for better, _ in lines)
    return "confirmed" if faster else "refuted", "; ".join(line for _, line in lines)


def _host(steps: _Steps) -> _Judged:
    lines = []
    for precision, detail in steps.measured().items():
        numbers = detail["cuda graphs"]
        if "stage decode" in numbers:
            gap = numbers["per token"]["median"] - numbers["stage decode"]["median"]
            lines.append((1000 * gap, precision))
    if not lines:
        return "not tried", "nothing was measured"
    words = ", ".join(f"{precision} {gap:.3f} ms" for gap, precision in lines)
    return ("confirmed" if max(lines)[0] <= HOST_MS else "refuted"), words


def _sampler(steps: _Steps) -> _Judged:
    lines = []
    for precision, detail in steps.measured().items():
        greedy, sampled = detail["cuda graphs"]["per token"]["median"], detail["sampled"]["median"]
        lines.append((sampled > 1.5 * greedy, f"{precision} {1000 * (sampled - greedy):.2f} ms"))
    if not lines:
        return "not tried", "nothing was measured"
    costly = any(costs for costs, _ in lines)
    words = ", ".join(line for _, line in lines)
    return "confirmed" if costly else "refuted", f"it adds {words} a token"


def _eight_bits(steps: _Steps) -> _Judged:
    measured = steps.measured()
    narrow = [name for name in ("int8", "fp8") if name in measured]
    if "fp16" not in measured or not narrow:
        return "not tried", "measure it with --precision fp16 --precision int8"

    def token(name: str) -> float:
        return float(measured[name]["cuda graphs"]["per token"]["median"])

    slower = [name for name in narrow if token(name) > token("fp16")]
    words = ", ".join(f"{name} {1000 * token(name):.2f} ms" for name in ("fp16", *narrow))
    return "confirmed" if slower else "refuted", words


def _build_memory(steps: _Steps) -> _Judged:
    failed = [step.line for _, step in steps.of("build") if "memory" in step.line.lower()]
    if failed:
        return "confirmed", failed[0]
    return "not tried", "this model is far smaller than the GPU"


def _never(reason: str) -> Callable[[_Steps], _Judged]:
    return lambda steps: ("not tried", reason)


_PLAN = "read the engines' layers, as `IEngineInspector` prints them"

HYPOTHESES: tuple[tuple[str, Callable[[_Steps], _Judged]], ...] = (
    ("The driver takes the PTX of the ahead-of-time plugin.", _ahead_of_time),
    ("TensorRT-RTX records its fallback kernels into CUDA graphs.",
     _never("compare the first tokens of a new process with later ones, on TensorRT-RTX")),
    ("Attention in float32 is taken apart, and stores its matrix.", _never(_PLAN)),
    ("The attention scale rounded to bf16 changes documents.",
     _never("compare bf16 engines with and without the corrected scale")),
    ("A run whose addresses have just changed cannot be recorded.", _recordings),
    ("fp32 engines differ from a CPU by more than 1e-5.", _fp32),
    ("int8 and fp8 are slower than fp16, since weights are dequantised in memory.", _eight_bits),
    ("The default sampler costs half of a greedy token or more.", _sampler),
    (f"The host takes {HOST_MS} ms a token or less.", _host),
    ("CUDA graphs make a token faster.", _graphs),
    ("A GPU with 24 GB cannot build the 13B model in fp16.", _build_memory),
    ("Contexts, code and recordings take 0.2 to 0.6 GB beyond the plan at 13B.",
     _never("the 13B model was not loaded")),
    ("A prefill copies the keys and values of every layer.", _never(_PLAN)),
    ("A dynamic batch keeps TensorRT from fusing the U-Net's attention.", _never(_PLAN)),
)  # fmt: skip


def judge(steps: Sequence[Step]) -> list[Verdict]:
    """Answers to all hypotheses from the steps of a run."""
    found = _Steps(steps)
    return [
        Verdict(number, claim, *judged(found))
        for number, (claim, judged) in enumerate(HYPOTHESES, 1)
    ]
