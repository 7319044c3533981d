"""The contract: every graph of a bundle, its inputs and outputs, their types, shapes and ranges.

Exporters name tensors from here, builders take their profiles from here, runtimes allocate from
here, and tests walk over it. No tensor name is written anywhere else.

Letters: b batch, t tokens, w wanted positions, n encoded images, m image slots, v visual tokens,
x context tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import Count, Few, MmfsConfig, ModelConfig
from mmi_deploy.spec.mmfs_operator import CHANNEL_STEP, MAX_CHANNELS, MAX_LEVELS, MAX_POINTS

OPSET = 24
IR_VERSION = 10
MMFS_DOMAIN = "mmi"
MMFS_OPERATOR = "MultiImageDeformableAttention"
MMFS_VERSION = 1
# Of the same domain, in TensorRT's copies of graphs alone: a product with a quantised weight.
PRODUCT_OPERATOR = "WeightOnlyMatMul"

# Numbers of image slots that the runtime pads to, so that few shapes occur.
IMAGE_SLOT_PADDING = (1, 2, 4, 8, 16, 32, 49)

# Latents that a solver may carry: its last corrected sample and its last two data predictions.
HISTORY = 3

# Rows of one step of the coefficient table: the next latents, then the next history.
STATE = 1 + HISTORY

# Columns of one step of the coefficient table: latents, prediction, noise, then the history.
TERMS = 3 + HISTORY

# Input of the U-Net's last up block besides its skips; `denoise_shallow` uses it again.
DEEP = "deep"

# Rows of the tables of all the samplers in a bundle, together.
MAX_STEPS = 4096


@dataclass(frozen=True)
class Range:
    """Sizes of a dynamic dimension as in a TensorRT profile: smallest, most frequent, largest.

    An `opt` beyond `max` is cut to `max`.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "opt", min(self.opt, self.max))


