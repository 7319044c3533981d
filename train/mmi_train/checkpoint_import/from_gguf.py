"""Reader of a LLaMA, or of a descendant, in a GGUF file of llama.cpp: weights dequantised,
tokenizer included.

Letters: h heads, d channels per head, c channels.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from mmi_deploy.errors import ConfigError, WeightsError
from mmi_train.checkpoint_import.config_fields import positive_int, readable_errors, unsupported
from mmi_train.checkpoint_import.families import FAMILIES, GGUF_ARCHITECTURES, Family
from mmi_train.checkpoint_import.gguf_tokenizer import gguf_tokenizer
from mmi_train.checkpoint_import.parts import EMBEDDING, HEAD, LlmPart
from mmi_train.checkpoint_import.tokenizer_files import read_tokenizer
from mmi_train.weights.lazy_tensor import Computed, InFile, StoredTensor

# Names of tensors: llama.cpp's -> Hugging Face's.
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHERS = {"token_embd": EMBEDDING, "output_norm": "model.norm.weight", "output": HEAD}

# Divisors of the rotary frequencies, highest frequency first: the scaling of LLaMA-3.1, tabulated.
_ROPE_DIVISORS = "rope_freqs.weight"

# Fields of the architecture whose values are read, or do not matter.
_READ = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "attention.key_length",
    "attention.value_length",
    "vocab_size",  # the embedding has the number of rows
    "tensor_data_layout",  # llama.cpp does not read it either
    "rope.scaling.original_context_length",  # used by YaRN alone
}

# Factors of linear scaling, by their name and an older one; 0 means none.
_FACTORS = ("rope.scaling.factor", "rope.scale_linear")

# Switches of the architecture, with the values that leave our blocks as they are.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none", "linear"),  # llama.cpp's default, decided by the factor
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": (False, True),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
}

# Tokens that end a text, a turn and a message: llama.cpp stops at each of them.
_ENDS = tuple(f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom"))

# Types that are stored without quantisation.
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# File names of a split model, as llama.cpp writes them.
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def read_gguf(path: Path, tokenizer: Path | None = None) -> LlmPart:
    """Read a GGUF file, or all parts of a split one from its first; tokenizer None: the file's own.

    Raises `ConfigError` naming the first field of another architecture, and `WeightsError`.
    """
    tensors, fields = _open(path)
    for number, part in enumerate(_other_shards(path, fields), 1):
        more, about = _open(part)
        if (about.get("split.no"), about.get("split.count")) != (number, fields["split.count"]):
            raise WeightsError(
                f"{part} is not a part of {path}",
                expected=f"part {number + 1} of {fields['split.count']}",
                fix="download all parts again",
            )
        tensors += more
    with readable_errors(path):
        return _read(path, tensors, fields, tokenizer)


def _open(path: Path) -> tuple[list[tuple[Path, gguf.ReaderTensor]], dict[str, Any]]:
    """The tensors of one file, each with the file's path, and its fields; raises `WeightsError`."""
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, TypeError):
        raise WeightsError(
            f"{path} is not a GGUF file, or it is cut off or damaged", fix="download it again"
        ) from None
    if reader.endianess == gguf.GGUFEndian.BIG:
        raise WeightsError(
            f"{path} is big-endian",
            expected="a little-endian file",
            fix=f"convert it with `gguf-convert-endian {path.name} little`",
        )
    return [(path, tensor) for tensor in reader.tensors], fields


def _other_shards(path: Path, fields: dict[str, Any]) -> list[Path]:
    """Paths of all parts of a split file but the first; raises `WeightsError` where they are
    missing."""
    number, parts = fields.get("split.no", 0), fields.get("split.count", 1)
    if parts == 1:
        return []
    found = _SHARD.fullmatch(path.name)
    if found is None or (int(found[2]), int(found[3])) != (number + 1, parts):
        raise WeightsError(
            f"{path} is part {number + 1} of {parts} of a split GGUF file, under another name",
            expected=f"NAME-{number + 1:05d}-of-{parts:05d}.gguf",
            fix="give all parts such names, or join them with `llama-gguf-split --merge`",
        )
    names = [f"{found[1]}-{index:05d}-of-{parts:05d}.gguf" for index in range(1, parts + 1)]
    if number:
        raise WeightsError(
            f"{path} is part {number + 1} of {parts} of a split GGUF file",
            fix=f"give its first part, {names[0]}",
        )
    if missing := [name for name in names[1:] if not path.with_name(name).is_file()]:
        raise WeightsError(
            f"{path} is the first of {parts} parts of a GGUF file; {len(missing)} are missing, "
            f"{missing[0]} first",
            fix="download them into the same folder",
        )
    return [path.with_name(name) for name in names[1:]]


