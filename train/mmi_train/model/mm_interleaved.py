"""MM-Interleaved (paper Fig. 2): one model that reads and writes interleaved text and images.

Images become a few visual tokens, which stand among the text, and multi-scale features, at which
both the language model and the image decoder look back through MMFS. Text comes from the language
model's head, pictures from the image decoder, given the hidden states before them.

Letters: b rows, t tokens, m images of a row, n encoded images, s feature cells, k pictures to draw,
x context tokens, z latent channels, c channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmi_deploy.spec import token_layout
from mmi_deploy.spec.config import ModelConfig
from mmi_train.model.image_decoder import Draws, ImageDecoder, LookBackImages
from mmi_train.model.llama import Llama
from mmi_train.model.lm_head import LmHead
from mmi_train.model.losses import IGNORE, text_loss, text_targets
from mmi_train.model.vae import Posterior
from mmi_train.model.visual_tokenizer import VisualTokenizer, flatten_maps

LOOKS_BACK = 2
"""A picture is trained only if its context is longer than `<s>` and its begin-of-image token."""


@dataclass(frozen=True)
class Batch:
    """Packed rows of documents, padded on the right with the pad token.

    `token_ids` [b, t]: every image is its BoI token and, if it is to be read, `visual_tokens` image
    ids right after it. `pixels` [n, 3, side, side] in [0, 1]: the images to read; None or n = 0 for
    rows without. `image_slot` [b, m]: which of `pixels` the j-th image of a row is (an image of the
    batch may be shared); -1 where the row has fewer images, or where its BoI ends a document that
    only draws, so that nothing has to be encoded.

    `pictures` [k, 2]: (row, j) of the images to train drawing on; None: no image loss. Their
    targets are either `target_pixels` [k, 3, size, size] in [0, 1] or `target_posterior`, what the
    autoencoder makes of them (mean and log variance, [k, z, side, side] each), which a data set may
    keep because the autoencoder is frozen. `picture_weight` [k] multiplies their losses.

    `text_target` [b, t - 1]: as `losses.text_targets` makes it; None: made from `token_ids` alone.
    `token_weight` [b, t]: weight of predicting each token (the first column is not used).
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
    """`tokens` [n, visual tokens, c] for the language model, `features` [n, s, c] of all levels."""

    tokens: Tensor
    features: Tensor


class Losses(NamedTuple):
    """`total` = text weight * `text` + image weight * `image`, all scalars; `pictures` [k]: each
    one's own loss before weights, not a number where the picture was left out."""

    total: Tensor
    text: Tensor
    image: Tensor
    pictures: Tensor


