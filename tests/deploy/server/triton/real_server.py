"""Check of the Triton model in the real server: `make triton-check`.

The server binary and its Python backend are those of `nvidia-pytriton`, the client is
`tritonclient`; both are in an environment of their own, and no GPU is needed. Every document is
compared with `generate`, to the bit.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import queue
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from mmi_deploy import GenerationOptions, Runtime, generate
from mmi_deploy.documents.document import Document
from mmi_deploy.documents.files import document_of_json
from mmi_deploy.documents.images import as_rgb, to_png
from mmi_deploy.runtime.events import Finished, ImageDone, TextDelta
from mmi_deploy.runtime.options import options_of
from mmi_deploy.server.triton.repository import write_model
from mmi_deploy.server.triton.settings import ModelSettings

SLOTS = 4

# A document's text, drawn pictures, reason, tokens and number of pictures.
Answer = tuple[str, tuple[bytes, ...], str, int, int]


def scene(shade: int) -> str:
    """Data URL of a picture."""
    rgb = np.full((64, 64, 3), 255, np.uint8)
    rgb[8:28, 8:28] = (shade, 30, 200 - shade)
    return "data:image/png;base64," + base64.b64encode(to_png(rgb)).decode()


def requests() -> list[dict[str, Any]]:
    """Eight documents: text alone, given pictures, drawn ones, with options of their own."""
    given = {"image": scene(200)}
    return [
        {"parts": [{"text": "a blue circle is on the left."}], "max_images": 0, "seed": 1},
        {"parts": [given, {"text": "the red square moves down."}, {"draw": True}], "max_images": 1},
        {"parts": [{"image": scene(10)}], "max_images": 0, "temperature": 0, "max_tokens": 24},
        {"parts": [given, {"text": "what is on the left?"}], "seed": 2**63, "max_images": 1},
        {"parts": [{"text": "a red square."}, {"draw": True}], "guidance": 2.0, "max_images": 0},
        {"parts": [given, {"image": scene(90)}], "max_images": 2, "max_tokens": 40, "seed": 5},
        {"parts": [{"text": "one"}], "stop": ["."], "top_k": 5, "max_images": 0},
        {
            "parts": [{"draw": True}, {"text": "the red square moves down."}, {"draw": True}],
            "max_images": 0,
        },
    ]


def reference(runtime: Runtime, request: dict[str, Any]) -> Answer:
    """Answer of `generate` to a request."""
    document, options = read(request)
    text, pictures = "", []
    for event in generate(runtime, document, options):
        if isinstance(event, TextDelta):
            text += event.text
        elif isinstance(event, ImageDone):
            pictures.append(event.rgb.tobytes())
        elif isinstance(event, Finished):
            return text, tuple(pictures), event.reason, event.tokens, event.images
    raise AssertionError("a document ends")


def read(request: dict[str, Any]) -> tuple[Document, GenerationOptions]:
    """Document and options of a request, without the model's own reader."""

    def pixels(url: str) -> Any:
        with PIL.Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
            return as_rgb(image)

    own = {key: value for key, value in request.items() if key not in ("id", "parts")}
    return document_of_json(request["parts"], pixels), options_of(own)


# The server --------------------------------------------------------------------------------------


@dataclass
class Server:
    """A running server: its process, its gRPC address, its log."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path

    def stub(self) -> int:
        """Process id of the backend's Python process."""
        found = [
            int(path.name)
            for path in Path("/proc").iterdir()
            if path.name.isdigit() and self._is_stub(path)
        ]
        assert len(found) == 1, found
        return found[0]

    def _is_stub(self, path: Path) -> bool:
        try:
            words = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_bytes()
        except OSError:
            return False
        return int(words[1]) == self.process.pid and b"triton_python_backend_stub" in command

    def memory(self) -> int:
        """Anonymous memory of the backend's process in bytes, swapped memory included."""
        text = Path(f"/proc/{self.stub()}/status").read_text()
        return 1024 * sum(int(n) for n in re.findall(r"(?:RssAnon|VmSwap):\s+(\d+)", text))


