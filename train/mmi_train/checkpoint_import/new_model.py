"""A new model built of trained parts: a LLaMA, and if given a CLIP and a Stable Diffusion.

What ties them together (adapter, resamplers, MMFS) is new. `form`, a preset, says how: the
published model's way (Q-Formers, null slots, MMFS on the skips) or the paper's. Sizes follow from
the parts; a part that is not given is new and small, with the sizes of the preset `tiny`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from mmi_deploy.errors import ConfigError, WeightsError
from mmi_deploy.spec.config import (
    ImageDecoderConfig,
    LlamaConfig,
    MmfsConfig,
    ModelConfig,
    ResamplerConfig,
    TokenConfig,
    VisionConfig,
    to_json,
)
from mmi_deploy.spec.presets import tiny
from mmi_deploy.system.output_folder import new_folder
from mmi_deploy.system.progress import Progress, silent
from mmi_train.checkpoint_import.config_fields import fitting
from mmi_train.checkpoint_import.fresh import fresh_tensors
from mmi_train.checkpoint_import.from_clip import VisionPart
from mmi_train.checkpoint_import.from_diffusion import DiffusionPart
from mmi_train.checkpoint_import.from_llama import EMBEDDING, HEAD, LanguageModel
from mmi_train.checkpoint_import.state_dict import misfits
from mmi_train.checkpoint_import.tokenizer_files import BEGIN_OF_IMAGE, IMAGE, PAD, add_marks
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights.lazy_tensor import InMemory, Rows, Stacked, StoredTensor
from mmi_train.weights.model_folder import CONFIG, FOLDER_KIND, TOKENIZER, WEIGHTS
from mmi_train.weights.writer import write_safetensors

HEAD_WIDTH = 64
"""Channels of one head of MMFS and of the resamplers, as in the published model."""

_SILENT = -100.0
"""The published head's bias of tokens that the language model did not know."""


@dataclass(frozen=True)
class Parts:
    """What a model is built of. `bos`, `eos`: spellings of other tokens than the language model's
    own; `eos` takes the place of all its end tokens. `context`: tokens of the longest document;
    None: as many as it has positions."""

    llm: LanguageModel
    vision: VisionPart | None = None
    diffusion: DiffusionPart | None = None
    bos: str | None = None
    eos: str | None = None
    context: int | None = None


class Built(NamedTuple):
    """What was written: tensors taken from parts, new ones, and bytes of the weights file."""

    config: ModelConfig
    taken: int
    new: int
    size: int


def build_model(
    parts: Parts,
    form: ModelConfig,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    force: bool = False,
    inputs: Sequence[Path] = (),
    progress: Progress = silent,
) -> Built:
    """Write the new model into the folder `out`, whole or not at all, tensor by tensor.

    `dtype` None: the types that the parts have, fp32 for new weights. `seed`: of new weights.
    Raises `ConfigError` and `WeightsError`, for everything but values before anything is written.
    """
    with new_folder(out, force, kind=FOLDER_KIND, inputs=inputs) as work:
        tokens, vocab, tokenizer = extend_tokenizer(parts)
        with fitting("what was given"), torch.device("meta"):
            config = derive_config(out.name, parts, form, tokens, vocab)
            sketch = MMInterleaved(config)
        shapes = {name: value.shape for name, value in sketch.state_dict().items()}
        del sketch
        taken = taken_tensors(parts, config, seed)
        _check_fit(taken, shapes)
        missing = {name: shape for name, shape in shapes.items() if name not in taken}
        tensors = {**taken, **fresh_tensors(missing, config, taken, seed)}
        tokenizer.save(str(work / TOKENIZER))
        (work / CONFIG).write_text(to_json(config))
        size = write_safetensors(work / WEIGHTS, tensors, dtype, progress)
    return Built(config, len(taken), len(missing), size)


