"""Model cards: README.md of a repository, written from the manifest and the receipts.

A card ends with a line that holds the hash of what is above it. While that is right, nobody has
edited the card, and the next upload may replace it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from math import prod

from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.bundle.manifest import FileEntry, FolderManifest, Receipt
from mmi_deploy.hub.reference import Reference
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.system.files import size
from mmi_deploy.system.safetensors_reader import Entry

CARD = "README.md"

LIBRARY = "mmi_deploy"

# Task on the Hub: text and pictures in, text and pictures out.
_TASK = "any-to-any"
_TAGS = ("mm-interleaved", "interleaved", "image-to-text", "text-to-image")

_PAPER = "https://arxiv.org/abs/2401.10208"

# Words before the hash in the last line.
_WRITTEN = "written by mmi push, and written again while it is not edited"
_SEAL = re.compile(rb"<!-- %s: ([0-9a-f]{64}) -->\n" % _WRITTEN.encode())


def is_unedited(card: bytes) -> bool:
    """True for a card that was written here, and that nobody has edited since."""
    *_, last = card.rpartition(b"<!-- ")
    found = _SEAL.fullmatch(b"<!-- " + last)
    above = card[: len(card) - len(last) - len(b"<!-- ")]
    return found is not None and sha256(above).hexdigest() == found[1].decode()


def bundle_card(
    bundle: Bundle, files: Mapping[str, FileEntry], reference: Reference, license: str | None
) -> str:
    """Card of a bundle. files: all that are uploaded. license: identifier, None if not known."""
    manifest, limits = bundle.manifest, bundle.limits
    side = bundle.config.image_decoder.image_size
    lines = [
        *_head(bundle.config, reference, license, ("onnx", "onnxruntime")),
        "",
        f"A bundle of `mmi export`: {len(manifest.graphs)} ONNX graphs, their weights, samplers "
        f"and tokenizer, {_total(files)}. Documents of up to {limits.context} tokens and "
        f"{limits.images} images, {limits.batch} at a time; drawn pictures have {side} × {side} "
        f"pixels. Samplers: {', '.join(bundle.schedules)}.",
        "",
        "## Use",
        "",
        "```",
        f"pip install '{LIBRARY}[cpu,serve,hub]'",
        f"mmi generate story.md -b {reference} -o out",
        f"mmi serve {reference}",
        "```",
        "",
        "## Graphs and receipts",
        "",
        "Each graph was run beside what it was made from. A receipt is void once a byte of the "
        f"graph changes; `mmi verify {reference}` hashes every file.",
        "",
        *_receipts(manifest),
    ]
    for target in bundle.targets:
        built = bundle.target(target, unproved=True)
        prefix = f"{bundle.target_folder(target).relative_to(bundle.folder).as_posix()}/"
        own = {name: entry for name, entry in files.items() if name.startswith(prefix)}
        lines += ["", f"### Engines: {target}", "", f"{_total(own)}.", "", *_receipts(built)]
        if built.valid_answers:
            lines += [
                "",
                "Answers on benchmarks, differences paired by question with 95 % intervals:",
            ]
            lines += ["", *(f"* {receipt.in_words()}" for receipt in built.valid_answers)]
    made = ", ".join(f"{name} {number}" for name, number in sorted(manifest.versions.items()))
    return _sealed([*lines, "", f"Made with {made}."])


def model_card(
    config: ModelConfig,
    tensors: Mapping[str, Entry],
    files: Mapping[str, FileEntry],
    reference: Reference,
    license: str | None,
) -> str:
    """Card of a model folder. tensors: of its weights. files, license: as in `bundle_card`."""
    parts: Counter[str] = Counter()
    for name, entry in tensors.items():
        parts[name.partition(".")[0]] += prod(entry.shape)
    kinds = ", ".join(sorted({entry.dtype for entry in tensors.values()}))
    rows = [(part, f"{count:,}") for part, count in parts.most_common()]
    lines = [
        *_head(config, reference, license, ("safetensors", "pytorch")),
        "",
        f"A model folder of `mmi`: configuration, weights ({kinds}) and tokenizer, "
        f"{_total(files)}.",
        "",
        "## Use",
        "",
        "```",
        f"pip install '{LIBRARY}[export,train,serve,hub]'",
        f"mmi export {reference} -o bundles/mine",
        "mmi generate story.md -b bundles/mine -o out",
        f"mmi train {reference} --data documents.jsonl -o runs/mine",
        "```",
        "",
        "## Parameters",
        "",
        *_table(("part", ">parameters"), [*rows, ("all", f"{sum(parts.values()):,}")]),
        "",
        "Its accuracy is not part of a model folder: `mmi evaluate` measures it. `mmi export` "
        "compares every graph with these weights.",
    ]
    return _sealed(lines)


def _head(
    config: ModelConfig, reference: Reference, license: str | None, tags: Iterable[str]
) -> list[str]:
    """Front matter, heading, and the model in a sentence."""
    about = [f"license: {license}"] if license else []
    about += [f"library_name: {LIBRARY}", f"pipeline_tag: {_TASK}", "tags:"]
    about += [f"- {tag}" for tag in (*_TAGS, *tags)]
    title = reference.repository.rpartition("/")[2]
    what = (
        f"`{config.name}`: an MM-Interleaved model ([paper]({_PAPER})), which reads and writes "
        f"documents in which text and pictures alternate."
    )
    return ["---", *about, "---", "", f"# {title}", "", what]


def _receipts(manifest: FolderManifest) -> list[str]:
    """Table of graphs: bytes with weights, and the worst case of each receipt."""
    rows = []
    for graph in manifest.graphs:
        of = size(sum(entry.size for entry in manifest.graph_files(graph).values()))
        rows.append((graph, of, *_proof(manifest.receipt(graph))))
    headings = ("graph", ">size", "compared with", ">cases", ">greatest error", ">allowed")
    return _table(headings, rows)


def _proof(receipt: Receipt | None) -> tuple[str, str, str, str]:
    if receipt is None or not receipt.cases:
        return "nothing yet", "0", "", ""
    worst = max(receipt.cases, key=lambda case: case.error / case.tolerance)
    sliced = ", on a smaller model of the same code" if receipt.scope == "slice" else ""
    with_ = receipt.compared_with + sliced
    return with_, str(len(receipt.cases)), f"{worst.error:.1e}", f"{worst.tolerance:.0e}"


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Rows of a Markdown table; columns whose heading begins with `>` are aligned to the right."""
    headings = list(headings)
    return [
        _row(heading.removeprefix(">") for heading in headings),
        _row("---:" if heading.startswith(">") else "---" for heading in headings),
        *map(_row, rows),
    ]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _total(files: Mapping[str, FileEntry]) -> str:
    return f"{len(files)} files, {size(sum(entry.size for entry in files.values()))}"


def _sealed(lines: Iterable[str]) -> str:
    """Text of a card, with the hash of its lines at the end."""
    text = "\n".join(_unbroken(lines)) + "\n\n"
    digest = sha256(text.encode()).hexdigest()
    return f"{text}<!-- {_WRITTEN}: {digest} -->\n"


def _unbroken(lines: Iterable[str]) -> Iterator[str]:
    """Lines without line breaks, which names of a manifest could bring."""
    for line in lines:
        yield " ".join(line.splitlines())
