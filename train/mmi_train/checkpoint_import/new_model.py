"""A new model built from trained parts: a language model, optionally a CLIP, a Stable Diffusion.

The layers that connect the parts (adapter, resamplers, MMFS) are new. In order: the tokenizer gets
the new tokens, the configuration follows from the parts (`derived_config`), tensors are taken from
the parts or drawn (`fresh`), and everything is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from mmi_deploy.errors import ConfigError, WeightsError
from mmi_deploy.spec.config import ModelConfig, TokenConfig, to_json
from mmi_deploy.system.output_folder import new_folder
from mmi_deploy.system.progress import Progress, silent
from mmi_train.checkpoint_import.config_fields import readable_errors
from mmi_train.checkpoint_import.derived_config import derive_config
from mmi_train.checkpoint_import.fresh import fresh_tensors
from mmi_train.checkpoint_import.misfits import shape_misfits
from mmi_train.checkpoint_import.parts import EMBEDDING, HEAD, Parts
from mmi_train.checkpoint_import.tokenizer_files import (
    BEGIN_OF_IMAGE,
    IMAGE,
    PAD,
    add_special_tokens,
)
from mmi_train.model.mm_interleaved import MMInterleaved
from mmi_train.weights.lazy_tensor import InMemory, Rows, Stacked, StoredTensor
from mmi_train.weights.model_folder import CONFIG, FOLDER_KIND, TOKENIZER, WEIGHTS
from mmi_train.weights.writer import write_safetensors

# The published head's bias of tokens that the language model was not trained on.
_SILENT = -100.0


@dataclass(frozen=True)
class BuiltModel:
    """A written model. taken, new: numbers of tensors. size: bytes of the weights file."""

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
) -> BuiltModel:
    """Write the new model of `parts` in the form of a preset into the folder `out`, atomically.

    dtype: of the written weights; None: each part's own type, fp32 for new weights. seed: of new
    weights. Raises `ConfigError` and `WeightsError` before anything is written, except for values
    that are not finite.
    """
    with new_folder(out, force, kind=FOLDER_KIND, inputs=inputs) as work:
        tokens, vocab, tokenizer = extend_tokenizer(parts)
        with readable_errors("what was given"), torch.device("meta"):
            config = derive_config(out.name, parts, form, tokens, vocab)
            outline = MMInterleaved(config)  # names and shapes, without memory for values
        shapes = {name: value.shape for name, value in outline.state_dict().items()}
        del outline
        taken = taken_tensors(parts, config, seed)
        _check_fit(taken, shapes)
        missing = {name: shape for name, shape in shapes.items() if name not in taken}
        tensors = {**taken, **fresh_tensors(missing, config, taken, seed)}
        tokenizer.save(str(work / TOKENIZER))
        (work / CONFIG).write_text(to_json(config))
        size = write_safetensors(work / WEIGHTS, tensors, dtype, progress)
    return BuiltModel(config, len(taken), len(missing), size)


def extend_tokenizer(parts: Parts) -> tuple[TokenConfig, int, Tokenizer]:
    """Special token ids, the size of the vocabulary, and the tokenizer with the new tokens.

    The two image tokens come after all ids of the language model's tokenizer; after them a padding
    token, unless the language model has one of its own. Raises `ConfigError`.
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
    added = [BEGIN_OF_IMAGE, IMAGE]
    pad = llm.pad
    if pad is None or pad in (bos, eos, *others) or tokenizer.id_to_token(pad) is None:
        pad = None
        added.append(PAD)
    known, rows = max(tokenizer.get_vocab().values()) + 1, llm.tensors[EMBEDDING].shape[0]
    if known > rows:
        raise ConfigError(
            f"the tokenizer does not belong to {llm.source}",
            expected=f"at most {rows} ids",
            got=known,
            fix="give --tokenizer the folder of the language model",
        )
    ids = add_special_tokens(tokenizer, added)
    if ids != list(range(known, known + len(added))):
        raise ConfigError(
            f"the tokenizer of {llm.source} has one of our special tokens already, or its ids "
            "have gaps",
            expected=f"{', '.join(added)} to become {known} and the next",
            got=", ".join(map(str, ids)),
            fix="build on a language model that knows no pictures",
        )
    pad = ids[2] if pad is None else pad
    tokens = TokenConfig(
        bos=bos, eos=eos, pad=pad, boi=ids[0], image=ids[1], other_eos=tuple(others)
    )
    return tokens, known + len(added), tokenizer


def _token(tokenizer: Tokenizer, asked: str | None, own: int | None, role: str) -> int:
    """The id of the spelling `asked`, or `own` without one; raises `ConfigError`."""
    found = own if asked is None else tokenizer.token_to_id(asked)
    if found is None or tokenizer.id_to_token(found) is None:
        raise ConfigError(
            f"the tokenizer has no {role} token" + (f" {asked!r}" if asked else ""),
            got=None if asked else own,
            fix=f"name one of its tokens with --{role}",
        )
    return found


def taken_tensors(parts: Parts, config: ModelConfig, seed: int) -> dict[str, StoredTensor]:
    """Lazy tensors taken from the parts, by our names.

    New tokens get rows of N(0, 0.02) in the embedding, and in the head zeros and a bias that keeps
    them from being written, as in the published model.
    """
    llm, known = parts.llm, config.tokens.boi  # new tokens begin with <|beginofimage|>
    new = config.llama.vocab - known
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(new, llm.width, generator=generator) * 0.02
    bias = torch.cat([torch.zeros(known), torch.full((new,), _SILENT)])
    taken: dict[str, StoredTensor] = {
        "llm.embed_tokens.weight": Stacked([Rows(llm.tensors[EMBEDDING], known), InMemory(drawn)]),
        "head.head.weight": Stacked([Rows(llm.head, known), InMemory(torch.zeros(new, llm.width))]),
        "head.head.bias": InMemory(bias),
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


def _check_fit(taken: Mapping[str, StoredTensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise `WeightsError` that names every tensor of a given part which is missing, unknown or
    misshapen."""
    prefixes = {
        "vision.encoder.": ("embeddings.", "pre_norm.", "layers."),
        "image_decoder.vae.autoencoder.": ("",),
    }
    required = [
        prefix + start
        for prefix, starts in prefixes.items()
        if any(name.startswith(prefix) for name in taken)
        for start in starts
    ]
    if any(name.startswith("image_decoder.unet.") for name in taken):
        names = [name for name in shapes if name.startswith("image_decoder.unet.")]
        required += [name for name in names if not name.startswith("image_decoder.unet.look_back.")]
    if problems := shape_misfits(
        taken, shapes, [name for name in shapes if name.startswith(tuple(required))]
    ):
        raise WeightsError(
            "the weights do not fit their configuration (by our names): " + "; ".join(problems)
        )
