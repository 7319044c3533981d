"""MM-Interleaved, deployed: the public API.

Everything here is imported from its module when it is first used, so that `import mmi_deploy`
loads neither NumPy nor a runtime:

    from mmi_deploy import Draw, Image, Runtime, Text, document_of, generate
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmi_deploy.system.entry_points import load

if TYPE_CHECKING:
    from mmi_deploy.batching.batch_engine import BatchEngine, EngineStats
    from mmi_deploy.batching.event_stream import EventStream
    from mmi_deploy.batching.job import JobStats
    from mmi_deploy.batching.scheduler import Policy
    from mmi_deploy.bundle.bundle import Bundle
    from mmi_deploy.documents.document import Document, Draw, Image, Part, Text, document_of
    from mmi_deploy.documents.files import parse_json, parse_markdown, read_document
    from mmi_deploy.documents.images import Rgb, to_png
    from mmi_deploy.documents.story import Story, write_story
    from mmi_deploy.errors import (
        BundleError,
        BusyError,
        ConfigError,
        DocumentError,
        EngineError,
        MmiError,
        WeightsError,
    )
    from mmi_deploy.runtime.events import (
        Event,
        Finished,
        ImageDone,
        ImageProgress,
        ImageStarted,
        TextDelta,
    )
    from mmi_deploy.runtime.generation import generate
    from mmi_deploy.runtime.options import GenerationOptions
    from mmi_deploy.runtime.runtime import Runtime
    from mmi_deploy.runtime.scoring import Score, score
    from mmi_deploy.runtime.timings import Timings

_MODULES = {
    "bundle.bundle": ("Bundle",),
    "documents.document": ("Document", "Draw", "Image", "Part", "Text", "document_of"),
    "documents.files": ("parse_json", "parse_markdown", "read_document"),
    "documents.images": ("Rgb", "to_png"),
    "documents.story": ("Story", "write_story"),
    "errors": (
        "BundleError",
        "BusyError",
        "ConfigError",
        "DocumentError",
        "EngineError",
        "MmiError",
        "WeightsError",
    ),
    "runtime.events": (
        "Event",
        "Finished",
        "ImageDone",
        "ImageProgress",
        "ImageStarted",
        "TextDelta",
    ),
    "runtime.generation": ("generate",),
    "runtime.options": ("GenerationOptions",),
    "runtime.runtime": ("Runtime",),
    "runtime.scoring": ("Score", "score"),
    "runtime.timings": ("Timings",),
    "batching.batch_engine": ("BatchEngine", "EngineStats"),
    "batching.event_stream": ("EventStream",),
    "batching.job": ("JobStats",),
    "batching.scheduler": ("Policy",),
}
_ENTRY_POINTS = {
    name: f"mmi_deploy.{module}:{name}" for module, names in _MODULES.items() for name in names
}

__all__ = [
    "BatchEngine",
    "Bundle",
    "BundleError",
    "BusyError",
    "ConfigError",
    "Document",
    "DocumentError",
    "Draw",
    "EngineError",
    "EngineStats",
    "Event",
    "EventStream",
    "Finished",
    "GenerationOptions",
    "Image",
    "ImageDone",
    "ImageProgress",
    "ImageStarted",
    "JobStats",
    "MmiError",
    "Part",
    "Policy",
    "Rgb",
    "Runtime",
    "Score",
    "Story",
    "Text",
    "TextDelta",
    "Timings",
    "WeightsError",
    "__version__",
    "document_of",
    "generate",
    "parse_json",
    "parse_markdown",
    "read_document",
    "score",
    "to_png",
    "write_story",
]


def __getattr__(name: str) -> Any:
    """Import `name` from its module (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("mmi_deploy")
    if name not in _ENTRY_POINTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = load(_ENTRY_POINTS[name])
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
