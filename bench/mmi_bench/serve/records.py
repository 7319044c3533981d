"""Requests as the client saw them: the time of every event."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["text", "image_start", "progress", "preview", "image", "end"]
Outcome = Literal["running", "done", "rejected", "failed", "cut"]


@dataclass(frozen=True)
class RequestEvent:
    """One event. time: seconds after the origin of the run. index: of the picture. tokens: text
    tokens of a text event. size: characters of a text, bytes of a picture's transport."""

    time: float
    kind: Kind
    index: int = 0
    tokens: int = 0
    size: int = 0

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"time": round(self.time, 6), "kind": self.kind}
        if self.kind in ("image_start", "progress", "preview", "image"):
            found["index"] = self.index
        if self.kind == "text":
            found["tokens"] = self.tokens
        return {**found, "size": self.size} if self.size else found


@dataclass
class Reply:
    """Parts of an answer in order: texts, and pictures as the bytes of their files (or `None` where
    they were not kept)."""

    parts: list[str | bytes | None] = field(default_factory=list)

    def add_text(self, text: str) -> None:
        if self.parts and isinstance(self.parts[-1], str):
            self.parts[-1] += text
        else:
            self.parts.append(text)

    def drop_pictures(self) -> None:
        """Free the files of pictures; their places stay."""
        self.parts = [part if isinstance(part, str) else None for part in self.parts]

    @property
    def texts(self) -> list[str]:
        return [part for part in self.parts if isinstance(part, str)]


@dataclass
class RequestRecord:
    """One request. Times are seconds after the origin of the run.

    number: of the load, from 0. prompt: id of the prompt. turn: of its conversation, from 0. due:
    t0 of an open loop; None in a closed one. outcome `cut`: in flight when the window ended.
    tokens, images: written and drawn, as the server reports them, else as counted here.
    recomputed: tokens of the text by the tokenizer. picture_hashes: SHA-256 of the transported
    files. checked: compared with its reference; difference: from it, None for none.
    """

    number: int
    prompt: str
    sent: float
    due: float | None = None
    turn: int = 0
    outcome: Outcome = "running"
    status: int | None = None
    error: str = ""
    reason: str = ""
    request_id: str = ""
    events: list[RequestEvent] = field(default_factory=list)
    reply: Reply = field(default_factory=Reply)
    text_hash: str = ""
    picture_hashes: list[str] = field(default_factory=list)
    usage: Mapping[str, Any] | None = None
    server: Mapping[str, Any] | None = None
    tokens: int = 0
    recomputed: int | None = None
    checked: bool = False
    difference: str | None = None

    @property
    def start(self) -> float:
        """t0."""
        return self.sent if self.due is None else self.due

    @property
    def end(self) -> float | None:
        """Time of the last event; None before the first."""
        return self.events[-1].time if self.events else None

    @property
    def images(self) -> int:
        return sum(event.kind == "image" for event in self.events)

    def to_json(self) -> dict[str, Any]:
        """Line of requests.jsonl; texts and pictures as hashes."""
        return {
            "number": self.number,
            "prompt": self.prompt,
            "turn": self.turn,
            "due": self.due if self.due is None else round(self.due, 6),
            "sent": round(self.sent, 6),
            "outcome": self.outcome,
            "status": self.status,
            "error": self.error,
            "reason": self.reason,
            "request_id": self.request_id,
            "tokens": self.tokens,
            "recomputed_tokens": self.recomputed,
            "images": self.images,
            "text_sha256": self.text_hash,
            "picture_sha256": self.picture_hashes,
            "checked": self.checked,
            "difference": self.difference,
            "usage": self.usage,
            "server": self.server,
            "events": [event.to_json() for event in self.events],
        }

    @classmethod
    def of_json(cls, line: Mapping[str, Any]) -> RequestRecord:
        """Read what `to_json` wrote. Raises `KeyError`, `TypeError` or `ValueError`."""
        events = [
            RequestEvent(
                float(event["time"]),
                event["kind"],
                event.get("index", 0),
                event.get("tokens", 0),
                event.get("size", 0),
            )
            for event in line["events"]
        ]
        due = line["due"]
        return cls(
            number=int(line["number"]),
            prompt=str(line["prompt"]),
            sent=float(line["sent"]),
            due=None if due is None else float(due),
            turn=int(line["turn"]),
            outcome=line["outcome"],
            status=line["status"],
            events=events,
            text_hash=line["text_sha256"],
            picture_hashes=list(line["picture_sha256"]),
            server=line["server"],
            tokens=int(line["tokens"]),
        )
