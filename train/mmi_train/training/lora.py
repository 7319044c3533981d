"""LoRA and QLoRA: low-rank adapters on frozen matrices (Hu et al. 2021, Dettmers et al. 2023).

An adapted linear layer computes W x + scale * B A x, with A [rank, in] and B [out, rank], which
alone learn; scale = alpha / rank, and B starts at zero. With 4-bit weights (NF4) W is stored
quantised and dequantised at every use. Adapters are kept apart from the model, in a folder of their
own, and merged into a model folder: W + scale * B A in fp32, rounded once to the folder's type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated
from torch import Tensor, nn

from mmi_deploy.errors import ConfigError, MmiError, WeightsError
from mmi_deploy.spec.config import first_flaw
from mmi_deploy.system.files import write_file
from mmi_train.training.optimiser import GroupRule
from mmi_train.weights.lazy_tensor import PLAIN_TYPES, Computed, InMemory, StoredTensor
from mmi_train.weights.model_folder import WEIGHTS, base_of, check_base, fingerprint, read_about
from mmi_train.weights.safetensors_files import load_tensors, read_safetensors
from mmi_train.weights.writer import write_safetensors

# Parts whose matrices can be adapted, by name: patterns of their layers' names.
PARTS: Mapping[str, str] = {
    "llm": r"llm\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    "unet": r"image_decoder\.unet\.(down_blocks|mid_block|up_blocks)\..*\.transformer_blocks\.\d+"
    r"\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))",
}

# Layers whose weights are read beside their calls, where an adapter would be left out.
_READ_DIRECTLY = re.compile(r"(^|\.)(look_back|head|vae)\.")

ADAPTERS = "adapters.safetensors"
ABOUT = "adapters.json"

# Kind of a folder of adapters in the marker of output folders.
ADAPTERS_KIND = "adapters"

# Name that the library gives to adapters, and to the layer that they belong to.
_ADAPTER = "adapter"
_BASE = ".base_layer"


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class LoraConfig:
    """Adapters of a run. `layers`: parts by their names in `PARTS`, or patterns of whole names of
    linear layers. `four_bit`: store the adapted matrices in 4 bits (QLoRA). `seed`: of A."""

    layers: tuple[str, ...] = ("llm", "unet")
    rank: int = Field(default=16, ge=1, le=2**16)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    four_bit: bool = False
    seed: int = 0

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / self.rank


def lora_rules(*others: GroupRule) -> tuple[GroupRule, ...]:
    """Rules of the optimiser under which adapters learn at the base rate, and of the rest only what
    `others` name; adapted matrices are frozen in any case."""
    return (
        GroupRule(r"\.lora_[AB]\."),
        GroupRule(rf"{re.escape(_BASE)}\.", rate=0.0),
        *others,
        GroupRule("", rate=0.0),
    )


def adapted_layers(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the linear layers that `config.layers` choose. Raises `ConfigError` for a pattern
    that matches none, and for layers that cannot be adapted."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen: set[str] = set()
    for pattern in config.layers:
        try:
            matching = re.compile(PARTS.get(pattern, pattern)).fullmatch
        except re.error as error:
            raise ConfigError(f"{pattern!r} is no pattern of names: {error}") from None
        if not (found := {name for name in linear if matching(name)}):
            raise ConfigError(
                f"no linear layer of this model is called {pattern!r}",
                expected=f"{' or '.join(PARTS)}, or a regular expression of whole names",
                fix=f"choose among names as {linear[0]}" if linear else "",
            )
        chosen |= found
    for name in sorted(chosen):
        if _READ_DIRECTLY.search(name):
            raise ConfigError(
                f"{name} cannot have an adapter",
                expected="a layer outside of MMFS, the head and the autoencoder",
                fix="let it learn as a whole by a rule of the optimiser",
            )
    return [name for name in linear if name in chosen]


def add_adapters(
    model: nn.Module,
    config: LoraConfig,
    device: torch.device | None = None,
    weight_of: Callable[[str], Tensor] | None = None,
) -> list[str]:
    """Put adapters, in fp32, on the chosen layers of `model`, in place; returns these layers.

    The matrices stay where they are, adapters of those on the meta device are on the CPU; with
    `four_bit` each matrix is quantised on `device` (None: where it is) and given up before the
    next. weight_of: reads a layer's matrix then, None: it is in `model`. Only adapters require
    gradients afterwards; the rules of `lora_rules` say so too. Raises `ConfigError`.
    """
    with _needed("adapters need", "peft", "train"):
        from peft import LoraConfig as Injected
        from peft import inject_adapter_in_model
    layers = adapted_layers(model, config)
    if config.four_bit:
        for name in layers:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            weight = layer.weight if weight_of is None else weight_of(name)
            _replace(model, name, _four_bit(layer, weight.detach(), device or weight.device))
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # the library asks the model
    injected = Injected(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=layers,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]), _on_cpu(model, layers):
        torch.manual_seed(config.seed)
        inject_adapter_in_model(injected, model, _ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(name))
        if _is_adapter(name):
            parameter.data = parameter.data.float()
    return layers


@contextmanager
def _on_cpu(model: nn.Module, layers: Iterable[str]) -> Iterator[None]:
    """Let matrices on the meta device seem to be on the CPU, where the library puts their adapters
    then; they take no memory there."""
    chosen = (model.get_submodule(name) for name in layers)
    found = [one for one in chosen if isinstance(one, nn.Linear) and one.weight.is_meta]
    kept = [layer.weight for layer in found]
    for layer, weight in zip(found, kept, strict=True):
        empty = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
        layer.weight = nn.Parameter(empty, requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in zip(found, kept, strict=True):
            layer.weight = weight


@contextmanager
def _needed(what: str, library: str, extra: str) -> Iterator[None]:
    """Convert a missing library to a `MmiError` that names the extra which installs it."""
    try:
        yield
    except ImportError:
        raise MmiError(
            f"{what} {library}, which is not installed",
            fix=f"install it with: pip install 'mmi_deploy[{extra}]'",
        ) from None


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the submodule called `name`."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def _four_bit(layer: nn.Linear, weight: Tensor, device: torch.device) -> nn.Module:
    """`layer` with its matrix, `weight`, in NF4 on `device`; the scales are quantised too."""
    with _needed("4-bit weights need", "bitsandbytes", "qlora"):
        from bitsandbytes.nn import Linear4bit, Params4bit
    with torch.device("meta"):
        quantised = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
        )
    quantised.weight = Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True
    ).to(device)
    quantised.bias = layer.bias
    quantised.support_avx512bf16_for_cpu = False  # a CPU's packed form cannot train any more
    return quantised


@dataclass(frozen=True)
class Adapters:
    """Trained adapters and what else learned, apart from their base.

    `state`: `<layer>.lora_A` [rank, in] and `<layer>.lora_B` [out, rank], other weights under the
    model's own names. `base`: fingerprint of the weights that they belong to.
    """

    config: LoraConfig
    base: str
    state: Mapping[str, Tensor] = field(repr=False)

    @property
    def layers(self) -> list[str]:
        """Names of the adapted layers."""
        names = (re.fullmatch(r"(.*)\.lora_[AB]", name) for name in self.state)
        return list(dict.fromkeys(name[1] for name in names if name))

    def save(self, folder: Path) -> None:
        """Write the two files of an adapter folder."""
        folder.mkdir(parents=True, exist_ok=True)
        stored = {name: InMemory(value.detach()) for name, value in self.state.items()}
        write_safetensors(folder / ADAPTERS, stored)
        about = {"base": self.base, "config": TypeAdapter(LoraConfig).dump_python(self.config)}
        write_file(folder / ABOUT, TypeAdapter(dict[str, Any]).dump_json(about, indent=2) + b"\n")

    def merged(self, base: Path) -> dict[str, StoredTensor]:
        """The weights that differ from those of the model folder `base`, in fp32, computed when
        they are read. Raises `WeightsError` if the adapters belong to other weights."""
        check_base(base, self.base, "adapters")
        stored = read_safetensors(base / WEIGHTS)
        found: dict[str, StoredTensor] = {}
        for layer in self.layers:
            name, halves = f"{layer}.weight", (f"{layer}.lora_B", f"{layer}.lora_A")
            if name not in stored or any(half not in self.state for half in halves):
                raise WeightsError(f"the adapters of {layer} are incomplete", fix="train them anew")
            weight, (up, down) = stored[name], (self.state[half] for half in halves)
            shapes = [list(up.shape), list(down.shape)]
            made = torch.Size((*up.shape[:1], *down.shape[1:]))
            if weight.shape != made or up.shape[1:] != down.shape[:1]:
                raise WeightsError(
                    f"the adapters of {layer} have the wrong shape",
                    expected=f"B and A whose product is {list(weight.shape)}",
                    got=f"{shapes[0]} and {shapes[1]}",
                )
            if not {up.dtype, down.dtype} <= set(PLAIN_TYPES):
                raise WeightsError(f"the adapters of {layer} are no floating-point numbers")
            whole = partial(_merge, weight, up, down, self.config.scale)
            found[name] = Computed(made, torch.float32, whole)
        for name, value in self.state.items():
            if not name.endswith((".lora_A", ".lora_B")):
                found[name] = InMemory(value.detach())
        return found


def _merge(weight: StoredTensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    return weight.read().float() + scale * (up.detach().float() @ down.detach().float()).cpu()


def trained_adapters(config: LoraConfig, base: Path, state: Mapping[str, Tensor]) -> Adapters:
    """Adapters of a run on the model folder `base`; state: all that learned, by the model's names
    (`checkpoints.learning`, or its averages)."""
    return Adapters(config, fingerprint(base), {_kept(name): v for name, v in state.items()})


def _kept(name: str) -> str:
    """Name in a folder of adapters: without the library's layers in between."""
    return stored_name(re.sub(rf"\.(lora_[AB])\.{_ADAPTER}\.weight$", r".\1", name))


