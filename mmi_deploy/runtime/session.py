"""One document in the making: everything it has computed so far is kept, and it only ever grows.

Letters: t tokens, m images, n rows of a value pool, c width of the LLM, x tokens of context.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from mmi_deploy.documents.images import Rgb, as_rgb, resize, to_pixels, to_rgb
from mmi_deploy.errors import DocumentError, EngineError
from mmi_deploy.runtime.buffers import Array, Buffer, Memory
from mmi_deploy.runtime.caches import Drawing, HiddenStates, KvCache, ValuePool, padded
from mmi_deploy.runtime.keyed_random import first_latents, step_noise
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.timings import Timings
from mmi_deploy.spec.graphs import DEEP, Graph
from mmi_deploy.spec.token_layout import image_positions, picture_positions

Logits = NDArray[np.float32]


class Session:
    """Appends text and images to one document, gives the next token's logits, draws pictures.

    Tokens wait until something needs them: a prompt of many parts is one run of the LLM.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.config = runtime.config
        self.limits = runtime.limits
        self.timings = Timings()
        self.token_ids: list[int] = []
        unet = self.config.image_decoder.mmfs
        values = runtime.graphs["image_values"]
        memory = runtime.memory
        self._cache = KvCache(runtime.graphs["llm"], memory)
        self._llm_values = ValuePool(
            [values[name] for name in values.names("llm_value")], memory, self.limits.images
        )
        self._unet_values = ValuePool(
            [values[name] for name in values.names("unet_value")],
            memory,
            min(unet.images_seen, self.limits.images),
        )
        llm = runtime.graphs["llm"]
        self._hidden = HiddenStates(llm, memory, self.limits.context)
        # Where a run of one token reads and writes: it stays, so that such runs can be replayed.
        self._one_hidden = _one(llm, "hidden", memory)
        self._logits = _one(llm, "logits", memory)
        self._no_visual = _one(llm, "visual_tokens", memory)
        self._drawing: Drawing | None = None
        self._done = 0  # tokens that the LLM has seen
        self._marks: list[int] = []  # the `<s>` and begin-of-image tokens among them
        # What the next token sees, where the last one read was no such token: nothing has changed.
        self._sight: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None
        self._unencoded: list[Array] = []  # pixels [3, side, side] of the images that wait
        self._unread: list[Buffer] = []  # visual tokens of those that were encoded since

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.limits.context - len(self.token_ids)

    @property
    def images(self) -> int:
        """Images in the document, given and drawn."""
        return self._llm_values.images + len(self._unencoded)

    @property
    def image_open(self) -> bool:
        """Whether the document ends with a begin-of-image token, so that an image comes next."""
        return bool(self.token_ids) and self.token_ids[-1] == self.config.tokens.boi

    def append_text(self, token_ids: Sequence[int]) -> None:
        """Append tokens: text, `<s>`, or the begin-of-image token of a picture to be drawn.

        Raises `DocumentError` when they do not fit, or are not followed as they must be.
        """
        tokens = self.config.tokens
        ids = [int(token) for token in token_ids]
        if tokens.image in ids:
            raise DocumentError("image tokens come from images alone", fix="use append_image")
        if ids and (self.image_open or tokens.boi in ids[:-1]):
            raise DocumentError("an image must follow its begin-of-image token")
        self._append(ids)

    def append_image(self, rgb: Rgb) -> None:
        """Append an image, uint8 [h, w, 3] of any size: its begin-of-image token unless the
        document ends with one, and its visual tokens. It is encoded once, when it is first needed.

        Raises `DocumentError` when there is no room for it, or it is no picture.
        """
        rgb = as_rgb(rgb)
        tokens, count = self.config.tokens, self.config.visual_tokens
        ids = [tokens.image] * count if self.image_open else [tokens.boi] + [tokens.image] * count
        if self.images == self.limits.images:
            raise DocumentError(
                "the document has too many images", expected=f"at most {self.limits.images}"
            )
        self._append(ids)
        side = self.config.vision.image_size
        self._unencoded.append(
            to_pixels(rgb if rgb.shape == (side, side, 3) else resize(rgb, side))
        )

    def _append(self, ids: list[int]) -> None:
        if len(ids) > self.room:
            raise DocumentError(
                "the document is too long",
                expected=f"at most {self.limits.context} tokens",
                got=len(self.token_ids) + len(ids),
                fix="shorten it, or export the bundle with a larger --context",
            )
        self.token_ids += ids

    def _encode_waiting(self) -> None:
        """Values into the pools and visual tokens [n, visual_tokens, c] of the images that wait, as
        many at a time as the graphs take and as lie side by side in the pools."""
        pools = (self._llm_values, self._unet_values)
        while self._unencoded:
            count = min(self.limits.batch, len(self._unencoded), *(pool.run for pool in pools))
            pixels = np.stack(self._unencoded[:count])
            with self._measure("encode", count):
                seen = self.runtime.engine("vision_encoder").run({"pixels": pixels})
                rows = {**self._llm_values.add(count), **self._unet_values.add(count)}
                self.runtime.engine("image_values").run({"features": seen["features"]}, rows)
            del self._unencoded[:count]
            self._unread.append(seen["visual_tokens"])

    def next_logits(self) -> Logits:
        """Logits [vocab] of the token that follows. Valid until the document grows."""
        if not self.token_ids:
            raise DocumentError("an empty document has no next token", fix="begin with `<s>`")
        self._read_waiting()
        logits: Logits = self._logits.read()[0, 0]
        check_finite(logits, f"the logits after {len(self.token_ids)} tokens")
        return logits

    def _read_waiting(self) -> None:
        """Run the LLM over the tokens that wait: one run, whatever they are."""
        ids = self.token_ids[self._done :]
        if not ids:
            return
        self._encode_waiting()
        first, last, count = self._done, len(self.token_ids), len(ids)
        tokens, engine = self.config.tokens, self.runtime.engine("llm")
        visual_tokens, visual_index = self._visual(ids)
        slot, position = self._visible_images(ids)
        inputs: dict[str, Buffer | Array] = {
            "token_ids": np.array([ids], np.int64),
            "visual_tokens": visual_tokens,
            "visual_index": visual_index,
            "position": np.arange(first, last, dtype=np.int64)[None],
            "write_index": np.array([first], np.int64),
            "start": np.zeros(1, np.int64),
            "logit_index": np.array([[count - 1]], np.int64),
            "image_slot": slot,
            "image_position": position,
            **self._llm_values.buffers(),
            **self._cache.buffers,
        }
        outputs = {"logits": self._logits}
        if count == 1:
            outputs["hidden"] = self._one_hidden
        with self._measure("prefill" if count > 1 else "decode", count):
            hidden = engine.run(inputs, outputs)["hidden"]  # [1, t, c]
            self._hidden.write(first, hidden.reshaped(hidden.shape[1:]))
        self._done = last
        self._marks += [token for token in ids if token in (tokens.bos, tokens.boi)]
        self._sight = None if ids[-1] in (tokens.bos, tokens.boi) else (slot, position[:, -1:])
        self._unread.clear()

    def _visual(self, ids: list[int]) -> tuple[Buffer, NDArray[np.int64]]:
        """Visual tokens of the waiting images [v, c], and which of them each token is [1, t]."""
        is_image = np.array([ids]) == self.config.tokens.image
        index = np.where(is_image, is_image.cumsum() - 1, -1)
        images = sum(tokens.shape[0] for tokens in self._unread)
        if not images:
            return self._no_visual, index
        memory, (count, width) = self.runtime.memory, self._unread[0].shape[1:]
        joined = memory.allocate((images, count, width), self._unread[0].dtype)
        first = 0
        for tokens in self._unread:
            memory.copy(tokens, joined.rows(first, first + tokens.shape[0]))
            first += tokens.shape[0]
        return joined.reshaped((images * count, width)), index

    def _visible_images(self, ids: list[int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Rows of the pool [1, m] and relative positions [1, t, m] for the waiting tokens.

        Only where documents and images begin matters, so earlier tokens are left out except these:
        what is found for the new ones is the same as over the whole row.
        """
        tokens, seen = self.config.tokens, self.config.llm_mmfs.images_seen
        if self._sight is not None and tokens.bos not in ids and tokens.boi not in ids:
            slot, position = self._sight
            return slot, position.repeat(len(ids), axis=1)
        row = np.array([self._marks + ids])
        begun = int((row == tokens.boi).sum())
        position = image_positions(row, tokens, begun, seen)[:, len(self._marks) :]
        images = np.flatnonzero(position.any(axis=(0, 1)))
        slots = [self._llm_values.slot(int(image)) for image in images]
        return pad_images(np.array(slots, np.int32), position[:, :, images], self.limits.images)

    def draw(
        self,
        schedule: str | None = None,
        guidance: float = 1.0,
        seed: int = 0,
        full_every: int = 1,
        on_step: Callable[[int, int], None] = lambda step, of: None,
    ) -> Rgb:
        """Draw the picture that the document's last token begins, and append it.

        schedule: which sampler, as in `Runtime.schedule`. guidance: 1 is none. full_every: of how
        many steps one runs the whole U-Net; the others use its deep features again, which is an
        approximation. on_step(step, of) is called after each step, `step` from 1. Returns uint8
        [h, w, 3].
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
        self, schedule: str | None, guidance: float, seed: int, full_every: int = 1
    ) -> Generator[tuple[int, int], None, Rgb]:
        """`draw` in steps: yields (step, of) after each and returns the picture, not appended.

        The same document and seed give the same picture; nothing is appended, so abandoning it
        leaves the document as it was. A session draws one picture at a time.
        """
        if not self.image_open:
            raise DocumentError(
                "a picture can only be drawn after a begin-of-image token", fix="append it first"
            )
        bound = self.runtime.schedule(schedule)
        self._read_waiting()
        picture = self.images
        drawing = self._place_to_draw()
        with self._measure("condition"):
            self.runtime.engine("image_condition").run(self._context(), drawing.condition)
        slot, position = self._earlier_pictures()
        shape = drawing.still.shape
        drawing.begin(first_latents(seed, picture, shape) * bound.schedule.initial_sigma)
        full = self.runtime.engine("denoise_step")
        shallow = self.runtime.engine("denoise_shallow") if full_every > 1 else full
        constant: dict[str, Buffer | Array] = {
            "guidance": np.array(guidance, np.float32),
            "coefficients": bound.coefficients,
            "time_table": bound.time_table,
            "image_slot": slot,
            "image_position": position,
            DEEP: drawing.deep,
            **drawing.condition,
            **self._unet_values.buffers(),
        }
        steps = bound.schedule.steps
        for step in range(steps):
            with self._measure("denoise"):
                noisy = bound.schedule.draws_noise(step)
                noise = step_noise(seed, picture, step, shape) if noisy else drawing.still
                given = {**constant, **drawing.state, "noise": noise}
                given["step"] = np.array(step, np.int64)
                engine = full if step % full_every == 0 else shallow
                inputs = {tensor.name: given[tensor.name] for tensor in engine.graph.inputs}
                engine.run(inputs, {**drawing.next_state, DEEP: drawing.deep})
                drawing.swap()
            yield step + 1, steps
        with self._measure("vae"):
            decoded = self.runtime.engine("vae_decoder").run({"latents": drawing.state["latents"]})
            pixels = decoded["pixels"].read()[0]
        check_finite(pixels, f"the pixels of picture {picture}")
        return to_rgb(pixels)

    def _place_to_draw(self) -> Drawing:
        graphs = self.runtime.graphs
        if self._drawing is None:
            self._drawing = Drawing(
                graphs["denoise_step"], graphs["image_condition"], self.runtime.memory
            )
        return self._drawing

    def _context(self) -> dict[str, Buffer | Array]:
        """Hidden states from the last token backwards to its `<s>`: [1, x, c], and x."""
        bos = self.config.tokens.bos
        ids = self.token_ids
        first = len(ids) - 1 - ids[::-1].index(bos) if bos in ids else 0
        context = self._hidden.backwards(first, len(ids))
        return {
            "context": context.reshaped((1, *context.shape)),
            "context_length": np.array([len(ids) - first], np.int64),
        }

    @contextmanager
    def _measure(self, stage: str, count: int = 1) -> Iterator[None]:
        """Time the block as a run of `stage`, until the device has done what the block asks for."""
        with self.timings.measure(stage, count):
            yield
            self.runtime.memory.wait()

    def _earlier_pictures(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Rows of the U-Net's pool and relative positions, both [1, m], for the open picture."""
        row, seen = np.array([self._marks]), self._unet_values.rows
        position = picture_positions(row, self.config.tokens, self.images + 1, seen)[:, -1]
        images = np.flatnonzero(position[0])
        slots = np.array([self._unet_values.slot(int(image)) for image in images], np.int32)
        return pad_images(slots, position[:, images], seen)


def _one(graph: Graph, name: str, memory: Memory) -> Buffer:
    """A place for tensor `name` of one row, token and logit."""
    tensor = graph[name]
    return memory.allocate(tensor.resolve(b=1, t=1, w=1, v=1), tensor.dtype)


def check_finite(array: Array, what: str) -> None:
    """Raise `EngineError` for NaN or infinity: they must not pass for a text or a black picture."""
    if not np.isfinite(array).all():
        raise EngineError(
            f"{what} are not finite",
            fix="check the bundle with `mmi verify`; a target of low precision may overflow",
        )


def pad_images(
    slot: NDArray[np.int32], position: NDArray[np.int32], most: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Slots [m] and positions [1, ..., m] with m padded by hidden images, so that few m occur."""
    missing = padded(len(slot), most) - len(slot)
    before = [(0, 0)] * (position.ndim - 1)
    return np.pad(slot, (0, missing))[None], np.pad(position, [*before, (0, missing)])