def extend_tokenizer(parts: Parts) -> tuple[TokenConfig, int, Tokenizer]:
    """The special tokens' ids, how many ids there are, and the tokenizer that knows them all.

    The two marks for pictures come after all ids that the language model's tokenizer has, and after
    them a token for padding where it has none of its own.
    """
    llm, tokenizer = parts.llm, Tokenizer.from_str(parts.llm.tokenizer.to_str())
    bos = _token(tokenizer, parts.bos, llm.bos, "bos")
    own = llm.ends if parts.eos is None else (None,)
    eos, *others = [_token(tokenizer, parts.eos, end, "eos") for end in own or (None,)]
    if bos == eos:
        raise ConfigError(
            f"{llm.source} begins and ends its documents with the same token",
            got=repr(tokenizer.id_to_token(bos)),
            fix="give another one for one of them with --bos or --eos",
        )
    marks = [BEGIN_OF_IMAGE, IMAGE]
    pad = llm.pad
    if pad is None or pad in (bos, eos, *others) or tokenizer.id_to_token(pad) is None:
        pad = None
        marks.append(PAD)
    known, rows = max(tokenizer.get_vocab().values()) + 1, llm.tensors[EMBEDDING].shape[0]
    if known > rows:
        raise ConfigError(
            f"the tokenizer does not belong to {llm.source}",
            expected=f"at most {rows} ids",
            got=known,
            fix="give --tokenizer the folder of the language model",
        )
    ids = add_marks(tokenizer, marks)
    if ids != list(range(known, known + len(marks))):
        raise ConfigError(
            f"the tokenizer of {llm.source} has one of our marks already, or ids that it skips",
            expected=f"{', '.join(marks)} to become {known} and the next",
            got=", ".join(map(str, ids)),
            fix="build on a language model that knows no pictures",
        )
    pad = ids[2] if pad is None else pad
    tokens = TokenConfig(
        bos=bos, eos=eos, pad=pad, boi=ids[0], image=ids[1], other_eos=tuple(others)
    )
    return tokens, known + len(marks), tokenizer


def _token(tokenizer: Tokenizer, asked: str | None, own: int | None, role: str) -> int:
    found = own if asked is None else tokenizer.token_to_id(asked)
    if found is None or tokenizer.id_to_token(found) is None:
        raise ConfigError(
            f"the tokenizer has no {role} token" + (f" {asked!r}" if asked else ""),
            got=None if asked else own,
            fix=f"name one of its tokens with --{role}",
        )
    return found


def derive_config(
    name: str, parts: Parts, form: ModelConfig, tokens: TokenConfig, vocab: int
) -> ModelConfig:
    """The configuration whose sizes are those of the parts, in the manner of `form`."""
    llm = parts.llm
    context = llm.context if parts.context is None else parts.context
    if context > min(llm.context, llm.window or llm.context):
        raise ConfigError(
            f"{llm.source} was not trained for {context} tokens",
            expected=f"at most {min(llm.context, llm.window or llm.context)}",
            fix="give a smaller --context",
        )
    vision = _vision(parts.vision)
    heads = _heads(vision.width)
    seen = replace(form.llm_mmfs, heads=heads, value_width=vision.width, base_grid=vision.grid)
    if parts.vision is None:
        levels = tiny().llm_mmfs
        seen = replace(seen, points=levels.points, levels=levels.levels, base_grid=levels.base_grid)
    return ModelConfig(
        name=name,
        tokens=tokens,
        vision=vision,
        vision_resampler=_resampler(
            form.vision_resampler,
            tiny().vision_resampler if parts.vision is None else None,
            vision.width,
        ),
        llama=LlamaConfig(
            vocab=vocab,
            width=llm.width,
            layers=llm.layers,
            heads=llm.heads,
            kv_heads=llm.kv_heads,
            mlp_width=llm.mlp_width,
            context=context,
            mmfs_every=form.llama.mmfs_every,
            eps=llm.eps,
            rope_theta=llm.rope_theta,
        ),
        llm_mmfs=seen,
        image_decoder=_image_decoder(parts.diffusion, form.image_decoder, vision, llm.width),
    )