def stored_name(name: str) -> str:
    """Name that a weight of a model with adapters has in the model folder."""
    return name.replace(f"{_BASE}.", ".")


def read_adapters(folder: Path) -> Adapters:
    """Read what `Adapters.save` wrote; raises `WeightsError`."""
    about = read_about(folder / ABOUT, "adapters")
    try:
        config = TypeAdapter(LoraConfig).validate_python(about.get("config"))
    except ValidationError as error:
        raise WeightsError(f"{folder / ABOUT} describes no adapters: {first_flaw(error)}") from None
    base = base_of(about, folder / ABOUT, "adapters")
    return Adapters(config, base, load_tensors(folder / ADAPTERS))


def load_adapters(
    model: nn.Module, adapters: Adapters, device: torch.device | None = None
) -> list[str]:
    """Put trained adapters, and what else learned with them, on `model`, in place, as
    `add_adapters` puts new ones; returns the adapted layers. Raises `WeightsError` for adapters of
    other layers."""
    layers = add_adapters(model, adapters.config, device)
    own: dict[str, Tensor] = {_kept(name): value for name, value in model.named_parameters()}
    own |= {_kept(name): value for name, value in model.named_buffers()}
    strangers = adapters.state.keys() - own.keys()
    missing = {name for name in own if re.search(r"\.lora_[AB]$", name)} - adapters.state.keys()
    wrong = [n for n in adapters.state.keys() & own.keys() if own[n].shape != _shape(adapters, n)]
    if strangers or missing or wrong:
        raise WeightsError(
            "the adapters belong to another model", got=_few((*strangers, *missing, *wrong))
        )
    with torch.no_grad():
        for name, value in adapters.state.items():
            own[name].copy_(value)
    return layers


def _shape(adapters: Adapters, name: str) -> torch.Size:
    return adapters.state[name].shape


def _few(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:5])
