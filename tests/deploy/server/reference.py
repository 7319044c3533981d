"""Answers of `generate` in process, with which replies are compared."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from mmi_deploy.documents.document import Document
from mmi_deploy.documents.images import Rgb
from mmi_deploy.runtime.events import Finished, ImageDone, TextDelta
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime


@cache
def runtime_of(bundle: Path) -> Runtime:
    return Runtime.open(bundle)


def alone(bundle: Path, document: Document, **options: Any) -> tuple[list[str | Rgb], str]:
    """Texts and pictures in order, and the reason of the end."""
    parts: list[str | Rgb] = []
    for event in generate(runtime_of(bundle), document, GenerationOptions(**options)):
        match event:
            case TextDelta(text) if text:
                if parts and isinstance(parts[-1], str):
                    parts[-1] += text
                else:
                    parts.append(text)
            case ImageDone(_, rgb):
                parts.append(rgb)
            case Finished(reason):
                return parts, reason
    raise AssertionError("no end")


def text_of(parts: list[str | Rgb]) -> str:
    return "".join(part for part in parts if isinstance(part, str))


def pictures_of(parts: list[str | Rgb]) -> list[Rgb]:
    return [part for part in parts if not isinstance(part, str)]
