"""Activation-aware weight quantisation: scales of input channels, folded into the graph (AWQ).

With s > 0 per input channel, (x / s) (s W) is x W. Quantising s W instead of W makes the rounding
of channels with a large s small after division by s, at the cost of the others, so channels with
large activations get a large s: their root mean square to a power that is searched. The division
is folded into what makes x: the weight of a norm, or the columns of an earlier product. So the
graph stays the same, node for node, and in exact arithmetic its outputs too (Lin et al., MLSys
2024). Where x comes from anything else, s is 1.

In both cases the clipping of each block then minimises the error of the outputs as far as mean
squares tell it, not that of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmi_deploy.targets.precision.attention_scale import product_columns, replace_constant
from mmi_deploy.targets.precision.attention_scale import weight_of as stored_weight
from mmi_deploy.targets.precision.constants import Array, Constants
from mmi_deploy.targets.precision.moments import Moments
from mmi_deploy.targets.precision.quantise import quantise
from mmi_deploy.targets.precision.recipes import INT4, Scheme, Weights
from mmi_deploy.targets.precision.weight_only import Product, products, scheme_on

# Powers of the root mean square that are tried. 0 is plain rounding.
POWERS = tuple(step / 10 for step in range(11))

# Columns of a weight that the search quantises, evenly spaced: a factor is chosen for rows.
SEARCHED_COLUMNS = 256

# Channels below this share of the largest root mean square count as that: the channels of a norm's
# weight that is 0 would get no scale at all.
_FLOOR = 1e-4

_NORMS = ("RMSNormalization", "LayerNormalization")


@dataclass
class Scaling:
    """Scales of a graph's products. powers: weight -> chosen power, of those whose scales
    could be folded. importance: product's node -> mean squares [in] of its input, as scaled."""

    powers: dict[str, float] = field(default_factory=dict)
    importance: dict[ir.Node, NDArray[np.float64]] = field(default_factory=dict)


def fold_input_scales(
    graph: ir.Graph,
    constants: Constants,
    weights: Weights,
    moments: Moments,
    runtime: str,
    peaks: Mapping[str, float] = MappingProxyType({}),
    greatest: float = np.inf,
) -> Scaling:
    """Search and fold the scales of all int4 products of a portable graph, before it is lowered.

    peaks: peak magnitudes of tensors; scales by which one could exceed `greatest` are not folded.
    Products of other types stay as they are. Raises `BundleError` for moments of another graph.
    """
    done = Scaling()
    for product in products(graph, constants):
        scheme = weights.of(product.name, product.rows * product.columns)
        scheme = scheme_on(runtime, scheme, product.rows) if scheme else None
        if scheme is None or scheme.dtype != INT4:
            continue
        squares = moments.of(product)
        done.importance[product.node] = squares
        fold = _origin(product, constants)
        if fold is None:
            continue
        power, scales = best_scales(product.weight(constants), squares, scheme)
        if peaks.get(str(fold.value.name), 0.0) / float(scales.min()) > greatest:
            power = 0.0
        done.powers[product.name] = power
        if power:
            _scale_rows(product, constants, scales)
            for node, place, factors in fold.inverse(scales):
                replace_constant(node, place, constants, factors)
            done.importance[product.node] = squares / scales.astype(np.float64) ** 2
    return done


