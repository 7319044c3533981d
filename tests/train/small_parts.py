"""Small random parts as others save them: a LLaMA (folder and GGUF), a CLIP, a Stable Diffusion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from mmi_train.checkpoint_import.sentencepiece_model import Piece

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "t"), ("c", "at"), ("Ġ", "cat")]


def byte_tokens() -> list[str]:
    """Special tokens, all bytes, a few words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*SPECIAL, *letters, *(left + right for left, right in MERGES)]


KNOWN = len(byte_tokens())
# The embedding is padded, as many are.
ROWS = KNOWN + 5


def byte_tokenizer() -> Tokenizer:
    """A byte-level tokenizer as SmolLM2 has one."""
    vocabulary = {token: index for index, token in enumerate(byte_tokens())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return tokenizer


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Nothing at zero or one, so that no tensor can be mistaken for another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise + (1 if parameter.ndim == 1 and "bias" not in name else 0))
    return module.eval()


def llama(tied: bool = False, **changes: Any) -> LlamaForCausalLM:
    """Grouped keys, other bases than the defaults; 256 wide, as block-quantised rows need."""
    fields: dict[str, Any] = {
        "vocab_size": ROWS,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    module = LlamaForCausalLM(LlamaConfig(**(fields | changes)))
    return randomise(module)  # type: ignore[return-value]


def write_llama(folder: Path, model: LlamaForCausalLM) -> Path:
    """As Hugging Face saves it: several safetensors files with an index, and a tokenizer."""
    model.save_pretrained(folder, max_shard_size="2MB")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    others = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in others:
        return others[name]
    _, _, layer, part = name.split(".", 3)
    stem, kind = part.rsplit(".", 1)
    return f"blk.{layer}.{_GGUF_NAMES[stem]}.{kind}"


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of query and key projections: rotary pairs as neighbours."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


# Architectures whose rotary pairs llama.cpp stores as neighbours.
_PAIRS_ADJACENT = ("llama", "smollm3")


def _random_blocks(shape: tuple[int, ...]) -> np.ndarray:
    """Rows of Q4_K blocks (256 numbers in 144 bytes: two scales, then packed bits), which the gguf
    package can read and not write. Scales make the numbers about N(0, 0.05)."""
    draw = np.random.default_rng(shape[0])
    blocks = draw.integers(0, 256, (shape[0], shape[1] // 256, 144), np.uint8)
    blocks[..., :4] = np.array([2e-4, 1.5e-3], np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    fields: dict[str, Any] | None = None,
    words: str = "smollm",
    pieces: list[Piece] | None = None,
    without: tuple[str, ...] = (),
    architecture: str = "llama",
    rope_freqs: np.ndarray | None = None,
    **form: Any,
) -> Path:
    """As llama.cpp's converter writes it; matrices quantised as `kind`. `fields`: more of them.
    `pieces`: of a SentencePiece tokenizer, in place of the byte-level one. `without`: fields that
    are left out. `rope_freqs`: divisors of LLaMA-3.1's rotary frequencies. `form`: byte order and
    parts of the file, see `GGUFWriter`."""
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or width
    adjacent = architecture in _PAIRS_ADJACENT
    writer = gguf.GGUFWriter(path, architecture, **form)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if head_width != width:
        writer.add_key_length(head_width)
        writer.add_value_length(head_width)
    if adjacent:
        writer.add_rope_dimension_count(head_width)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    writer.add_vocab_size(config.vocab_size)
    if pieces is None:
        padding = [f"<pad{index}>" for index in range(config.vocab_size - KNOWN)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(words)
        writer.add_token_list(byte_tokens() + padding)
        known = [3] * len(SPECIAL) + [1] * (KNOWN - len(SPECIAL))
        writer.add_token_types(known + [5] * len(padding))
        writer.add_token_merges([" ".join(pair) for pair in MERGES])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([piece.text for piece in pieces])
        writer.add_token_scores([piece.score for piece in pieces])
        writer.add_token_types([piece.kind for piece in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in (fields or {}).items():
        writer.add_key_value(name, value, _gguf_type(value))
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        value = tensor.numpy()
        if adjacent and name.endswith(("q_proj.weight", "k_proj.weight")):
            grouped = name.endswith("k_proj.weight")
            heads = config.num_key_value_heads if grouped else config.num_attention_heads
            value = _interleaved(value, heads)
        if value.ndim == 1:
            writer.add_tensor(_gguf_name(name), value)
        else:
            blocks = kind == gguf.GGMLQuantizationType.Q4_K
            data = _random_blocks(value.shape) if blocks else gguf.quantize(value, kind)
            writer.add_tensor(_gguf_name(name), data, raw_dtype=kind)
    for name in without:
        del writer.kv_data[0][name]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_type(value: object) -> gguf.GGUFValueType:
    if isinstance(value, str):
        return gguf.GGUFValueType.STRING
    return gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.UINT32


VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def write_clip_vision(folder: Path) -> CLIPVisionModel:
    """CLIP's vision half alone."""
    model = randomise(CLIPVisionModel(CLIPVisionConfig(**VISION)))
    model.save_pretrained(folder)
    return model


def write_clip(folder: Path) -> CLIPModel:
    """Both halves of CLIP, as CLIP itself is published."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config={**text, "num_attention_heads": 2, "vocab_size": 99}, vision_config=VISION
    )
    model = randomise(CLIPModel(config))
    model.save_pretrained(folder)
    return model


def unet(**changes: Any) -> UNet2DConditionModel:
    """Stable Diffusion 2's form: three levels, the last without attention, linear projections."""
    fields: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 64,
        "attention_head_dim": [1, 2, 2],
        "use_linear_projection": True,
        "norm_num_groups": 16,
    }
    return randomise(UNet2DConditionModel(**(fields | changes)))


def vae(**changes: Any) -> AutoencoderKL:
    """Two levels: four times two pixels per latent cell."""
    fields: dict[str, Any] = {
        "block_out_channels": (32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 16,
        "scaling_factor": 0.2,
    }
    return randomise(AutoencoderKL(**(fields | changes)))


def write_diffusion(folder: Path, text: bool = True) -> dict[str, nn.Module]:
    """A pipeline's folders; `text`: with a text encoder and its tokenizer."""
    parts: dict[str, nn.Module] = {"unet": unet(), "vae": vae()}
    parts["unet"].save_pretrained(folder / "unet")
    parts["vae"].save_pretrained(folder / "vae")
    DDPMScheduler(prediction_type="v_prediction", beta_start=0.001, beta_end=0.01).save_pretrained(
        folder / "scheduler"
    )
    if text:
        tokens = ["<|startoftext|>", "<|endoftext|>", "a</w>", "a"]
        encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                vocab_size=len(tokens),
                max_position_embeddings=7,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
        parts["text_encoder"] = randomise(encoder)
        encoder.save_pretrained(folder / "text_encoder")
        words = folder / "tokenizer"
        words.mkdir()
        (words / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
        (words / "merges.txt").write_text("#version: 0.2\n")
        about = {"model_max_length": 7, "tokenizer_class": "CLIPTokenizer"}
        (words / "tokenizer_config.json").write_text(json.dumps(about))
    return parts


def byte_tokenizer_ids(text: str) -> list[int]:
    """Ids of `text`, its marks read as letters."""
    tokenizer = byte_tokenizer()
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids
