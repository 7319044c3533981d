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
from mmi_train.checkpoint_import.config_fields import Fields, count, fitting, read_json, refuse
from mmi_train.checkpoint_import.state_dict import misfits
from mmi_train.checkpoint_import.tokenizer_files import read_tokenizer
from mmi_train.weights.lazy_tensor import StoredTensor
from mmi_train.weights.safetensors_files import read_folder

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_FAMILY = ("llama", "mistral")
_COMPUTED = "rotary_emb.inv_freq"
"""What older checkpoints hold although the configuration determines it."""


@dataclass(frozen=True)
class LanguageModel:
    """`tensors` by Hugging Face's names. `tied`: the head is the embedding. `bos`, `eos`, `pad`:
    ids, None where the model names none. `window`: how far back it was trained to look, if that is
    limited."""

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
    eos: int | None
    pad: int | None
    window: int | None = None

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
    tied = bool(config.get("tie_word_embeddings", False))
    ignored = {HEAD} if tied else set()
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
        rope_theta=_rope_theta(config),
        tied=tied,
        tensors={
            name: tensor
            for name, tensor in tensors.items()
            if not name.endswith(_COMPUTED) and name not in ignored
        },
        tokenizer=read_tokenizer(folder if tokenizer is None else tokenizer),
        bos=_id(config, "bos_token_id"),
        eos=_id(config, "eos_token_id"),
        pad=_id(config, "pad_token_id"),
        window=config.get("sliding_window") or None,
    )


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
    if "quantization_config" in config:
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
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field) or {}
        form = rope.get("rope_type", rope.get("type", "default"))
        if form != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise refuse(folder, f"{field} {form}", "rotary positions that are not scaled", rope)


def _rope_theta(config: Fields) -> float:
    nested = (config.get("rope_parameters") or {}).get("rope_theta")
    return float(config.get("rope_theta") or nested or 10000.0)


def _id(config: Fields, field: str) -> int | None:
    """A token id; the first when a model has several."""
    value = config.get(field)
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, int) and value >= 0 else None


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
