"""Our configuration of a golden unit, converted from the `config` of its side-car.

The side-car uses the published code's own terms. A key that it lacks has the value of the preset
`released_13b`. Values that the published code hard-codes or derives (heads and points of MMFS, the
prior's width, rows of tables) follow from the shapes of the weights, so that any variant can be
checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from mmi_deploy.spec.config import (
    DiffusionConfig,
    ImageDecoderConfig,
    LlamaConfig,
    MmfsConfig,
    ModelConfig,
    ResamplerConfig,
    TokenConfig,
    UnetConfig,
    VaeConfig,
    VisionConfig,
)
from mmi_deploy.spec.presets import released_13b
from mmi_train.golden.units import UnitError

State = Mapping[str, Tensor]
T = TypeVar("T")

PUBLISHED = released_13b()

CLIP_NAME = "encoder.vision_model."


class Section:
    """One object of a side-car, with readable errors. `path`: its place, such as `config.clip`."""

    def __init__(self, values: Mapping[str, Any], path: str = "config") -> None:
        self.values, self.path = values, path

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def section(self, key: str) -> Section:
        """The object `key`; empty if it is missing."""
        inner = self.values.get(key)
        if inner is not None and not isinstance(inner, dict):
            raise UnitError(f"{self.path}.{key} is not an object", got=repr(inner))
        return Section(inner or {}, f"{self.path}.{key}")

    def get(self, key: str, default: T) -> T:
        """The value of `key`, of the type of `default`; `default` if it is missing."""
        value = self.values.get(key)
        if value is None:
            return default
        kind = type(default)
        if kind is float and type(value) is int:
            value = float(value)
        if kind is tuple and isinstance(value, list):
            value = tuple(value)
        if type(value) is not kind:
            raise UnitError(
                f"{self.path}.{key} is of the wrong type", expected=kind.__name__, got=repr(value)
            )
        return value

    def count(self, key: str, default: int) -> int:
        """`get` for a number that must be positive."""
        value = self.get(key, default)
        if value < 1:
            raise UnitError(f"{self.path}.{key} must be positive", got=value)
        return value


def under(state: State, prefix: str) -> dict[str, Tensor]:
    """Tensors whose names start with `prefix`, under their names without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def size(state: State, name: str, dimension: int) -> int:
    """Size of one dimension of the weight `name`; raises `UnitError` if it does not exist."""
    if name not in state:
        raise UnitError(f"lacks the tensor state.{name}")
    shape = state[name].shape
    if len(shape) <= dimension:
        raise UnitError(f"state.{name} has shape {list(shape)}")
    return shape[dimension]


def mmfs(section: Section, state: State, default: MmfsConfig, prefix: str = "") -> MmfsConfig:
    """Configuration of the MMFS with weights `state[prefix + ...]`, on the levels of `default`.

    Heads h and points p follow from 2 h p rows of the offsets and h l (p + 1) rows of the logits.
    """
    offset_rows = size(state, prefix + "sampling_offsets.weight", 0)
    logit_rows = size(state, prefix + "attention_weights.weight", 0)
    levels = len(default.levels)
    heads = logit_rows // levels - offset_rows // 2
    points = offset_rows // 2 // max(heads, 1)
    consistent = heads > 0 and points > 0
    heads = section.count(
        "n_heads", section.count("num_heads", heads if consistent else default.heads)
    )
    points = section.count("n_points", points if consistent else default.points)
    images = section.count("max_num_image_per_seq", size(state, prefix + "query_relpos.weight", 0))
    width = section.count("attn_dim", size(state, prefix + "value_proj.weight", 0))
    if "d_model" in section and "ratio" in section:
        width = int(section.count("d_model", width) * section.get("ratio", 1.0))
    return replace(
        default,
        heads=heads,
        points=points,
        value_width=width,
        images=images,
        images_seen=min(default.images_seen, images - 1),
    )


def levels_of(spatial_shapes: Sequence[int], sides: Sequence[int]) -> tuple[int, ...]:
    """Indices of the encoder's maps, of `sides`, whose side is in `spatial_shapes`."""
    levels = tuple(level for level, side in enumerate(sides) if side in spatial_shapes)
    if [sides[level] for level in levels] != list(spatial_shapes):
        raise UnitError(
            "config.spatial_shapes are not sides of the encoder's maps",
            expected=f"some of {list(sides)} in this order",
            got=list(spatial_shapes),
        )
    return levels


