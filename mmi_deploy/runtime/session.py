"""Session: one document that only grows, with its KV cache, image values and hidden states.

Letters: b batch, t tokens, n encoded images, m image slots, c channels, v visual tokens, x context
tokens, u vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.documents.images import Rgb, to_pixels, to_rgb
from mmi_deploy.errors import DocumentError, EngineError
from mmi_deploy.runtime.buffers import Array, Buffer, Mark, Memory
from mmi_deploy.runtime.cache_rows import CacheRows
from mmi_deploy.runtime.caches import HiddenStates, ImagePool, KvCache
from mmi_deploy.runtime.decode_step import DecodeStep
from mmi_deploy.runtime.picture_rows import PictureRows
from mmi_deploy.runtime.prefill import prefill_inputs
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.sampling import sample_rows
from mmi_deploy.runtime.sequence import TokenSequence
from mmi_deploy.runtime.timings import Timings
from mmi_deploy.runtime.visible_images import VisibleImages, pad_images
from mmi_deploy.runtime.work import (
    BeamStep,
    Condition,
    DecodeLatents,
    Denoise,
    NextToken,
    Picture,
    Work,
)
from mmi_deploy.spec.graphs import Graph

Logits = NDArray[np.float32]

# No token: text sees the images that the token before it sees, whichever it is.
_ANY_TEXT = -1


class Session:
    """Appends text and images to one document, computes the next token's logits, draws pictures.

    Appending is lazy: images are encoded and tokens pass through the LLM once logits or a picture
    are asked for, so a prompt of many parts is a single prefill.
    """

    def __init__(self, runtime: Runtime, rows: int = 1) -> None:
        """rows: of the KV cache, for the beams of a search or texts to score. The document is in
        the first one."""
        self.runtime = runtime
        self.config = runtime.config
        self.limits = runtime.limits
        self.timings = Timings()
        self.sequence = TokenSequence(runtime.config, runtime.limits)
        graphs, memory = runtime.graphs, runtime.memory
        llm, most = graphs["llm"], self.limits.images
        seen = min(self.config.image_decoder.mmfs.images_seen, most)
        self._cache_rows = CacheRows(KvCache(llm, memory, rows), memory, rows)
        self._llm_values = ImagePool(graphs["llm_values"].outputs, memory, most)
        # The U-Net sees the last images alone, and only once a picture is begun: their features are
        # kept until then.
        self._features = ImagePool([graphs["vision_encoder"]["features"]], memory, seen)
        self._unet_values = ImagePool(graphs["unet_values"].outputs, memory, seen)
        self._hidden = HiddenStates(llm, memory, self.limits.context)
        # Fixed buffers of a decode step: with the same addresses at each token, the step can be
        # replayed as a CUDA graph.
        self._hidden_rows = _allocate_rows(llm, "hidden", memory, rows)
        self._logits = _allocate_rows(llm, "logits", memory, rows)
        # Visual tokens of the pending images, densely from the first row on. Of text the graphs
        # read a row too, and ignore it.
        visual_tokens = llm["visual_tokens"]
        self._visual_tokens = memory.allocate(
            visual_tokens.resolve(v=self.limits.context), visual_tokens.dtype
        )
        features = graphs["vision_encoder"]["features"]
        self._encoded = memory.allocate(features.resolve(n=self.limits.batch), features.dtype)
        # By rows, image slots and rows of the pool.
        self._decode_steps: dict[tuple[int, int, int], DecodeStep] = {}
        self._pictures: PictureRows | None = None
        self._pixels: Buffer | None = None  # of a finished picture
        self._last_step: Mark | None = None  # end of the denoising step that was enqueued last
        self._processed = 0  # tokens in the KV cache
        self._visible = VisibleImages(runtime.config.tokens, self.config.llm_mmfs.images_seen, most)
        self._pending_images = 0  # encoded images that the LLM has not read yet

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the document."""
        return self.sequence.token_ids

    @property
    def room(self) -> int:
        """Number of tokens that still fit."""
        return self.sequence.room

    @property
    def images(self) -> int:
        """Number of images in the document, given and drawn."""
        return self.sequence.images

    def append_text(self, token_ids: Sequence[int]) -> None:
        """Append tokens, as `TokenSequence.append_text`."""
        self.sequence.append_text(token_ids)

    def append_image(self, rgb: Rgb) -> None:
        """Append an image, as `TokenSequence.append_image`. It is encoded once, before the next
        run of the LLM."""
        self.sequence.append_image(rgb)

    def _encode_pending(self) -> None:
        """Encode the pending images: the LLM's values into their pool, visual tokens for the LLM,
        features for the U-Net. A batch is limited by the graphs."""
        while pending := self.sequence.pictures[self._llm_values.images :]:
            count = min(self.limits.batch, len(pending), self._llm_values.contiguous)
            pixels = np.stack([to_pixels(rgb) for rgb in pending[:count]])
            with self._measure("encode", count):
                features = self._encoded.rows(0, count)
                outputs = {"features": features, "visual_tokens": self._next_visual_tokens(count)}
                self.runtime.engine("vision_encoder").run({"pixels": pixels}, outputs)
                rows = self._llm_values.next_rows(count)
                self.runtime.engine("llm_values").run({"features": features}, rows)
                for image in range(count):
                    row = self._features.next_rows(1)["features"]
                    self.runtime.memory.copy(features.rows(image, image + 1), row)
                    self._features.add(1)
                self._llm_values.add(count)
            self._pending_images += count

    def _next_visual_tokens(self, count: int) -> Buffer:
        """Place of the visual tokens of the next `count` images [count, visual_tokens, c]."""
        tensor = self.runtime.graphs["vision_encoder"]["visual_tokens"]
        shape = tensor.resolve(n=count)
        first = self._pending_images * shape[1]
        return self._visual_tokens.rows(first, first + count * shape[1]).reshaped(shape)

    def _compute_unet_values(self) -> None:
        """Compute the U-Net's values of the images that it may see and that have none yet."""
        values, last = self._unet_values, self._features.images
        while values.images < last:
            # Images that a later one has pushed out of the ring are skipped.
            values.add(max(last - values.rows - values.images, 0))
            count = min(
                self.limits.batch, last - values.images, values.contiguous, self._features.rows
            )
            with self._measure("values", count):
                first = self._features.slot(values.images)
                features = self._features.buffers()["features"].rows(first, first + count)
                self.runtime.engine("unet_values").run(
                    {"features": features}, values.next_rows(count)
                )
                values.add(count)

    def next_logits(self) -> Logits:
        """Logits [u] of the next token. A view on the host: valid until the document grows."""
        if not self.token_ids:
            raise DocumentError("an empty document has no next token", fix="begin with `<s>`")
        self._run_pending()
        self._cache_rows.end_search()
        logits: Logits = self._logits.read()[0, 0]
        check_finite(logits, f"the logits after {len(self.token_ids)} tokens")
        return logits

    def _run_pending(self) -> None:
        """Run the LLM once over all pending tokens, which fills their slots of the KV cache."""
        ids = self.token_ids[self._processed :]
        if not ids:
            return
        self._encode_pending()  # before the buffers below are taken: encoding fills the value pool
        tokens, first, count = self.config.tokens, self._processed, len(ids)
        slot, position = self._visible.of_tokens(ids, self._llm_values.slot)
        with self._measure("prefill" if count > 1 else "decode", count):
            if count == 1 and ids[0] != tokens.image:
                step = self._decode_step(1, slot.shape[1])
                step.set(0, ids[0], first, slot[0], position[0, 0])
                step.run()
                hidden = self._hidden_rows.rows(0, 1)  # a fixed place, or no step could be recorded
                self._hidden.write(first, hidden.reshaped(hidden.shape[1:]))
            else:
                self._prefill(ids, slot, position)
        # Last: if the run raised, its tokens stay pending, and the next run overwrites their slots.
        self._processed = first + count
        self._visible.add(ids, slot, position)
        self._pending_images = 0

    def _decode_step(self, b: int, m: int) -> DecodeStep:
        """Decode step for `b` rows, `m` image slots and the rows of the pool in use."""
        key = (b, m, self._llm_values.used)
        if key not in self._decode_steps:
            fixed = {
                "visual_tokens": self._visual_tokens.rows(0, 1),
                **self._llm_values.buffers(),
                **self._cache_rows.first(b),
            }
            outputs = {"logits": self._logits.rows(0, b), "hidden": self._hidden_rows.rows(0, b)}
            self._decode_steps[key] = DecodeStep(self.runtime.engine("llm"), b, m, fixed, outputs)
        return self._decode_steps[key]

    def beam_logits(self, step: BeamStep) -> list[Logits]:
        """Logits [u] after each beam of `step`, whose last tokens are decoded in one run. Views:
        valid until the next run."""
        if not step.tokens:
            return [self.next_logits()]
        placed = self._cache_rows.grow(step.parents)
        first = len(self.token_ids)
        b = max(row for row, _ in placed) + 1
        slot, position = self._visible.of_tokens([_ANY_TEXT], self._llm_values.slot)
        with self._measure("decode", len(placed)):
            decoding = self._decode_step(b, slot.shape[1])
            # An idle row writes behind the document, where its next text begins.
            for row in set(range(b)) - {row for row, _ in placed}:
                decoding.set(row, 0, first, slot[0], position[0, 0])
            for (row, depth), token in zip(placed, step.tokens, strict=True):
                decoding.set(row, token, first + depth, slot[0], position[0, 0])
            decoding.run()
        logits = self._logits.read()
        for row, depth in placed:
            check_finite(logits[row], f"the logits after {first + depth + 1} tokens of a beam")
        return [logits[row, 0] for row, _ in placed]

    def _prefill(
        self, ids: list[int], slot: NDArray[np.int32], position: NDArray[np.int32]
    ) -> None:
        """Run the LLM over `ids`."""
        visual_tokens, index = self._visual(ids)
        inputs: dict[str, Buffer | Array] = {
            **prefill_inputs(ids, self._processed, index, slot, position),
            "visual_tokens": visual_tokens,
            **self._llm_values.buffers(),
            **self._cache_rows.first(1),
        }
        hidden = self._hidden.tokens(self._processed, self._processed + len(ids))
        outputs = {"logits": self._logits.rows(0, 1), "hidden": hidden.reshaped((1, *hidden.shape))}
        self.runtime.engine("llm").run(inputs, outputs)

    def _visual(self, ids: list[int]) -> tuple[Buffer, NDArray[np.int64]]:
        """Visual tokens of the pending images [v, c], and the row of it for each of `ids` [1, t];
        -1 for text."""
        is_image = np.array([ids]) == self.config.tokens.image
        index = np.where(is_image, is_image.cumsum() - 1, -1)
        return self._visual_tokens.rows(0, max(int(is_image.sum()), 1)), index

    def draw(
        self,
        schedule: str | None = None,
        guidance: float | None = None,
        seed: int = 0,
        full_every: int = 1,
        on_step: Callable[[int, int], None] = lambda step, of: None,
    ) -> Rgb:
        """Draw the picture that the document's last token begins, and append it.

        schedule: key of a sampler, as in `Runtime.schedule`. guidance: as in `GenerationOptions`.
        full_every: run the whole U-Net at every n-th step, and reuse its deep features at the
        others, which is an approximation. on_step(step, of): called after each
        step, `step` from 1. Returns uint8 [height, width, 3].
        """
        steps = self.draw_steps(schedule, guidance, seed, full_every)
        while True:
            try:
                on_step(*next(steps))
            except StopIteration as stop:
                rgb: Rgb = stop.value
                self.append_image(rgb)
                return rgb

    def draw_steps(
        self, schedule: str | None, guidance: float | None, seed: int, full_every: int = 1
    ) -> Generator[tuple[int, int], None, Rgb]:
        """`draw` as a generator: yields (step, of) after each step and returns the picture.

        The same document and seed give the same picture. The picture is not appended, so closing
        the generator leaves the document as it was. A session draws one picture at a time.
        """
        scale = self.config.image_decoder.guidance_of(guidance)
        picture = Picture(self.images, schedule, scale, seed, full_every)
        self.begin(picture)
        steps = self.runtime.schedule(schedule).schedule.steps
        for step in range(steps):
            self.denoise(picture, step)
            yield step + 1, steps
        return self.decode_latents(picture)

    def do(self, work: Work) -> Any:
        """Do one item of work; returns its result."""
        match work:
            case NextToken(request):
                (sampled,) = sample_rows(self.next_logits()[None], [request])
                return sampled
            case BeamStep():
                return self.beam_logits(work)
            case Condition(picture):
                return self.begin(picture)
            case Denoise(picture, step, preview):
                self.denoise(picture, step)
                return self.preview(picture) if preview else None
            case DecodeLatents(picture):
                return self.decode_latents(picture)

    def begin(self, picture: Picture) -> None:
        """Compute what stays the same over the steps of `picture`, and draw its first latents."""
        if not self.sequence.image_open:
            raise DocumentError(
                "a picture can only be drawn after a begin-of-image token", fix="append it first"
            )
        self._run_pending()
        self._compute_unet_values()
        drawing = self._picture_rows()
        with self._measure("condition"):
            self.runtime.engine("image_condition").run(self._context(), drawing.condition(0))
        self._last_step = None
        slot, position = self._earlier_pictures()
        drawing.begin(0, picture, slot[0], position[0])

    def denoise(self, picture: Picture, step: int) -> None:
        """Run step `step` of the picture that was begun last."""
        with self._measure("denoise"):
            self._picture_rows().denoise([Denoise(picture, step)], 1)
        # The device computes this step while the host prepares the next one. It is not let further
        # ahead, so that a picture can be cancelled and its progress is true.
        before, self._last_step = self._last_step, self.runtime.memory.mark()
        if before is not None:
            before.wait()

    def preview(self, picture: Picture) -> Rgb:
        """Show the picture as far as it is known after its last step: uint8 [side, side, 3] with
        the side of the latents."""
        pixels = self._picture_rows().preview(0)
        check_finite(pixels, f"the pixels of a preview of picture {picture.index}")
        return to_rgb(pixels)

    def decode_latents(self, picture: Picture) -> Rgb:
        """Decode the latents after the last step to the picture, uint8 [height, width, 3]."""
        latents = self._picture_rows().latents(0)
        assert self._pixels is not None  # allocated with the latents
        with self._measure("vae"):
            self.runtime.engine("vae_decoder").run({"latents": latents}, {"pixels": self._pixels})
        pixels = self._pixels.read()[0]
        check_finite(pixels, f"the pixels of picture {picture.index}")
        return to_rgb(pixels)

    def _picture_rows(self) -> PictureRows:
        """The one row of pictures, allocated with the first picture."""
        if self._pictures is None:
            # All rows: the plans of a picture's steps keep the buffers that they are bound to.
            values = self._unet_values.all_rows
            self._pictures = PictureRows(self.runtime, 1, values)
            pixels = self.runtime.graphs["vae_decoder"]["pixels"]
            self._pixels = self.runtime.memory.allocate(pixels.resolve(b=1), pixels.dtype)
        return self._pictures

    def _context(self) -> dict[str, Buffer | Array]:
        """Hidden states of the current document [1, x, c], and x [1]."""
        bos = self.config.tokens.bos
        ids = self.token_ids
        first = len(ids) - 1 - ids[::-1].index(bos) if bos in ids else 0
        context = self._hidden.tokens(first, len(ids))
        return {
            "context": context.reshaped((1, *context.shape)),
            "context_length": np.array([len(ids) - first], np.int64),
        }

    def _measure(self, stage: str, count: int = 1) -> AbstractContextManager[None]:
        """Time the block as one run of `stage`, up to the completion of the device's work, for
        which nothing waits."""
        return self.timings.measure(stage, count, self.runtime.memory)

    def _earlier_pictures(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Rows of the U-Net's value pool and relative positions, both [1, m], for the picture to be
        drawn."""
        seen = self._unet_values.rows
        images, position = self._visible.of_picture(self.images, seen)
        slots = np.array([self._unet_values.slot(image) for image in images], np.int32)
        return pad_images(slots, position, seen)


def _allocate_rows(graph: Graph, name: str, memory: Memory, rows: int) -> Buffer:
    """Allocate tensor `name` for `rows` rows of one token and logit."""
    tensor = graph[name]
    return memory.allocate(tensor.resolve(b=rows, t=1, w=1, v=1), tensor.dtype)


def check_finite(array: Array, what: str) -> None:
    """Raise `EngineError` for NaN or infinity, which would become arbitrary text or a black
    picture."""
    if not np.isfinite(array).all():
        raise EngineError(
            f"{what} are not finite",
            fix="check the bundle with `mmi verify`; a target of low precision may overflow",
        )
