"""Check of generation by the whole model: units `full_generate_texts`, `_scores` and `_images`.

Letters: b batch, t tokens, o options, u vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmi_train.checkpoint_import.state_dict import published_module
from mmi_train.golden import full
from mmi_train.golden.compare import Checks
from mmi_train.golden.configs import Section, under
from mmi_train.golden.full import Weights
from mmi_train.golden.units import Unit, UnitError
from mmi_train.model.diffusion import ddim
from mmi_train.model.generation import generate_texts, search_texts
from mmi_train.model.image_decoder import DenoisingStep
from mmi_train.model.vae import Vae

_PUBLISHED_BEAMS = 5
_DISK_VAE = "disk_vae."


def not_comparable(unit: Unit) -> str:
    """Reason that the tokens of a `full_generate_texts` unit cannot be compared; empty if they
    can."""
    if Section(unit.config).get("do_sample", False):
        return "sampled tokens depend on the generator"
    return ""


def check_texts(unit: Unit, checks: Checks, weights: Weights) -> None:
    """Compare the texts of left-padded rows, which start with `<s>` and end at `</s>` or BoI, and
    the scores of a beam search where the unit holds them.

    The published search writes `</s>` in place of whichever token ended a text.
    """
    config = Section(unit.config)
    model, tokens = weights.model, weights.model.config.tokens
    data, pixels = full.rows(unit, tokens), unit.input("image_tensors")
    rows = model, data.ids, pixels, data.slot, data.real
    beams = config.count("num_beams", _PUBLISHED_BEAMS)
    most = config.count("max_new_tokens", config.count("max_length", 30))
    least, repetition = config.get("min_length", 8), config.get("repetition_penalty", 1.0)
    if beams == 1:
        ids = generate_texts(
            *rows, max_new_tokens=most, min_length=least, repetition_penalty=repetition
        )
        checks.compare("text_ids", ids, "exact")
        return
    ids, scores = search_texts(
        *rows,
        max_new_tokens=most,
        beams=beams,
        min_length=least,
        repetition_penalty=repetition,
        length_penalty=config.get("length_penalty", 1.0),
        early_stopping=config.get("early_stopping", False),
    )
    ended = torch.isin(ids, torch.tensor([*tokens.ends, tokens.boi]))
    checks.compare("text_ids", ids.masked_fill(ended, tokens.ends[0]), "exact")
    checks.compare("sequences_scores", scores)


def check_scores(unit: Unit, checks: Checks, weights: Weights) -> None:
    """Compare summed log-probabilities of options after prompts with one image each."""
    model, tokens = weights.model, weights.model.config.tokens
    prompts = _with_batch(unit.input("text_ids"), 1)  # [b, t]
    options = _with_batch(unit.input("options_ids"), 2)  # [b, o, length]
    real = _with_batch(unit.input("options_attn_mask"), 2).bool()
    before = _with_batch(unit.inputs.get("attention_mask", torch.ones_like(prompts)), 1).bool()
    pixels = unit.input("image_tensors")
    if not len(prompts) == len(options) == len(real) == len(pixels):
        raise UnitError("prompts, options and images differ in number")
    scores = []
    for row in range(len(prompts)):
        count = len(options[row])
        ids = torch.cat([prompts[row].expand(count, -1), options[row]], 1)  # [o, t + length]
        shown = torch.cat([before[row].expand(count, -1), real[row]], 1)
        slot = _slots((ids == tokens.boi).sum(1).tolist())
        data = full.Rows(ids, shown, slot, pictures=torch.zeros(0, 2), bounds=ids)
        hidden = full.read(model, data, model.encode_images(pixels[row : row + 1]))
        logits = model.head(hidden[:, prompts.shape[1] - 1 : -1])
        # [o, length]
        log_probability = logits.log_softmax(-1).gather(-1, options[row][..., None])[..., 0]
        scores.append((log_probability * real[row]).sum(-1))
    checks.compare("scores", torch.stack(scores)[:, None])


def _with_batch(tensor: Tensor, dimensions: int) -> Tensor:
    """Add a batch dimension if `tensor` has only `dimensions`."""
    if tensor.ndim not in (dimensions, dimensions + 1):
        raise UnitError(
            "an input has an unknown shape",
            expected=f"{dimensions} dimensions",
            got=list(tensor.shape),
        )
    return tensor[None] if tensor.ndim == dimensions else tensor


def _slots(counts: list[int]) -> Tensor:
    """Image slots of rows with one image each: all the first of the pool."""
    if set(counts) != {1}:
        raise UnitError("every prompt must hold one image", got=counts)
    return torch.zeros(len(counts), 1, dtype=torch.int64)


@torch.no_grad()
def check_images(unit: Unit, checks: Checks, weights: Weights) -> None:
    """Compare pictures of the ancestral sampler with the stored noise and the unit's own VAE."""
    config = Section(unit.config)
    model, decoder = weights.model, weights.model.image_decoder
    steps = config.count("num_inference_steps", 30)
    guidance = max(
        config.get("guidance_scale", 7.5), 1.0
    )  # up to 1 the published code does not guide
    if config.count("image_size", decoder.config.image_size) != decoder.config.image_size:
        raise UnitError(
            "config.image_size is not that of the weights",
            expected=decoder.config.image_size,
            got=config.values["image_size"],
        )
    data = full.rows(unit, model.config.tokens)
    pictures = data.pictures[unit.inputs.get("target_image_idxs", torch.arange(len(data.pictures)))]
    images = model.encode_images(unit.input("image_tensors"))
    hidden = full.read(model, data, images)
    layout = model.picture_layout(data.bounds, data.slot, pictures)
    condition = model.condition(hidden, layout)
    previous = model.previous_images(images, layout)
    noise = unit.inputs_of("step_noise")
    if len(noise) != steps:
        raise UnitError("wrong number of tensors in.step_noise.*", expected=steps, got=len(noise))
    scheduler = ddim(decoder.config.diffusion)
    scheduler.set_timesteps(steps)
    done: list[DenoisingStep] = []
    latents = decoder.draw(
        condition,
        previous,
        unit.input("initial_latents"),
        scheduler,
        guidance=guidance,
        step_noise=noise,
        on_step=done.append,
    )
    checks.compare("timesteps", torch.tensor([step.timestep for step in done]), "exact")
    for index, step in enumerate(done):
        checks.compare(f"guided_eps.{index}", step.prediction)
        checks.compare(f"latents.{index}", step.latents)
    if checks.wants("image"):
        checks.compare("image", _vae(unit, decoder.vae).decode(latents))


def _vae(unit: Unit, own: Vae) -> Vae:
    """The autoencoder of the unit: for drawing, the published code loads its VAE again from
    disk."""
    state = under(unit.state, _DISK_VAE)
    if not state:
        return own
    prefixes = {"theirs": "image_decoder.decoder.vae.", "ours": "image_decoder.vae."}
    return published_module(lambda: Vae(own.config), state, **prefixes)
