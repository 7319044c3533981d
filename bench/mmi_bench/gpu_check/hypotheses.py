"""Hypotheses about the GPU path that were written down before it had met one, and what a run of
gpu-check says about them: confirmed, refuted, or not tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmi_bench.gpu_check.target import EXACT
from mmi_deploy.bundle.build_report import GraphReport, TargetReport
from mmi_deploy.bundle.kernel_plan import Finding, ProfilePlan
from mmi_deploy.parity import PRECISION_TOLERANCES
from mmi_deploy.targets.plan_rules import Facts, cache_copies
from mmi_deploy.targets.profiles import DEFAULT

if TYPE_CHECKING:
    from mmi_bench.gpu_check.check import Step

Answer = Literal["confirmed", "refuted", "not tried"]

# Milliseconds that the host may take for a token.
HOST_MS = 0.1

# Bytes that contexts, code and recordings, and the workspace of one row, may take at 13B widths.
BESIDE_BYTES = WORKSPACE_BYTES = 600 * 10**6

# In the names of the steps of the slice of the 13B model.
SLICE = "slice"


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

    def tokens_of_slice(self) -> dict[str, float]:
        """Seconds of a token of the slice, by precision."""
        return {
            precision.removeprefix(f"{SLICE} "): step.detail["decode_seconds"]
            for precision, step in self.of("compare")
            if "decode_seconds" in step.detail
        }

    def _graph(self, precision: str, graph: str) -> GraphReport | None:
        """Build report of an engine, if it was built and has kernel plans."""
        step = self._steps.get(f"build {precision}")
        report = step.detail.get("report") if step else None
        for found in TargetReport.model_validate(report).graphs if report else ():
            if found.graph == graph and found.plans:
                return found
        return None

    def plan(self, precision: str, graph: str, profile: str = DEFAULT) -> ProfilePlan | None:
        report = self._graph(precision, graph)
        plans = report.plans if report else ()
        return next((plan for plan in plans if plan.profile == profile), None)

    def kernels(self, precision: str, graph: str, profile: str = DEFAULT) -> list[str]:
        """Names of an engine's kernels; empty where they are not known."""
        plan = self.plan(precision, graph, profile)
        return [kernel.name for kernel in plan.launched] if plan else []

    def findings(self, precision: str, graph: str) -> tuple[Finding, ...] | None:
        report = self._graph(precision, graph)
        return report.findings if report else None

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
    tokens = steps.tokens_of_slice()
    what = "a token of one layer at 13B widths"
    if len(tokens) < 2:
        tokens = {
            name: float(detail["cuda graphs"]["per token"]["median"])
            for name, detail in steps.measured().items()
            if name in ("fp16", "int8", "fp8")
        }
        what = "a token"
    if "fp16" not in tokens or len(tokens) < 2:
        return "not tried", "run it with the slice, or with --precision fp16 --precision int8"
    slower = any(seconds > tokens["fp16"] for seconds in tokens.values())
    words = ", ".join(f"{name} {1000 * seconds:.3f} ms" for name, seconds in tokens.items())
    return "confirmed" if slower else "refuted", f"{what}: {words}"


def _four_bits(steps: _Steps) -> _Judged:
    tokens = {
        name: float(detail["cuda graphs"]["per token"]["median"])
        for name, detail in steps.measured().items()
        if name in ("fp16", "int4")
    }
    if len(tokens) < 2:
        return "not tried", "measure a 13B bundle with --precision fp16 --precision int4"
    slow = tokens["int4"] > tokens["fp16"] / 2
    words = ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in tokens.items())
    return "confirmed" if slow else "refuted", words


def _build_memory(steps: _Steps) -> _Judged:
    failed = [step.line for _, step in steps.of("build") if "memory" in step.line.lower()]
    if failed:
        return "confirmed", failed[0]
    return "not tried", "these models are far smaller than the GPU"


def _beside(steps: _Steps) -> _Judged:
    found = [
        (step.detail["beside_bytes"], name)
        for name, step in steps.of("compare")
        if "beside_bytes" in step.detail
    ]
    if not found:
        return "not tried", "the slice was not loaded"
    words = ", ".join(f"{name} {count / 1e9:.2f} GB" for count, name in found)
    return ("confirmed" if max(found)[0] <= BESIDE_BYTES else "refuted"), words


def _workspace(steps: _Steps) -> _Judged:
    found = [
        (step.detail["workspace_bytes"], name)
        for name, step in steps.of("compare")
        if "workspace_bytes" in step.detail
    ]
    if not found:
        return "not tried", "the slice was not loaded; by shapes it is 0.54 GB, of vae_decoder"
    words = ", ".join(f"{name} {count / 1e9:.2f} GB" for count, name in found)
    return ("confirmed" if max(found)[0] <= WORKSPACE_BYTES else "refuted"), words


def _float32_attention(steps: _Steps) -> _Judged:
    kernels = steps.kernels(EXACT, "denoise_step")
    if not kernels:
        return "not tried", f"no plan of an fp32 engine. {_RTX} it is (test_plan_rules.py)"
    fused = sum("mha" in name.lower() for name in kernels)
    return (
        "refuted" if fused else "confirmed"
    ), f"{fused} fused attentions of {len(kernels)} kernels"


def _prefill_copies(steps: _Steps) -> _Judged:
    for precision in (f"{SLICE} fp16", "fp16"):
        plan = steps.plan(precision, "llm", "prefill")
        if plan is None:
            continue
        caches = frozenset(
            tensor.name
            for kernel in plan.launched
            for tensor in kernel.reads
            if tensor.name.startswith(("past_", "present_"))
        )
        copies = len(list(cache_copies(plan.launched, Facts(caches=caches))))
        return ("confirmed" if copies else "refuted"), f"{copies} copies in the plan of {precision}"
    return "not tried", f"no plan of an fp16 engine. {_RTX} it does"


def _dynamic_batch(steps: _Steps) -> _Judged:
    findings = steps.findings("fp16", "denoise_step")
    if findings is None:
        return "not tried", (
            f"no plan of an fp16 engine. {_RTX} it does not: 320 kernels a step of the tiny model "
            "for up to 8 rows, 295 for one, and each attention is one kernel in both"
        )
    apart = [one for one in findings if one.rule == "fused attention"]
    return ("confirmed" if apart else "refuted"), f"{len(apart)} attentions are taken apart"


def _tiny_is_no_model(steps: _Steps) -> _Judged:
    kinds = [
        {name for name in steps.kernels(precision, "llm", "decode") if "mha" in name.lower()}
        for precision in ("fp16", f"{SLICE} fp16")
    ]
    if not all(kinds):
        return "not tried", (
            f"no plans of both. {_RTX} it is: _gemm_mha_v2 and copies of the cache for the tiny "
            "model, _gemv_mha_v1 and none for the slice"
        )
    words = " and ".join(", ".join(sorted(names)) for names in kinds)
    return ("confirmed" if kinds[0] != kinds[1] else "refuted"), words


def _slices(steps: _Steps) -> _Judged:
    kernels = steps.kernels(f"{SLICE} fp16", "denoise_step")
    if not kernels:
        return "not tried", f"no plan of the slice. {_RTX} it does"
    found = sum("slic" in name.lower() for name in kernels)
    return ("confirmed" if found else "refuted"), f"{found} slices of {len(kernels)} kernels"


def _never(reason: str) -> Callable[[_Steps], _Judged]:
    return lambda steps: ("not tried", reason)


_RTX = "By the plans of TensorRT-RTX 1.7.1, read without a GPU,"

HYPOTHESES: tuple[tuple[str, Callable[[_Steps], _Judged]], ...] = (
    ("The driver takes the PTX of the ahead-of-time plugin.", _ahead_of_time),
    ("TensorRT-RTX records its fallback kernels into CUDA graphs.",
     _never("contexts are EAGER, so there are none; compare the first tokens of a new process "
            "with later ones, on TensorRT-RTX")),
    ("Attention in float32 is taken apart, and stores its matrix.", _float32_attention),
    ("The attention scale rounded to bf16 changes documents.",
     _never("the scale is corrected in the query projection, exact on paper and in simulation; "
            "compare documents of bf16 engines with those of fp32 ones")),
    ("A run whose addresses have just changed cannot be recorded.", _recordings),
    ("fp32 engines differ from a CPU by more than 1e-5.", _fp32),
    ("int8 and fp8 are slower than fp16, since weights are dequantised in memory.", _eight_bits),
    ("The default sampler costs half of a greedy token or more.", _sampler),
    (f"The host takes {HOST_MS} ms a token or less.", _host),
    ("CUDA graphs make a token faster.", _graphs),
    ("A GPU with 24 GB cannot build the 13B model in fp16.", _build_memory),
    ("Contexts, code and recordings take at most 0.6 GB beyond the plan at 13B.", _beside),
    ("A prefill copies the keys and values of every layer.", _prefill_copies),
    ("A dynamic batch keeps TensorRT from fusing the U-Net's attention.", _dynamic_batch),
    ("Kernels of the tiny model are others than those at 13B widths.", _tiny_is_no_model),
    ("Each MMFS plugin costs two kernels that take its packed input apart.", _slices),
    ("At one row the 13B engines need at most 0.6 GB of workspace.", _workspace),
    ("TensorRT's own int4 product takes more than half of fp16's time.", _four_bits),
    ("TensorRT logs errors at its start and runs all the same.",
     _never("it is a warning in the log of `mmi generate`, and stops nothing")),
    ("Each new length of a prompt costs TensorRT-RTX a compilation.",
     _never("compare first tokens of two prompts of one length, and of two lengths, on "
            "TensorRT-RTX")),
    ("Documents that take turns replay their recordings.",
     _never("on the fake GPU 98 of 100 tokens do; on a GPU, see `recordings` of two sessions")),
    ("--device chooses the GPU that builds, on a machine with GPUs of two kinds.",
     _never("there is one GPU, or one kind of them; the fake driver has two")),
)  # fmt: skip


def judge(steps: Sequence[Step]) -> list[Verdict]:
    """Answers to all hypotheses from the steps of a run."""
    found = _Steps(steps)
    return [
        Verdict(number, claim, *judged(found))
        for number, (claim, judged) in enumerate(HYPOTHESES, 1)
    ]
