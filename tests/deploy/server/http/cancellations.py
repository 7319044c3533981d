"""Cancel requests at random points, then compare later answers with the reference.

    python -m deploy.server.http.cancellations BUNDLE [--count 10000] [--after 100]

with the repository and its folder `tests` in PYTHONPATH. Prints a line; exit code 1 if an answer
is wrong.
"""

from __future__ import annotations

import argparse
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from deploy.server.reference import alone, pictures_of, text_of
from deploy.server.requests import CHAT, IMAGES, RESPONSES, chat, picture, rgb_of_url
from deploy.server.server_process import ServerProcess, wait_until
from mmi_deploy.documents.document import Document, Draw, Image, Text

WORDS = "the red square moves down."


def _request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A request of any endpoint that would take long."""
    stream, seed = rng.random() < 0.7, rng.randrange(1000)
    path = rng.choice((CHAT, CHAT, CHAT, RESPONSES, IMAGES))
    mmi: dict[str, Any] = {"seed": seed}
    if path == CHAT:
        given = (picture(rng.randrange(3)),) if rng.random() < 0.5 else ()
        mmi = {"turn_tokens": rng.choice((1, 30))}
        return path, chat(*given, WORDS, tokens=60, images=8, seed=seed, mmi=mmi, stream=stream)
    if path == RESPONSES:
        tools = [{"type": "image_generation"}]
        return path, {"model": "tiny", "input": WORDS, "tools": tools, "mmi": mmi, "stream": stream}
    return path, {"prompt": WORDS, "n": rng.choice((1, 3)), "mmi": mmi, "stream": stream}


def cancel_at_random(server: ServerProcess, count: int, seed: int, clients: int = 8) -> None:
    """Send `count` requests and leave each after a random time, or a random number of bytes."""

    def one(number: int) -> None:
        rng = random.Random(f"{seed}-{number}")
        path, body = _request(rng)
        seconds = rng.choice((0.001, 0.01, 0.05, 0.2)) * rng.uniform(0.5, 2)
        try:
            with httpx.Client(base_url=server.address, timeout=seconds, trust_env=False) as client:
                with client.stream("POST", path, json=body) as response:
                    end = time.monotonic() + seconds
                    for _ in response.iter_raw():
                        if time.monotonic() > end:
                            return
        except httpx.HTTPError:
            pass

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(one, range(count)))


def check_after(server: ServerProcess, bundle: Path, count: int) -> None:
    """Compare `count` answers with those of `generate`. Raises `AssertionError`."""
    wait_until(lambda: not server.get("/health").json()["documents"], 10)
    for seed in range(count):
        given = picture(seed % 3)
        body = chat(given, WORDS, None, tokens=8, images=1, seed=seed)
        message = server.post(CHAT, body).json()["choices"][0]["message"]
        document = Document((Image(given), Text(WORDS), Draw()))
        parts, _ = alone(bundle, document, seed=seed, max_tokens=8, max_images=1)
        assert message["content"] == text_of(parts)
        pictures = [rgb_of_url(image["image_url"]["url"]) for image in message["images"]]
        for found, wanted in zip(pictures, pictures_of(parts), strict=True):
            np.testing.assert_array_equal(found, wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--after", type=int, default=100)
    told = parser.parse_args()
    with ServerProcess(told.bundle, "--slots", 4) as server:
        begun, engine = time.monotonic(), server.engines
        cancel_at_random(server, told.count, seed=0)
        try:
            check_after(server, told.bundle, told.after)
            assert server.engines == engine, "the engine process is another one"
        except AssertionError as error:
            print(f"wrong after {told.count} cancellations: {error}")
            return 1
        seconds = time.monotonic() - begun
        print(f"{told.count} cancellations, {told.after} equal answers after them; {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