def _read(
    path: Path,
    stored: list[tuple[Path, gguf.ReaderTensor]],
    fields: dict[str, Any],
    tokenizer: Path | None,
) -> LlmPart:
    architecture = _architecture(path, fields)
    family, own = FAMILIES[architecture], _own_fields(path, architecture, fields)
    heads, width = own["attention.head_count"], own["embedding_length"]
    kv_heads = own.get("attention.head_count_kv", heads)
    head_width = own.get("attention.key_length", width // heads)
    divisors = _linear_divisors(path, architecture, own, head_width)
    tensors: dict[str, StoredTensor] = {}
    for file, tensor in stored:
        if tensor.name == _ROPE_DIVISORS:
            divisors = _stored_divisors(file, tensor, head_width, divisors)
            continue
        name = _hugging_face_name(tensor.name)
        if name in tensors:
            raise WeightsError(
                f"{file} holds {tensor.name}, which another part holds too",
                fix="download all parts again",
            )
        tensors[name] = _tensor(file, tensor, _reordered_heads(family, name, heads, kv_heads))
    return LlmPart(
        source=path,
        width=width,
        layers=own["block_count"],
        heads=heads,
        kv_heads=kv_heads,
        mlp_width=own["feed_forward_length"],
        context=own["context_length"],
        eps=_from_fp32(own["attention.layer_norm_rms_epsilon"]),
        rope_theta=float(own.get("rope.freq_base", 10000.0)),
        channels_per_head=head_width if head_width * heads != width else None,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_divisors=divisors,
        layers_without_rope=family.unrotated(own["block_count"]),
        tied=HEAD not in tensors,
        tensors=tensors,
        tokenizer=gguf_tokenizer(path, fields) if tokenizer is None else read_tokenizer(tokenizer),
        bos=fields.get("tokenizer.ggml.bos_token_id"),
        ends=tuple(dict.fromkeys(fields[name] for name in _ENDS if name in fields)),
        pad=fields.get("tokenizer.ggml.padding_token_id"),
    )


def _architecture(path: Path, fields: dict[str, Any]) -> str:
    """The kind of the model; raises `ConfigError` for one that our blocks do not implement."""
    kind = fields.get("general.architecture")
    if kind not in GGUF_ARCHITECTURES:
        known = " or ".join(GGUF_ARCHITECTURES)
        raise unsupported(path, f"general.architecture {kind}", known, kind)
    return str(kind)


def _own_fields(path: Path, architecture: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of the architecture, without its name in front; raises `ConfigError` for what our
    blocks lack."""
    prefix = f"{architecture}."
    own = {n.removeprefix(prefix): v for n, v in fields.items() if n.startswith(prefix)}
    for name, value in own.items():
        if name in _HARMLESS and value not in _HARMLESS[name]:
            raise unsupported(path, prefix + name, _HARMLESS[name][0], value)
        if name not in (*_READ, *_FACTORS, *_HARMLESS):
            raise unsupported(path, prefix + name, "no such field", value)
    needed = ("block_count", "context_length", "embedding_length", "feed_forward_length")
    for name in (*needed, "attention.head_count"):
        positive_int(path, fields, prefix + name)
    head_width = own["embedding_length"] // own["attention.head_count"]
    if "attention.key_length" in own:
        head_width = positive_int(path, fields, f"{prefix}attention.key_length")
    for name in ("rope.dimension_count", "attention.value_length"):
        if own.get(name, head_width) != head_width:
            raise unsupported(path, prefix + name, head_width, own[name])
    if "attention.layer_norm_rms_epsilon" not in own:
        raise ConfigError(f"{path} lacks {prefix}attention.layer_norm_rms_epsilon")
    return own


def _linear_divisors(
    path: Path, architecture: str, own: dict[str, Any], head_width: int
) -> tuple[float, ...]:
    """Divisors of the rotary frequencies by a factor that is the same for all; none for 1."""
    factors = {name: float(own[name]) for name in _FACTORS if own.get(name) not in (0.0, 1.0, None)}
    for name, factor in factors.items():
        if factor <= 0 or own.get("rope.scaling.type", "linear") == "none":
            raise unsupported(path, f"{architecture}.{name}", 1.0, factor)
    factor = next(iter(factors.values()), 1.0)
    return (factor,) * (head_width // 2) if factor != 1 else ()


def _stored_divisors(
    path: Path, tensor: gguf.ReaderTensor, head_width: int, linear: tuple[float, ...]
) -> tuple[float, ...]:
    """The divisors of the rotary frequencies in a tensor, times those of linear scaling."""
    shape = [int(side) for side in tensor.shape]
    if tensor.tensor_type.name != "F32" or shape != [head_width // 2]:
        raise WeightsError(
            f"{path}: {_ROPE_DIVISORS} is wrong",
            expected=f"F32 numbers of shape [{head_width // 2}]",
            got=f"{tensor.tensor_type.name} {shape}",
        )
    values = np.asarray(tensor.data, np.float64)
    if not (values > 0).all() or not np.isfinite(values).all():
        raise WeightsError(f"{path}: {_ROPE_DIVISORS} holds numbers that are not positive")
    return tuple((values * (linear or 1)).tolist())


def _reordered_heads(family: Family, name: str, heads: int, kv_heads: int) -> int | None:
    """Heads of a query or key projection whose rows llama.cpp stores in another order."""
    if not family.pairs_adjacent:
        return None
    return {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])


def _from_fp32(value: float) -> float:
    """Round a number that GGUF stores as fp32 to six digits: 9.999999747378752e-06 is 1e-05."""
    return float(f"{value:.6g}")


def _hugging_face_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor, or its own name where Hugging Face has none."""
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return name
    if stem in _OTHERS and kind == "weight":
        return _OTHERS[stem]
    start, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if start == "blk" and part in _BLOCK:
        return f"model.layers.{layer}.{_BLOCK[part]}.{kind}"
    return name


def _tensor(path: Path, tensor: gguf.ReaderTensor, heads: int | None) -> StoredTensor:
    """A lazy weight. heads: of a query or key projection, whose rows llama.cpp reorders; else
    None."""
    shape = torch.Size(int(side) for side in reversed(tensor.shape))
    kind = tensor.tensor_type.name
    if kind in _PLAIN:
        plain = InFile(path, int(tensor.data_offset), _PLAIN[kind], shape)
        if heads is None:
            return plain
        return Computed(shape, plain.dtype, lambda: _half_split(plain.read(), heads))
    try:
        gguf.dequantize(tensor.data[:1], tensor.tensor_type)
    except NotImplementedError:
        raise WeightsError(
            f"{path}: {tensor.name} is quantised as {kind}, which the gguf package cannot read",
            expected="F16, Q8_0, Q4_K or another of its types",
            fix="use a file in one of these types",
        ) from None
    rows = partial(_dequantise, tensor)
    if heads is None:
        return Computed(shape, torch.float32, lambda: rows(0, shape[0]), rows)
    return Computed(shape, torch.float32, lambda: _half_split(rows(0, shape[0]), heads))


def _dequantise(tensor: gguf.ReaderTensor, start: int, end: int) -> Tensor:
    """Rows `start` to `end` (exclusive), in fp32."""
    return torch.from_numpy(
        np.ascontiguousarray(gguf.dequantize(tensor.data[start:end], tensor.tensor_type))
    )


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key projection: the two channels of a rotary pair, neighbours
    in llama.cpp, are half a head apart in our block."""
    pairs = weight.unflatten(0, (heads, -1, 2))  # [h, d/2, 2, c]
    return pairs.transpose(1, 2).reshape(weight.shape)