@contextmanager
def running(repository: Path, work: Path) -> Iterator[Server]:
    """Start the server on free ports of this machine; at the end nothing may be in flight."""
    packages = Path(sysconfig.get_path("purelib"))
    triton = packages / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    backend = work / "backends" / "python"
    shutil.copytree(triton / "backends" / "python", backend)
    stub = backend / "triton_python_backend_stub"
    shutil.copy(triton / "python_backend_stubs" / version / stub.name, stub)
    stub.chmod(0o755)
    libraries = [packages / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    environment = {
        **os.environ,
        # The backend's Python takes the environment whose `python3` comes first.
        "PATH": os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ["PATH"]]),
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
    }
    http, grpc = free_ports(2)
    log = work / "server.log"
    command = [
        *(triton / "bin" / "tritonserver", "--model-repository", repository),
        *("--backend-directory", work / "backends", "--allow-metrics", "false"),
        *("--exit-timeout-secs", 20),
        *("--http-address", "127.0.0.1", "--http-port", http),
        *("--grpc-address", "127.0.0.1", "--grpc-port", grpc),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    server = Server(process, f"127.0.0.1:{grpc}", log)
    try:
        wait_until(lambda: ready(server), 120, "the model is ready")
        yield server
        stub = server.stub()
        process.send_signal(signal.SIGTERM)
        if process.wait(timeout=60) != 0:
            # Seen with 2.51: it never asks the idle backend to finalize, and gives up.
            assert "Exit timeout expired" in log.read_text(), f"exit code {process.returncode}"
            print("the server did not unload the model and gave up waiting")
            os.kill(stub, signal.SIGKILL)  # it stays behind
        in_flight = re.findall(r"Found (\d+) model versions that have in-flight", log.read_text())
        assert in_flight[:1] == ["0"], f"requests without a final response: {in_flight}"
    except BaseException:
        print(log.read_text()[-4000:], file=sys.stderr)
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def ready(server: Server) -> bool:
    """True once the model has loaded. Raises `AssertionError` if the server has ended."""
    from tritonclient.grpc import InferenceServerClient, InferenceServerException

    assert server.process.poll() is None, "the server has ended"
    try:
        return bool(InferenceServerClient(server.address).is_model_ready("mmi"))
    except InferenceServerException:
        return False


def wait_until(done: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for a condition. Raises `AssertionError` if it takes longer."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)


# The client --------------------------------------------------------------------------------------


@dataclass
class Received:
    """Responses to one request."""

    text: str = ""
    pictures: list[bytes] = field(default_factory=list)
    previews: int = 0
    types: list[str] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    finals: int = 0

    def add(self, result: Any) -> None:
        """Add a response of the server."""
        self.finals += result.get_response().parameters["triton_final_response"].bool_param
        event = json.loads(result.as_numpy("event")[0])
        image = result.as_numpy("image")
        self.types.append(event["type"])
        match event["type"]:
            case "text":
                self.text += event["text"]
            case "image.done":
                self.pictures.append(image.tobytes())
            case "image.progress":
                self.previews += image is not None
            case "finished":
                self.end = event

    @property
    def answer(self) -> Answer:
        """The whole answer. Raises `AssertionError` for an error."""
        assert not self.error, self.error
        end, pictures = self.end, tuple(self.pictures)
        return self.text, pictures, end["reason"], end["tokens"], end["images"]


class Stream:
    """A request in a gRPC stream of its own."""

    def __init__(self, server: Server, request: object, timeout: int | None = None) -> None:
        """timeout: of the request, in microseconds."""
        from tritonclient.grpc import InferenceServerClient, InferInput

        self._responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client = InferenceServerClient(server.address)
        self._client.start_stream(
            lambda result, error: self._responses.put((result, error)),
            headers={"triton_grpc_error": "true"},  # the status of an error
        )
        data = request if isinstance(request, bytes) else json.dumps(request).encode()
        tensor = InferInput("request", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([data], object))
        self._client.async_stream_infer("mmi", [tensor], timeout=timeout)
        self.received = Received()

    def next(self) -> bool:
        """Wait for a response; False after the last one."""
        result, error = self._responses.get(timeout=120)
        if error is not None:
            self.received.error = f"{error.status()} {error.message()}"
            return False
        self.received.add(result)
        return self.received.finals == 0

    def rest(self) -> Received:
        """All responses, then close the stream."""
        while self.next():
            pass
        self._client.stop_stream()
        self._client.close()
        return self.received

    def cancel(self) -> None:
        """Cancel the request by closing its stream."""
        self._client.stop_stream(cancel_requests=True)
        self._client.close()


# The checks --------------------------------------------------------------------------------------


def check_answers(server: Server, expected: list[Answer]) -> None:
    """One after another, then eight at once, then more than there are slots: all the same."""
    for request, answer in zip(requests(), expected, strict=True):
        received = Stream(server, request).rest()
        assert received.answer == answer and received.finals == 1
    streams = [Stream(server, request) for request in 3 * requests()]
    for stream, answer in zip(streams, 3 * expected, strict=True):
        assert stream.rest().answer == answer
    drawn = sum(len(answer[1]) for answer in expected)
    print(f"{len(expected)} documents ({drawn} drawn pictures), alone and 24 at once: equal")


def check_previews(server: Server, expected: Answer) -> None:
    """Previews come with progress, and change nothing."""
    received = Stream(server, {**requests()[4], "previews": 3}).rest()
    assert received.answer == expected
    assert received.previews == 3
    print("previews: 3")


def check_errors(server: Server) -> None:
    """Errors have a code, and neither a path nor an address; the next request is answered."""
    broken = scene(5)[:-40]
    cases: list[tuple[object, str]] = [
        (b"{", "INVALID_ARGUMENT"),
        (b"\xff", "INVALID_ARGUMENT"),
        ({"parts": []}, "INVALID_ARGUMENT"),
        ({"parts": [{"text": "a"}], "sed": 1}, "INVALID_ARGUMENT"),
        ({"parts": [{"text": "a"}], "seed": -1}, "INVALID_ARGUMENT"),
        ({"parts": [{"image": "/etc/passwd"}]}, "INVALID_ARGUMENT"),
        ({"parts": [{"image": "http://127.0.0.1/"}]}, "INVALID_ARGUMENT"),
        ({"parts": [{"image": broken}]}, "INVALID_ARGUMENT"),
        ({"parts": [{"text": "a " * 5000}]}, "INVALID_ARGUMENT"),
        ({"parts": [{"text": "electroencephalograph"}]}, "INVALID_ARGUMENT"),
        ({"parts": [{"text": "a"}], "schedule": "none:1"}, "INVALID_ARGUMENT"),
        ({"parts": [{"draw": True}] * 60}, "INVALID_ARGUMENT"),
    ]
    for request, code in cases:
        error = Stream(server, request).rest().error
        assert error.startswith(f"StatusCode.{code} "), (request, error)
        assert not re.search(r"0x[0-9a-f]{6}|\.py\b|site-packages|/tmp|/home|/root", error), error
    late = Stream(server, {"parts": [{"text": "a"}], "max_images": 40}, timeout=500_000).rest()
    assert late.end["reason"] == "deadline"
    print(f"{len(cases)} refusals, and a deadline")


def check_cancellation(server: Server, expected: list[Answer]) -> None:
    """All slots draw, and one more document waits; one is cancelled in the middle of a picture."""
    long = {"parts": [{"text": "a red square"}], "max_images": 25, "turn_tokens": 1}
    streams = [Stream(server, {**long, "seed": n}) for n in range(SLOTS)]
    for stream in streams:
        while stream.next() and "image.started" not in stream.received.types:
            pass
    waiting = Stream(server, requests()[5])
    time.sleep(0.5)
    assert waiting._responses.empty(), "it waits"
    started = time.monotonic()
    streams[0].cancel()
    assert waiting.rest().answer == expected[5]
    seconds = time.monotonic() - started
    assert all(stream.received.finals == 0 for stream in streams[1:]), "others are drawing"
    for stream in streams[1:]:
        stream.cancel()
    print(f"cancelled in a picture: the document that waited was answered {seconds:.2f} s later")


def check_many(server: Server, expected: list[Answer], count: int) -> None:
    """Streams, a third of them cancelled at a random moment; memory stays as it was."""
    chosen, documents = random.Random(0), requests()
    short = [kind for kind, answer in enumerate(expected) if len(answer[1]) <= 1]

    def one(number: int) -> bool:
        kind = chosen.choice(short)
        stream = Stream(server, documents[kind])
        if number % 3:
            assert stream.rest().answer == expected[kind]
            return True
        for _ in range(chosen.randrange(30)):
            if not stream.next():
                break
        stream.cancel()
        return False

    memory, begun = [], time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        for start in range(0, count, 50):
            list(threads.map(one, range(start, min(start + 50, count))))
            memory.append(server.memory())
            megabytes = memory[-1] / 2**20
            print(f"  {min(start + 50, count)} streams: {megabytes:.1f} MiB", flush=True)
    settled = memory[len(memory) // 4 :]
    growth = settled[-1] / settled[0] - 1
    assert growth < 0.05, f"memory grew by {growth:.1%}"
    seconds = time.monotonic() - begun
    print(f"{count} streams, a third cancelled, {seconds:.0f} s: memory {growth:+.1%}")
    assert Stream(server, documents[1]).rest().answer == expected[1]


def main() -> None:
    """Write the model, start the server, run all checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--streams", type=int, default=100, help="streams of the memory check")
    given = parser.parse_args()
    with closing(Runtime.open(given.bundle)) as runtime:
        expected = [reference(runtime, request) for request in requests()]
    assert len({answer[0] for answer in expected}) > 5, "documents that differ"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        settings = ModelSettings(str(given.bundle.resolve()), slots=SLOTS)
        model = write_model(work / "models", "mmi", settings)
        with running(work / "models", work) as server:
            print(f"tritonserver at {server.address}, {SLOTS} slots")
            check_answers(server, expected)
            check_previews(server, expected[4])
            check_errors(server)
            check_cancellation(server, expected)
            check_many(server, expected, given.streams)
        write_model(work / "models", "mmi", settings)  # the server has left it as it was
        print(f"{model.name}: nothing in flight at the end")


if __name__ == "__main__":
    main()
