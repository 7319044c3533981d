"""Work that a generation asks of the engines, one item at a time."""

from __future__ import annotations

from dataclasses import dataclass

from mmi_deploy.runtime.sampling import SampleRequest


@dataclass(frozen=True)
class NextToken:
    """Sample the token that follows the document, which is not appended. Result: `Sampled`."""

    request: SampleRequest


# Parent of a beam that begins at the document.
DOCUMENT = -1


@dataclass(frozen=True)
class BeamStep:
    """Decode the last token of each beam of a search (`beam_search.py`), or of each text that is
    scored (`scoring.py`); they are not appended.

    parents: of each beam, its number among the beams of the step before, or `DOCUMENT`, for not
    more beams at once than the first step had. tokens: of each beam, the last one. Result: the
    logits [u] of the token that follows each beam; views, valid until the next work. Without beams
    a search begins, with the token that follows the document.
    """

    parents: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A picture to draw after the begin-of-image token that ends the document.

    index: among all images of the document, given ones included; part of the key of its random
    draws. schedule: key of a sampler, None for the default. guidance: scale of classifier-free
    guidance, 1 for none. full_every: run the whole U-Net at every n-th step, and reuse its deep
    features at the others, which is an approximation.
    """

    index: int
    schedule: str | None = None
    guidance: float = 1.0
    seed: int = 0
    full_every: int = 1


@dataclass(frozen=True)
class Condition:
    """Make a picture's condition from the document, and its first latents. Result: None."""

    picture: Picture


@dataclass(frozen=True)
class Denoise:
    """Run one denoising step, from 0 on. Result: None, or with `preview` the picture as far as it
    is known then, uint8 [side, side, 3] with the side of the latents."""

    picture: Picture
    step: int
    preview: bool = False

    @property
    def full(self) -> bool:
        """True if the whole U-Net runs."""
        return self.step % self.picture.full_every == 0


@dataclass(frozen=True)
class DecodeLatents:
    """Decode the latents after the last step. Result: uint8 [height, width, 3], not appended."""

    picture: Picture


Work = NextToken | BeamStep | Condition | Denoise | DecodeLatents