def best_scales(
    weight: Array, squares: NDArray[np.float64], scheme: Scheme
) -> tuple[float, NDArray[np.float32]]:
    """Power of `POWERS`, and scales [in], with the least error of the outputs.

    weight: [in, out]. squares: mean squares of the input channels. The error is that of channels
    which are independent: the squared rounding of a weight times its channel's mean square.
    """
    step = max(1, weight.shape[1] // SEARCHED_COLUMNS)
    sample = np.ascontiguousarray(weight[:, ::step], np.float32)
    best, power, chosen = np.inf, 0.0, np.ones(len(squares), np.float32)
    for tried in POWERS:
        scales = scales_of(squares, tried)
        importance = squares / scales.astype(np.float64) ** 2
        rest = quantise(sample * scales[:, None], scheme, np.float16, importance).dequantised()
        rest = (rest / scales[:, None] - sample) ** 2
        error = float(squares @ rest.sum(1, dtype=np.float64))
        if error < best:
            best, power, chosen = error, tried, scales
    return power, chosen


def scales_of(squares: NDArray[np.float64], power: float) -> NDArray[np.float32]:
    """Scales [in] for mean squares and a power, the largest times the smallest being 1."""
    size = np.sqrt(squares)
    size = np.maximum(size, max(_FLOOR * size.max(initial=0.0), np.finfo(np.float32).tiny))
    scales = size**power
    return np.asarray(scales / np.sqrt(scales.max() * scales.min()), np.float32)


@dataclass(frozen=True)
class _Fold:
    """Constants that `value`, behind the input of a product, is proportional to: (node, input),
    each with the channel of every of its entries, -1 for one of no channel, and whether these are
    rows of a stored weight [out, in]."""

    value: ir.Value
    places: tuple[tuple[ir.Node, int, NDArray[np.int64], bool], ...]

    def inverse(
        self, scales: NDArray[np.float32]
    ) -> list[tuple[ir.Node, int, NDArray[np.float32]]]:
        found = []
        for node, place, channels, transposed in self.places:
            factors = np.ones(len(channels), np.float32)
            factors[channels >= 0] = 1 / scales[channels[channels >= 0]]
            found.append((node, place, factors[:, None] if transposed else factors))
        return found


def _origin(product: Product, constants: Constants) -> _Fold | None:
    """Constants that can take the inverse scales of `product`: of the norm before it, or of an
    earlier product that its input is proportional to. None where another node reads what lies
    between."""
    value = product.node.inputs[0]
    if value is None or _read_elsewhere(value):
        return None
    node = value.producer()
    if node is not None and node.op_type in _NORMS:
        every = np.arange(product.rows)
        places = [i for i in range(1, len(node.inputs)) if node.inputs[i] is not None]
        read = [constant for i in places if (constant := node.inputs[i]) in constants]
        if len(read) == len(places) and all(
            constants.tensor(constant).shape == (product.rows,) for constant in read
        ):
            return _Fold(value, tuple((node, place, every, False) for place in places))
        return None
    if node is None or node.op_type != "Mul":
        return None
    for factor in node.inputs:  # a gate times a linear value: SwiGLU
        fold = _linear_in(factor, product.rows, constants) if factor is not None else None
        if fold is not None:
            return fold
    return None


def _linear_in(value: ir.Value, channels: int, constants: Constants) -> _Fold | None:
    found = product_columns(value, constants)
    if found is None or found.mixed or len(found.columns) != channels:
        return None
    if found.bias is not None:
        node, place = found.bias
        if constants.tensor(node.inputs[place]).shape != (found.width,):
            return None
    channel_of = np.full(found.width, -1)
    channel_of[found.columns] = np.arange(channels)
    if (channel_of >= 0).sum() != channels:
        return None  # a column that is several channels
    node, place = found.weight
    places = [(node, place, channel_of, node.op_type == "Transpose")]
    if found.bias is not None:
        places.append((*found.bias, channel_of, False))
    return _Fold(value, tuple(places))


def _read_elsewhere(value: ir.Value) -> bool:
    readers = [reader for reader, _ in value.uses() if reader.op_type != "Shape"]
    return len(readers) != 1 or value.is_graph_output()


def _scale_rows(product: Product, constants: Constants, scales: NDArray[np.float32]) -> None:
    found = stored_weight(product.node, constants)
    assert found is not None
    node, place = found
    factors = scales if node.op_type == "Transpose" else scales[:, None]
    replace_constant(node, place, constants, factors)


def importances(scaling: Scaling | None) -> Mapping[ir.Node, NDArray[np.float64]]:
    """Mean squares by product, none without calibration."""
    return scaling.importance if scaling is not None else {}
