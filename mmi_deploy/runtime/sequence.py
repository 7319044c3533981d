"""Token sequence: ids and images of one document that only grows."""

from __future__ import annotations

from collections.abc import Sequence

from mmi_deploy.documents.images import Rgb, as_rgb, resize
from mmi_deploy.errors import DocumentError
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import Limits


class TokenSequence:
    """Token ids of a document, and its images at the size that the encoder takes.

    It knows the rules of the token layout and the limits; engines read what is new in it.
    """

    def __init__(self, config: ModelConfig, limits: Limits) -> None:
        self.config = config
        self.limits = limits
        self.token_ids: list[int] = []
        self.pictures: list[Rgb] = []

    @property
    def room(self) -> int:
        """Number of tokens that still fit."""
        return self.limits.context - len(self.token_ids)

    @property
    def images(self) -> int:
        """Number of images in the document, given and drawn."""
        return len(self.pictures)

    @property
    def image_open(self) -> bool:
        """True if the document ends with a begin-of-image token, so that an image must follow."""
        return bool(self.token_ids) and self.token_ids[-1] == self.config.tokens.boi

    def append_text(self, token_ids: Sequence[int]) -> None:
        """Append tokens: text, `<s>`, or the begin-of-image token of a picture to be drawn.

        Raises `DocumentError` if they do not fit, or an image is missing after its begin-of-image
        token.
        """
        tokens = self.config.tokens
        ids = [int(token) for token in token_ids]
        if tokens.image in ids:
            raise DocumentError("image tokens come from images alone", fix="call append_image")
        if ids and (self.image_open or tokens.boi in ids[:-1]):
            raise DocumentError("an image must follow its begin-of-image token")
        self._append(ids)

    def append_image(self, rgb: Rgb) -> None:
        """Append an image, uint8 [height, width, 3] of any size: its begin-of-image token unless
        the document ends with one, and its image tokens.

        Raises `DocumentError` if the image does not fit, or is not a picture.
        """
        rgb = as_rgb(rgb)
        tokens, count = self.config.tokens, self.config.visual_tokens
        ids = [tokens.image] * count if self.image_open else [tokens.boi] + [tokens.image] * count
        if self.images == self.limits.images:
            raise DocumentError(
                "the document has too many images", expected=f"at most {self.limits.images}"
            )
        self._append(ids)  # may raise, so before the picture: an error leaves all as it was
        side = self.config.vision.image_size
        self.pictures.append(rgb if rgb.shape == (side, side, 3) else resize(rgb, side))

    def _append(self, ids: list[int]) -> None:
        if len(ids) > self.room:
            raise DocumentError(
                "the document is too long",
                expected=f"at most {self.limits.context} tokens",
                got=len(self.token_ids) + len(ids),
                fix="shorten it, or export the bundle with a larger --context",
            )
        self.token_ids += ids
