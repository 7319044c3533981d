"""Reference outputs: what a request gets when the server does nothing else, or in process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmi_bench.serve.band import EXACT, Band
from mmi_bench.serve.client import Client
from mmi_bench.serve.definitions import CHECK_EVERY
from mmi_bench.serve.records import RequestRecord
from mmi_bench.serve.run import Kept
from mmi_bench.serve.wire import Wire, decoded
from mmi_deploy.documents.images import Rgb
from mmi_deploy.errors import MmiError
from mmi_deploy.runtime.events import ImageDone, TextDelta
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.system.progress import Progress, silent

# Output in order: texts, and pictures as uint8 [height, width, 3].
Output = list[str | Rgb]

# Cells per side of a picture's thumbnail.
_CELLS = 8

# Differences that a report lists.
_LISTED = 5


@dataclass(frozen=True)
class Check:
    """Comparison of a share of the requests. differences: a line for each request that differs
    beyond the levels of the band. texts: how many of these differ in a text alone. largest:
    difference of a picture, in levels of 255."""

    compared: int
    every: int
    reference: str
    band: Band
    largest: int
    differences: Sequence[str]
    texts: int = 0

    @property
    def valid(self) -> bool:
        return len(self.differences) == self.texts <= self.band.allowed(self.compared)

    def to_json(self) -> dict[str, Any]:
        return {
            "compared": self.compared,
            "one_in": self.every,
            "reference": self.reference,
            **self.band.to_json(),
            "largest_picture_difference": self.largest,
            "differences": list(self.differences),
            "valid": self.valid,
        }

    def line(self) -> str:
        if not self.compared:
            return "no output was compared with a reference"
        found = f"{self.compared} outputs (1 in {self.every}) compared with {self.reference}"
        if self.valid:
            equal = f"{self.texts} other texts, within the band," if self.texts else "equal text,"
            return f"{found}: {equal} pictures within {self.largest}/255"
        listed = "; ".join(self.differences[:_LISTED])
        return f"INVALID: {found}, {len(self.differences)} differ: {listed}"


def judge(
    kept: Sequence[Kept],
    references: Sequence[Output | str],
    reference: str,
    band: Band = EXACT,
    every: int = CHECK_EVERY,
) -> Check:
    """Compare outputs with their references, and note the result in their records. A reference that
    is a string is an error that came in place of it."""
    differences, largest, texts = [], 0, 0
    for one, expected in zip(kept, references, strict=True):
        record = one.record
        found: str | None
        try:
            if isinstance(expected, str):
                raise MmiError(f"the reference failed: {expected}")
            output = output_of(record)
            found, levels = difference(output, expected, band.levels)
            largest = max(largest, levels)
            if found:
                alike, _ = difference(_blanked(output), _blanked(expected), band.levels)
                texts += alike is None
        except MmiError as error:
            found = str(error)
        record.checked, record.difference = True, found
        if found:
            differences.append(f"request {record.number} ({record.prompt}): {found}")
    return Check(len(kept), every, reference, band, largest, differences, texts)


def _blanked(output: Output) -> Output:
    """The output with all texts empty."""
    return ["" if isinstance(part, str) else part for part in output]


def output_of(record: RequestRecord) -> Output:
    """Output of a request whose pictures were kept. Raises `MmiError` for a damaged picture."""
    parts = record.reply.parts
    return [part if isinstance(part, str) else decoded(part or b"") for part in parts]


def difference(found: Output, expected: Output, band: int) -> tuple[str | None, int]:
    """First difference, None within the band, and the largest difference of a picture."""
    kinds = [["text" if isinstance(part, str) else "picture" for part in one] for one in
             (found, expected)]  # fmt: skip
    if kinds[0] != kinds[1]:
        return f"{_counted(kinds[0])} in place of {_counted(kinds[1])}", 0
    largest, pictures, first = 0, 0, None
    for got, wanted in zip(found, expected, strict=True):
        if isinstance(got, str) or isinstance(wanted, str):
            if not isinstance(got, str) or got != wanted:
                first = first or f"text {str(got)[:60]!r} in place of {str(wanted)[:60]!r}"
            continue
        pictures += 1
        if got.shape != wanted.shape:
            first = first or f"picture {pictures} has the shape {got.shape}, not {wanted.shape}"
            continue
        levels = int(np.abs(got.astype(np.int16) - wanted).max(initial=0))
        largest = max(largest, levels)
        if levels > band:
            first = first or f"picture {pictures} differs by {levels}/255"
    return first, largest


def _counted(kinds: Sequence[str]) -> str:
    return ", ".join(kinds) or "nothing"


def in_process(
    runtime: Runtime, kept: Sequence[Kept], progress: Progress = silent
) -> list[Output | str]:
    """Outputs of the same documents, one after another, by `generate`."""
    found: list[Output | str] = []
    for number, one in enumerate(kept):
        progress("generating references", number, len(kept))
        parts: Output = []
        try:
            for event in generate(runtime, one.document, one.prompt.options):
                if isinstance(event, TextDelta):
                    if parts and isinstance(parts[-1], str):
                        parts[-1] += event.text
                    else:
                        parts.append(event.text)
                elif isinstance(event, ImageDone):
                    parts.append(event.rgb)
        except MmiError as error:
            found.append(str(error))
            continue
        found.append(parts)
    return found


async def sequential(
    client: Client, wire: Wire, kept: Sequence[Kept], progress: Progress = silent
) -> list[Output | str]:
    """Outputs of the same documents from the same server, one request at a time."""
    found: list[Output | str] = []
    for number, one in enumerate(kept):
        progress("requesting references", number, len(kept))
        record = RequestRecord(number, one.record.prompt, client.now())
        body = wire.body(one.document, one.prompt.options)
        await client.generate(record, wire.endpoint, body, keep=True)
        found.append(output_of(record) if record.outcome == "done" else record.error)
    return found


def thumbnails(record: RequestRecord, decode: Callable[[bytes], Rgb] = decoded) -> list[str]:
    """Means of 8 x 8 cells of each kept picture, as hexadecimal digits: two pictures within a band
    of levels have thumbnails within it."""
    found = []
    for part in record.reply.parts:
        if isinstance(part, bytes):
            rgb = decode(part).astype(np.float64)
            rows = [np.array_split(row, _CELLS, axis=1) for row in np.array_split(rgb, _CELLS)]
            means = [[cell.mean(axis=(0, 1)) if cell.size else np.zeros(3) for cell in row]
                     for row in rows]  # fmt: skip
            found.append(np.rint(means).astype(np.uint8).tobytes().hex())
    return found
