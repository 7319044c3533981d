"""A LLaMA to build on, from a GGUF file of llama.cpp: weights dequantised, tokenizer included."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from mmi_deploy.errors import ConfigError, WeightsError
from mmi_train.checkpoint_import.config_fields import count, fitting, refuse
from mmi_train.checkpoint_import.from_llama import EMBEDDING, HEAD, LanguageModel
from mmi_train.checkpoint_import.sentencepiece_model import (
    Kind,
    Normaliser,
    Piece,
    byte_pair_tokenizer,
    vocabulary,
)
from mmi_train.checkpoint_import.tokenizer_files import read_tokenizer
from mmi_train.weights.lazy_tensor import Computed, InFile, StoredTensor

_ARCHITECTURE = "llama"
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHERS = {"token_embd": EMBEDDING, "output_norm": "model.norm.weight", "output": HEAD}

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
    "vocab_size",  # the embedding tells
    "tensor_data_layout",  # llama.cpp does not read it either
    "rope.scaling.original_context_length",  # of YaRN alone
}
_HARMLESS: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none", "linear"),  # llama.cpp's default, by the factor
    "rope.scaling.factor": (1.0, 0.0),
    "rope.scale_linear": (1.0, 0.0),  # an older name of the factor; 0 means none
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": (False, True),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
}
"""Switches of the architecture, and the values with which they change nothing."""

_ENDS = tuple(f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom"))
"""Tokens that end a text, a turn and a message: llama.cpp stops at each of them."""

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_NEEDED = {"llama": ("token_type", "scores"), "gpt2": ("token_type", "pre", "merges")}
"""Fields that decide how a kind of tokenizer cuts a text; llama.cpp guesses those that are missing,
with a warning."""

_OWN_TOKENIZER = "give --tokenizer a folder with the model's tokenizer.json"

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
"""How llama.cpp names the files of a split model."""

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_WORDS: dict[str, Callable[[], list[pre_tokenizers.PreTokenizer]]] = {
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": lambda: [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": lambda: [
        pre_tokenizers.Split(Regex(_LLAMA_3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
"""How texts are cut into words before byte pairs are joined, by llama.cpp's name for it."""


def read_gguf(path: Path, tokenizer: Path | None = None) -> LanguageModel:
    """The model in a GGUF file, or in all parts of a split one whose first part is given; its
    tokenizer, or the one at `tokenizer`.

    Raises `ConfigError` naming the first field of another architecture, and `WeightsError`.
    """
    tensors, fields = _open(path)
    for number, part in enumerate(_other_parts(path, fields), 1):
        more, about = _open(part)
        if (about.get("split.no"), about.get("split.count")) != (number, fields["split.count"]):
            raise WeightsError(
                f"{part} is no part of {path}",
                expected=f"part {number + 1} of {fields['split.count']}",
                fix="download all parts again",
            )
        tensors += more
    with fitting(path):
        return _read(path, tensors, fields, tokenizer)


def _open(path: Path) -> tuple[list[tuple[Path, gguf.ReaderTensor]], dict[str, Any]]:
    """The tensors of one file with its path, and its fields; raises `WeightsError`."""
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, TypeError):
        raise WeightsError(
            f"{path} is no GGUF file, or it is cut off or damaged", fix="download it again"
        ) from None
    if reader.endianess == gguf.GGUFEndian.BIG:
        raise WeightsError(
            f"{path} is big-endian",
            expected="a little-endian file",
            fix=f"convert it with `gguf-convert-endian {path.name} little`",
        )
    return [(path, tensor) for tensor in reader.tensors], fields


def _other_parts(path: Path, fields: dict[str, Any]) -> list[Path]:
    """The files that follow the first one of a split file, by their names; raises `WeightsError`
    where they cannot be found."""
    number, parts = fields.get("split.no", 0), fields.get("split.count", 1)
    if parts == 1:
        return []
    found = _PART.fullmatch(path.name)
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
) -> LanguageModel:
    sizes = _sizes(path, fields)
    heads, width = sizes["attention.head_count"], sizes["embedding_length"]
    kv_heads = sizes.get("attention.head_count_kv", heads)
    tensors: dict[str, StoredTensor] = {}
    for file, tensor in stored:
        name = _name(path, tensor.name)
        if name in tensors:
            raise WeightsError(f"{file} holds {tensor.name}, which another part holds too")
        turned = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
        tensors[name] = _tensor(file, tensor, turned)
    return LanguageModel(
        source=path,
        width=width,
        layers=sizes["block_count"],
        heads=heads,
        kv_heads=kv_heads,
        mlp_width=sizes["feed_forward_length"],
        context=sizes["context_length"],
        eps=_six_digits(fields[f"{_ARCHITECTURE}.attention.layer_norm_rms_epsilon"]),
        rope_theta=float(fields.get(f"{_ARCHITECTURE}.rope.freq_base", 10000.0)),
        tied=HEAD not in tensors,
        tensors=tensors,
        tokenizer=_tokenizer(path, fields) if tokenizer is None else read_tokenizer(tokenizer),
        bos=fields.get("tokenizer.ggml.bos_token_id"),
        ends=tuple(dict.fromkeys(fields[name] for name in _ENDS if name in fields)),
        pad=fields.get("tokenizer.ggml.padding_token_id"),
    )


