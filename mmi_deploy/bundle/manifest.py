"""Manifests of a bundle and its targets: file hashes, and receipts that prove their graphs.

A receipt records the reference that a graph was compared with, the sizes, and the errors. It holds
one hash over the compared graph and its weights, so it is void once either changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from mmi_deploy.errors import BundleError
from mmi_deploy.parity import Case
from mmi_deploy.spec.config import ModelConfig, first_flaw
from mmi_deploy.spec.graphs import Limits
from mmi_deploy.spec.preview_map import PreviewMap
from mmi_deploy.system.files import sha256_of, write_file
from mmi_deploy.system.output_folder import CHECKED
from mmi_deploy.system.progress import Progress, silent
from mmi_deploy.system.safetensors_reader import reject_duplicates

# Version of the folder's layout and of the graphs' contract; a runtime reads exactly one. 2: each
# row of `denoise_step` has a step and a guidance; `llm_values` and `unet_values` in place of
# `image_values`.
FORMAT = 2

# Target name of the graphs as exported, before any rewrite for an execution provider.
PORTABLE = "portable"

# Bytes that are hashed at a time.
_BLOCK = 2**24

Bytes = Annotated[int, Field(ge=0, le=2**50)]
Size = Annotated[int, Field(ge=0, le=2**32)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class FileEntry(_Model):
    """SHA-256 and size in bytes of one file of the folder."""

    sha256: str
    size: Bytes


class Receipt(_Model):
    """Proof that the files of `graph` for `target` compute the same as `compared_with`.

    sha256: of the graph and its weights together, see `hash_of_files`. scope: `full` if these very
    files were run; `slice` if they were too large, and a smaller model of the same code was run.
    """

    graph: str
    target: str
    sha256: str
    compared_with: str
    cases: tuple[Case, ...]
    scope: Literal["full", "slice"] = "full"

    @property
    def passed(self) -> bool:
        return bool(self.cases) and all(case.passed for case in self.cases)


# Shown in terminals and model cards: printable ASCII without markup.
Shown = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _+.,:@()%/-]*$", max_length=100)
]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class AnswerDifference(_Model):
    """Difference of a metric between two targets, paired by question: value and 95 % interval in
    the metric's unit, and on which side of zero the interval lies."""

    value: _Finite | None
    interval: tuple[_Finite | None, _Finite | None]
    verdict: Literal["higher", "lower", "not told apart"]

    @model_validator(mode="after")
    def _agree(self) -> AnswerDifference:
        low, high = self.interval
        side = "not told apart"
        if low is not None and high is not None:
            if low > high:
                raise ValueError("the interval ends before it begins")
            side = "higher" if low > 0 else "lower" if high < 0 else side
        if self.verdict != side:
            raise ValueError(f"the interval says {side}, the verdict {self.verdict}")
        return self


class AnswerReceipt(_Model):
    """Answers of a target beside those of `against` on the same questions of a benchmark.

    sha256: `TargetManifest.engines`; the receipt is void once one of them changes. answers: that
    both gave, of which `different` are not the same. differences: by metric.
    """

    benchmark: Shown
    split: Shown
    against: Shown
    sha256: str
    answers: Annotated[int, Field(ge=1, le=10**9, strict=True)]
    different: Annotated[int, Field(ge=0, strict=True)]
    differences: Annotated[dict[Shown, AnswerDifference], Field(max_length=100)]

    @model_validator(mode="after")
    def _counted(self) -> AnswerReceipt:
        if self.different > self.answers:
            raise ValueError("more answers are different than there are")
        return self

    def in_words(self) -> str:
        """Describe the receipt in a line: "vqav2, val: 200 answers, 3 others than cpu gives;
        accuracy -0.50 (-1.20 to 0.20), not told apart"."""
        start = f"{self.benchmark}, {self.split}: {self.answers} answers, "
        parts = [f"{start}{self.different} others than {self.against} gives"]
        for name, one in self.differences.items():
            low, high = map(_number, one.interval)
            parts.append(f"{name} {_number(one.value, '+')} ({low} to {high}), {one.verdict}")
        return "; ".join(parts)


def _number(value: float | None, sign: str = "") -> str:
    return "unknown" if value is None else f"{value:{sign}.2f}"