@dataclass(frozen=True)
class Tensor:
    """Name, element type (numpy's name) and shape; a string in the shape is a dynamic dimension.

    Integers that index something lie in [min, below); `below` may name a dynamic dimension too.
    `activation`: whether a target of lower precision may hold the tensor in its own type. Pixels,
    logits, latents and the sampler's tables keep theirs.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    min: int = 0
    below: int | str | None = None
    activation: bool = False

    def resolve(self, **sizes: int) -> tuple[int, ...]:
        """The shape with dynamic dimensions replaced; a product such as `2*b` is understood."""
        return tuple(_size(side, sizes) for side in self.shape)


def _size(side: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(side, int):
        return side
    factor, star, letter = side.rpartition("*")
    return (int(factor) if star else 1) * sizes[letter]


@dataclass(frozen=True)
class Graph:
    """One graph: inputs and outputs in order, and the ranges of its dynamic dimensions.

    in_place: output name -> name of the input whose buffer the output shares.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    ranges: Mapping[str, Range]
    in_place: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        for tensor in (*self.inputs, *self.outputs):
            if tensor.name == name:
                return tensor
        raise KeyError(f"{self.name} has no tensor {name}")

    def typed(self, activations: str) -> Graph:
        """The graph for a target that holds activations as `activations` (numpy's name, or
        bfloat16)."""

        def of(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(
                replace(tensor, dtype=activations) if tensor.activation else tensor
                for tensor in tensors
            )

        return replace(self, inputs=of(self.inputs), outputs=of(self.outputs))

    def names(self, prefix: str) -> list[str]:
        """The numbered tensors `prefix.00`, `prefix.01`, ... among inputs, or else outputs."""
        found = [tensor.name for tensor in self.inputs if tensor.name.startswith(prefix + ".")]
        return found or [
            tensor.name for tensor in self.outputs if tensor.name.startswith(prefix + ".")
        ]


def chosen_sizes(graph: Graph, given: Mapping[str, int]) -> dict[str, int]:
    """Sizes of the dynamic dimensions: those `given`, else the typical ones of the contract.

    Raises `ConfigError` for a size outside its range. Ignores letters that the graph does not have.
    """
    sizes = {}
    for letter, allowed in graph.ranges.items():
        size = given.get(letter, allowed.opt)
        if not allowed.min <= size <= allowed.max:
            raise ConfigError(
                f"{graph.name} cannot be run with {letter}={size}",
                expected=f"{allowed.min} to {allowed.max}",
            )
        sizes[letter] = size
    return sizes


def _activation(name: str, *shape: int | str) -> Tensor:
    return Tensor(name, "float32", shape, activation=True)


def numbered(prefix: str, index: int) -> str:
    """Name of one tensor of a numbered series: `past_key.07`."""
    return f"{prefix}.{index:02d}"


@dataclass(frozen=True)
class Limits:
    """Limits of an exported bundle.

    context: tokens of a document, which are the slots of a row of the KV cache. batch: rows of one
    run. images: images of a document. pool: rows of the pools of image values, shared by all
    documents; at least `images`.
    """

    context: Count
    batch: Few = 8
    images: Few = 49
    pool: Count = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", max(self.pool, self.images))


def feature_cells(config: ModelConfig, mmfs: MmfsConfig | None = None) -> int:
    """Number of cells of one image's feature maps, on all four levels or those `mmfs` reads."""
    levels = range(4) if mmfs is None else mmfs.levels
    return sum(config.vision.level_sides[level] ** 2 for level in levels)


def beyond_kernels(config: ModelConfig) -> dict[str, str]:
    """Graphs whose MMFS exceeds our kernels, with the reason: their model-local function runs."""
    decoder = config.image_decoder.mmfs
    of = {llm: config.llm_mmfs, denoise_step: decoder, denoise_shallow: decoder}
    reasons = {make.__name__: _beyond_kernels(mmfs) for make, mmfs in of.items()}
    return {graph: reason for graph, reason in reasons.items() if reason is not None}


def _beyond_kernels(mmfs: MmfsConfig) -> str | None:
    width = mmfs.head_width
    if width % CHANNEL_STEP or width > MAX_CHANNELS:
        return (
            f"{width} channels a head, and kernels take multiples of {CHANNEL_STEP} up to "
            f"{MAX_CHANNELS}"
        )
    if mmfs.points > MAX_POINTS:
        return f"{mmfs.points} points, and kernels take at most {MAX_POINTS}"
    if len(mmfs.levels) > MAX_LEVELS:
        return f"{len(mmfs.levels)} levels, and kernels take at most {MAX_LEVELS}"
    return None


def level_sides(config: ModelConfig, mmfs: MmfsConfig) -> tuple[int, ...]:
    """Side of each feature map that `mmfs` reads, in cells, finest first."""
    return tuple(config.vision.level_sides[level] for level in mmfs.levels)


def _values(
    prefix: str, blocks: Sequence[int], config: ModelConfig, mmfs: MmfsConfig
) -> Iterator[Tensor]:
    shape = ("n", feature_cells(config, mmfs), mmfs.heads, mmfs.head_width)
    return (_activation(numbered(prefix, index), *shape) for index in blocks)


def vision_encoder(config: ModelConfig, limits: Limits) -> Graph:
    """Pixels in [0, 1] to the visual tokens of the LLM and the multi-scale features.

    Features hold all levels one after another, finest first, row-major.
    """
    side, vision = config.vision.image_size, config.vision
    return Graph(
        "vision_encoder",
        inputs=(Tensor("pixels", "float32", ("n", 3, side, side)),),
        outputs=(
            _activation("visual_tokens", "n", config.visual_tokens, config.llama.width),
            _activation("features", "n", feature_cells(config), vision.width),
        ),
        ranges={"n": Range(1, 1, limits.batch)},
    )


def llm_values(config: ModelConfig, limits: Limits) -> Graph:
    """Features to the MMFS values of every LLM layer that looks at images. Runs when an image is
    encoded."""
    layers, mmfs = range(len(config.llama.mmfs_layers)), config.llm_mmfs
    return _image_values("llm_values", _values("llm_value", layers, config, mmfs), config, limits)


def unet_values(config: ModelConfig, limits: Limits) -> Graph:
    """Features to the MMFS values of every U-Net block that looks at images. Runs when a picture is
    begun, for the images that it sees."""
    decoder = config.image_decoder
    values = _values("unet_value", range(decoder.unet.mmfs_blocks), config, decoder.mmfs)
    return _image_values("unet_values", values, config, limits)


def _image_values(
    name: str, values: Iterator[Tensor], config: ModelConfig, limits: Limits
) -> Graph:
    return Graph(
        name,
        inputs=(_activation("features", "n", feature_cells(config), config.vision.width),),
        outputs=tuple(values),
        ranges={"n": Range(1, 1, limits.batch)},
    )


def llm(config: ModelConfig, limits: Limits) -> Graph:
    """Tokens to logits and hidden states, with the KV cache in place. Prefill and decode alike.

    `visual_index[b,t]`: row of `visual_tokens` that replaces the token's embedding, -1 for none.
    Key j is visible to query t of row b iff start[b] <= j <= write_index[b] + t.
    """
    llama, mmfs = config.llama, config.llm_mmfs
    cache = ("b", llama.kv_heads, limits.context, llama.head_width)
    layers = range(llama.layers)
    past = [
        _activation(numbered(f"past_{kind}", i), *cache)
        for i in layers
        for kind in ("key", "value")
    ]
    present = [
        _activation(numbered(f"present_{kind}", i), *cache)
        for i in layers
        for kind in ("key", "value")
    ]
    return Graph(
        "llm",
        inputs=(
            Tensor("token_ids", "int64", ("b", "t"), below=llama.vocab),
            _activation("visual_tokens", "v", llama.width),
            Tensor("visual_index", "int64", ("b", "t"), min=-1, below="v"),
            Tensor("position", "int64", ("b", "t"), below=limits.context),
            Tensor("write_index", "int64", ("b",), below=limits.context),
            Tensor("start", "int64", ("b",), below=limits.context),
            Tensor("logit_index", "int64", ("b", "w"), below="t"),
            Tensor("image_slot", "int32", ("b", "m"), below="n"),
            Tensor("image_position", "int32", ("b", "t", "m"), below=mmfs.images),
            *_values("llm_value", range(len(llama.mmfs_layers)), config, mmfs),
            *past,
        ),
        outputs=(
            Tensor("logits", "float32", ("b", "w", llama.vocab)),
            _activation("hidden", "b", "t", llama.width),
            *present,
        ),
        ranges={
            "b": Range(1, 1, limits.batch),
            "t": Range(1, 1, limits.context),
            "w": Range(1, 1, limits.context),
            "v": Range(1, config.visual_tokens, limits.context),
            "n": Range(1, 4, limits.pool),
            "m": Range(1, 4, limits.images),
        },
        in_place={new.name: old.name for new, old in zip(present, past, strict=True)},
    )


def image_condition(config: ModelConfig, limits: Limits) -> Graph:
    """Hidden states of the context to the keys and values of each U-Net cross-attention.

    `context`: LLM hidden states from the start of the document to the picture's begin-of-image
    token, as the LLM writes them; rows from `context_length[b]` on are padding. The unconditional
    branch depends on no input: its keys and values are constants of the denoising graphs.
    """
    widths = config.image_decoder.unet.cross_attention_widths
    return Graph(
        "image_condition",
        inputs=(
            _activation("context", "b", "x", config.llama.width),
            Tensor("context_length", "int64", ("b",), min=1, below=limits.context + 1),
        ),
        outputs=_condition(config, range(len(widths))),
        ranges={"b": Range(1, 1, limits.batch), "x": Range(1, 64, limits.context)},
    )


def _condition(config: ModelConfig, attentions: Sequence[int]) -> tuple[Tensor, ...]:
    """Keys and values of some of the U-Net's cross-attentions."""
    decoder = config.image_decoder
    tokens, widths = decoder.resampler.queries, decoder.unet.cross_attention_widths
    return tuple(
        _activation(numbered(f"condition_{kind}", index), "b", tokens, widths[index])
        for index in attentions
        for kind in ("key", "value")
    )


def denoise_step(config: ModelConfig, limits: Limits) -> Graph:
    """One step of any linear solver, both guidance branches inside, the conditional one first.

    Each row is a picture with a step, sampler and guidance of its own. A distilled U-Net has one
    branch, and the graph no `guidance`. `coefficients[step[b]]`
    [STATE, TERMS] times (latents, prediction, noise, history) is the next state of row b;
    `time_table[step[b]]` holds the time projection of every ResNet, one after another. Both tables
    hold all samplers, one after another.
    """
    unet = config.image_decoder.unet
    condition = range(len(unet.cross_attention_widths))
    return Graph(
        "denoise_step",
        inputs=(
            *_denoise_inputs(config),
            *_denoise_constants(config, condition, range(unet.mmfs_blocks)),
        ),
        outputs=(*_denoise_outputs(config), _deep(config)),
        ranges=_denoise_ranges(config, limits),
    )


def denoise_shallow(config: ModelConfig, limits: Limits) -> Graph:
    """Approximate `denoise_step` with cached deep features (DeepCache, Ma et al., CVPR 2024).

    Only the U-Net's first down block and last up block run.
    """
    unet = config.image_decoder.unet
    return Graph(
        "denoise_shallow",
        inputs=(
            *_denoise_inputs(config),
            _deep(config),
            *_denoise_constants(config, unet.outer_cross_attentions, unet.outer_mmfs_blocks),
        ),
        outputs=_denoise_outputs(config),
        ranges=_denoise_ranges(config, limits),
    )


def _latents(config: ModelConfig) -> tuple[int, int, int]:
    unet = config.image_decoder.unet
    return unet.latent_channels, unet.latent_side, unet.latent_side


def _deep(config: ModelConfig) -> Tensor:
    unet, branches = config.image_decoder.unet, config.image_decoder.branches
    return _activation(DEEP, "b", branches, unet.deep_width, unet.latent_side, unet.latent_side)


def _denoise_inputs(config: ModelConfig) -> tuple[Tensor, ...]:
    decoder, latents = config.image_decoder, _latents(config)
    return (
        Tensor("latents", "float32", ("b", *latents)),
        Tensor("history", "float32", ("b", HISTORY, *latents)),
        Tensor("noise", "float32", ("b", *latents)),
        Tensor("step", "int64", ("b",), below="steps"),
        *((Tensor("guidance", "float32", ("b",)),) if decoder.branches > 1 else ()),
        Tensor("coefficients", "float32", ("steps", STATE, TERMS)),
        Tensor("time_table", "float32", ("steps", sum(decoder.unet.resnet_widths))),
        Tensor("image_slot", "int32", ("b", "m"), below="n"),
        Tensor("image_position", "int32", ("b", "m"), below=decoder.mmfs.images),
    )


def _denoise_constants(
    config: ModelConfig, attentions: Sequence[int], blocks: Sequence[int]
) -> tuple[Tensor, ...]:
    """Inputs that stay the same over all steps: keys and values of the condition for some
    cross-attentions, image values for some MMFS blocks."""
    decoder = config.image_decoder
    return (
        *_condition(config, attentions),
        *_values("unet_value", blocks, config, decoder.mmfs),
    )


def _denoise_outputs(config: ModelConfig) -> tuple[Tensor, ...]:
    latents = _latents(config)
    return (
        Tensor("next_latents", "float32", ("b", *latents)),
        Tensor("next_history", "float32", ("b", HISTORY, *latents)),
    )


def _denoise_ranges(config: ModelConfig, limits: Limits) -> dict[str, Range]:
    return {
        "b": Range(1, 1, limits.batch),
        "steps": Range(1, 20, MAX_STEPS),
        "n": Range(1, 4, limits.pool),
        "m": Range(1, 4, config.image_decoder.mmfs.images_seen),
    }


def vae_decoder(config: ModelConfig, limits: Limits) -> Graph:
    """Latents to pixels in [0, 1]."""
    unet, side = config.image_decoder.unet, config.image_decoder.image_size
    return Graph(
        "vae_decoder",
        inputs=(
            Tensor(
                "latents",
                "float32",
                ("b", unet.latent_channels, unet.latent_side, unet.latent_side),
            ),
        ),
        outputs=(Tensor("pixels", "float32", ("b", 3, side, side)),),
        ranges={"b": Range(1, 1, limits.batch)},
    )


GRAPHS = (
    vision_encoder,
    llm_values,
    llm,
    image_condition,
    unet_values,
    denoise_step,
    denoise_shallow,
    vae_decoder,
)


def graphs(config: ModelConfig, limits: Limits) -> dict[str, Graph]:
    """Every graph of a bundle of `config` by name, in the order in which a document needs them."""
    return {make.__name__: make(config, limits) for make in GRAPHS}