class MMInterleaved(nn.Module):
    """The whole model of `config`."""

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
        """Trade time for memory in training: keep only the inputs of LLM blocks, encoder
        interactions and U-Net blocks, and compute the rest again in the backward pass."""
        self.llm.checkpointing = on
        self.vision.encoder.gradient_checkpointing = on
        self.image_decoder.unet.gradient_checkpointing = on

    def encode_images(self, pixels: Tensor | None) -> EncodedImages:
        """Pixels [n, 3, side, side] in [0, 1]. Without any, one blank image that nobody sees: MMFS
        then gives what it gives to any query that sees nothing."""
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
        """[b, t, c]: embeddings, the learned vector added to BoI, visual tokens [n, tokens, c]
        where `visual_index` [b, t] (`token_layout.visual_index`) is not -1."""
        embeddings = self.llm.embed_tokens(token_ids)
        is_boi = (token_ids == self.config.tokens.boi)[..., None]
        embeddings = embeddings + is_boi * self.boi_embedding
        rows = visual_tokens.flatten(0, 1)[visual_index.clamp(min=0)].to(embeddings.dtype)
        return torch.where((visual_index >= 0)[..., None], rows, embeddings)

    def embed_rows(self, token_ids: Tensor, images: EncodedImages, image_slot: Tensor) -> Tensor:
        """[b, t, c]: embeddings of whole rows with their images' visual tokens in place."""
        ids, slots = token_ids.cpu().numpy(), image_slot.cpu().numpy()
        index = token_layout.visual_index(ids, self.config.tokens, slots, self.config.visual_tokens)
        return self.embed(token_ids, images.tokens, _like(index, token_ids))

    def image_positions(self, token_ids: Tensor, image_slot: Tensor) -> Tensor:
        """[b, t, m]: how far back each image lies from each token, 0 hidden; see `layout`."""
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

        `position` [b, t] and `mask` (bool [b, 1, t, t], true where a query may look) can keep
        packed documents to themselves; without them a row is causal from its first token on.
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
        """What pictures [k, 2] are drawn from: hidden states [k, x, c] from each one's BoI
        backwards to its `<s>`, zeros after that, and how many they are, [k]."""
        row, image = pictures.cpu().numpy().T
        ids = token_ids.cpu().numpy()
        ranges = token_layout.context_ranges(
            ids, self.config.tokens, token_layout.image_count(ids, self.config.tokens)
        )
        start, stop = ranges[row, image].T
        length = stop - start
        backwards = stop[:, None] - 1 - np.arange(length.max(initial=1))  # [k, x]
        real = backwards >= start[:, None]
        rows = _like(row, token_ids)[:, None]
        taken = hidden[rows, _like(np.where(real, backwards, 0), token_ids)]
        return taken * _like(real, token_ids)[..., None], _like(length, token_ids)

    def look_back_images(
        self, images: EncodedImages, token_ids: Tensor, image_slot: Tensor, pictures: Tensor
    ) -> LookBackImages:
        """The earlier images of each picture's document. Only images that some picture sees are
        kept, and only as many columns as a picture needs, so that nothing is computed in vain."""
        ids, slots = token_ids.cpu().numpy(), image_slot.cpu().numpy()
        row, image = pictures.cpu().numpy().T
        seen = self.config.image_decoder.mmfs.images_seen
        positions = token_layout.picture_positions(ids, self.config.tokens, slots.shape[1], seen)
        slot, position = token_layout.only_seen(
            slots[row], positions[row, image] * (slots[row] >= 0)
        )  # [k, m]
        used = np.unique(slot[position > 0])
        used = used if len(used) else np.zeros(1, slot.dtype)
        slot = np.searchsorted(used, slot).clip(max=len(used) - 1)
        return LookBackImages(
            images.features[_like(used, token_ids)],
            _like(slot, token_ids),
            _like(position, token_ids),
        )

    def condition(self, hidden: Tensor, token_ids: Tensor, pictures: Tensor) -> Tensor:
        """The U-Net's condition tokens [k, q, c] of pictures [k, 2]."""
        return self.image_decoder.condition(*self.context(hidden, token_ids, pictures))

    def forward(
        self,
        batch: Batch,
        *,
        draws: Draws | None = None,
        text_weight: float = 1.0,
        image_weight: float = 10.0,
    ) -> Losses:
        """The training losses (Sec. 3.3, Eq. 5; lambda = 10). `draws`: a row for each picture;
        None: fresh ones from torch's default generator."""
        images = self.encode_images(batch.pixels)
        hidden = self.read(batch.token_ids, images, batch.image_slot)
        text = self.text_loss(hidden, batch)
        image, pictures = self.image_loss(hidden, images, batch, draws)
        return Losses(text_weight * text + image_weight * image, text, image, pictures)

    def text_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy over the tokens that count; only their logits are computed."""
        target = batch.text_target
        if target is None:
            target = text_targets(batch.token_ids, self.config.tokens)
        counts = target != IGNORE
        weight = None if batch.token_weight is None else batch.token_weight[:, 1:][counts]
        return text_loss(self.head(hidden[:, :-1][counts]), target[counts], weight)

    def image_loss(
        self, hidden: Tensor, images: EncodedImages, batch: Batch, draws: Draws | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean over all pictures of the batch, and each one's own loss [k].

        A picture right after `<s>` has nothing to be drawn from: it counts as zero in the mean, as
        in the published code, but is not computed.
        """
        pictures = batch.pictures
        if pictures is None or not len(pictures):
            return hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros(
                0, dtype=torch.float32
            )
        decoder = self.image_decoder
        draws = decoder.draws(len(pictures)) if draws is None else draws
        context, length = self.context(hidden, batch.token_ids, pictures)
        drawn = length > LOOKS_BACK  # [k]
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
        look_back = self.look_back_images(
            images, batch.token_ids, batch.image_slot, pictures[drawn]
        )
        condition = decoder.condition(context[drawn], length[drawn])
        losses = decoder.losses(posterior, condition, look_back, draws[drawn])
        own = own.masked_scatter(drawn, losses.detach())
        if batch.picture_weight is not None:
            losses = losses * batch.picture_weight[drawn]
        return losses.sum() / len(pictures), own


def _like(array: np.ndarray, tensor: Tensor) -> Tensor:
    """The array on the tensor's device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(tensor.device)
