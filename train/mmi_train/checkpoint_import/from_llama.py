"""Reader of a LLaMA, or of a descendant, in a Hugging Face folder: sizes, weights and tokenizer.

Fields that our block does not implement (another activation, biases of other layers, scalings of
rotary positions that are no constants) are refused by name: such a model would load, and write
nonsense.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from mmi_deploy.errors import ConfigError
from mmi_train.checkpoint_import.config_fields import (
    Fields,
    positive_int,
    read_json,
    readable_errors,
    unsupported,
)
from mmi_train.checkpoint_import.families import FAMILIES, Family
from mmi_train.checkpoint_import.parts import EMBEDDING, HEAD, LlmPart
from mmi_train.checkpoint_import.rotary_scaling import rotary_base, rotary_divisors
from mmi_train.checkpoint_import.tokenizer_files import read_tokenizer
from mmi_train.weights.lazy_tensor import StoredTensor
from mmi_train.weights.safetensors_files import read_folder

# Kinds of attention; a window counts only where `sliding_window` gives its length.
_LAYER_TYPES = ("full_attention", "sliding_attention")

# A buffer that older checkpoints hold although the configuration determines it.
_INV_FREQ = "rotary_emb.inv_freq"


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
    family = _family(folder, config)
    config = {**family.defaults, **config}
    _check_architecture(folder, config)
    heads = positive_int(path, config, "num_attention_heads")
    width = positive_int(path, config, "hidden_size")
    layers = positive_int(path, config, "num_hidden_layers")
    own_head_width = config.get("head_dim") is not None
    head_width = positive_int(path, config, "head_dim") if own_head_width else width // heads
    theta = rotary_base(path, config, family.theta)
    divisors = rotary_divisors(path, config, theta, head_width)
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
    return LlmPart(
        source=folder,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        mlp_width=positive_int(path, config, "intermediate_size"),
        context=positive_int(path, config, "max_position_embeddings"),
        eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        channels_per_head=head_width if head_width * heads != width else None,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_divisors=divisors,
        layers_without_rope=_layers_without_rope(path, config, family, layers),
        tied=tied,
        tensors=tensors,
        tokenizer=read_tokenizer(folder if tokenizer is None else tokenizer),
        bos=bos[0] if bos else None,
        ends=tuple(tokens["eos"]),
        pad=tokens["pad"][0] if tokens["pad"] else None,
        window=_window(config, family),
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


def _family(folder: Path, config: Fields) -> Family:
    """The kind of the model; raises `ConfigError` for one that our block does not implement."""
    kind = config.get("model_type")
    if kind is None:
        raise ConfigError(
            f"{folder / 'config.json'} has no model_type",
            expected=" or ".join(FAMILIES),
            fix="give the folder of a language model as Hugging Face stores it",
        )
    if kind not in FAMILIES:
        raise unsupported(folder, f"model_type {kind}", " or ".join(FAMILIES), kind)
    return FAMILIES[kind]


def _check_architecture(folder: Path, config: Fields) -> None:
    """Raise `ConfigError` for the first field that our block does not implement."""
    if config.get("quantization_config") is not None:
        raise unsupported(
            folder, "quantization_config", "weights as they were trained", "quantised ones"
        )
    plain: dict[str, tuple[object, ...]] = {
        "hidden_act": ("silu", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "partial_rotary_factor": (1.0, None),
        "use_qk_norm": (False, None),
        "qk_layernorm": (False, None),
        "use_mrope": (False, None),
    }
    for field, allowed in plain.items():
        if config.get(field) not in allowed:
            raise unsupported(folder, field, allowed[0], config[field])
    for kind in config.get("layer_types") or ():
        if kind not in _LAYER_TYPES:
            raise unsupported(folder, "layer_types", " or ".join(_LAYER_TYPES), kind)


def _window(config: Fields, family: Family) -> int | None:
    """Tokens of the sliding attention window of some or all layers, None without one."""
    if family.switched_window and not config.get("use_sliding_window", False):
        return None
    return config.get("sliding_window") or None


def _layers_without_rope(
    path: Path, config: Fields, family: Family, layers: int
) -> tuple[int, ...]:
    """Indices of the layers without rotary positions: the zeros of `no_rope_layers`, or every
    `no_rope_layer_interval`-th."""
    if family.unrotated_every is None:
        return ()
    stated = config.get("no_rope_layers")
    if stated is None:
        every = "no_rope_layer_interval"
        if config.get(every) is not None:
            family = replace(family, unrotated_every=positive_int(path, config, every))
        return family.unrotated(layers)
    if not isinstance(stated, list) or len(stated) < layers or not {*stated} <= {0, 1}:
        raise ConfigError(
            f"{path}: no_rope_layers is wrong",
            expected=f"{layers} numbers: 1 with rotary positions, 0 without",
            got=stated,
        )
    return tuple(layer for layer, rotary in enumerate(stated[:layers]) if not rotary)


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
