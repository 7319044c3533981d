"""Readers of streams that follow the rules of clients, written anew.

vllm: `vllm bench serve` joins what arrives, splits at empty lines, and takes any chunk with
`choices` for a token; usage comes from a chunk without. lines: aiohttp's reader of lines, which
fails at one of more than 64 KiB. sglang: `bench_serving` reads lines, and the first choice of each.
Each gets the pieces in which the bytes arrive.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

LINE = 2**16


@dataclass
class Heard:
    """A client's view of a reply. tokens: events that it takes for one."""

    text: str = ""
    tokens: int = 0
    usage: dict[str, Any] | None = None
    done: bool = False
    chunks: list[dict[str, Any]] = field(default_factory=list)


def vllm(pieces: Iterable[bytes], *, completions: bool = False) -> Heard:
    """Rules of `vllm bench serve`."""
    heard, buffer = Heard(), ""
    for piece in pieces:
        buffer += piece.decode()  # fails if a character is cut
        while "\n\n" in buffer:
            message, buffer = buffer.split("\n\n", 1)
            message = message.strip()
            if not message or message.startswith(":"):
                continue
            data = message.removeprefix("data: ")
            if data == "[DONE]":
                heard.done = True
                continue
            chunk = json.loads(data)
            heard.chunks.append(chunk)
            if choices := chunk.get("choices"):
                heard.tokens += 1
                text = choices[0]["text"] if completions else choices[0]["delta"].get("content")
                heard.text += text or ""
            elif usage := chunk.get("usage"):
                heard.usage = usage
    assert not buffer.strip(), "the stream ended inside of an event"
    return heard


def lines(pieces: Iterable[bytes], limit: int = LINE) -> Iterator[bytes]:
    """Rules of aiohttp's reader of lines."""
    buffer = b""
    for piece in pieces:
        buffer += piece
        while (end := buffer.find(b"\n")) >= 0:
            line, buffer = buffer[: end + 1], buffer[end + 1 :]
            if len(line) > limit:
                raise ValueError("Chunk too big")
            yield line
        if len(buffer) > limit:
            raise ValueError("Chunk too big")
    if buffer:
        yield buffer


def sglang(pieces: Iterable[bytes], *, completions: bool = False) -> Heard:
    """Rules of SGLang's `bench_serving`."""
    heard = Heard()
    for line in lines(pieces):
        data = line.strip().decode().removeprefix("data: ")
        if not data or heard.done:
            continue
        if data == "[DONE]":
            heard.done = True
            continue
        chunk = json.loads(data)
        heard.chunks.append(chunk)
        choice = chunk["choices"][0]
        text = choice["text"] if completions else choice["delta"].get("content", "")
        if text:
            heard.tokens += 1
            heard.text += text
        heard.usage = chunk.get("usage") or heard.usage
    return heard
