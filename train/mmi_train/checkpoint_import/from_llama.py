"""Reader of a LLaMA in a Hugging Face folder: sizes, weights and tokenizer.

Fields that our block does not implement (scaled rotary positions, biases, norms of queries and
keys) are refused by name: such a model would load, and write nonsense.
"""

from __future__ import annotations

from operator import floordiv
from pathlib import Path

import torch

from mmi_deploy.errors import ConfigError
from mmi_train.checkpoint_import.config_fields import (
    Fields,
    consistent_value,
    positive_int,
    read_json,
    readable_errors,
    unsupported,
)
from mmi_train.checkpoint_import.parts import EMBEDDING, HEAD, LlmPart
from mmi_train.checkpoint_import.tokenizer_files import read_tokenizer
from mmi_train.weights.lazy_tensor import StoredTensor
from mmi_train.weights.safetensors_files import read_folder

_FAMILY = ("llama", "mistral")

# A buffer that older checkpoints hold although the configuration determines it.
_INV_FREQ = "rotary_emb.inv_freq"

# The object of rotary positions, as transformers names it before version 5, and from 5 on.
_ROPE = ("rope_scaling", "rope_parameters")

# Base of the rotary angles where the configuration has none.
_THETA = 10000.0


def read_llama(folder: Path, tokenizer: Path | None = None) -> LlmPart:
    """Read the model in `folder`: config.json, safetensors or pickles, tokenizer (None: its own).

    Raises `ConfigError` naming the first field of another architecture, and `WeightsError` naming
    every tensor that is missing, extra or misshapen.
    """
    path = folder / "config.json"
    config = read_json(path)
    with readable_errors(path):
        return _read(folder, path, config, tokenizer)


def _read(folder: Path, path: Path, config: Fields, tokenizer: Path | None) -> LlmPart:
    _check_architecture(folder, config)
    tensors = _tensors(folder)
    tied, remarks = bool(config.get("tie_word_embeddings", False)), []
    if tied and HEAD in tensors:
        tied = EMBEDDING in tensors and _equal(tensors[EMBEDDING], tensors[HEAD])
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
    heads = positive_int(path, config, "num_attention_heads")
    return LlmPart(
        source=folder,
        width=positive_int(path, config, "hidden_size"),
        layers=positive_int(path, config, "num_hidden_layers"),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        mlp_width=positive_int(path, config, "intermediate_size"),
        context=positive_int(path, config, "max_position_embeddings"),
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


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    tensors = read_folder(folder, ("model", "pytorch_model"))
    if not any(name.startswith("model.") for name in tensors):  # saved without its head's wrapper
        tensors = {name if name == HEAD else f"model.{name}": t for name, t in tensors.items()}
    return {name: t for name, t in tensors.items() if not name.endswith(_INV_FREQ)}


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Compare shapes, types and values of two tensors, in pieces."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    pairs = zip(one.pieces(), other.pieces(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def _check_architecture(folder: Path, config: Fields) -> None:
    """Raise `ConfigError` for the first field that our block does not implement."""
    path = folder / "config.json"
    kind = config.get("model_type")
    if kind is None:
        raise ConfigError(
            f"{path} has no model_type",
            expected=" or ".join(_FAMILY),
            fix="give the folder of a language model as Hugging Face stores it",
        )
    if kind not in _FAMILY:
        raise unsupported(folder, f"model_type {kind}", " or ".join(_FAMILY), kind)
    if config.get("quantization_config") is not None:
        raise unsupported(
            folder, "quantization_config", "weights as they were trained", "quantised ones"
        )
    sizes = (positive_int(path, config, name) for name in ("hidden_size", "num_attention_heads"))
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
            raise unsupported(folder, field, allowed[0], config[field])
    _check_rotary(folder, path, config)


def _check_rotary(folder: Path, path: Path, config: Fields) -> None:
    """Raise `ConfigError` for scaled or partial rotary positions."""
    for field in _ROPE:
        rope = config.get(field) or {}
        names = {f"{field}.{name}": rope.get(name) for name in ("rope_type", "type")}
        form = consistent_value(path, names) or "default"
        scaled = form != "default" and not (form == "linear" and rope.get("factor") == 1.0)
        if scaled or rope.get("partial_rotary_factor") not in (1.0, None):
            raise unsupported(
                folder, f"{field} {form}", "rotary positions that are not scaled", rope
            )


def _rope_theta(path: Path, config: Fields) -> float:
    """Base of the rotary angles; transformers 5 nests it, older versions do not."""
    nested = {f"{field}.rope_theta": (config.get(field) or {}).get("rope_theta") for field in _ROPE}
    stated = consistent_value(path, {**nested, "rope_theta": config.get("rope_theta")})
    return float(_THETA if stated is None else stated)


def _special_tokens(folder: Path, config: Fields) -> dict[str, list[int]]:
    """Token ids by role (bos, eos, pad), without repetitions: first those of config.json, then
    those of generation_config.json, the only file that names all end tokens of instruct models."""
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
