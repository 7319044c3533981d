"""A LLaMA to build on, from a Hugging Face folder: its sizes, weights and tokenizer.

What our blocks do not have (scaled rotary positions, sliding windows, biases, norms of queries and
keys) is refused by name: such a model would load and talk nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import floordiv
from pathlib import Path

import torch
from tokenizers import Tokenizer

from mmi_deploy.errors import ConfigError, WeightsError
from mmi_train.checkpoint_import.config_fields import (
    Fields,
    agreed,
    count,
    fitting,
    read_json,
    refuse,
)
from mmi_train.checkpoint_import.state_dict import misfits
from mmi_train.checkpoint_import.tokenizer_files import read_tokenizer
from mmi_train.weights.lazy_tensor import StoredTensor
from mmi_train.weights.safetensors_files import read_folder

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_FAMILY = ("llama", "mistral")
_COMPUTED = "rotary_emb.inv_freq"
"""What older checkpoints hold although the configuration determines it."""

_ROPE = ("rope_scaling", "rope_parameters")
"""What transformers before 5, and from 5 on, call the form of the rotary positions."""

_THETA = 10000.0
"""Base of the rotary angles where the configuration has none."""


@dataclass(frozen=True)
class LanguageModel:
    """`tensors` by Hugging Face's names. `tied`: the head is the embedding. `bos`, `pad`: ids, None
    where the model names none. `ends`: ids of all tokens that end a text, the first of them that of
    training. `window`: how far back it was trained to look, if that is limited. `remarks`: what the
    user should know of it, a line each."""

    source: Path
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    context: int
    eps: float
    rope_theta: float
    tied: bool
    tensors: Mapping[str, StoredTensor]
    tokenizer: Tokenizer
    bos: int | None
    ends: tuple[int, ...]
    pad: int | None
    window: int | None = None
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.width % self.heads or self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.source}: {self.heads} heads and {self.kv_heads} key-value heads do not "
                f"divide a width of {self.width}"
            )
        _check_tensors(self)

    @property
    def head(self) -> StoredTensor:
        return self.tensors[EMBEDDING if self.tied else HEAD]


def read_language_model(folder: Path, tokenizer: Path | None = None) -> LanguageModel:
    """The model in `folder`: config.json, safetensors (or pickles), tokenizer (None: its own).

    Raises `ConfigError` naming the first field of another architecture, and `WeightsError` naming
    every tensor that is missing, extra or misshapen.
    """
    path = folder / "config.json"
    config = read_json(path)
    with fitting(path):
        return _read(folder, path, config, tokenizer)


def _read(folder: Path, path: Path, config: Fields, tokenizer: Path | None) -> LanguageModel:
    _check_architecture(folder, config)
    tensors = read_folder(folder, ("model", "pytorch_model"))
    if not any(name.startswith("model.") for name in tensors):  # saved without its head's wrapper
        tensors = {name if name == HEAD else f"model.{name}": t for name, t in tensors.items()}
    tensors = {name: t for name, t in tensors.items() if not name.endswith(_COMPUTED)}
    tied, remarks = bool(config.get("tie_word_embeddings", False)), []
    if tied and HEAD in tensors:
        tied = EMBEDDING in tensors and _same(tensors[EMBEDDING], tensors[HEAD])
        if tied:
            del tensors[HEAD]
        else:
            remarks.append(
                f"{path} says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}: both are "
                "kept as they are"
            )
    tokens = _special_tokens(folder, config)
    bos = tokens["bos"]
    if len(bos) > 1:
        remarks.append(f"{folder} names several tokens that begin a text, {bos}: the first is used")
    heads = count(path, config, "num_attention_heads")
    return LanguageModel(
        source=folder,
        width=count(path, config, "hidden_size"),
        layers=count(path, config, "num_hidden_layers"),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        mlp_width=count(path, config, "intermediate_size"),
        context=count(path, config, "max_position_embeddings"),
        eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(path, config),
        tied=tied,
        tensors=tensors,
        tokenizer=read_tokenizer(folder if tokenizer is None else tokenizer),
        bos=bos[0] if bos else None,
        ends=tuple(tokens["eos"]),
        pad=tokens["pad"][0] if tokens["pad"] else None,
        window=config.get("sliding_window") or None,
        remarks=tuple(remarks),
    )


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers; read in pieces."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    pairs = zip(one.pieces(), other.pieces(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def _check_architecture(folder: Path, config: Fields) -> None:
    kind = config.get("model_type")
    if kind is None:
        raise ConfigError(
            f"{folder / 'config.json'} has no model_type",
            expected=" or ".join(_FAMILY),
            fix="give the folder of a language model as Hugging Face stores it",
        )
    if kind not in _FAMILY:
        raise refuse(folder, f"model_type {kind}", " or ".join(_FAMILY), kind)
    if config.get("quantization_config") is not None:
        raise refuse(
            folder, "quantization_config", "weights as they were trained", "quantised ones"
        )
    path = folder / "config.json"
    sizes = (count(path, config, name) for name in ("hidden_size", "num_attention_heads"))
    plain: dict[str, tuple[object, ...]] = {
        "hidden_act": ("silu", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "partial_rotary_factor": (1.0, None),
        "head_dim": (floordiv(*sizes), None),
        "use_qk_norm": (False, None),
        "qk_layernorm": (False, None),
    }
    for field, allowed in plain.items():
        if config.get(field) not in allowed:
            raise refuse(folder, field, allowed[0], config[field])
    for field in _ROPE:
        rope = config.get(field) or {}
        names = {f"{field}.{name}": rope.get(name) for name in ("rope_type", "type")}
        form = agreed(path, names) or "default"
        scaled = form != "default" and not (form == "linear" and rope.get("factor") == 1.0)
        if scaled or rope.get("partial_rotary_factor") not in (1.0, None):
            raise refuse(folder, f"{field} {form}", "rotary positions that are not scaled", rope)


def _rope_theta(path: Path, config: Fields) -> float:
    """The base of the rotary angles; transformers 5 nests it, older versions did not."""
    nested = {f"{field}.rope_theta": (config.get(field) or {}).get("rope_theta") for field in _ROPE}
    stated = agreed(path, {**nested, "rope_theta": config.get("rope_theta")})
    return float(_THETA if stated is None else stated)


def _special_tokens(folder: Path, config: Fields) -> dict[str, list[int]]:
    """Ids by role (bos, eos, pad), without repetitions: those of config.json, then those of
    generation_config.json, which alone names all end tokens of instruct models."""
    beside = folder / "generation_config.json"
    sources = [(folder / "config.json", config)]
    if beside.is_file():
        sources.append((beside, read_json(beside)))
    found: dict[str, dict[int, None]] = {"bos": {}, "eos": {}, "pad": {}}
    for source, fields in sources:
        for role, ids in found.items():
            value = fields.get(f"{role}_token_id")
            given = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(token, int) and not isinstance(token, bool) for token in given):
                raise ConfigError(
                    f"{source}: {role}_token_id is wrong", expected="ids of tokens", got=value
                )
            ids.update((token, None) for token in given if token >= 0)  # -1: it has none
    return {role: list(ids) for role, ids in found.items()}


def _check_tensors(model: LanguageModel) -> None:
    """Raise `WeightsError` that names every tensor which is missing, extra or misshapen."""
    expected = _shapes(model)
    missing = [name for name in expected if name not in model.tensors]
    extra = [name for name in model.tensors if name not in expected]
    wrong = [
        f"{name} has shape {list(tensor.shape)}, expected {list(expected[name])}"
        for name, tensor in model.tensors.items()
        if name in expected and tensor.shape != expected[name]
    ]
    wrong += [
        f"{name} holds {str(tensor.dtype).removeprefix('torch.')} numbers"
        for name, tensor in model.tensors.items()
        if not tensor.dtype.is_floating_point
    ]
    if problems := misfits(missing, extra, wrong):
        raise WeightsError(f"{model.source} is no LLaMA of its config: " + "; ".join(problems))


def _shapes(model: LanguageModel) -> dict[str, torch.Size]:
    width, kv_width = model.width, model.width // model.heads * model.kv_heads
    rows = model.tensors[EMBEDDING].shape[0] if EMBEDDING in model.tensors else 0
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (rows, width), "model.norm.weight": (width,)}
    for layer in range(model.layers):
        block = f"model.layers.{layer}."
        shapes |= {
            f"{block}self_attn.q_proj.weight": (width, width),
            f"{block}self_attn.k_proj.weight": (kv_width, width),
            f"{block}self_attn.v_proj.weight": (kv_width, width),
            f"{block}self_attn.o_proj.weight": (width, width),
            f"{block}mlp.gate_proj.weight": (model.mlp_width, width),
            f"{block}mlp.up_proj.weight": (model.mlp_width, width),
            f"{block}mlp.down_proj.weight": (width, model.mlp_width),
            f"{block}input_layernorm.weight": (width,),
            f"{block}post_attention_layernorm.weight": (width,),
        }
    if not model.tied:
        shapes[HEAD] = (rows, width)
    return {name: torch.Size(shape) for name, shape in shapes.items()}
