"""Model configuration: frozen, validated dataclasses, read from and written to JSON.

Two readings of MM-Interleaved are configurations of one implementation: the paper's (MMFS after the
U-Net's up blocks, all previous images, plain softmax, Perceiver Resamplers) and that of the
released checkpoint (MMFS on the skips, the nearest image, a null slot, Q-Formers). See
`presets.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.dataclasses import dataclass

from mmi_deploy.errors import ConfigError

STRICT = ConfigDict(extra="forbid")

# Bounds far beyond any existing model. A value beyond them comes from a damaged or hostile file and
# is refused before any memory is allocated for it.
Id = Annotated[int, Field(ge=0, lt=2**24)]

# Tokens, channels, training steps.
Count = Annotated[int, Field(ge=1, le=2**24)]

# Layers, heads, points, images, rows.
Few = Annotated[int, Field(ge=1, le=2**12)]

# Positions in a sequence of layers.
Index = Annotated[int, Field(ge=0, lt=2**12)]

# Pixels, patches or cells along one side.
Side = Annotated[int, Field(ge=1, le=2**14)]

# Tuples with one entry per resolution, which halves from block to block.
Counts = Annotated[tuple[Count, ...], Field(min_length=1, max_length=12)]
Fews = Annotated[tuple[Few, ...], Field(min_length=1, max_length=12)]

Finite = Annotated[float, Field(ge=-1e6, le=1e6)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
Ratio = Annotated[float, Field(gt=0, le=64)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Level = Annotated[int, Field(ge=0, le=3)]

# Scale of classifier-free guidance in the paper's evaluation (Sec. 4.1).
PUBLISHED_GUIDANCE = 3.5


_HEADS = "its number of heads"
_GROUPS = "its norm_groups"
_SIN_COS = "as sin/cos tables of two coordinates need"


def _multiple(what: str, size: int, count: int, which: str) -> None:
    """Raise `ValueError` unless `size` is a multiple of `count`."""
    if size < count or size % count:
        raise ValueError(f"{what} {size} is not a multiple of {count}, {which}")


@dataclass(frozen=True, config=STRICT)
class TokenConfig:
    """Ids of the special tokens. `image` stands once per visual token of an image.

    `eos` ends a document in training; generation ends at it and at each of `other_eos` (LLaMA-3
    instruct: `<|end_of_text|>`, `<|eom_id|>`, `<|eot_id|>`), which may be `bos` or `pad` as well.
    """

    bos: Id
    eos: Id
    pad: Id
    boi: Id
    image: Id
    other_eos: tuple[Id, ...] = ()

    @model_validator(mode="after")
    def _are_different(self) -> TokenConfig:
        ids = (self.bos, self.eos, self.boi, self.image)
        marks = (self.boi, self.image, *self.ends)
        if len({*ids}) < len(ids) or len({*marks}) < len(marks) or self.pad in marks[:2]:
            raise ValueError("two special tokens have the same id")
        return self

    @model_serializer(mode="wrap")
    def _without_empty(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit an empty `other_eos`: checkpoints from before the field compare this text."""
        fields: dict[str, Any] = inner(self)
        return {name: value for name, value in fields.items() if value not in ((), [])}

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end a generated text, `eos` first."""
        return (self.eos, *self.other_eos)

    @property
    def largest(self) -> int:
        return max(self.bos, self.pad, self.boi, self.image, *self.ends)


@dataclass(frozen=True, config=STRICT)
class MmfsConfig:
    """Multi-image Multi-scale Feature Synchronizer (paper Sec. 3.2, Eq. 4).

    `levels`: indices into the encoder's four maps (0 = finest), finest first.
    `value_width`: heads * channels per head. `base_grid`: side of the grid whose cells are the unit
    of offsets; None: the grid of the query's own map, `grid_scale` times as fine (2 in the
    published U-Net with an encoder at 448 pixels, whose maps are twice as large as those it was
    built for). `images`: rows of the relative-position table (row 0 hidden, 1 the nearest image).
    `images_seen`: number of nearest images that a query may look at.
    """

    heads: Few
    points: Few
    value_width: Count
    levels: Annotated[tuple[Level, ...], Field(min_length=1)]
    base_grid: Side | None
    images: Few
    images_seen: Few
    null_slot: bool
    offset_init: Finite
    grid_scale: Few = 1

    @model_validator(mode="after")
    def _fits(self) -> MmfsConfig:
        _multiple("value width", self.value_width, self.heads, _HEADS)
        if not all(finer < coarser for finer, coarser in pairwise(self.levels)):
            raise ValueError(f"the levels {list(self.levels)} are not in order, finest first")
        return self

    @property
    def head_width(self) -> int:
        return self.value_width // self.heads


@dataclass(frozen=True, config=STRICT)
class ResamplerConfig:
    """Resampler: any number of context tokens to `queries` tokens.

    `perceiver`: Flamingo's resampler, keys and values are [context; queries].
    `qformer`: BLIP-2's, self-attention over the queries, cross-attention every `cross_every`
    layers.
    """

    form: Literal["perceiver", "qformer"]
    queries: Few
    width: Count
    context_width: Count
    layers: Few
    heads: Few
    mlp_width: Count
    cross_every: Few = 1
    qk_norm: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    eps: Positive = 1e-12

    @model_validator(mode="after")
    def _fits(self) -> ResamplerConfig:
        _multiple("width", self.width, self.heads, _HEADS)
        return self


@dataclass(frozen=True, config=STRICT)
class VisionConfig:
    """CLIP ViT with a ViT-Adapter pyramid. Image sides and patches in pixels."""

    image_size: Side
    patch_size: Side
    width: Count
    layers: Few
    heads: Few
    mlp_width: Count
    interactions: Few = 4
    prior_width: Count = 64
    adapter_heads: Few = 16
    adapter_points: Few = 4
    adapter_value_ratio: Ratio = 0.5
    adapter_mlp_ratio: Ratio = 0.25
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    eps: Positive = 1e-5
    pixel_mean: tuple[Finite, Finite, Finite] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)
    position_grid: Side = 16

    @model_validator(mode="after")
    def _fits(self) -> VisionConfig:
        _multiple("width", self.width, self.heads, _HEADS)
        value_width = int(self.width * self.adapter_value_ratio)
        _multiple("the adapter's value width", value_width, self.adapter_heads, _HEADS)
        _multiple("width", self.width, 4, _SIN_COS)
        return self

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def level_sides(self) -> tuple[int, int, int, int]:
        """Sides of the four feature maps, finest first: strides of 1/4, 1/2, 1 and 2 patches."""
        return (self.grid * 4, self.grid * 2, self.grid, self.grid // 2)


# Fields of `LlamaConfig` that configurations from before them lack.
_LATER = ("channels_per_head", "qkv_bias", "qk_norm", "rope_divisors", "layers_without_rope")


@dataclass(frozen=True, config=STRICT)
class LlamaConfig:
    """LLaMA with MMFS before the MLP of every `mmfs_every`-th block, starting with block 0.

    The last five fields tell apart LLaMA's descendants; their defaults are LLaMA itself.
    `channels_per_head`: of attention; None: width / heads. `qkv_bias`: query, key and value
    projections have a bias (Qwen2). `qk_norm`: an RMS norm over the channels of each head of
    queries and keys, before their rotation (Qwen3). `rope_divisors`: the rotary frequencies are
    divided by these, highest frequency first (LLaMA-3.1's scaling); empty: by one.
    `layers_without_rope`: indices of blocks whose attention knows no positions (SmolLM3).
    """

    vocab: Count
    width: Count
    layers: Few
    heads: Few
    kv_heads: Few
    mlp_width: Count
    context: Count
    mmfs_every: Few
    eps: Positive = 1e-6
    rope_theta: Positive = 10000.0
    channels_per_head: Few | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_divisors: Annotated[tuple[Positive, ...], Field(max_length=2**11)] = ()
    layers_without_rope: tuple[Index, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> LlamaConfig:
        if self.channels_per_head is None:
            _multiple("width", self.width, self.heads, _HEADS)
        _multiple("heads", self.heads, self.kv_heads, "its kv_heads")
        _multiple("head width", self.head_width, 2, "as rotary positions need")
        if self.rope_divisors and len(self.rope_divisors) != self.head_width // 2:
            raise ValueError(
                f"it has {len(self.rope_divisors)} rope_divisors for the {self.head_width // 2} "
                "frequencies of a head"
            )
        unturned = self.layers_without_rope
        if list(unturned) != sorted({*unturned}) or any(i >= self.layers for i in unturned):
            raise ValueError(
                f"layers_without_rope {list(unturned)} are not layers of {self.layers}, in order"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit later fields at their defaults: checkpoints from before them compare this text."""
        fields: dict[str, Any] = inner(self)
        return {name: value for name, value in fields.items() if value or name not in _LATER}

    @property
    def head_width(self) -> int:
        return self.channels_per_head or self.width // self.heads

    def cut(self, layers: int) -> LlamaConfig:
        """Derive the configuration of the first `layers` blocks."""
        kept = tuple(layer for layer in self.layers_without_rope if layer < layers)
        return replace(self, layers=layers, layers_without_rope=kept)

    @property
    def mmfs_layers(self) -> tuple[int, ...]:
        return tuple(range(0, self.layers, self.mmfs_every))


@dataclass(frozen=True, config=STRICT)
class UnetConfig:
    """Stable Diffusion's U-Net, in the terms of diffusers' `UNet2DConditionModel`.

    `mmfs_at`: `up_blocks` (paper) or `skips` (released: each skip connection and the middle block).
    """

    latent_side: Side
    latent_channels: Count
    block_widths: Counts
    layers_per_block: Few
    condition_width: Count
    attention_heads: Fews
    attention_blocks: tuple[bool, ...]
    mmfs_at: Literal["up_blocks", "skips"]
    norm_groups: Few = 32
    linear_projection: bool = True

    @model_validator(mode="after")
    def _fits(self) -> UnetConfig:
        blocks = len(self.block_widths)
        if not blocks == len(self.attention_heads) == len(self.attention_blocks):
            raise ValueError(
                f"it has {blocks} block_widths, {len(self.attention_heads)} attention_heads and "
                f"{len(self.attention_blocks)} attention_blocks"
            )
        for width, heads in zip(self.block_widths, self.attention_heads, strict=True):
            _multiple("block width", width, heads, _HEADS)
            _multiple("block width", width, self.norm_groups, _GROUPS)
            _multiple("block width", width, 4, _SIN_COS)
        _multiple(
            "latent_side", self.latent_side, 2 ** (blocks - 1), "the side of its coarsest cells"
        )
        return self

    @property
    def resnet_widths(self) -> tuple[int, ...]:
        """Output channels of every ResNet, in the order of execution."""
        layers, widths = self.layers_per_block, self.block_widths
        down = [width for width in widths for _ in range(layers)]
        up = [width for width in reversed(widths) for _ in range(layers + 1)]
        return (*down, widths[-1], widths[-1], *up)

    @property
    def cross_attention_widths(self) -> tuple[int, ...]:
        """Channels of every cross-attention to the condition, in the order of execution."""
        layers = self.layers_per_block
        blocks = list(zip(self.block_widths, self.attention_blocks, strict=True))
        down = [width for width, attends in blocks if attends for _ in range(layers)]
        up = [width for width, attends in reversed(blocks) if attends for _ in range(layers + 1)]
        return (*down, self.block_widths[-1], *up)

    @property
    def mmfs_maps(self) -> tuple[tuple[int, int], ...]:
        """(channels, side) of every map to which MMFS is added, in the order of execution."""
        widths, side, last = self.block_widths, self.latent_side, len(self.block_widths) - 1
        if self.mmfs_at == "up_blocks":
            return tuple(
                (widths[level], side >> max(level - 1, 0)) for level in range(last, -1, -1)
            )
        skips = [(widths[0], side)]
        for level, width in enumerate(widths):
            skips += [(width, side >> level)] * self.layers_per_block
            if level < last:
                skips.append((width, side >> (level + 1)))
        return (*skips, (widths[-1], side >> last))

    @property
    def mmfs_blocks(self) -> int:
        return len(self.mmfs_maps)

    @property
    def deep_width(self) -> int:
        """Channels of the deep features, the input of the last up block; their side is that of the
        latents."""
        return self.block_widths[min(1, len(self.block_widths) - 1)]

    @property
    def outer_cross_attentions(self) -> tuple[int, ...]:
        """Indices into `cross_attention_widths` of those in the first down and last up block."""
        layers, count = self.layers_per_block, len(self.cross_attention_widths)
        if not self.attention_blocks[0]:
            return ()
        return (*range(layers), *range(count - layers - 1, count))

    @property
    def outer_mmfs_blocks(self) -> tuple[int, ...]:
        """Indices into `mmfs_maps` of those in the first down and last up block."""
        if self.mmfs_at == "up_blocks":
            return (self.mmfs_blocks - 1,)
        return tuple(range(1 + self.layers_per_block))


@dataclass(frozen=True, config=STRICT)
class VaeConfig:
    """Latent autoencoder, in the terms of diffusers' `AutoencoderKL`.

    `patch`: side in pixels of the patches it works on, each a cell of 3 * patch^2 channels.
    """

    block_widths: Counts
    layers_per_block: Few
    latent_channels: Count
    scaling_factor: Positive
    norm_groups: Few = 32
    mid_attention: bool = True
    patch: Side = 1

    @model_validator(mode="after")
    def _fits(self) -> VaeConfig:
        for width in self.block_widths:
            _multiple("block width", width, self.norm_groups, _GROUPS)
        return self

    @property
    def factor(self) -> int:
        """Pixels per latent cell along one side."""
        return self.patch * 2 ** (len(self.block_widths) - 1)


# Fields of `DiffusionConfig` that configurations from before them lack.
_LATER_DIFFUSION = ("rescale_betas_zero_snr", "min_snr_gamma")


@dataclass(frozen=True, config=STRICT)
class DiffusionConfig:
    """Noise schedule of training and the U-Net's prediction type, as in diffusers' DDPM.

    `rescale_betas_zero_snr`: the last timestep is noise alone (Lin et al. 2023, Algorithm 1); the
    prediction is then v, because noise alone predicts no picture. `min_snr_gamma`: the loss of a
    timestep counts as that of the picture with the weight min(SNR, gamma) (Hang et al. 2023); None:
    the mean squared error of the prediction, as published.
    """

    prediction: Literal["epsilon", "v_prediction"]
    steps: Count = 1000
    beta_start: Rate = 0.00085
    beta_end: Rate = 0.012
    beta_schedule: str = "scaled_linear"
    rescale_betas_zero_snr: bool = False
    min_snr_gamma: Positive | None = None

    @model_validator(mode="after")
    def _fits(self) -> DiffusionConfig:
        if self.rescale_betas_zero_snr and self.prediction == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr needs the prediction v_prediction: at the last timestep "
                "the noise, which epsilon predicts, is all that the U-Net is given"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit later fields at their defaults: checkpoints from before them compare this text."""
        fields: dict[str, Any] = inner(self)
        return {n: value for n, value in fields.items() if value or n not in _LATER_DIFFUSION}

    @property
    def spacing(self) -> Literal["leading", "trailing"]:
        """Timestep spacing of samplers: Stable Diffusion's, or, with a terminal SNR of zero, one
        that begins at the last timestep (Lin et al. 2023, Sec. 3.3)."""
        return "trailing" if self.rescale_betas_zero_snr else "leading"


# Kinds of distillation.
DistillationKind = Literal["guidance", "lcm", "dmd"]


@dataclass(frozen=True, config=STRICT)
class DistillationConfig:
    """Distillation of the U-Net into one branch, with guidance of scale `guidance` folded in.

    `guidance` (Meng et al. 2023, Sec. 3.1): the prediction is the teacher's guided one, for any
    sampler. `lcm` (Luo et al. 2023): a latent consistency function, sampled by `lcm:N`;
    `solver_steps`: evenly spread timesteps on which it was trained, the most that N can be.
    `dmd` (Yin et al. 2024): sampled so too, and trained by matching distributions in
    `solver_steps` steps.
    """

    kind: DistillationKind
    guidance: Annotated[float, Field(ge=0, le=100)]
    solver_steps: Few | None = None

    @model_validator(mode="after")
    def _fits(self) -> DistillationConfig:
        if (self.kind == "guidance") != (self.solver_steps is None):
            raise ValueError("solver_steps belongs to the kinds lcm and dmd, which need it")
        return self

    @model_serializer(mode="wrap")
    def _without_empty(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit `solver_steps` where there are none."""
        fields: dict[str, Any] = inner(self)
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, config=STRICT)
class ImageDecoderConfig:
    """Image decoder, LLM hidden states to a picture: context resampler, U-Net with MMFS, VAE.

    `distillation`: None for a U-Net as published, which takes two branches for guidance.
    """

    resampler: ResamplerConfig
    unet: UnetConfig
    mmfs: MmfsConfig
    vae: VaeConfig
    diffusion: DiffusionConfig
    distillation: DistillationConfig | None = None

    @model_validator(mode="after")
    def _steps_fit(self) -> ImageDecoderConfig:
        steps = self.distillation.solver_steps if self.distillation else None
        if steps is not None and steps > self.diffusion.steps:
            raise ValueError(f"solver_steps {steps} are more than {self.diffusion.steps} steps")
        return self

    @model_serializer(mode="wrap")
    def _without_empty(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit an absent `distillation`: checkpoints from before the field compare this text."""
        fields: dict[str, Any] = inner(self)
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def image_size(self) -> int:
        return self.unet.latent_side * self.vae.factor

    @property
    def branches(self) -> int:
        """Rows that the U-Net computes for a picture: a conditional and an unconditional one for
        classifier-free guidance, or one where guidance is distilled."""
        return 2 if self.distillation is None else 1

    def guidance_of(self, asked: float | None) -> float:
        """Guidance scale of a picture for which `asked` was given, None for the default. Raises
        `ConfigError` for one that a distilled U-Net does not have."""
        if self.distillation is None:
            return PUBLISHED_GUIDANCE if asked is None else asked
        own = self.distillation.guidance
        if asked is not None and asked != own:
            raise ConfigError(
                f"this model draws with guidance {own:g} alone, which is distilled into it",
                got=f"guidance {asked:g}",
                fix="leave the guidance out, or take the model that it was distilled from",
            )
        return own


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Complete configuration of an MM-Interleaved model."""

    name: str
    tokens: TokenConfig
    vision: VisionConfig
    vision_resampler: ResamplerConfig
    llama: LlamaConfig
    llm_mmfs: MmfsConfig
    image_decoder: ImageDecoderConfig

    @property
    def visual_tokens(self) -> int:
        """Number of LLM positions of one image, without its begin-of-image token."""
        return self.vision_resampler.queries

    @model_validator(mode="after")
    def _parts_fit(self) -> ModelConfig:
        def same(what: str, left: int, right: int) -> None:
            if left != right:
                raise ValueError(f"{what}: {left} and {right} must be equal")

        decoder = self.image_decoder
        same(
            "vision width and its resampler's context",
            self.vision.width,
            self.vision_resampler.context_width,
        )
        same(
            "LLM width and the image decoder resampler's context",
            self.llama.width,
            decoder.resampler.context_width,
        )
        same(
            "image decoder resampler width and U-Net condition",
            decoder.resampler.width,
            decoder.unet.condition_width,
        )
        same(
            "latent channels of VAE and U-Net",
            decoder.vae.latent_channels,
            decoder.unet.latent_channels,
        )
        for mmfs in (self.llm_mmfs, decoder.mmfs):
            if mmfs.images_seen >= mmfs.images:
                raise ValueError(
                    f"MMFS sees {mmfs.images_seen} images but has {mmfs.images} table rows"
                )
        if self.llm_mmfs.base_grid is None:
            raise ValueError(
                "llm_mmfs.base_grid: tokens have no map of their own, so it must be set"
            )
        largest = self.tokens.largest
        if largest >= self.llama.vocab:
            raise ValueError(
                f"tokens: id {largest} is beyond the vocabulary, whose {self.llama.vocab} ids end "
                f"at {self.llama.vocab - 1}"
            )
        return self


_ADAPTER = TypeAdapter(ModelConfig)


def to_json(config: ModelConfig) -> str:
    """The configuration as indented JSON."""
    return _ADAPTER.dump_json(config, indent=2).decode() + "\n"


def first_flaw(error: ValidationError) -> str:
    """Describe the first wrong field in one line: its name, the fault, its value."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "the whole"
    line = f"{field}: {first['msg'].removeprefix('Value error, ')}"
    shown = isinstance(first["input"], int | float | str) and first["type"] != "json_invalid"
    return f"{line}; got {first['input']!r:.80}" if shown else line


def from_json(text: str | bytes, source: str = "configuration") -> ModelConfig:
    """Parse a configuration; raises `ConfigError` that names the first wrong field."""
    return _validated(lambda: _ADAPTER.validate_json(text), source)


def _validated(make: Callable[[], ModelConfig], source: str) -> ModelConfig:
    try:
        return make()
    except ValidationError as error:
        raise ConfigError(
            f"{source} is not a valid model configuration: {first_flaw(error)}",
            fix="compare it with the output of `mmi inspect --preset tiny`",
        ) from None


def with_fields(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """`config` with some fields changed, by dotted names as `image_decoder.diffusion.beta_end`.
    Raises `ConfigError` for a field that there is not, or a value that does not fit."""
    # Field by field: the written form leaves some out at their defaults.
    fields = asdict(config)
    for name, value in changes.items():
        *tables, last = name.split(".")
        table: Any = fields
        for key in tables:
            table = table.get(key) if isinstance(table, dict) else None
        if not isinstance(table, dict) or last not in table or isinstance(table[last], dict):
            raise ConfigError(
                f"a model configuration has no field {name!r}",
                expected="a dotted name, as image_decoder.diffusion.prediction",
                fix="see `mmi inspect --preset tiny`",
            )
        table[last] = value
    return _validated(
        lambda: _ADAPTER.validate_python(fields), f"the change of {', '.join(changes)}"
    )


def read_config(path: Path) -> ModelConfig:
    """Read a configuration file; raises `ConfigError` if it is missing or wrong."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}",
            fix="give a model folder that holds config.json",
        ) from None
    return from_json(text, str(path))