def _sizes(path: Path, fields: dict[str, Any]) -> dict[str, int]:
    """The whole numbers among the fields of the architecture; raises `ConfigError`."""
    kind = fields.get("general.architecture")
    if kind != _ARCHITECTURE:
        raise refuse(path, f"general.architecture {kind}", _ARCHITECTURE, kind)
    prefix = f"{_ARCHITECTURE}."
    own = {n.removeprefix(prefix): v for n, v in fields.items() if n.startswith(prefix)}
    for name, value in own.items():
        if name in _HARMLESS and value not in _HARMLESS[name]:
            raise refuse(path, prefix + name, _HARMLESS[name][0], value)
        if name not in _READ and name not in _HARMLESS:
            raise refuse(path, prefix + name, "no such field", value)
    needed = ("block_count", "context_length", "embedding_length", "feed_forward_length")
    for name in (*needed, "attention.head_count"):
        count(path, fields, prefix + name)
    head_width = own["embedding_length"] // own["attention.head_count"]
    for name in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if own.get(name, head_width) != head_width:
            raise refuse(path, prefix + name, head_width, own[name])
    if "attention.layer_norm_rms_epsilon" not in own:
        raise ConfigError(f"{path} lacks {prefix}attention.layer_norm_rms_epsilon")
    return {name: value for name, value in own.items() if isinstance(value, int)}


def _six_digits(value: float) -> float:
    """GGUF stores fp32: 9.999999747378752e-06 is 1e-05."""
    return float(f"{value:.6g}")


def _name(path: Path, name: str) -> str:
    """Hugging Face's name of a GGUF tensor; its own where there is none."""
    stem, _, kind = name.rpartition(".")
    if name == "rope_freqs.weight":
        raise refuse(path, name, "rotary positions that are not scaled", "scaled ones")
    if kind != "weight":
        return name
    if stem in _OTHERS:
        return _OTHERS[stem]
    start, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if start == "blk" and part in _BLOCK:
        return f"model.layers.{layer}.{_BLOCK[part]}.weight"
    return name


def _tensor(path: Path, tensor: gguf.ReaderTensor, heads: int | None) -> StoredTensor:
    """A weight; `heads`: of a query or key projection, whose rows llama.cpp has in another
    order."""
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
        ) from None
    rows = partial(_dequantised, tensor)
    if heads is None:
        return Computed(shape, torch.float32, lambda: rows(0, shape[0]), rows)
    return Computed(shape, torch.float32, lambda: _half_split(rows(0, shape[0]), heads))


def _dequantised(tensor: gguf.ReaderTensor, start: int, end: int) -> Tensor:
    return torch.from_numpy(
        np.ascontiguousarray(gguf.dequantize(tensor.data[start:end], tensor.tensor_type))
    )


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection from llama.cpp's order, in which the two channels of a
    rotary pair are neighbours, to ours, in which they are half a head apart."""
    pairs = weight.unflatten(0, (heads, -1, 2))  # [h, d/2, 2, c]
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tokenizer(path: Path, fields: dict[str, Any]) -> Tokenizer:
    own = {n.removeprefix("tokenizer.ggml."): v for n, v in fields.items()}
    kind, texts = own.get("model"), own.get("tokens")
    if not texts:
        raise WeightsError(f"{path} holds no tokenizer", fix="give --tokenizer the folder of one")
    needed, words = _NEEDED.get(str(kind)), own.get("pre", "")
    if needed is None or (kind == "gpt2" and words not in (*_WORDS, "")):
        raise ConfigError(
            f"{path}: its tokenizer ({kind}, tokenizer.ggml.pre {words}) is not known",
            expected=f"llama, or gpt2 with one of {', '.join(_WORDS)}",
            fix=_OWN_TOKENIZER,
        )
    if lacking := [f"tokenizer.ggml.{name}" for name in needed if own.get(name) is None]:
        raise ConfigError(
            f"{path} does not say how it cuts texts: it lacks {', '.join(lacking)}",
            fix=_OWN_TOKENIZER,
        )
    kinds = own["token_type"]
    used = max((i + 1 for i, found in enumerate(kinds) if found != Kind.UNUSED), default=0)
    texts, kinds = texts[:used], kinds[:used]  # the others only fill the embedding up
    if kind == "llama":
        pieces = [Piece(*row) for row in zip(texts, own["scores"][:used], kinds, strict=True)]
        return byte_pair_tokenizer(
            pieces, Normaliser(add_space=bool(own.get("add_space_prefix", True)))
        )
    merges = [tuple(line.split(" ", 1)) for line in own["merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary(texts),
            merges=merges,
            ignore_merges=words == "llama-bpe",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_WORDS[words]())
    tokenizer.decoder = decoders.ByteLevel()
    for special, added in ((True, Kind.CONTROL), (False, Kind.USER_DEFINED)):
        tokens = [
            AddedToken(text, special=special, normalized=False)
            for text, found in zip(texts, kinds, strict=True)
            if found == added
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(tokens)
    return tokenizer