def qformer(section: Section, default: ResamplerConfig, state: State) -> ResamplerConfig:
    """Convert a published `perceiver_config`, of the resampler whose weights are in `state`."""
    norms = any(name.endswith("attention.q_norm.weight") for name in state)
    return replace(
        default,
        queries=section.count("num_queries", default.queries),
        width=section.count("hidden_size", default.width),
        context_width=section.count("encoder_hidden_size", default.context_width),
        layers=section.count("num_hidden_layers", default.layers),
        heads=section.count("num_attention_heads", default.heads),
        mlp_width=section.count("intermediate_size", default.mlp_width),
        cross_every=section.count("cross_attention_frequency", default.cross_every),
        qk_norm=section.get("qk_normalization", norms),
        eps=section.get("layer_norm_eps", default.eps),
    )


def vision(section: Section, image_size: int, state: State) -> VisionConfig:
    """Convert a published CLIP configuration, with the adapter in `state` of the visual tokenizer.

    The adapter has as many heads as CLIP; its values are half as wide as CLIP, its feed-forward
    layers a quarter (`clip_vit_adapter_hf`).
    """
    default = PUBLISHED.vision
    heads = section.count("num_attention_heads", default.heads)
    return replace(
        default,
        image_size=image_size,
        patch_size=section.count("patch_size", default.patch_size),
        width=section.count("hidden_size", default.width),
        layers=section.count("num_hidden_layers", default.layers),
        heads=heads,
        mlp_width=section.count("intermediate_size", default.mlp_width),
        prior_width=size(state, CLIP_NAME + "adapter_spm.stem.0.weight", 0),
        adapter_heads=heads,
        activation=section.get("hidden_act", default.activation),
        eps=section.get("layer_norm_eps", default.eps),
        position_grid=round((size(state, "pos_embed", 0) - 1) ** 0.5),
    )


def llama(section: Section, vocab: int, context: int, mmfs_every: int) -> LlamaConfig:
    """Convert a published LLaMA configuration; the published code has no grouped-query
    attention."""
    default = PUBLISHED.llama
    heads = section.count("num_attention_heads", default.heads)
    return replace(
        default,
        vocab=vocab,
        width=section.count("hidden_size", default.width),
        layers=section.count("num_hidden_layers", default.layers),
        heads=heads,
        kv_heads=heads,
        mlp_width=section.count("intermediate_size", default.mlp_width),
        context=context,
        mmfs_every=mmfs_every,
        eps=section.get("rms_norm_eps", default.eps),
    )


def unet(section: Section, latent_side: int, state: State) -> UnetConfig:
    """Convert a configuration of diffusers' `UNet2DConditionModel`, in which `attention_head_dim`
    is the number of heads; `state` holds the weights of the U-Net."""
    default = PUBLISHED.image_decoder.unet
    projections = [state[name] for name in state if name.endswith("attentions.0.proj_in.weight")]
    linear = all(weight.ndim == 2 for weight in projections)
    widths = section.get("block_out_channels", default.block_widths)
    heads = section.values.get("num_attention_heads") or section.values.get("attention_head_dim")
    if isinstance(heads, int):
        heads = [heads] * len(widths)
    down = section.get("down_block_types", _down_blocks(default.attention_blocks))
    attends = tuple(kind.startswith("CrossAttn") for kind in down)
    known = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
    if [known[flag] for flag in attends] != list(down):
        raise UnitError(f"{section.path}.down_block_types holds an unknown kind", got=list(down))
    up = section.get("up_block_types", tuple(kind.replace("Down", "Up") for kind in reversed(down)))
    if [kind.replace("Up", "Down") for kind in reversed(up)] != list(down):
        raise UnitError(
            f"{section.path}.up_block_types does not mirror down_block_types", got=list(up)
        )
    return replace(
        default,
        latent_side=latent_side,
        latent_channels=section.count("in_channels", default.latent_channels),
        block_widths=widths,
        layers_per_block=section.count("layers_per_block", default.layers_per_block),
        condition_width=section.count("cross_attention_dim", default.condition_width),
        attention_heads=default.attention_heads if heads is None else tuple(heads),
        attention_blocks=attends,
        norm_groups=section.count("norm_num_groups", default.norm_groups),
        linear_projection=section.get("use_linear_projection", linear),
    )


