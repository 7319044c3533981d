"""Rules that the kernel plan of an engine must keep, as data.

Each rule names one way in which TensorRT's fusion can fail silently: the engine computes the same,
but moves several times the bytes. A broken rule is a `Finding`; a fatal one stops the build of a
TensorRT-RTX engine. TensorRT's plans have not been seen on a GPU yet, so theirs are only reported.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import onnx

from mmi_deploy.bundle.kernel_plan import FLOATS, Finding, Kernel, PlanTensor, ProfilePlan
from mmi_deploy.errors import EngineError
from mmi_deploy.spec.backends import BACKENDS
from mmi_deploy.spec.graphs import MMFS_OPERATOR, PRODUCT_OPERATOR
from mmi_deploy.targets.profiles import PREFILL

# Most channels of a head for which TensorRT has a fused attention. The VAE of Stable Diffusion has
# one attention with a single head of 512, which runs once per picture.
MAX_FUSED_WIDTH = 256

# Smaller constants are not weights whose bytes matter.
MIN_WEIGHT_ELEMENTS = 4096

_QUANTISED = ("Int8", "Int4", "FP8", "FP4")
_FUSED_ATTENTION = re.compile(r"mha|flash", re.I)
_FUSED_GROUP_NORM = re.compile(r"gnor|groupnorm", re.I)
_PLUGIN = re.compile(r"custom|plugin", re.I)

# A rule's offenders: description, and bytes that are written and read again in vain.
_Offenders = Iterator[tuple[str, int]]


@dataclass(frozen=True)
class Facts:
    """Facts about a graph that its plan must agree with, from the ONNX file. Nodes by name;
    attentions: those that can be fused; plugins: those of our operators, MMFS and weight-only
    products; caches: tensors that TensorScatter updates in place, old and new."""

    attentions: tuple[str, ...] = ()
    group_norms: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    caches: frozenset[str] = frozenset()


def facts_of(model: onnx.ModelProto) -> Facts:
    """Facts of the ONNX file that an engine is built from."""

    def named(operator: str) -> tuple[str, ...]:
        return tuple(node.name for node in model.graph.node if node.op_type == operator)

    wide = _wide_attentions(model)
    scatters = [node for node in model.graph.node if node.op_type == "TensorScatter"]
    return Facts(
        tuple(name for name in named("Attention") if name not in wide),
        named("GroupNormalization"),
        (*named(MMFS_OPERATOR), *named(PRODUCT_OPERATOR)),
        frozenset(name for node in scatters for name in (node.input[0], node.output[0])),
    )


def _wide_attentions(model: onnx.ModelProto) -> set[str]:
    """Names of the Attention nodes whose heads are too wide for a fused kernel."""
    nodes = [node for node in model.graph.node if node.op_type == "Attention"]
    if not nodes:
        return set()
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.input, *graph.value_info]
    widths = {
        value.name: value.type.tensor_type.shape.dim[-1].dim_value
        for value in values
        if len(value.type.tensor_type.shape.dim) == 4  # [b, heads, tokens, channels]
    }
    return {node.name for node in nodes if widths.get(node.input[0], 0) > MAX_FUSED_WIDTH}


@dataclass(frozen=True)
class Rule:
    """One rule. why: what breaking it costs. find: offenders in the plan of one profile. fatal: an
    engine that breaks it must not be used. in_prefill: whether it holds in that profile, which runs
    once per prompt; half: for engines with 16-bit activations alone."""

    name: str
    why: str
    find: Callable[[Sequence[Kernel], Facts], _Offenders]
    fatal: bool = False
    in_prefill: bool = True
    half: bool = False


def check_plans(
    plans: Sequence[ProfilePlan], facts: Facts, half: bool = True
) -> tuple[Finding, ...]:
    """Findings of all rules in the plans of one engine. half: its activations have 16 bits."""
    return tuple(
        Finding(
            rule=rule.name,
            profile=plan.profile,
            what=what,
            why=rule.why,
            bytes=size,
            fatal=rule.fatal and plan.profile != PREFILL,
        )
        for plan in plans
        for rule in RULES
        if (half or not rule.half) and (rule.in_prefill or plan.profile != PREFILL)
        for what, size in rule.find(plan.launched, facts)
    )


def refuse_fatal(graph: str, runtime: str, findings: Sequence[Finding]) -> None:
    """Raise `EngineError` for a fatal finding in a plan of TensorRT-RTX."""
    fatal = [finding for finding in findings if finding.fatal]
    if not fatal or not BACKENDS[runtime].cross_compiles:
        return
    more = f" (and {len(fatal) - 1} more)" if len(fatal) > 1 else ""
    raise EngineError(
        f"the engine of {graph} would be slow: {fatal[0].what}{more}; {fatal[0].why}",
        fix="Choose another --precision or other limits, or build it all the same with --force",
    )


def _dequantised_weights(kernels: Sequence[Kernel], facts: Facts) -> _Offenders:
    for kernel in kernels:
        written = [tensor for tensor in kernel.writes if tensor.type in FLOATS]
        for weight in kernel.weights:
            if weight.type not in _QUANTISED or weight.elements < MIN_WEIGHT_ELEMENTS:
                continue
            for tensor in written:
                if tensor.elements == weight.elements:
                    what = f"{_name(kernel)} writes a weight of {weight.type} as {tensor.type}"
                    yield f"{what} {list(tensor.shape)}", 2 * tensor.bytes


def _attention_kernels(kernels: Sequence[Kernel], facts: Facts) -> _Offenders:
    fused = [kernel for kernel in kernels if _FUSED_ATTENTION.search(kernel.name)]
    if len(fused) == len(facts.attentions):
        return
    if not any(kernel.nodes for kernel in kernels):  # no names to tell them apart
        yield f"{len(facts.attentions)} attentions became {len(fused)} fused kernels", 0
    for name in facts.attentions:
        count = sum(name in kernel.nodes for kernel in fused)
        if count != 1 and any(kernel.nodes for kernel in kernels):
            parts = sum(name in kernel.nodes for kernel in kernels)
            yield f"{name} became {parts} kernels, {count} of them fused", 0


def _attention_matrices(kernels: Sequence[Kernel], facts: Facts) -> _Offenders:
    for kernel in kernels:
        if not set(kernel.nodes) & set(facts.attentions) or _FUSED_ATTENTION.search(kernel.name):
            continue
        read = [*kernel.reads, *kernel.weights]
        if not read or not all(map(_plane, read)):
            continue  # of dynamic sizes, which cannot be compared
        plane, elements = max(map(_plane, read)), max(tensor.elements for tensor in read)
        sides = {side for tensor in read for side in tensor.shape[-2:]}
        for tensor in kernel.writes:
            # A product of queries and keys has more elements than both while there are more of
            # them than channels per head; the softmax reads and writes the same.
            larger = 2 * plane < _plane(tensor) and 2 * elements < tensor.elements
            # Its sides are theirs; a reshape may split a dynamic side, such as rows and heads.
            product = sides.issuperset(tensor.shape[-2:])
            if tensor.type in FLOATS and larger and product:
                yield f"{_name(kernel)} writes {tensor.type} {list(tensor.shape)}", 2 * tensor.bytes


def _plane(tensor: PlanTensor) -> int:
    """Product of the last two sides, such as queries and keys; 0 if one is dynamic."""
    sides = tensor.shape[-2:]
    return 0 if min(sides, default=1) < 0 else prod(sides)


def cache_copies(kernels: Sequence[Kernel], facts: Facts) -> _Offenders:
    """Kernels that copy a KV cache."""
    for kernel in kernels:
        caches = [tensor for tensor in kernel.reads if tensor.name in facts.caches]
        if not caches or _FUSED_ATTENTION.search(kernel.name):
            continue
        for tensor in kernel.writes:
            # Rows and heads may be one dynamic dimension there: the slots and channels tell it.
            like = any(sorted(tensor.shape[-2:]) == sorted(one.shape[-2:]) for one in caches)
            # An update in place reads and writes one name.
            if like and tensor.name not in {one.name for one in kernel.reads}:
                what = f"{kernel.name} copies {caches[0].name} to {tensor.type}"
                yield f"{what} {list(tensor.shape)}", 2 * caches[0].bytes


def _group_norms(kernels: Sequence[Kernel], facts: Facts) -> _Offenders:
    for name in facts.group_norms:
        of = [kernel for kernel in kernels if name in kernel.nodes]
        fused = sum(bool(_FUSED_GROUP_NORM.search(kernel.name)) for kernel in of)
        if of and fused != 1:
            yield f"{name} became {len(of)} kernels, none of them for a group norm", 0


def _sibling_products(kernels: Sequence[Kernel], facts: Facts) -> _Offenders:
    siblings: dict[tuple[object, ...], list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        weights = [weight for weight in kernel.weights if _is_matrix(weight)]
        if len(weights) == 1 and kernel.reads and kernel.kind != "correlation":
            inputs = tuple(tensor.name for tensor in kernel.reads)
            siblings[inputs, weights[0].shape].append(kernel)
    for same in siblings.values():
        if len(same) > 1:
            yield f"{' and '.join(map(_name, same))} read the same, each by itself", 0


def _is_matrix(weight: PlanTensor) -> bool:
    matrix = sum(side > 1 for side in weight.shape) == 2
    return (
        matrix and weight.elements >= MIN_WEIGHT_ELEMENTS and weight.type in (*FLOATS, *_QUANTISED)
    )


def _plugins(kernels: Sequence[Kernel], facts: Facts) -> _Offenders:
    found = sum(bool(_PLUGIN.search(kernel.kind)) for kernel in kernels)
    if found != len(facts.plugins):
        yield f"{len(facts.plugins)} nodes of our operators became {found} kernels of our plugin", 0


def _name(kernel: Kernel) -> str:
    """Name of a kernel, and the first node that it computes."""
    return kernel.name if not kernel.nodes else f"{kernel.name} ({kernel.nodes[0]})"


RULES = (
    Rule(
        "dequantised weights",
        "a run then reads 1 byte a weight, writes 2 and reads 2, where float16 reads 2",
        _dequantised_weights,
        fatal=True,
        in_prefill=False,
    ),
    Rule(
        "fused attention",
        "an attention is one kernel where TensorRT has one for its type and sizes",
        _attention_kernels,
        fatal=True,
        half=True,
    ),
    Rule(
        "attention matrices",
        "the matrix of all queries and keys then passes through memory several times",
        _attention_matrices,
        fatal=True,
        half=True,
    ),
    Rule(
        "copies of the KV cache",
        "each token then copies the whole cache of a layer",
        cache_copies,
        in_prefill=False,
    ),
    Rule("fused group norms", "a group norm is one kernel where its sizes allow it", _group_norms),
    Rule(
        "merged products",
        "products of one tensor are one kernel where their weights lie together",
        _sibling_products,
    ),
    Rule(
        "plugin", "our operators are computed by our kernels, once per node", _plugins, fatal=True
    ),
)
