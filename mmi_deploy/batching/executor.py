"""Runs of the engines over rows of many documents.

Every run waits for its end, as the scheduler measures it. One that raises leaves all documents as
they were, so that it can be repeated for some of them.

Letters: b batch, t tokens, n encoded images, m image slots, c channels, v visual tokens,
u vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.batching.document_row import DocumentRow
from mmi_deploy.batching.image_rows import ImageRows, Key
from mmi_deploy.batching.kv_slots import KvSlots, Slot
from mmi_deploy.documents.images import Rgb, to_pixels
from mmi_deploy.runtime.buffers import Array, Buffer
from mmi_deploy.runtime.decode_step import DecodeStep
from mmi_deploy.runtime.picture_rows import PictureRows
from mmi_deploy.runtime.prefill import prefill_inputs
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.session import Logits
from mmi_deploy.runtime.visible_images import pad_images
from mmi_deploy.runtime.work import Denoise, Picture

# Slot and position of the image of a row that sees none.
_NO_IMAGES = (np.zeros(1, np.int32), np.zeros(1, np.int32))


class Executor:
    """Slots, pools and picture rows of a service, and the runs on them. Not thread-safe."""

    def __init__(self, runtime: Runtime, slots: int, images: int) -> None:
        """slots: documents at once. images: images to keep encoded."""
        self.runtime = runtime
        self.config, self.limits = runtime.config, runtime.limits
        graphs, memory = runtime.graphs, runtime.memory
        host = memory.device == "cpu"
        # Row counts of a run. A device replays recordings of few shapes; the host pays per row.
        most = min(self.limits.batch, slots)
        self.row_counts = tuple(range(1, most + 1)) if host else powers_of_two(most)
        self.slots = KvSlots(runtime, slots, exact=host)
        encoder = graphs["vision_encoder"]
        kept = [*graphs["llm_values"].outputs, encoder["visual_tokens"], encoder["features"]]
        self.images = ImageRows(kept, memory, images)
        self._values = [tensor.name for tensor in graphs["llm_values"].outputs]
        self.seen = graphs["denoise_step"].ranges["m"].max
        # One row of the pool's range stays zero.
        drawn = min(most, max((self.limits.pool - 1) // self.seen, 1))
        self.unet_images = ImageRows(
            graphs["unet_values"].outputs, memory, min(drawn * self.seen, self.limits.pool - 1)
        )
        self.pictures = PictureRows(runtime, drawn, self.unet_images.buffers)

        llm = graphs["llm"]

        def allocate(name: str, **sizes: int) -> Buffer:
            tensor = llm[name]
            return memory.allocate(tensor.resolve(**sizes), tensor.dtype)

        self._hidden = allocate("hidden", b=most, t=1)
        self._logits = allocate("logits", b=most, w=1)
        self._visual_tokens = allocate("visual_tokens", v=self.limits.context)
        latents = graphs["vae_decoder"]["latents"]
        self._latents = memory.allocate(latents.resolve(b=most), latents.dtype)
        self._decode_steps: dict[tuple[int, int, int], DecodeStep] = {}

    @property
    def rows_of_a_run(self) -> int:
        """Most rows of one run."""
        return self.row_counts[-1]

    def padded(self, rows: int) -> int:
        """Number of rows that a run of `rows` documents has."""
        return next(count for count in self.row_counts if count >= rows)

    def encode(self, pictures: Mapping[Key, Rgb]) -> None:
        """Encode those of `pictures` that are not in the pool, at most `rows_of_a_run`, into rows
        that nobody holds."""
        pictures = {key: rgb for key, rgb in pictures.items() if key not in self.images}
        if not pictures:  # done by a run that failed for another picture
            return
        pixels = np.stack([to_pixels(rgb) for rgb in pictures.values()])
        missing = self.padded(len(pixels)) - len(pixels)
        pixels = np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0)))
        encoded = self.runtime.engine("vision_encoder").run({"pixels": pixels})
        for index, key in enumerate(pictures):
            with _new_row(self.images, key) as row:
                for name, rows in encoded.items():
                    kept = self.images.buffers[name].rows(row, row + 1)
                    self.runtime.memory.copy(rows.rows(index, index + 1), kept)
                self._run_values("llm_values", row, self.images, row)
        self.runtime.memory.wait()

    def unet_values(self, images: Mapping[Key, int]) -> None:
        """Compute the U-Net's values of those of `images` that have none: key -> row of the pool of
        encoded images."""
        for key, image in images.items():
            if key in self.unet_images:  # as above
                continue
            with _new_row(self.unet_images, key) as row:
                self._run_values("unet_values", image, self.unet_images, row)
        self.runtime.memory.wait()

    def _run_values(self, name: str, image: int, pool: ImageRows, row: int) -> None:
        """Run the graph `name` for one encoded image, into its row of `pool`. Images one by one: a
        batch gains nothing, and would have to be copied into the rows."""
        outputs = [tensor.name for tensor in self.runtime.graphs[name].outputs]
        self.runtime.engine(name).run(
            {"features": self.images.buffers["features"].rows(image, image + 1)},
            {output: pool.buffers[output].rows(row, row + 1) for output in outputs},
        )

    def prefill(self, row: DocumentRow, count: int) -> Logits:
        """Run the LLM over the next `count` tokens of a document; returns the logits [u] after
        them. A view: valid until the next run."""
        assert row.slot is not None, "only a document with a slot runs"
        first = row.processed
        ids = row.sequence.token_ids[first : first + count]
        slot, position = row.visible.of_tokens(ids, row.image_row)
        index, pieces = row.visual_rows(count)
        copy, filled = self.runtime.memory.copy, 0
        pool = self.images.buffers["visual_tokens"]  # [n, v, c]
        for image, begin, end in pieces:
            source = pool.rows(image, image + 1).reshaped(pool.shape[1:]).rows(begin, end)
            copy(source, self._visual_tokens.rows(filled, filled + end - begin))
            filled += end - begin
        logits = self._logits.rows(0, 1)
        inputs: dict[str, Buffer | Array] = {
            **prefill_inputs(ids, first, index, slot, position),
            "visual_tokens": self._visual_tokens.rows(0, max(filled, 1)),
            **{name: self.images.buffers[name] for name in self._values},
            **self.slots.cache(row.slot.index, row.slot.index + 1),
        }
        outputs = self.runtime.engine("llm").run(inputs, {"logits": logits})
        hidden = outputs["hidden"]
        self.slots.write_hidden(row.slot, first, hidden.reshaped(hidden.shape[1:]))
        result: Logits = logits.read()[0, 0]  # waits for the run, which may raise
        row.visible.add(ids, slot, position)
        row.add(ids)
        return result

    def decode(self, rows: Sequence[DocumentRow]) -> list[Logits]:
        """Run the LLM over the next token of each document, at most `rows_of_a_run`; returns the
        logits [u] after each. Views: valid until the next run."""
        slots = [_slot(row) for row in rows]
        first, last = self.slots.window(slots, self.rows_of_a_run)
        b = self.padded(last - first)
        first = min(first, len(self.slots.slots) - b)
        seen = {}
        for row, slot in zip(rows, slots, strict=True):
            token = row.sequence.token_ids[row.processed]
            seen[slot.index] = token, *row.visible.of_tokens([token], row.image_row)
        m = max(slot.shape[1] for _, slot, _ in seen.values())
        self.run_decode(first, b, m, seen)
        logits = self._logits.rows(0, b).read()
        indices = [slot.index - first for slot in slots]
        hidden = self._hidden.rows(0, b)
        self.slots.write_each_hidden(slots, hidden.reshaped((b, hidden.shape[2])), indices)
        for row, slot in zip(rows, slots, strict=True):
            token, image_slot, position = seen[slot.index]
            row.visible.add([token], image_slot, position)
            row.add([token])
        return [logits[index, 0] for index in indices]

    def run_decode(
        self,
        first: int,
        b: int,
        m: int,
        seen: Mapping[int, tuple[int, NDArray[np.int32], NDArray[np.int32]]],
    ) -> None:
        """Decode in the slots from `first` on. seen: index of a slot -> its token, and the image
        slots [1, m] and positions [1, 1, m] that it sees; the others are idle."""
        step = self._decode_step(first, b, m)
        for index in range(b):
            slot = self.slots.slots[first + index]
            place = len(slot.token_ids)
            if slot.index in seen:
                token, image_slot, position = seen[slot.index]
                step.set(index, token, place, image_slot[0], position[0, 0])
            else:
                # An idle row writes behind its tokens, where its next token will go.
                step.set(index, 0, place, *_NO_IMAGES)
        step.run()

    def _decode_step(self, first: int, b: int, m: int) -> DecodeStep:
        """Decode step of the slots from `first` on."""
        key = (first, b, m)
        if key not in self._decode_steps:
            fixed = {
                "visual_tokens": self._visual_tokens.rows(0, 1),
                **{name: self.images.buffers[name] for name in self._values},
                **self.slots.cache(first, first + b),
            }
            outputs = {"logits": self._logits.rows(0, b), "hidden": self._hidden.rows(0, b)}
            self._decode_steps[key] = DecodeStep(self.runtime.engine("llm"), b, m, fixed, outputs)
        return self._decode_steps[key]

    def condition(self, row: DocumentRow, picture: Picture, at: int) -> None:
        """Compute what stays the same over the steps of `picture` into row `at` of the pictures,
        and its first latents. The document holds the U-Net's values of the images that it sees."""
        ids, bos = row.sequence.token_ids, self.config.tokens.bos
        first = len(ids) - 1 - ids[::-1].index(bos) if bos in ids else 0
        context = self.slots.hidden(_slot(row), first, len(ids))
        self.runtime.engine("image_condition").run(
            {
                "context": context.reshaped((1, *context.shape)),
                "context_length": np.array([len(ids) - first], np.int64),
            },
            self.pictures.condition(at),
        )
        images, position = row.visible.of_picture(picture.index, self.seen)
        slots = [row.unet_images.row(row.keys[image]) for image in images]
        slot, position = pad_images(np.array(slots, np.int32), position, self.seen)
        self.pictures.begin(at, picture, slot[0], position[0])
        self.runtime.memory.wait()

    def denoise(self, steps: Sequence[Denoise]) -> None:
        """Run a denoising step of the pictures in the first rows, one of `steps` each."""
        self.pictures.denoise(steps, min(self.padded(len(steps)), self.pictures.rows))
        self.runtime.memory.wait()

    def decode_latents(self, rows: Sequence[int]) -> list[NDArray[np.float32]]:
        """Pixels [3, height, width] in [0, 1] of the pictures in `rows`."""
        for index, row in enumerate(rows):
            self.runtime.memory.copy(
                self.pictures.latents(row), self._latents.rows(index, index + 1)
            )
        return list(self.run_vae(len(rows))[: len(rows)])

    def run_vae(self, b: int) -> NDArray[np.float32]:
        """Pixels of the first `b` latents that were gathered, padded to the rows of a run."""
        latents = self._latents.rows(0, self.padded(b))
        decoded = self.runtime.engine("vae_decoder").run({"latents": latents})
        pixels: NDArray[np.float32] = decoded["pixels"].read()
        return pixels


@contextmanager
def _new_row(pool: ImageRows, key: Key) -> Iterator[int]:
    """Row of `pool` to write an image to, which nobody holds afterwards; dropped if the block
    raises."""
    row = pool.add(key)
    try:
        yield row
    except Exception:
        pool.release(key)
        pool.forget([key])
        raise
    pool.release(key)


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... below `most`, and `most`."""
    sizes = [1]
    while sizes[-1] * 2 < most:
        sizes.append(sizes[-1] * 2)
    return (*sizes, most) if most > 1 else (1,)


def _slot(row: DocumentRow) -> Slot:
    assert row.slot is not None, "only a document with a slot runs"
    return row.slot
