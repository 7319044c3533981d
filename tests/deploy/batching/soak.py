"""Real load on a bundle for a given time: `python -m deploy.batching.soak BUNDLE --minutes 20`.

Every document is compared with what `generate` gives alone, a third is cancelled at a random
event, and the process's memory is printed every minute.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from threading import Thread

import numpy as np

from deploy.batching.harness import told
from deploy.batching.test_batch_engine_hostile import anonymous_memory
from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.batching.event_stream import EventStream
from mmi_deploy.documents.document import Document, Draw, Image, Part, Text, document_of
from mmi_deploy.runtime.events import Finished
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime

# Kinds of documents, and threads that submit them.
DOCUMENTS, CLIENTS = 24, 10


def document(rng: random.Random) -> Document:
    """A random document with few pictures, some of which recur."""
    parts: list[Part] = []
    for _ in range(rng.randrange(3)):
        pixels = np.random.default_rng(rng.randrange(8)).integers(0, 256, (64, 64, 3), np.uint8)
        parts += [Image(pixels), Text("the red square moves down.")]
    parts.append(Text(rng.choice(("a blue circle is on the left.", "a green square and"))))
    if rng.random() < 0.5:
        parts.append(Draw())
    return document_of(*parts)


def options(rng: random.Random) -> GenerationOptions:
    return GenerationOptions(
        seed=rng.randrange(100),
        max_tokens=rng.choice((4, 12, 40)),
        max_images=rng.choice((0, 0, 1)),
        guidance=rng.choice((1.0, 3.5)),
        full_every=rng.choice((1, 2)),
        previews=rng.choice((0, 0, 1, 3)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    rng = random.Random(0)
    runtime = Runtime.open(given.bundle, threads=given.threads)
    asked = [(document(rng), options(rng)) for _ in range(DOCUMENTS)]
    alone = [[told(event) for event in generate(runtime, *one)] for one in asked]
    engine = BatchEngine(runtime)
    end = time.monotonic() + 60 * given.minutes
    wrong: list[str] = []
    done = {"compared": 0, "cancelled": 0}

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end and not wrong:
            which = rng.randrange(DOCUMENTS)
            stream = engine.submit(*asked[which], max_seconds=600)
            cancel = rng.random() < 1 / 3
            if problem := read(stream, alone[which], rng.randrange(30) if cancel else None):
                wrong.append(f"document {which}: {problem}")
            done["cancelled" if cancel else "compared"] += 1

    def read(stream: EventStream, wanted: list[tuple], cancel_at: int | None) -> str:
        events = []
        for event in stream:
            events.append(event)
            if len(events) - 1 == cancel_at:
                stream.cancel()
        last = events[-1]
        if isinstance(last, Finished) and last.reason == "cancelled":
            return ""
        return "" if [told(event) for event in events] == wanted else "not what it is alone"

    threads = [Thread(target=client, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(60.0, max(end - time.monotonic(), 1.0)))
        gc.collect()
        memory.append(anonymous_memory())
        print(json.dumps({"MB": round(memory[-1] / 1e6, 1), **done}), flush=True)
    stats = engine.stats()
    engine.close()
    executor = engine._scheduler.executor
    assert not wrong, wrong
    assert not executor.images.in_use and not executor.unet_images.in_use
    assert not any(slot.running for slot in executor.slots.slots)
    print(stats)
    later = memory[len(memory) // 4 :]
    print(f"memory after the first quarter: {min(later) / 1e6:.1f} to {max(later) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