class FolderManifest(_Model):
    """Fields that the manifests of a bundle and of a target have in common.

    Paths are relative, with `/`. shared: graph -> weight files that it shares with other graphs.
    """

    format: int
    graphs: dict[str, str]
    shared: dict[str, tuple[str, ...]] = {}
    files: dict[str, FileEntry]
    receipts: tuple[Receipt, ...]
    versions: dict[str, str]

    @field_validator("files", "graphs")
    @classmethod
    def _stay_inside(cls, value: dict[str, object]) -> dict[str, object]:
        paths = [*value, *(entry for entry in value.values() if isinstance(entry, str))]
        for path in map(PurePosixPath, paths):
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{path} leaves the folder")
        return value

    def graph_files(self, graph: str) -> dict[str, FileEntry]:
        """Entries of the file of `graph` and of its weights, by path."""
        path, shared = self.graphs[graph], self.shared.get(graph, ())
        return {
            name: entry
            for name, entry in self.files.items()
            if belongs(name, path) or name in shared
        }

    def receipt(self, graph: str) -> Receipt | None:
        """Receipt whose hash is that of the present files of `graph`; None without one."""
        sha256 = hash_of_files(self.graph_files(graph))
        for receipt in self.receipts:
            if receipt.graph == graph and receipt.sha256 == sha256:
                return receipt
        return None


def belongs(name: str, graph_file: str) -> bool:
    """Test whether `name` is `graph_file` or has the same stem, as the graph's weights have."""
    return f"{name}.".startswith(f"{PurePosixPath(graph_file).with_suffix('')}.")


def hash_of_files(files: Mapping[str, FileEntry]) -> str:
    """Combined SHA-256 of names and contents: that of the output of `sha256sum` for the files in
    the order of their names."""
    lines = (f"{entry.sha256}  {name}\n" for name, entry in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class BundleManifest(FolderManifest):
    """`bundle.json`. schedules: `NAME:STEPS` -> file; the first is the default. weights: `given`
    for a model's own, `empty` or `random` for placeholders. preview: map of the previews; None in
    bundles of earlier exports, which show none."""

    weights: Literal["given", "empty", "random"] = "given"
    config: ModelConfig
    limits: Limits
    tokenizer: str
    schedules: dict[str, str]
    preview: PreviewMap | None = None

    @model_validator(mode="after")
    def _fits_latents(self) -> BundleManifest:
        channels = self.config.image_decoder.unet.latent_channels
        if self.preview and any(len(row) != channels for row in self.preview.weights):
            raise ValueError(f"preview.weights does not fit the model's {channels} latent channels")
        return self

    @model_validator(mode="after")
    def _has_positions(self) -> BundleManifest:
        if self.limits.context > self.config.llama.context:
            raise ValueError(
                f"limits.context {self.limits.context} is beyond the model's "
                f"{self.config.llama.context} positions"
            )
        return self


class TargetManifest(FolderManifest):
    """`engines/<target>/target.json`: engines built from the portable graphs for one target.

    made_for: hash of the bundle.json that they were built from. recipe: fields of the builder's
    cache key (precision, architecture, flags). activations: element type of the tensors that
    `graphs.py` marks as activations. answers: receipts of whole answers, one for each benchmark and
    split.
    """

    target: str
    made_for: str
    recipe: dict[str, str]
    activations: str = "float32"
    answers: tuple[AnswerReceipt, ...] = ()

    @property
    def engines(self) -> str:
        """Hash of all files that its graphs run: the report of their build, with its times, is none
        of them."""
        names = {name for graph in self.graphs for name in self.graph_files(graph)}
        return hash_of_files({name: self.files[name] for name in names})

    @property
    def valid_answers(self) -> tuple[AnswerReceipt, ...]:
        """Receipts of answers that the present engines gave."""
        return tuple(one for one in self.answers if one.sha256 == self.engines)


Manifest = TypeVar("Manifest", bound=FolderManifest)


def read_manifest(path: Path, kind: type[Manifest], fix: str) -> Manifest:
    """Read a manifest; raises `BundleError` that ends with `fix`, the command that writes it."""
    try:
        text = path.read_bytes()
        found = json.loads(text, object_pairs_hook=reject_duplicates)
    except FileNotFoundError:
        if (path.parent / "config.json").is_file():
            raise BundleError(
                f"{path.parent} is a model folder, not a bundle",
                fix=f"export it: `mmi export {path.parent} -o FOLDER`",
            ) from None
        raise BundleError(
            f"{path.parent} is not complete: it holds no {path.name}", fix=f"write it with `{fix}`"
        ) from None
    except NotADirectoryError:
        raise BundleError(f"there is no bundle {path.parent}", fix=f"make one: `{fix}`") from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"cannot read {path}: it is not the JSON that mmi writes ({error})",
            fix=f"write it again with `{fix}`",
        ) from None
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT:
        raise BundleError(
            f"{path} has another format version",
            expected=FORMAT,
            got=f"{version!s:.40}",
            fix=f"write it with `{fix}`",
        )
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise BundleError(
            f"{path} is damaged: {first_flaw(error)}",
            fix=f"remove it, and write it again with `{fix}`",
        ) from None


