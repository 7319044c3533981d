"""Precision recipes as data: type of activations, float32 operators, quantisation of weights.

Tensors that the range check finds are kept in float32 too, when a graph is rewritten; see
`ranges.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.backends import CPU, CUDA, backend

FLOAT32, FLOAT16, BFLOAT16 = "float32", "float16", "bfloat16"
INT8, INT4, FP8 = "int8", "int4", "float8_e4m3fn"

# Largest finite value of each type.
MAX_FINITE = {FLOAT32: 3.4028234e38, FLOAT16: 65504.0, BFLOAT16: 3.3895314e38, FP8: 448.0}

# Bits of one element.
BITS = {FLOAT32: 32, FLOAT16: 16, BFLOAT16: 16, INT8: 8, FP8: 8, INT4: 4}


@dataclass(frozen=True)
class Scheme:
    """Quantisation scheme of one weight. dtype: int8, int4 or float8_e4m3fn. block: rows of the
    weight [in, out] that share a scale, 0 for one scale per output channel."""

    dtype: str
    block: int = 0


def quantised_bytes(shape: tuple[int, int], scheme: Scheme, scale_bits: int) -> int:
    """Bytes of a quantised weight [in, out] and its scales. Schemes are symmetric: no zero
    points."""
    rows, columns = shape
    blocks = rows // scheme.block if scheme.block else 1
    packed = -(-rows * columns * BITS[scheme.dtype] // 8)
    return packed + blocks * columns * scale_bits // 8


@dataclass(frozen=True)
class Weights:
    """Schemes for the matrix products of one graph.

    scheme: for weights with at least `min_elements` elements. overrides: (regular expression on the
    weight's name, scheme or None for not quantised); the first match replaces `scheme`.
    """

    scheme: Scheme
    min_elements: int = 4096
    overrides: tuple[tuple[str, Scheme | None], ...] = ()

    def of(self, name: str, elements: int) -> Scheme | None:
        """Scheme of the weight called `name`, None where it is not quantised."""
        for pattern, scheme in self.overrides:
            if re.search(pattern, name):
                return scheme
        return self.scheme if elements >= self.min_elements else None


@dataclass(frozen=True)
class Recipe:
    """A precision recipe.

    activations: their type on a GPU. on_cpu: their type on the CPU, None where the recipe is
    refused (`why_not_on_cpu` is the reason). why_not_on_cuda: the reason why ONNX Runtime's CUDA
    provider cannot run it, or "". weights: graph -> schemes, for GPU and CPU.
    min_architecture: first SM number that supports the types. fp32_operators: operators that stay
    in float32. margin: factor by which activations may exceed the ranges of the calibration inputs.
    activation_aware: int4 weights are scaled by recorded activations before they are rounded.
    """

    name: str
    description: str
    activations: str
    on_cpu: str | None = FLOAT32
    why_not_on_cpu: str = ""
    why_not_on_cuda: str = ""
    weights: Mapping[str, Weights] = field(default_factory=lambda: MappingProxyType({}))
    min_architecture: int = 0
    fp32_operators: tuple[str, ...] = ("Softmax", "GridSample")
    margin: float = 4.0
    activation_aware: bool = False

    @property
    def min_batch(self) -> int:
        """Rows that engines of the recipe must be built for at least.

        In a batch of exactly one, TensorRT-RTX 1.7.1 does not fuse the product with a weight that
        has one scale per channel: every token then writes the weight dequantised.
        """
        schemes = [
            scheme
            for weights in self.weights.values()
            for scheme in (weights.scheme, *(other for _, other in weights.overrides))
        ]
        per_channel = any(scheme is not None and not scheme.block for scheme in schemes)
        return 2 if per_channel else 1

    def activations_on(self, runtime: str) -> str:
        """Type of activations on the backend `runtime`. Raises `ConfigError` where it is
        refused."""
        if backend(runtime).on_gpu:
            return self.activations
        if self.on_cpu is None:
            raise ConfigError(
                f"precision {self.name} is not for the CPU: {self.why_not_on_cpu}",
                fix=f"choose {_named(r.name for r in RECIPES.values() if r.on_cpu and r.weights)}",
            )
        return self.on_cpu


# Projection to the offsets and weights of MMFS: small, and its error moves sampling points.
_LOCATIONS = (r"look_back.*query_weight", None)

# Projection to the logits.
_HEAD = r"(^|\.)head(_new)?[_.]weight"


def _llm(scheme: Scheme, *overrides: tuple[str, Scheme | None]) -> Mapping[str, Weights]:
    return MappingProxyType({"llm": Weights(scheme, overrides=(_LOCATIONS, *overrides))})


_UPCAST = "ONNX Runtime computes it in float32 there, at twice the memory and no gain"

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", "float32 throughout, as exported", FLOAT32),
        Recipe("fp16", "float16 with islands of float32", FLOAT16, None, _UPCAST),
        Recipe(
            "bf16",
            "bfloat16 with islands of float32",
            BFLOAT16,
            None,
            _UPCAST,
            "it has no ConvTranspose in bfloat16, and no buffers of that type in Python",
            min_architecture=80,
        ),
        Recipe(
            "int8",
            "weights of the LLM in int8, one scale per channel (GPU) or per 32 rows (CPU)",
            FLOAT16,
            weights=_llm(Scheme(INT8)),
        ),
        Recipe(
            "int4",
            "weights of the LLM in int4, one scale per 32 rows; its head in int8",
            FLOAT16,
            weights=_llm(Scheme(INT4, 32), (_HEAD, Scheme(INT8))),
            min_architecture=80,
        ),
        Recipe(
            "int4-128",
            "weights of the LLM in int4, one scale per 128 rows; its head in int8",
            FLOAT16,
            weights=_llm(Scheme(INT4, 128), (_HEAD, Scheme(INT8))),
            min_architecture=80,
        ),
        Recipe(
            "int4-awq",
            "as int4, its input channels scaled by recorded activations",
            FLOAT16,
            weights=_llm(Scheme(INT4, 32), (_HEAD, Scheme(INT8))),
            min_architecture=80,
            activation_aware=True,
        ),
        Recipe(
            "int4-awq-128",
            "as int4-128, its input channels scaled by recorded activations",
            FLOAT16,
            weights=_llm(Scheme(INT4, 128), (_HEAD, Scheme(INT8))),
            min_architecture=80,
            activation_aware=True,
        ),
        Recipe(
            "fp8",
            "weights of the LLM in float8 (E4M3), one scale per channel",
            FLOAT16,
            None,
            "no processor here computes with float8",
            "its MatMulNBits has int8 and int4 alone",
            weights=_llm(Scheme(FP8)),
            min_architecture=89,
        ),
        Recipe(
            "mixed",
            "as int4, with the down projection of MLPs and the output projection of MMFS in int8",
            FLOAT16,
            weights=_llm(
                Scheme(INT4, 32), (_HEAD, Scheme(INT8)), (r"down_proj|look_back", Scheme(INT8))
            ),
            min_architecture=80,
        ),
    )
}


def recipe(name: str) -> Recipe:
    """Recipe called `name`. Raises `ConfigError` that lists the recipes."""
    if name not in RECIPES:
        raise ConfigError(
            f"there is no precision {name!r}", expected=_named(RECIPES), fix="choose one of them"
        )
    return RECIPES[name]


def check_possible(
    chosen: Recipe, runtime: str, architecture: str | None, graphs: Iterable[str] | None = None
) -> None:
    """Raise `ConfigError` when `chosen` cannot be built for a target.

    architecture: such as `sm89`, None on the CPU. graphs: the graphs of --graph, None for all; a
    recipe that quantises none of them is refused, since a plain one gives the same engines.
    """
    chosen.activations_on(runtime)
    if runtime == CUDA and chosen.why_not_on_cuda:
        raise ConfigError(
            f"precision {chosen.name} is not for ONNX Runtime on CUDA: {chosen.why_not_on_cuda}",
            fix=f"choose {_named(r.name for r in RECIPES.values() if not r.why_not_on_cuda)}",
        )
    if architecture is not None and int(architecture.removeprefix("sm")) < chosen.min_architecture:
        raise ConfigError(
            f"precision {chosen.name} cannot be built for {architecture}",
            expected=f"sm{chosen.min_architecture} or later",
            fix="choose " + _named(_possible(architecture)),
        )
    if graphs is not None and chosen.weights and not set(graphs) & set(chosen.weights):
        plain = next(r for r in RECIPES.values() if r.activations == chosen.activations)
        raise ConfigError(
            f"precision {chosen.name} quantises the weights of {', '.join(chosen.weights)} alone",
            got=", ".join(graphs),
            fix="on the CPU the portable file runs for the others"
            if runtime == CPU
            else f"choose --precision {plain.name} for these graphs",
        )


def _possible(architecture: str) -> list[str]:
    number = int(architecture.removeprefix("sm"))
    return [r.name for r in RECIPES.values() if r.min_architecture <= number]


def _named(names: Iterable[str]) -> str:
    found = list(names)
    return " or ".join(filter(None, (", ".join(found[:-1]), found[-1])))
