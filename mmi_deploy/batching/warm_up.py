"""Warm-up: every kind of run once, so that no document waits for it, and its measured time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from mmi_deploy.batching.document_row import DocumentRow
from mmi_deploy.batching.executor import Executor, powers_of_two
from mmi_deploy.batching.image_rows import Key
from mmi_deploy.batching.job_runs import CHUNK
from mmi_deploy.batching.kv_slots import Slot
from mmi_deploy.batching.run_times import RunTimes
from mmi_deploy.documents.images import Rgb
from mmi_deploy.runtime.sequence import TokenSequence

# Runs of each kind and size; the fastest counts, as the first one also allocates.
REPEATS = 3


def warm_up(executor: Executor, times: RunTimes, clock: Callable[[], float]) -> None:
    """Load and run every engine at 1, 2, 4, ... rows, before any document is taken."""
    executor.runtime.load()
    memory, side = executor.runtime.memory, executor.config.vision.image_size

    def measure(kind: str, size: int, run: Callable[[], object]) -> None:
        seconds = []
        for _ in range(REPEATS):
            start = clock()
            run()
            memory.wait()
            seconds.append(clock() - start)
        times.add(kind, size, min(seconds))

    for b in powers_of_two(executor.rows_of_a_run):
        measure("decode", b, partial(executor.run_decode, 0, b, 1, {}))
        measure("vae", b, partial(executor.run_vae, b))
        if b <= executor.images.rows:
            pictures = {bytes([row]): np.zeros((side, side, 3), np.uint8) for row in range(b)}
            measure("encode", b, partial(_encode, executor, pictures))
        if b <= executor.pictures.rows:
            measure("denoise", b, partial(executor.pictures.run, "denoise_step", b, b))
    measure("values", 1, partial(_unet_values, executor))
    _prefill(executor, measure)


def _encode(executor: Executor, pictures: Mapping[Key, Rgb]) -> None:
    executor.encode(pictures)
    executor.images.forget(pictures)


def _unet_values(executor: Executor) -> None:
    executor.unet_values({b"": 1})
    executor.unet_images.forget([b""])


def _prefill(executor: Executor, measure: Callable[[str, int, Callable[[], object]], None]) -> None:
    """Measure pieces of a prompt, in a slot that is filled with zeros afterwards."""
    size, context = CHUNK, executor.limits.context
    while size < context:
        sequence = TokenSequence(executor.config, executor.limits)
        sequence.append_text([executor.config.tokens.bos] * size)
        row = DocumentRow(sequence, "", executor.images, executor.unet_images)
        slot = executor.slots.take("", [], [])
        assert slot is not None, "no document runs yet"

        def run(row: DocumentRow = row, slot: Slot = slot) -> None:
            slot.token_ids.clear()
            row.begin(slot)
            executor.prefill(row, len(row.pending))

        measure("prefill", size, run)
        executor.slots.release(slot, failed=True)
        size *= 4
