"""Read the kernels of an engine: from the builder's log, or from TensorRT's engine inspector.

With detailed verbosity the builder logs one line per final kernel, `Name: ..., LayerType: ...`,
with all tensors. TensorRT-RTX does so without a GPU. `IEngineInspector` gives the same as JSON, of
an engine that is loaded on a GPU. Both become `ProfilePlan`s.

Seen: the log of TensorRT-RTX 1.7.1. Older TensorRT writes `Format/Datatype` for `Datatype` and
lists constants among the inputs; both are understood, and neither was met on a GPU yet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmi_deploy.bundle.kernel_plan import BITS, Kernel, PlanTensor, ProfilePlan

# In every message of the builder's log that lists final kernels.
LAYER = ", LayerType: "

_LINE = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>.*)")
_FIELD = re.compile(r"\b(Inputs|Constants|Outputs|TacticName|TacticValue|StreamId|Metadata): ")
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<shape>[-\d,]*)\]"
    r".*?(?:Format/)?Datatype: (?P<type>[^,}]*?)(?: \}|, Format: .*? \})"
)
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
_PROFILE = re.compile(r" ?\[profile (\d+)\]")
# Myelin, TensorRT's compiler of fused kernels, numbers its subgraphs: kernel 13 of subgraph 0.
_SUBGRAPH = re.compile(r"_myl(\d+)(?:_\d+)?$")
# Names of constants where they are listed among the inputs.
_CONSTANT = re.compile(r"_dconst|constant(?:Float|Half)?$|_alpha$|_beta$")
# Names of types inside `Format/Datatype`, as "Row major linear FP16 format".
_TYPES = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16", "INT8": "Int8", "INT32": "Int32"}


def read_log(lines: Iterable[str], profiles: Sequence[str]) -> tuple[ProfilePlan, ...]:
    """Kernels in the messages of a builder's log. profiles: names of the engine's profiles.

    Empty where the log has no layer information.
    """
    found = []
    for message in lines:
        for line in message.splitlines():
            if match := _LINE.match(line):
                found.append(_kernel_of_line(match))
    return _by_profile(found, profiles)


def read_inspector(text: str, profiles: Sequence[str]) -> tuple[ProfilePlan, ...]:
    """Kernels in the JSON of `IEngineInspector.get_engine_information`.

    Empty where the engine was built without detailed verbosity: layers are names alone then.
    """
    layers = [layer for layer in json.loads(text).get("Layers", []) if isinstance(layer, dict)]
    return _by_profile([_kernel_of_layer(layer) for layer in layers], profiles)


# A kernel, its name and that of all its tensors as TensorRT gave them.
_Found = tuple[Kernel, str]


def _kernel_of_line(match: re.Match[str]) -> _Found:
    _, *parts = _FIELD.split(match["rest"])
    fields = dict(zip(parts[::2], parts[1::2], strict=True))
    tensors = {
        name: [_tensor(one.groupdict()) for one in _TENSOR.finditer(fields.get(name, ""))]
        for name in ("Inputs", "Constants", "Outputs")
    }
    return _kernel(match["name"], match["kind"], fields.get("Metadata", ""), tensors)


def _kernel_of_layer(layer: Mapping[str, Any]) -> _Found:
    def read(name: str) -> list[PlanTensor]:
        return [
            _tensor(
                {
                    "name": one["Name"],
                    "shape": ",".join(map(str, one.get("Dimensions", []))),
                    "type": one.get("Datatype") or one.get("Format/Datatype", ""),
                }
            )
            for one in layer.get(name, [])
        ]

    tensors = {name: read(name) for name in ("Inputs", "Constants", "Outputs")}
    kind = str(layer.get("LayerType", ""))
    return _kernel(str(layer["Name"]), kind, str(layer.get("Metadata", "")), tensors)


def _kernel(name: str, kind: str, text: str, tensors: Mapping[str, Sequence[PlanTensor]]) -> _Found:
    inputs = [one for one in tensors["Inputs"] if not _CONSTANT.search(one.name)]
    constants = [*tensors["Constants"], *(one for one in tensors["Inputs"] if one not in inputs)]
    kernel = Kernel(
        name=_plain(name),
        kind=kind,
        nodes=tuple(dict.fromkeys(_NODE.findall(text))),
        inputs=tuple(map(str, inputs)),
        constants=tuple(map(str, constants)),
        outputs=tuple(map(str, tensors["Outputs"])),
    )
    return kernel, name


def _tensor(found: Mapping[str, str]) -> PlanTensor:
    shape = tuple(int(side) for side in found["shape"].split(",") if side)
    return PlanTensor(_plain(found["name"]), _type(found["type"].strip()), shape)


def _type(text: str) -> str:
    if text in BITS:
        return text
    return next((kind for name, kind in _TYPES.items() if name in text), text.split()[-1])


def _plain(name: str) -> str:
    """Name without the numbers of subgraph and profile."""
    return _SUBGRAPH.sub("", _PROFILE.sub("", name))


def _by_profile(found: Sequence[_Found], profiles: Sequence[str]) -> tuple[ProfilePlan, ...]:
    """A subgraph belongs to the profile that the names of its kernels say, else to the first."""
    of: dict[str, int] = {}
    for _, name in found:
        if match := _PROFILE.search(name):
            of[_subgraph(name)] = int(match[1])
    kernels: dict[int, list[Kernel]] = {}
    for kernel, name in found:
        kernels.setdefault(of.get(_subgraph(name), 0), []).append(kernel)
    return tuple(
        ProfilePlan(
            profile=profiles[index] if index < len(profiles) else str(index),
            kernels=tuple(kernels[index]),
        )
        for index in sorted(kernels)
    )


def _subgraph(name: str) -> str:
    match = _SUBGRAPH.search(name)
    return match[1] if match else name
