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

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmi_deploy.spec import token_layout
from mmi_deploy.spec.config import DiffusionConfig, ModelConfig
from mmi_train.model.diffusion import Diffusion
from mmi_train.model.image_decoder import ImageDecoder, PreviousImages, RandomDraws
from mmi_train.model.layout import (
    Layout,
    PictureLayout,
    RowLayout,
    image_positions,
    layout_of,
    map_tensors,
    moved,
    picture_layout,
    row_layout,
)
from mmi_train.model.llama import Llama
from mmi_train.model.lm_head import LmHead
from mmi_train.model.losses import text_loss, text_targets
from mmi_train.model.vae import Posterior
from mmi_train.model.visual_tokenizer import VisualTokenizer, flatten_maps


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
    `layout`: where tokens and pictures find what they see, best made with the batch; None: made by
    the model, for rows that are causal from their first token on. `blank`: `pixels` is one image
    that no row sees, and that changes no random draw of the others.
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
    layout: Layout | None = None
    blank: bool = False

    def pin_memory(self) -> Batch:
        """Copy in page-locked memory, for PyTorch's loader."""
        return map_tensors(self, Tensor.pin_memory)


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


class PictureInputs(NamedTuple):
    """Inputs of the image decoder's loss on pictures [j], beside random draws: the posterior of
    their latents, condition tokens [j, y, c] and earlier images."""

    posterior: Posterior
    condition: Tensor
    images: PreviousImages

    def repeated(self, times: int) -> PictureInputs:
        """All pictures `times` times, one block after another, for as many noise levels."""
        return PictureInputs(
            Posterior(*(moment.repeat(times, 1, 1, 1) for moment in self.posterior)),
            self.condition.repeat(times, 1, 1),
            self.images.repeated(times),
        )


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

    def change_diffusion(self, diffusion: DiffusionConfig) -> None:
        """Train and draw by another noise schedule, prediction or weight of the loss."""
        decoder = replace(self.config.image_decoder, diffusion=diffusion)
        self.config = replace(self.config, image_decoder=decoder)
        self.image_decoder.config = decoder
        device = self.image_decoder.diffusion.signal.device
        self.image_decoder.diffusion = Diffusion(diffusion).to(device)

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
        ids, slots = _array(token_ids), _array(image_slot)
        index = token_layout.visual_index(ids, self.config.tokens, slots, self.config.visual_tokens)
        return self.embed(token_ids, images.tokens, _like(index, token_ids))

    def image_positions(self, token_ids: Tensor, image_slot: Tensor) -> Tensor:
        """Image position of each token, [b, t, m]: 1 the nearest image, 2 the one before it, 0
        hidden; see `token_layout.image_positions`."""
        found = image_positions(_array(token_ids), _array(image_slot), self.config)
        return _like(found, token_ids)

    def read(self, token_ids: Tensor, images: EncodedImages, image_slot: Tensor) -> Tensor:
        """Hidden states [b, t, c] of whole rows, each causal from its first token on; see
        `Batch`."""
        layout = row_layout(_array(token_ids), _array(image_slot), self.config)
        return self.read_rows(token_ids, images, moved(layout, token_ids.device))

    def read_rows(self, token_ids: Tensor, images: EncodedImages, layout: RowLayout) -> Tensor:
        """Hidden states [b, t, c] of whole rows with their layout."""
        return self.llm(
            self.embed(token_ids, images.tokens, layout.visual_index),
            layout.position,
            layout.mask,
            values=self.llm.image_values(images.features),
            image_slot=layout.image_slot,
            image_position=layout.image_position,
        )

    def picture_layout(
        self, token_ids: Tensor, image_slot: Tensor, pictures: Tensor
    ) -> PictureLayout:
        """Layout of pictures [j, 2] on the device of the tokens."""
        ids, slots, wanted = _array(token_ids), _array(image_slot), _array(pictures)
        return moved(picture_layout(ids, slots, wanted, self.config), token_ids.device)

    def context(self, hidden: Tensor, layout: PictureLayout) -> tuple[Tensor, Tensor]:
        """Context of pictures: hidden states [j, x, c] from each picture's BoI backwards to its
        `<s>`, zeros after that, and their number, [j]."""
        context = hidden[layout.row, layout.column]  # [j, x, c]
        return context * layout.real[..., None], layout.length

    def previous_images(self, images: EncodedImages, layout: PictureLayout) -> PreviousImages:
        """The earlier images of each picture's document."""
        return PreviousImages(
            images.features[layout.used], layout.slot, layout.position, layout.seeing
        )

    def condition(self, hidden: Tensor, layout: PictureLayout) -> Tensor:
        """Condition tokens [j, y, c] of pictures for the U-Net."""
        return self.image_decoder.condition(*self.context(hidden, layout))

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
        batch = self.with_layout(batch)
        assert batch.layout is not None
        with unchanged_draws(batch.token_ids.device) if batch.blank else nullcontext():
            images = self.encode_images(batch.pixels)
        hidden = self.read_rows(batch.token_ids, images, batch.layout.rows)
        text = self.text_loss(hidden, batch)
        if image_weight == 0:
            batch = replace(batch, layout=replace(batch.layout, pictures=None))
        image, pictures = self.image_loss(hidden, images, batch, draws)
        return Losses(text_weight * text + image_weight * image, text, image, pictures)

    def with_layout(self, batch: Batch) -> Batch:
        """The batch with its text targets and layout, which are made unless it has them."""
        if batch.layout is not None:
            return batch
        target = batch.text_target
        if target is None:
            target = text_targets(batch.token_ids, self.config.tokens)
        layout = layout_of(
            batch.token_ids.cpu(),
            batch.image_slot.cpu(),
            None if batch.pictures is None else batch.pictures.cpu(),
            target.cpu(),
            self.config,
            picture_weight=None if batch.picture_weight is None else batch.picture_weight.cpu(),
        )
        layout = moved(layout, batch.token_ids.device)
        return replace(batch, text_target=target, layout=layout)

    def text_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy over the targets that count; only their logits are computed."""
        assert batch.layout is not None and batch.text_target is not None
        row, column = batch.layout.target_row, batch.layout.target_column
        weight = None if batch.token_weight is None else batch.token_weight[row, column + 1]
        logits = self.head(hidden[row, column])  # [w, u]
        return text_loss(logits, batch.text_target[row, column], weight)

    def image_loss(
        self, hidden: Tensor, images: EncodedImages, batch: Batch, draws: RandomDraws | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean loss over all pictures of the batch, and the loss of each picture [j].

        A picture right after `<s>` has an empty context: as in the published code it counts as zero
        in the mean, but its loss is not computed; nor is that of a picture of weight zero.
        """
        assert batch.layout is not None
        drawn, layout = batch.layout.drawn, batch.layout.pictures
        count = 0 if batch.pictures is None else len(batch.pictures)
        own = hidden.new_full((count,), torch.nan, dtype=torch.float32)
        if layout is None:
            return own.new_zeros(()), own
        decoder = self.image_decoder
        draws = decoder.random_draws(count) if draws is None else draws
        inputs = self.picture_inputs(hidden, images, batch)
        losses = decoder.losses(*inputs, draws[drawn])
        own = own.index_copy(0, drawn, losses.detach())
        if batch.picture_weight is not None:
            losses = losses * batch.picture_weight[drawn]
        return losses.sum() / count, own

    def picture_inputs(self, hidden: Tensor, images: EncodedImages, batch: Batch) -> PictureInputs:
        """Target, condition and earlier images of the pictures of a batch that are computed."""
        assert batch.layout is not None and batch.layout.pictures is not None
        drawn, layout = batch.layout.drawn, batch.layout.pictures
        if batch.target_posterior is not None:
            posterior = Posterior(*(moment[drawn] for moment in batch.target_posterior))
        else:
            assert batch.target_pixels is not None, (
                "pictures need target_pixels or target_posterior"
            )
            posterior = self.image_decoder.encode(batch.target_pixels[drawn])
        look_back = self.previous_images(images, layout)
        return PictureInputs(posterior, self.condition(hidden, layout), look_back)


def unchanged_draws(device: torch.device) -> AbstractContextManager[None]:
    """Leave torch's default generators, of the CPU and of `device`, as they were before."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.cpu().numpy()


def _like(array: np.ndarray, tensor: Tensor) -> Tensor:
    """Move an array to the device of `tensor`."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(tensor.device)
