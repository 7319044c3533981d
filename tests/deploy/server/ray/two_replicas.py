"""Check of `mmi serve --engine ray`: two replicas, one killed under load: `make ray-check`.

Every answer is compared with `generate`: text, pictures, and counts.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image

from mmi_deploy import Draw, GenerationOptions, Runtime, Text, document_of, generate
from mmi_deploy.runtime.events import Finished, ImageDone, TextDelta

# Text, hashable pictures, text tokens, pictures.
Answer = tuple[str, tuple[bytes, ...]]

CASES = [
    ("the red square moves down.", False, {"seed": 7, "max_images": 1}),
    ("a blue circle is on the left.", False, {"seed": 1, "max_images": 0}),
    ("a red square.", True, {"seed": 2, "max_images": 0}),
    ("what is on the left?", False, {"seed": 3, "max_images": 0}),
]


def reference(runtime: Runtime, text: str, draw: bool, options: dict[str, Any]) -> Answer:
    document = document_of(Text(text), *([Draw()] if draw else []))
    written, pictures = "", []
    chosen = GenerationOptions(**options, max_tokens=24, temperature=1.0, top_p=1.0)
    for event in generate(runtime, document, chosen):
        match event:
            case TextDelta():
                written += event.text
            case ImageDone():
                pictures.append(event.rgb.tobytes())
            case Finished():
                return written, tuple(pictures)
    raise AssertionError


def body(text: str, draw: bool, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    own = {key: value for key, value in options.items() if key != "seed"}
    return {
        "model": "ray",
        "messages": [{"role": "user", "content": parts + [{"type": "mmi.draw"}] * draw}],
        "modalities": ["text", "image"],
        "seed": options["seed"],
        "max_completion_tokens": 24,
        "temperature": 1.0,
        "top_p": 1.0,
        "mmi": own,
        **more,
    }


class Front:
    """The server of this check."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, url: str) -> None:
        self.process, self._log, self.url = process, log, url
        self.client = httpx.Client(base_url=url, timeout=120)

    def answer(self, *case: Any) -> Answer:
        """Answer to a case, not streamed. Raises `httpx.HTTPStatusError`."""
        reply = self.client.post("/v1/chat/completions", json=body(*case))
        reply.raise_for_status()
        message = reply.json()["choices"][0]["message"]
        pictures = [picture["image_url"]["url"] for picture in message.get("images") or []]
        return message["content"] or "", tuple(pixels(url) for url in pictures)

    def lines(self, *case: Any, **more: Any) -> Iterator[dict[str, Any]]:
        """Events of a stream."""
        sent = body(*case, stream=True, **more)
        with self.client.stream("POST", "/v1/chat/completions", json=sent) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line[6:])

    def replicas(self) -> list[int]:
        """Process ids of the replicas: Ray names them so."""
        found = []
        for path in Path("/proc").iterdir():
            if path.name.isdigit():
                try:
                    command = (path / "cmdline").read_bytes()
                    session = os.getsid(int(path.name))
                except OSError:
                    continue
                if command.startswith(b"ray::ServeReplica:mmi:") and session == self.session:
                    found.append(int(path.name))
        return found

    @property
    def session(self) -> int:
        """Session of the server and of all that it started."""
        return os.getsid(self.process.pid)

    def gauge(self, name: str) -> float:
        """Sum of a metric."""
        text = self.client.get("/metrics").text
        return sum(
            float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.M)
        )

    def ready(self) -> bool:
        try:
            return self.client.get("/health/ready").status_code == 200
        except httpx.TransportError:
            assert self.process.poll() is None, self._log.read_text()[-3000:]
            return False


def pixels(url: str) -> bytes:
    with PIL.Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB")).tobytes()


@contextmanager
def running(bundle: Path, log: Path) -> Iterator[Front]:
    """Start the server in a session of its own; at the end none of its processes may be left."""
    options = "--name ray --port 0 --engine ray --replicas 2 --slots 2 --threads 1 --exit-on-crash"
    words = options.split()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mmi_deploy", "serve", str(bundle), *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    session = os.getsid(process.pid)
    try:
        address = ""

        def told() -> bool:
            nonlocal address
            assert process.poll() is None, log.read_text()[-3000:]
            found = re.search(r"Serving \S+ at (http\S+)", log.read_text())
            address = found[1] if found else ""
            return bool(found)

        wait_until(told, 240, "the server is ready")
        yield Front(process, log, address)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0, f"exit code {process.returncode}"
        wait_until(lambda: not in_session(session), 20, "all processes have ended")
    finally:
        for number in in_session(session):
            os.kill(number, signal.SIGKILL)