def _heads(width: int) -> int:
    return max(1, width // HEAD_WIDTH)


def _vision(part: VisionPart | None) -> VisionConfig:
    if part is None:
        small = tiny().vision
        return replace(small, pixel_mean=VisionConfig.pixel_mean, pixel_std=VisionConfig.pixel_std)
    return VisionConfig(
        image_size=part.image_size,
        patch_size=part.patch_size,
        width=part.width,
        layers=part.layers,
        heads=part.heads,
        mlp_width=part.mlp_width,
        adapter_heads=part.heads,
        activation="gelu" if part.activation == "gelu" else "quick_gelu",
        eps=part.eps,
        pixel_mean=part.pixel_mean,
        pixel_std=part.pixel_std,
        position_grid=part.image_size // part.patch_size,
    )


def _resampler(
    form: ResamplerConfig, small: ResamplerConfig | None, context: int, width: int | None = None
) -> ResamplerConfig:
    """A resampler in the manner of `form`, with the sizes of `small` if there is one."""
    sizes = form if small is None else small
    width = sizes.width if width is None else width
    return replace(
        form,
        queries=sizes.queries,
        width=width,
        context_width=context,
        layers=sizes.layers,
        heads=_heads(width),
        mlp_width=sizes.mlp_width,
    )


def _image_decoder(
    part: DiffusionPart | None, form: ImageDecoderConfig, vision: VisionConfig, llm_width: int
) -> ImageDecoderConfig:
    small = tiny().image_decoder
    mmfs: MmfsConfig = replace(form.mmfs, heads=_heads(vision.width), value_width=vision.width)
    if part is None:
        return ImageDecoderConfig(
            resampler=_resampler(form.resampler, small.resampler, llm_width),
            unet=replace(small.unet, mmfs_at=form.unet.mmfs_at),
            mmfs=replace(mmfs, points=small.mmfs.points, levels=small.mmfs.levels),
            vae=small.vae,
            diffusion=small.diffusion,
        )
    resampler = _resampler(form.resampler, None, llm_width, part.unet.condition_width)
    if part.null_condition is not None:
        resampler = replace(resampler, queries=part.null_condition.shape[1])
    return ImageDecoderConfig(
        resampler=resampler, unet=part.unet, mmfs=mmfs, vae=part.vae, diffusion=part.diffusion
    )


def taken_tensors(parts: Parts, config: ModelConfig, seed: int) -> dict[str, StoredTensor]:
    """Our tensors that come from the parts, by our names, still in the parts' files.

    The rows of new tokens: N(0, 0.02) in the embedding, silent in the head, as published.
    """
    llm, known = parts.llm, config.tokens.boi  # the marks come after all that it knew
    new = config.llama.vocab - known
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(new, llm.width, generator=generator) * 0.02
    silent = torch.cat([torch.zeros(known), torch.full((new,), _SILENT)])
    taken: dict[str, StoredTensor] = {
        "llm.embed_tokens.weight": Stacked([Rows(llm.tensors[EMBEDDING], known), InMemory(drawn)]),
        "head.head.weight": Stacked([Rows(llm.head, known), InMemory(torch.zeros(new, llm.width))]),
        "head.head.bias": InMemory(silent),
    }
    for name, tensor in llm.tensors.items():
        if name not in (EMBEDDING, HEAD):
            taken[name.replace("model.", "llm.", 1)] = tensor
    if parts.vision is not None:
        taken |= {f"vision.encoder.{n}": t for n, t in parts.vision.tensors.items()}
    if parts.diffusion is not None:
        taken |= {f"image_decoder.unet.{n}": t for n, t in parts.diffusion.unet_tensors.items()}
        vae = parts.diffusion.vae_tensors
        taken |= {f"image_decoder.vae.autoencoder.{n}": t for n, t in vae.items()}
        if parts.diffusion.null_condition is not None:
            taken["image_decoder.null_condition"] = InMemory(parts.diffusion.null_condition)
    return taken


def _check_fit(taken: dict[str, StoredTensor], shapes: dict[str, torch.Size]) -> None:
    """Raise `WeightsError` that names every tensor of a part which is missing, extra, misshapen."""
    parts = {
        "vision.encoder.": ("embeddings.", "pre_norm.", "layers."),
        "image_decoder.vae.autoencoder.": ("",),
    }
    given = [
        prefix + start
        for prefix, starts in parts.items()
        if any(name.startswith(prefix) for name in taken)
        for start in starts
    ]
    if any(name.startswith("image_decoder.unet.") for name in taken):
        names = [name for name in shapes if name.startswith("image_decoder.unet.")]
        given += [name for name in names if not name.startswith("image_decoder.unet.look_back.")]
    missing = [n for n in shapes if n.startswith(tuple(given)) and n not in taken]
    extra = [name for name in taken if name not in shapes]
    wrong = [
        f"{name} has shape {list(tensor.shape)}, expected {list(shapes[name])}"
        for name, tensor in taken.items()
        if name in shapes and tensor.shape != shapes[name]
    ]
    if problems := misfits(missing, extra, wrong):
        raise WeightsError(
            "the weights do not fit their configuration (by our names): " + "; ".join(problems)
        )