def _down_blocks(attends: Sequence[bool]) -> tuple[str, ...]:
    return tuple("CrossAttnDownBlock2D" if flag else "DownBlock2D" for flag in attends)


def vae(section: Section) -> VaeConfig:
    """Convert a configuration of diffusers' `AutoencoderKL`."""
    default = PUBLISHED.image_decoder.vae
    return replace(
        default,
        block_widths=section.get("block_out_channels", default.block_widths),
        layers_per_block=section.count("layers_per_block", default.layers_per_block),
        latent_channels=section.count("latent_channels", default.latent_channels),
        scaling_factor=section.get("scaling_factor", default.scaling_factor),
        norm_groups=section.count("norm_num_groups", default.norm_groups),
    )


def diffusion(section: Section) -> DiffusionConfig:
    """Convert a configuration of diffusers' `DDPMScheduler`."""
    default = PUBLISHED.image_decoder.diffusion
    return DiffusionConfig(
        prediction=section.values.get("prediction_type", default.prediction),
        steps=section.count("num_train_timesteps", default.steps),
        beta_start=section.get("beta_start", default.beta_start),
        beta_end=section.get("beta_end", default.beta_end),
        beta_schedule=section.get("beta_schedule", default.beta_schedule),
    )


def tokens(section: Section) -> TokenConfig:
    """Convert a published `special_token_dict`."""
    default = PUBLISHED.tokens
    return TokenConfig(
        bos=section.get("bos_token_id", default.bos),
        eos=section.get("eos_token_id", default.eos),
        pad=section.get("pad_token_id", default.pad),
        boi=section.get("soi_token_id", default.boi),
        image=section.get("image_token_id", default.image),
    )


def model(config: Section, state: State, image_side: int) -> ModelConfig:
    """Convert the whole model: `config.model` holds the published constructor's arguments,
    `config.tiny` the configurations of the pre-trained parts. `image_side`: side of the images, in
    pixels."""
    arguments, parts = config.section("model"), config.section("tiny")
    tokenizer = under(state, "visual_tokenizer.")
    vision_config = vision(parts.section("clip"), image_side, tokenizer)
    resampler = qformer(
        arguments.section("visual_tokenizer_config").section("perceiver_config"),
        PUBLISHED.vision_resampler,
        tokenizer,
    )
    body = parts.section("llama")
    vocab = arguments.count("txt_vocab_size", PUBLISHED.llama.vocab)
    context = max(
        arguments.count("seq_len", PUBLISHED.llama.context),
        body.count("max_position_embeddings", PUBLISHED.llama.context),
    )
    every = arguments.count("cross_attention_frequency", PUBLISHED.llama.mmfs_every)
    llama_config = llama(body, vocab, context, every)
    shapes = arguments.get("spatial_shapes", (32, 16, 8))
    llm_mmfs = mmfs(
        arguments,
        state,
        replace(PUBLISHED.llm_mmfs, levels=levels_of(shapes, vision_config.level_sides)),
        "mm_decoder.layers.0.llama_cross_attn.attn.",
    )
    return ModelConfig(
        name="golden",
        tokens=tokens(arguments.section("special_token_dict")),
        vision=vision_config,
        vision_resampler=resampler,
        llama=llama_config,
        llm_mmfs=llm_mmfs,
        image_decoder=image_decoder(arguments.section("image_decoder_config"), parts, state),
    )


def image_decoder(section: Section, parts: Section, state: State) -> ImageDecoderConfig:
    """Convert a published `image_decoder_config` with the configurations of its U-Net and VAE."""
    vae_config = vae(parts.section("vae"))
    image_size = section.count("image_size", PUBLISHED.image_decoder.image_size)
    return ImageDecoderConfig(
        resampler=qformer(
            section.section("perceiver_config"),
            PUBLISHED.image_decoder.resampler,
            under(state, "image_decoder.perceiver_resampler."),
        ),
        unet=unet(parts.section("unet"), image_size // vae_config.factor, state),
        mmfs=mmfs(
            section,
            state,
            PUBLISHED.image_decoder.mmfs,
            "image_decoder.decoder.mmfs_module.mmfs_mid_block.mmfs.",
        ),
        vae=vae_config,
        diffusion=diffusion(parts.section("scheduler")),
    )