def in_session(session: int) -> list[int]:
    """Processes of a session, zombies aside."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(path.name))
    return found


def wait_until(done: Callable[[], object], seconds: float, what: str) -> float:
    """Wait for a condition; returns the seconds that it took."""
    start = time.monotonic()
    while not done():
        assert time.monotonic() - start < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.1)
    return time.monotonic() - start


def check_answers(front: Front, expected: list[Answer]) -> None:
    for case, answer in zip(CASES, expected, strict=True):
        assert front.answer(*case) == answer
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda case: front.answer(*case), CASES * 3))
    assert found == expected * 3
    print(f"{len(CASES)} documents, alone and 12 at once over two replicas: as generate")


def check_cancellation(front: Front, expected: list[Answer]) -> None:
    """A client leaves in the middle of a picture; its document ends, and others are answered."""
    endless = ("a red square", False, {"seed": 1, "max_images": 30, "turn_tokens": 1})
    streams = [front.lines(*endless) for _ in range(4)]
    for stream in streams:
        next(stream)
    assert front.gauge("mmi_running") >= 1
    for stream in streams:
        stream.close()

    def documents() -> int:
        return int(front.client.get("/health/ready").json()["documents"])

    seconds = wait_until(lambda: documents() == 0, 10, "no document is left")
    # The replica that had them all: the same beginning goes there.
    start = time.monotonic()
    front.answer(endless[0], False, {"seed": 5, "max_images": 0})
    assert time.monotonic() - start < 10, "its slots are free"
    assert front.answer(*CASES[1]) == expected[1]
    print(f"four clients left in a picture: no document after {seconds:.1f} s")


def check_death(front: Front, expected: list[Answer]) -> None:
    """A replica is killed under load: its documents get an error, the others their answers."""
    before = front.replicas()
    assert len(before) == 2, before

    def one(number: int) -> str:
        try:
            right = front.answer(*CASES[number % 4]) == expected[number % 4]
            return "right" if right else "wrong"
        except httpx.HTTPStatusError as error:
            assert error.response.status_code == 503, error.response.text
            return error.response.json()["error"]["code"]

    with ThreadPoolExecutor(6) as threads:
        asked = [threads.submit(one, number) for number in range(40)]
        wait_until(lambda: sum(future.done() for future in asked) >= 8, 120, "under load")
        os.kill(before[0], signal.SIGKILL)
        killed = time.monotonic()
        ends = [future.result() for future in asked]
    counts = {end: ends.count(end) for end in set(ends)}
    assert counts.pop("wrong", 0) == 0 and counts["right"] >= 30, counts
    assert set(counts) <= {"right", "engine_died"}, counts
    assert front.ready(), "one replica is enough"
    wait_until(
        lambda: len(front.replicas()) == 2 and before[0] not in front.replicas(),
        120,
        "a new replica",
    )
    seconds = time.monotonic() - killed
    assert front.answer(*CASES[0]) == expected[0]
    print(f"one of two replicas killed under load: {counts}; two again within {seconds:.0f} s")


def check_affinity(front: Front) -> None:
    """Check that an equal beginning finds its replica's cache, with many others between."""
    text = "a red square and a blue circle and a green cross and a white ring moves down."
    cached = []
    for number in range(6):
        sent = body(text, False, {"seed": number, "max_images": 0})
        usage = front.client.post("/v1/chat/completions", json=sent).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        front.answer(f"{CASES[number % 4][0]} {number}", False, {"seed": 0, "max_images": 0})
    assert all(count > 0 for count in cached[1:]), cached
    print(f"cached tokens of the same beginning: {cached}")


def main() -> None:
    """Start the server, run all checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--log", type=Path, default=Path("ray.log"))
    given = parser.parse_args()
    with closing(Runtime.open(given.bundle)) as runtime:
        expected = [reference(runtime, *case) for case in CASES]
    with running(given.bundle, given.log) as front:
        check_answers(front, expected)
        check_affinity(front)
        check_cancellation(front, expected)
        check_death(front, expected)
    print("SIGTERM: exit code 0, and no process is left")


if __name__ == "__main__":
    main()
