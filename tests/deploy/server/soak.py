"""Mixed load on a server for a given time: `python -m deploy.server.soak BUNDLE --minutes 30`.

Clients keep every slot and half of the queue busy with texts, questions about pictures, drawings
and stories over all endpoints. Each answer is compared with that of a first pass in which nothing
else ran; a tenth leaves in the middle, some send rubbish. Every 10 seconds the memory of both
processes is noted. Exit code 1 if an answer was lost or wrong, memory grew by more than 5 % after
the first sixth, or a text gap was beyond the stated bound at p99.9.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

from deploy.server.requests import CHAT, COMPLETIONS, IMAGES, RESPONSES, chat, picture
from deploy.server.server_process import ServerProcess

QUEUE = 16

SENTENCES = ("the red square moves down.", "a blue circle is on the left.", "a green ring")


def requests() -> list[tuple[str, dict[str, Any]]]:
    """Kinds of requests, each with a seed of its own."""
    found: list[tuple[str, dict[str, Any]]] = []
    for seed in range(4):
        text = SENTENCES[seed % len(SENTENCES)]
        given = [picture(seed), picture(seed + 4)]
        found += [
            (CHAT, chat(text, tokens=40, seed=seed, ignore_eos=True)),
            (CHAT, chat(*given, text, tokens=16, images=1, seed=seed, stream=True)),
            (COMPLETIONS, {"model": "tiny", "prompt": text, "max_tokens": 24, "seed": seed}),
            (IMAGES, {"prompt": text, "n": 1 + seed % 2, "mmi": {"seed": seed}}),
            (
                RESPONSES,
                {
                    "model": "tiny",
                    "input": text,
                    "stream": bool(seed % 2),
                    "tools": [{"type": "image_generation", "partial_images": seed % 2}],
                    "max_output_tokens": 24,
                    "mmi": {"seed": seed, "max_images": 2},
                },
            ),
        ]
    return found


RUBBISH: tuple[tuple[str, bytes], ...] = (
    (CHAT, b"{"),
    (CHAT, b'{"model": "tiny", "messages": [], "unknown": 1}'),
    (RESPONSES, b'{"model": "other", "input": "a"}'),
    (
        CHAT,
        b'{"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url", '
        b'"image_url": {"url": "data:image/png;base64,AAAA"}}]}]}',
    ),
)


def content(text: str) -> Any:
    """Answer without what differs between two equal requests: ids, times, counts of caches."""
    text = re.sub(r'"(id|item_id)": ?"[^"]*"', "", text)
    pictures = re.findall(r'"(?:b64_json|result|url)": ?"([^"]{200,})"', text)
    words = re.findall(r'"(?:content|text|delta)": ?"((?:[^"\\]|\\.)*)"', text)
    if "text/event-stream" in text or "data: " in text:  # texts come in pieces of any size
        parts = re.findall(r'"(?:delta|content)": ?"((?:[^"\\]|\\.)*)"', text)
        return pictures, "".join(parts)
    return pictures, words


class Soak:
    """State of the load."""

    def __init__(self, server: ServerProcess, seed: int) -> None:
        self.server, self.rng = server, random.Random(seed)
        self.kinds = requests()
        self.expected: list[Any] = []
        self.right = self.wrong = self.lost = self.left = self.refused = self.rubbish = 0
        self.faults: list[str] = []
        self.memory: list[tuple[float, int, int]] = []

    async def reference(self, session: aiohttp.ClientSession) -> None:
        for path, body in self.kinds:
            async with session.post(path, json=body) as response:
                assert response.status == 200, await response.text()
                self.expected.append(content(await response.text()))

    async def client(self, session: aiohttp.ClientSession, end: float) -> None:
        while time.monotonic() < end:
            try:
                await self.one(session)
            except Exception as error:
                self.lost += 1
                self.faults.append(repr(error)[:200])

    async def one(self, session: aiohttp.ClientSession) -> None:
        draw = self.rng.random()
        if draw < 0.03:
            path, rubbish = self.rng.choice(RUBBISH)
            headers = {"content-type": "application/json"}
            async with session.post(path, data=rubbish, headers=headers) as response:
                assert 400 <= response.status < 500, response.status
                self.rubbish += 1
            return
        number = self.rng.randrange(len(self.kinds))
        path, body = self.kinds[number]
        if draw < 0.13:
            try:
                async with asyncio.timeout(self.rng.random()):
                    async with session.post(path, json=body) as response:
                        await response.read()
            except TimeoutError:
                pass
            self.left += 1
            return
        async with session.post(path, json=body) as response:
            text = await response.text()
            if response.status == 429:
                self.refused += 1
                await asyncio.sleep(0.2)
                return
            assert response.status == 200, (response.status, text[:200])
        if content(text) == self.expected[number]:
            self.right += 1
        else:
            self.wrong += 1
            self.faults.append(f"{path} {number}: {text[:300]}")

    async def watch(self, begun: float) -> None:
        while True:
            (engine,) = self.server.engines
            sizes = self.server.memory(), self.server.memory(engine)
            self.memory.append((time.monotonic() - begun, *sizes))
            await asyncio.sleep(10)

    async def run(self, minutes: float, clients: int) -> dict[str, Any]:
        begun = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=300)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            self.server.address, timeout=timeout, connector=connector, read_bufsize=2**24
        ) as session:
            await self.reference(session)
            end = time.monotonic() + 60 * minutes
            watch = asyncio.create_task(self.watch(begun))
            await asyncio.gather(*(self.client(session, end) for _ in range(clients)))
            watch.cancel()
        return self.report(minutes)

    def report(self, minutes: float) -> dict[str, Any]:
        settled = [one for one in self.memory if one[0] >= 10 * minutes]
        growth = [
            max(one[place] for one in settled[-6:]) / max(one[place] for one in settled[:6]) - 1
            for place in (1, 2)
        ]
        metrics = self.server.metrics()
        total = metrics["mmi_text_gap_seconds_count"]
        buckets = sorted(
            (float(name.partition('le="')[2].partition('"')[0]), count)
            for name, count in metrics.items()
            if name.startswith("mmi_text_gap_seconds_bucket") and "+Inf" not in name
        )
        within = next((edge for edge, count in buckets if count >= 0.999 * total), None)
        return {
            "minutes": minutes,
            "right": self.right,
            "wrong": self.wrong,
            "lost": self.lost,
            "left": self.left,
            "refused_429": self.refused,
            "rubbish": self.rubbish,
            "growth_front": round(growth[0], 4),
            "growth_engine": round(growth[1], 4),
            "memory_mb": [[round(t), a >> 20, b >> 20] for t, a, b in self.memory[::30]],
            "text_gaps": total,
            "text_gap_p999_at_most": within,
            "text_gap_bound": metrics['mmi_text_gap_bound_seconds{engine="0"}'],
            "restarts": metrics["mmi_worker_restarts_total"],
            "faults": self.faults[:5],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with ServerProcess(given.bundle, "--queue", QUEUE) as server:
        soak = Soak(server, given.seed)
        report = asyncio.run(soak.run(given.minutes, 8 + QUEUE // 2))
    print(json.dumps(report, indent=2))
    grown = max(report["growth_front"], report["growth_engine"]) > 0.05
    return int(bool(report["wrong"] or report["lost"] or report["restarts"] or grown))


if __name__ == "__main__":
    sys.exit(main())
