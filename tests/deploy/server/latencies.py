"""Latencies that the server itself adds: `python -m deploy.server.latencies BUNDLE`.

Overhead: the same documents in turn through a batch engine in this process and through `mmi serve`,
whose engine has the same number of threads; one stream for latency, eight for throughput.
Responsiveness: `/health/live` while eight pictures are drawn, and refusals of a full queue. Needs
an otherwise idle machine with two cores or more.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

from deploy.server.requests import CHAT, IMAGES, TEXT, chat
from deploy.server.server_process import ServerProcess
from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.documents.document import Document, Text
from mmi_deploy.runtime.options import GenerationOptions

STREAMS, TOKENS, ROUNDS = 8, 200, 7

# Seconds from the request to the first text, and to the end.
Times = tuple[float, float]
Generate = Callable[[int], Times]


def in_process(engine: BatchEngine, seed: int) -> Times:
    """Generate with an engine of this process."""
    begun = time.perf_counter()
    options = GenerationOptions(
        seed=seed, max_tokens=TOKENS, min_tokens=TOKENS, max_images=0, temperature=1.0
    )
    first = 0.0
    for _ in engine.submit(Document((Text(TEXT),)), options):
        first = first or time.perf_counter() - begun
    return first, time.perf_counter() - begun


class Client:
    """Client with one connection, which reads as little as it can."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc)

    def post(self, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        headers = {"content-type": "application/json"}
        self._connection.request("POST", path, json.dumps(body), headers)
        return self._connection.getresponse()

    def generate(self, seed: int) -> Times:
        """Generate with the server, as a stream."""
        begun = time.perf_counter()
        body = chat(TEXT, tokens=TOKENS, seed=seed, ignore_eos=True, stream=True, temperature=1.0)
        with self.post(CHAT, body) as reply:
            assert reply.status == 200, reply.read()
            first = 0.0
            for line in reply:
                if not first and b'"content":"' in line:
                    first = time.perf_counter() - begun
        return first, time.perf_counter() - begun

    def get(self, path: str) -> float:
        """Seconds of a GET."""
        begun = time.perf_counter()
        self._connection.request("GET", path)
        with self._connection.getresponse() as reply:
            reply.read()
        return time.perf_counter() - begun


def tokens_per_second(generate: Sequence[Generate], seed: int) -> float:
    """Tokens of all streams in a second, each a document."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(len(generate)) as pool:
        list(pool.map(lambda one: one(seed), generate))
    return len(generate) * TOKENS / (time.perf_counter() - begun)


def spread(values: Sequence[float], unit: str, factor: float = 1.0) -> str:
    quarters = statistics.quantiles(values, n=4)
    middle, low, high = (factor * value for value in (quarters[1], quarters[0], quarters[2]))
    return f"{middle:.1f} {unit} (quartiles {low:.1f} to {high:.1f})"


def overhead(bundle: Path, threads: int) -> None:
    """Print what the server adds to an engine."""
    with (
        BatchEngine.open(bundle, slots=STREAMS, threads=threads) as engine,
        ServerProcess(bundle, "--slots", STREAMS, "--threads", threads) as server,
    ):
        clients = [Client(server.address) for _ in range(STREAMS)]
        direct = partial(in_process, engine)
        ways: dict[str, list[Generate]] = {
            "in process": [direct] * STREAMS,
            "server": [client.generate for client in clients],
        }
        for generate in ways.values():  # warm
            tokens_per_second(generate, 0)
        firsts: dict[str, list[float]] = {way: [] for way in ways}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for seed in range(1, 1 + ROUNDS):
            for way, generate in ways.items():
                for number in range(20):
                    firsts[way].append(generate[0](100 * seed + number)[0])
                rates[way].append(tokens_per_second(generate, seed))
        print(f"engine with {threads} thread(s)")
        for way in ways:
            print(f"  first text, one stream, {way}: {spread(firsts[way], 'ms', 1e3)}")
        added = statistics.median(firsts["server"]) - statistics.median(firsts["in process"])
        print(f"  added: {1e3 * added:.1f} ms")
        for way in ways:
            print(f"  {STREAMS} streams, {way}: {spread(rates[way], 'tokens/s')}")
        share = 1 - statistics.median(rates["server"]) / statistics.median(rates["in process"])
        print(f"  lost: {share:.1%}")


@contextmanager
def drawing(url: str, count: int) -> Iterator[None]:
    """Keep a number of pictures in the drawing."""
    stop = Event()

    def draw(seed: int) -> None:
        client = Client(url)
        while not stop.is_set():
            with client.post(IMAGES, {"prompt": TEXT, "mmi": {"seed": seed}}) as reply:
                reply.read()

    threads = [Thread(target=draw, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(2)
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def responsiveness(bundle: Path) -> None:
    """Print how long probes and refusals take."""
    with ServerProcess(bundle, "--slots", 8) as server, drawing(server.address, 8):
        client, seconds = Client(server.address), []
        for _ in range(2000):
            seconds.append(client.get("/health/live"))
            time.sleep(0.005)
        print(f"/health/live while 8 pictures are drawn: {percentiles(seconds)}")
    with ServerProcess(bundle, "--slots", 1, "--queue", 1) as server, drawing(server.address, 6):
        client, seconds = Client(server.address), []
        while len(seconds) < 500:
            begun = time.perf_counter()
            with client.post(CHAT, chat(TEXT, tokens=1)) as reply:
                reply.read()
                if reply.status == 429:
                    seconds.append(time.perf_counter() - begun)
            time.sleep(0.005)
        print(f"429 of a full queue: {percentiles(seconds)}")


def percentiles(seconds: Sequence[float]) -> str:
    cuts = statistics.quantiles(seconds, n=100)
    return (
        f"p50 {1e3 * cuts[49]:.1f}, p99 {1e3 * cuts[98]:.1f}, "
        f"greatest {1e3 * max(seconds):.1f} ms of {len(seconds)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    for threads in arguments.threads:
        overhead(arguments.bundle, threads)
    responsiveness(arguments.bundle)


if __name__ == "__main__":
    main()
