"""Options of a generation, shared by the runtime and the PyTorch path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.sampling import LogitBias, TextSampling, check_ranges, check_types

# Beams of a search, at most; the rows of a run allow fewer.
MOST_BEAMS = 64


@dataclass(frozen=True)
class GenerationOptions:
    """Options of a generation.

    seed: of all random draws. max_tokens: text tokens to write in total. min_tokens: text tokens of
    a turn before the model may end the text or begin a picture. max_images: pictures to draw beyond
    those the document asks for. draw_first: begin with a picture. turn_tokens: write exactly this
    number of tokens, then draw, repeatedly until `max_images` (for benchmarks). stop: texts that
    end the generation; they are not part of the output. temperature, top_k, top_p,
    repetition_penalty, min_p, presence_penalty, frequency_penalty, logit_bias, logprobs: see
    `TextSampling`; penalties apply to tokens of the current turn, as in the published code. beams:
    texts of a turn that grow side by side, of which the best is kept (`beam_search.py`); 1 for
    none. It takes a temperature of 0. length_penalty: exponent of the length that the log
    probability of a text is divided by, above 0 in favour of long texts. early_stopping: end a
    search once `beams` texts have finished.
    schedule: key of the sampler, as `ddim:20`; None for the bundle's first. guidance: scale of
    classifier-free guidance, 1 for none; None for 3.5, as in the paper's evaluation, or for that of
    a model into which guidance is distilled, which takes no other. full_every: run the
    whole U-Net at every n-th denoising step and reuse its deep features at the others, a faster
    approximation. previews: pictures shown out of the noise while one is drawn, at most; evenly
    over its steps.
    """

    seed: int = 0
    max_tokens: int = 256
    min_tokens: int = 0
    max_images: int = 4
    draw_first: bool = False
    turn_tokens: int | None = None
    stop: tuple[str, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: LogitBias = ()
    logprobs: int | None = None
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    schedule: str | None = None
    guidance: float | None = None
    full_every: int = 1
    previews: int = 0

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a value of a wrong type or out of range."""
        check_types(self)
        check_ranges(
            self,
            ("max_tokens", self.max_tokens >= 0, "0 or more"),
            ("min_tokens", self.min_tokens >= 0, "0 or more"),
            ("max_images", self.max_images >= 0, "0 or more"),
            ("turn_tokens", self.turn_tokens is None or self.turn_tokens >= 0, "0 or more"),
            ("full_every", self.full_every >= 1, "1 or more"),
            ("previews", self.previews >= 0, "0 or more"),
            ("guidance", self.guidance is None or 0 <= self.guidance <= 100, "0 to 100"),
            ("beams", 1 <= self.beams <= MOST_BEAMS, f"1 to {MOST_BEAMS}"),
            ("length_penalty", -10 <= self.length_penalty <= 10, "-10 to 10"),
            ("seed", 0 <= self.seed < 2**64, "0 to 2^64 - 1"),
        )
        if "" in self.stop:
            raise ConfigError("an empty stop text would end every generation at once")
        _ = self.sampling  # checks its own ranges
        self._check_beams()

    def _check_beams(self) -> None:
        """Raise `ConfigError` for options that a beam search excludes, or that need one."""
        if self.beams == 1:
            for name, unused in (
                ("length_penalty", self.length_penalty == 1),
                ("early_stopping", not self.early_stopping),
            ):
                if not unused:
                    raise ConfigError(
                        f"{name} is an option of beam search", fix="give beams, 2 or more"
                    )
            return
        for name, fits, expected in (
            ("temperature", self.temperature == 0, "0, as a beam search draws nothing"),
            ("logprobs", self.logprobs is None, "none with beams"),
            ("turn_tokens", self.turn_tokens is None, "none with beams"),
        ):
            if not fits:
                raise ConfigError(
                    f"{name} does not go together with beams",
                    expected=expected,
                    got=getattr(self, name),
                )

    @cached_property
    def sampling(self) -> TextSampling:
        """The options of text sampling, checked once and not at every token."""
        return TextSampling(
            self.temperature,
            self.top_k,
            self.top_p,
            self.repetition_penalty,
            self.min_p,
            self.presence_penalty,
            self.frequency_penalty,
            self.logit_bias,
            self.logprobs,
        )


DEFAULTS = GenerationOptions()


def options_of(own: Mapping[str, Any], others: GenerationOptions = DEFAULTS) -> GenerationOptions:
    """Options with those of decoded JSON, `own`, in place of the same of `others`. Raises
    `ConfigError`."""
    given = dict(own)
    biases = given.get("logit_bias")
    if isinstance(biases, dict):  # keys of JSON are strings
        try:
            given["logit_bias"] = {int(token): bias for token, bias in biases.items()}
        except ValueError:
            raise ConfigError(
                "logit_bias is malformed", expected='ids as keys, as {"13": -100}', got=biases
            ) from None
    return replace(others, **given)