def manifest_text(manifest: FolderManifest) -> str:
    """Manifest as the JSON text of its file."""
    return manifest.model_dump_json(indent=2) + "\n"


def write_manifest(path: Path, manifest: FolderManifest) -> None:
    """Write `path` atomically: complete, or not at all."""
    write_file(path, manifest_text(manifest))


class Hashes:
    """SHA-256 of files; a file with several hard links is hashed once.

    progress: receives the bytes done of files larger than one block.
    """

    def __init__(self, progress: Progress = silent) -> None:
        self.progress = progress
        self._known: dict[tuple[int, ...], str] = {}

    def __call__(self, path: Path) -> str:
        status = path.stat()
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if key not in self._known:
            self._known[key] = self._hash(path, status.st_size)
        return self._known[key]

    def _hash(self, path: Path, size: int) -> str:
        found, done = hashlib.sha256(), 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                found.update(block)
                done += len(block)
                if size > _BLOCK:
                    self.progress(f"hashing {path.name}", done, size, unit="bytes")
        return found.hexdigest()


def file_entries(
    folder: Path,
    graph_file: str | None = None,
    shared: Sequence[str] = (),
    hash_file: Callable[[Path], str] = sha256_of,
) -> dict[str, FileEntry]:
    """Entries of all files under `folder` that are not hidden, or of the files of one graph."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if graph_file and not belongs(name, graph_file) and name not in shared:
            continue
        if path.is_file() and not path.name.startswith("."):
            entries[name] = FileEntry(sha256=hash_file(path), size=path.stat().st_size)
    return entries


def cache_hashes(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Cache the hashes of `files`, which were computed just now, for the next `check_files`."""
    _write_checked(folder, {name: _seen(folder / name, entry) for name, entry in files.items()})


def _seen(path: Path, entry: FileEntry) -> list[object]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, entry.sha256]


def check_files(
    folder: Path,
    files: Mapping[str, FileEntry],
    fix: str,
    *,
    rehash: bool = False,
    hash_file: Callable[[Path], str] = sha256_of,
) -> None:
    """Raise `BundleError` for the first file that is missing or changed; `fix`: the command that
    writes the files.

    A file is hashed if its size, mtime or ctime differs from that of the last check. Programs
    cannot set back the ctime, so only silent corruption of the disk goes unnoticed: `rehash`
    hashes every file.
    """
    checked = {} if rehash else _read_checked(folder)
    now: dict[str, list[object]] = {}
    for name, entry in files.items():
        try:
            now[name] = _seen(folder / name, entry)
        except OSError:
            raise BundleError(
                f"{folder} is not complete: {name} is missing", fix=f"write it again with `{fix}`"
            ) from None
        size = now[name][0]
        if size == entry.size and checked.get(name) == now[name]:
            continue
        if size != entry.size or hash_file(folder / name) != entry.sha256:
            raise BundleError(
                f"{folder / name} has changed since it was written",
                fix=f"remove it, and write it with `{fix}`",
            )
    if now != checked:
        _write_checked(folder, now)


def _read_checked(folder: Path) -> dict[str, list[object]]:
    try:
        found = json.loads((folder / CHECKED).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_checked(folder: Path, checked: dict[str, list[object]]) -> None:
    """Cache the result of a check, if possible: a read-only bundle is hashed at every opening."""
    with suppress(OSError):
        write_file(folder / CHECKED, json.dumps(checked))


def check_receipts(manifest: FolderManifest, graphs: Iterable[str], where: Path, fix: str) -> None:
    """Raise `BundleError` for the first graph without a receipt that passed; `fix`: the command
    that writes receipts. `where`: the folder, for the message."""
    for graph in graphs:
        receipt = manifest.receipt(graph)
        if receipt is None or not receipt.passed:
            state = "no receipt" if receipt is None else "a receipt with too large an error"
            raise BundleError(
                f"{graph} in {where} has {state}: nothing proves that it computes what the model "
                "does",
                fix=f"write it with `{fix}`, or run the graph anyway with --unproved",
            )
