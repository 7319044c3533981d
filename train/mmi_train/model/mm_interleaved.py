"""MM-Interleaved (paper Fig. 2): one model that reads and writes interleaved text and images.

The visual tokenizer turns an image into a few visual tokens, which stand among the text, and
multi-scale features, which the language model and the image decoder sample through MMFS. Text comes
from the language model's head, pictures from the image decoder, given the hidden states before
them.

Letters: b batch, t tokens, v visual tokens, m image slots, n encoded images, s feature cells,
j pictures to draw, x context tokens, y condition tokens, w wanted positions, u vocabulary,
z latent channels, c channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmi_deploy.spec import token_layout
from mmi_deploy.spec.config import ModelConfig
from mmi_train.model.image_decoder import ImageDecoder, PreviousImages, RandomDraws
from mmi_train.model.llama import Llama
from mmi_train.model.lm_head import LmHead
from mmi_train.model.losses import IGNORE, text_loss, text_targets
from mmi_train.model.vae import Posterior
from mmi_train.model.visual_tokenizer import VisualTokenizer, flatten_maps

# Context tokens, `<s>` and begin-of-image, of a picture with nothing before it: it is not trained.
EMPTY_CONTEXT = 2


@dataclass(frozen=True)
class Batch:
    """Packed rows of documents, padded on the right with the pad token.

    `token_ids` [b, t]: an image is its begin-of-image (BoI) token and, if the model is to see it, v
    image ids right after it. `pixels` [n, 3, side, side] in [0, 1]: the images to encode; None or
    empty for rows without. `image_slot` [b, m]: index into `pixels` of each image of a row (rows
    may share an image); -1 where the row has fewer images, or where the BoI ends a document whose
    last picture is only drawn and therefore not encoded.

    `pictures` [j, 2]: (row, image of the row) of the pictures to train drawing on; None: no image
    loss. Their targets are either `target_pixels` [j, 3, size, size] in [0, 1] or
    `target_posterior` (mean and log variance [j, z, side, side]), which a data set may store
    because the autoencoder is frozen. `picture_weight` [j] multiplies their losses; a picture of
    weight 0, as one that fine-tuning masks, counts in the mean without being computed.

    `text_target` [b, t - 1]: from `losses.text_targets`; None: computed from `token_ids` alone.
    `token_weight` [b, t]: loss weight of each token as a target (the first column is not used).
    """

    token_ids: Tensor
    image_slot: Tensor
    pixels: Tensor | None = None
    pictures: Tensor | None = None
    target_pixels: Tensor | None = None
    target_posterior: Posterior | None = None
    picture_weight: Tensor | None = None
    text_target: Tensor | None = None
    token_weight: Tensor | None = None


class EncodedImages(NamedTuple):
    """`tokens` [n, v, c] for the language model, `features` [n, s, c] of all levels for MMFS."""

    tokens: Tensor
    features: Tensor


class Losses(NamedTuple):
    """`total` = text weight * `text` + image weight * `image`, all scalars; `pictures` [j]: the
    loss of each picture before weights, NaN where the picture was left out."""

    total: Tensor
    text: Tensor
    image: Tensor
    pictures: Tensor


class MMInterleaved(nn.Module):
    """Visual tokenizer, language model with its head, and image decoder of `config`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        vision, llama = config.vision, config.llama
        self.vision = VisualTokenizer(vision, config.vision_resampler, llama.width)
        self.llm = Llama(llama, config.llm_mmfs, vision.width, vision.level_sides)
        self.head = LmHead(llama.width, llama.vocab, (config.tokens.boi, config.tokens.image))
        self.boi_embedding = nn.Parameter(torch.zeros(1, llama.width))
        self.image_decoder = ImageDecoder(config)

    def checkpoint_gradients(self, on: bool = True) -> None:
        """Switch gradient checkpointing on or off: LLM blocks, encoder interactions and U-Net
        layers keep only their inputs and are recomputed in the backward pass."""
        self.llm.gradient_checkpointing = on
        self.vision.encoder.gradient_checkpointing = on
        self.image_decoder.unet.gradient_checkpointing = on

    def encode_images(self, pixels: Tensor | None) -> EncodedImages:
        """Encode pixels [n, 3, side, side] in [0, 1]. Without images, returns the zeros of one
        blank image that no query may see."""
        if pixels is None or not len(pixels):
            cells = sum(side * side for side in self.config.vision.level_sides)
            blank = self.boi_embedding.new_zeros
            return EncodedImages(
                blank(1, self.config.visual_tokens, self.config.llama.width),
                blank(1, cells, self.config.vision.width),
            )
        tokens, maps = self.vision(pixels)
        return EncodedImages(tokens, flatten_maps(maps))

    def embed(self, token_ids: Tensor, visual_tokens: Tensor, visual_index: Tensor) -> Tensor:
        """Embed tokens [b, t, c]: word embeddings, a learned vector added to BoI, and visual tokens
        [n, v, c] where `visual_index` [b, t] (`token_layout.visual_index`) is not -1."""
        embeddings = self.llm.embed_tokens(token_ids)  # [b, t, c]
        is_boi = (token_ids == self.config.tokens.boi)[..., None]
        embeddings = embeddings + is_boi * self.boi_embedding
        rows = visual_tokens.flatten(0, 1)[visual_index.clamp(min=0)].to(embeddings.dtype)
        return torch.where((visual_index >= 0)[..., None], rows, embeddings)

    def embed_rows(self, token_ids: Tensor, images: EncodedImages, image_slot: Tensor) -> Tensor:
        """Embed whole rows with the visual tokens of their images in place: [b, t, c]."""
        ids, slots = token_ids.cpu().numpy(), image_slot.cpu().numpy()
        index = token_layout.visual_index(ids, self.config.tokens, slots, self.config.visual_tokens)
        return self.embed(token_ids, images.tokens, _like(index, token_ids))

    def image_positions(self, token_ids: Tensor, image_slot: Tensor) -> Tensor:
        """Image position of each token, [b, t, m]: 1 the nearest image, 2 the one before it, 0
        hidden; see `token_layout.image_positions`."""
        ids, slots = token_ids.cpu().numpy(), image_slot.cpu().numpy()
        seen = self.config.llm_mmfs.images_seen
        position = token_layout.image_positions(ids, self.config.tokens, slots.shape[1], seen)
        return _like(position * (slots >= 0)[:, None], token_ids)

    def read(
        self,
        token_ids: Tensor,
        images: EncodedImages,
        image_slot: Tensor,
        *,
        position: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [b, t, c] of whole rows; see `Batch`.

        `position` [b, t] and `mask` (bool [b, 1, t, t], True where a key may be seen) can isolate
        packed documents from each other; without them a row is causal from its first token on.
        """
        if position is None:
            rows, columns = token_ids.shape
            position = torch.arange(columns, device=token_ids.device).expand(rows, -1)
        slot, image_position = token_layout.only_seen(
            image_slot.cpu().numpy(), self.image_positions(token_ids, image_slot).cpu().numpy()
        )
        return self.llm(
            self.embed_rows(token_ids, images, image_slot),
            position,
            mask,
            values=self.llm.image_values(images.features),
            image_slot=_like(slot, token_ids).clamp(min=0),
            image_position=_like(image_position, token_ids),
        )

    def context(self, hidden: Tensor, token_ids: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Context of pictures [j, 2]: hidden states [j, x, c] from each picture's BoI backwards to
        its `<s>`, zeros after that, and their number, [j]."""
        row, image = pictures.cpu().numpy().T
        ids = token_ids.cpu().numpy()
        ranges = token_layout.context_ranges(
            ids, self.config.tokens, token_layout.image_count(ids, self.config.tokens)
        )
        start, stop = ranges[row, image].T
        length = stop - start
        backwards = stop[:, None] - 1 - np.arange(length.max(initial=1))  # [j, x]
        real = backwards >= start[:, None]
        rows = _like(row, token_ids)[:, None]
        context = hidden[rows, _like(np.where(real, backwards, 0), token_ids)]  # [j, x, c]
        return context * _like(real, token_ids)[..., None], _like(length, token_ids)

    def previous_images(
        self, images: EncodedImages, token_ids: Tensor, image_slot: Tensor, pictures: Tensor
    ) -> PreviousImages:
        """The earlier images of each picture's document. Images that no picture sees are dropped,
        and so are unused columns, so that no MMFS value is computed unnecessarily."""
        ids, slots = token_ids.cpu().numpy(), image_slot.cpu().numpy()
        row, image = pictures.cpu().numpy().T
        seen = self.config.image_decoder.mmfs.images_seen
        positions = token_layout.picture_positions(ids, self.config.tokens, slots.shape[1], seen)
        slot, position = token_layout.only_seen(
            slots[row], positions[row, image] * (slots[row] >= 0)
        )  # [j, m]
        used = np.unique(slot[position > 0])
        used = used if len(used) else np.zeros(1, slot.dtype)
        slot = np.searchsorted(used, slot).clip(max=len(used) - 1)
        return PreviousImages(
            images.features[_like(used, token_ids)],
            _like(slot, token_ids),
            _like(position, token_ids),
        )

    def condition(self, hidden: Tensor, token_ids: Tensor, pictures: Tensor) -> Tensor:
        """Condition tokens [j, y, c] of pictures [j, 2] for the U-Net."""
        return self.image_decoder.condition(*self.context(hidden, token_ids, pictures))

    def forward(
        self,
        batch: Batch,
        *,
        draws: RandomDraws | None = None,
        text_weight: float = 1.0,
        image_weight: float = 10.0,
    ) -> Losses:
        """Training losses (Sec. 3.3, Eq. 5; lambda = 10). `draws`: a row for each picture; None:
        drawn from torch's default generator. `image_weight` 0, as the published code fine-tunes on
        questions with, leaves the U-Net out."""
        images = self.encode_images(batch.pixels)
        hidden = self.read(batch.token_ids, images, batch.image_slot)
        text = self.text_loss(hidden, batch)
        if image_weight == 0:
            batch = replace(batch, pictures=None)
        image, pictures = self.image_loss(hidden, images, batch, draws)
        return Losses(text_weight * text + image_weight * image, text, image, pictures)

    def text_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy over the targets that count; only their logits are computed."""
        target = batch.text_target
        if target is None:
            target = text_targets(batch.token_ids, self.config.tokens)
        counts = target != IGNORE
        weight = None if batch.token_weight is None else batch.token_weight[:, 1:][counts]
        logits = self.head(hidden[:, :-1][counts])  # [w, u]
        return text_loss(logits, target[counts], weight)

    def image_loss(
        self, hidden: Tensor, images: EncodedImages, batch: Batch, draws: RandomDraws | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean loss over all pictures of the batch, and the loss of each picture [j].

        A picture right after `<s>` has an empty context: as in the published code it counts as zero
        in the mean, but its loss is not computed; nor is that of a picture of weight zero.
        """
        pictures = batch.pictures
        if pictures is None or not len(pictures):
            return hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros(
                0, dtype=torch.float32
            )
        decoder = self.image_decoder
        draws = decoder.random_draws(len(pictures)) if draws is None else draws
        context, length = self.context(hidden, batch.token_ids, pictures)
        drawn = length > EMPTY_CONTEXT  # [j]
        if batch.picture_weight is not None:
            drawn &= batch.picture_weight != 0
        own = torch.full(drawn.shape, torch.nan, device=drawn.device)
        if not drawn.any():
            return own.new_zeros(()), own
        if batch.target_posterior is not None:
            posterior = Posterior(*(moment[drawn] for moment in batch.target_posterior))
        else:
            assert batch.target_pixels is not None, (
                "pictures need target_pixels or target_posterior"
            )
            posterior = decoder.encode(batch.target_pixels[drawn])
        look_back = self.previous_images(images, batch.token_ids, batch.image_slot, pictures[drawn])
        condition = decoder.condition(context[drawn], length[drawn])
        losses = decoder.losses(posterior, condition, look_back, draws[drawn])
        own = own.masked_scatter(drawn, losses.detach())
        if batch.picture_weight is not None:
            losses = losses * batch.picture_weight[drawn]
        return losses.sum() / len(pictures), own


def _like(array: np.ndarray, tensor: Tensor) -> Tensor:
    """Move an array to the device of `tensor`."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(tensor.device)
