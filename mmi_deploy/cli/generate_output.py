"""Output of `mmi generate` for one document: its folder, its report and its line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmi_deploy.cli.console import counted
from mmi_deploy.documents.document import Document, Text
from mmi_deploy.documents.files import title_of
from mmi_deploy.documents.html import page
from mmi_deploy.documents.story import PAGE_NAME, Entry, Story, picture_names, write_story
from mmi_deploy.runtime.events import Event, Finished, ImageDone, TextDelta
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.spec.backends import CPU

ENDS = {
    "end": "the model ended the document",
    "stop": "a stop text came",
    "max_tokens": "--max-tokens was reached",
    "max_images": "--max-images was reached",
    "context": "the model's context is full",
    "cancelled": "it was cancelled",
    "deadline": "its time was over",
}


class Output:
    """Collects the events of one document. `finished` is None until its last one."""

    def __init__(self, source: Document, runtime: Runtime, options: GenerationOptions) -> None:
        self.source, self.options = source, options
        self.model = runtime.config.name
        self.schedule = runtime.schedule(options.schedule).schedule.key
        self.guidance = runtime.config.image_decoder.guidance_of(options.guidance)
        self.story = Story(source)
        self.finished: Finished | None = None

    def add(self, event: Event) -> None:
        """Add an event."""
        match event:
            case TextDelta(text):
                self.story.add_text(text)
            case ImageDone(_, rgb):
                self.story.add_picture(rgb)
            case Finished():
                self.finished = event

    def write(self, folder: Path, document: Path, bundle: str, target: str, spent: str) -> None:
        """Write story.md, the pictures and index.html into `folder`. document: its file. bundle: as
        its command names it. spent: the time that the page names."""
        entries = self.story.entries
        write_story(folder, entries)
        options = replace(self.options, guidance=self.guidance)
        command = _command(document, bundle, target, self.schedule, options)
        title = title_of(self.source) or document.stem
        html = page(title, entries, self._facts(spent), command)
        (folder / PAGE_NAME).write_text(html, encoding="utf-8", errors="replace")

    def summary(self, seconds: float) -> str:
        """Format the result in words: `12 tokens and 1 picture in 0.3 s; ...`."""
        finished = self._end
        return f"{_added(finished)} in {seconds:.1f} s; {ENDS[finished.reason]}."

    def report(self, out: Path, seconds: float) -> dict[str, Any]:
        """Result for `--json`. out: the output folder, which holds its pictures."""
        entries = self.story.entries
        return {
            "out": str(out),
            "parts": parts_of(entries, picture_names(entries)),
            **self.facts(seconds),
        }

    def facts(self, seconds: float) -> dict[str, Any]:
        """Reason of the end, counts, seed, sampler and times, for JSON."""
        finished = self._end
        return {
            "reason": finished.reason,
            "tokens": finished.tokens,
            "images": finished.images,
            "seed": self.options.seed,
            "schedule": self.schedule,
            "seconds": round(seconds, 3),
            "stages": {
                stage: {"seconds": round(spent, 6), "count": count}
                for stage, (spent, count) in finished.timings.totals().items()
            },
        }

    @property
    def _end(self) -> Finished:
        assert self.finished is not None, "a generation ends with Finished"
        return self.finished

    def _facts(self, spent: str) -> dict[str, str]:
        """Facts in the footer of the page."""
        finished, options = self._end, self.options
        facts = {
            "model": self.model,
            "added": _added(finished),
            "ended": ENDS[finished.reason],
            "seed": str(options.seed),
            "sampler": f"{self.schedule}, guidance {self.guidance:g}"
            + (f", whole every {options.full_every} steps" if options.full_every > 1 else ""),
            "time": spent,
        }
        for stage, (seconds, count) in finished.timings.totals().items():
            facts[stage] = f"{seconds / count * 1000:.1f} ms each, {count} in all"
        return facts


def parts_of(entries: Sequence[Entry], names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Parts of a document for JSON. names: index of each picture -> its path."""
    return [
        {
            **({"text": entry.part.text} if isinstance(entry.part, Text) else {"image": names[i]}),
            "generated": entry.generated,
        }
        for i, entry in enumerate(entries)
    ]


def _command(
    document: Path, bundle: str, target: str, schedule: str, options: GenerationOptions
) -> str:
    """Shell command that reproduces the document."""
    words = ["mmi", "generate", str(document), "--bundle", bundle]
    words += ["--schedule", schedule] + (["--target", target] if target != CPU else [])
    for name in (
        "seed",
        "max_images",
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "guidance",
        "full_every",
    ):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    if options.beams > 1:
        words += ["--beams", str(options.beams), "--length-penalty", str(options.length_penalty)]
    for token, bias in dict(options.logit_bias).items():
        words += ["--logit-bias", f"{token}={bias}"]
    return shlex.join(words)


def _added(finished: Finished) -> str:
    return f"{counted(finished.tokens, 'token')} and {counted(finished.images, 'picture')}"
