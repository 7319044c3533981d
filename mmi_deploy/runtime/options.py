"""What a generation is asked for. Without engines, so that the PyTorch path takes the same."""

from __future__ import annotations

from dataclasses import dataclass

from mmi_deploy.errors import ConfigError
from mmi_deploy.runtime.sampling import TextSampling, check_ranges, check_types


@dataclass(frozen=True)
class GenerationOptions:
    """What to generate, and how.

    seed: of all draws. max_tokens: text tokens to write in all. min_tokens: text tokens of a turn
    before which neither an end nor a picture may come. max_images: pictures to draw beyond those
    the document asks for. draw_first: begin with a picture. turn_tokens: write exactly so many
    tokens, then draw, again and again until `max_images` (for measuring). stop: texts that end the
    generation; they are not given out. temperature, top_k, top_p, repetition_penalty: see
    `TextSampling`; the penalty counts the tokens of the current turn, as the published code does.
    schedule: which sampler draws, as in `ddim:20`; None is the bundle's first. guidance:
    classifier-free guidance scale, 1 for none (the paper's evaluation uses 3.5). full_every: of how
    many denoising steps one runs the whole U-Net; the others use its deep features again, which is
    faster and an approximation.
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
    schedule: str | None = None
    guidance: float = 3.5
    full_every: int = 1

    def __post_init__(self) -> None:
        """Raises `ConfigError` for a value of another type or out of range."""
        check_types(self)
        check_ranges(
            self,
            ("max_tokens", self.max_tokens >= 0, "0 or more"),
            ("min_tokens", self.min_tokens >= 0, "0 or more"),
            ("max_images", self.max_images >= 0, "0 or more"),
            ("turn_tokens", self.turn_tokens is None or self.turn_tokens >= 0, "0 or more"),
            ("full_every", self.full_every >= 1, "1 or more"),
            ("guidance", 0 <= self.guidance <= 100, "0 to 100"),
        )
        if "" in self.stop:
            raise ConfigError("an empty stop text would stop everything")
        _ = self.sampling

    @property
    def sampling(self) -> TextSampling:
        return TextSampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty)


DEFAULTS = GenerationOptions()
