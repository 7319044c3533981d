"""Bundle: the folder that is deployed, opened and verified, or written.

bundle.json                configuration, limits, hashes, receipts; see `manifest.py`
graphs/*.onnx              the portable graphs, weights as safetensors beside them
schedules/*.safetensors    samplers as tables
tokenizer.json             and tokenizer_config.json, which transformers alone reads
polygraphy/                inputs and shapes for Polygraphy; see `targets/polygraphy`
engines/<target>/          engines or graphs of one target, with its target.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from mmi_deploy.bundle.manifest import (
    FORMAT,
    PORTABLE,
    BundleManifest,
    Hashes,
    Receipt,
    TargetManifest,
    cache_hashes,
    check_files,
    check_receipts,
    file_entries,
    hash_of_files,
    read_manifest,
    sha256_of,
    write_manifest,
)
from mmi_deploy.errors import BundleError
from mmi_deploy.parity import Case
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import GRAPHS, Graph, Limits, beyond_kernels, graphs
from mmi_deploy.spec.preview_map import PreviewMap
from mmi_deploy.spec.schedule import (
    Schedule,
    check_schedule,
    parse_schedule_name,
    read_schedule,
)
from mmi_deploy.spec.target import build_options
from mmi_deploy.system.output_folder import check_replaceable, new_folder

MANIFEST = "bundle.json"
TARGET_MANIFEST = "target.json"
EXPORT = "mmi export"
BUILD = "mmi build"
_TARGET = "target"
VERIFY = "mmi verify"

# Packages whose versions a manifest records.
_TOOLS = ("mmi_deploy", "numpy", "onnx", "onnxruntime", "onnxscript", "torch", "diffusers")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Its files were complete and unchanged when it was opened.

    unproved: run graphs without a receipt too.
    """

    folder: Path
    manifest: BundleManifest
    unproved: bool = False

    @classmethod
    def open(
        cls,
        folder: Path | str,
        *,
        unproved: bool = False,
        hash_file: Callable[[Path], str] = sha256_of,
    ) -> Bundle:
        """Read `folder` and verify its checksums. `hash_file`: path -> SHA-256 in hex.

        Raises `BundleError`, one line that names the command that fixes it: a file is missing or
        has changed, the format version differs, or a graph is missing or (unless `unproved`) has
        no receipt.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise BundleError(f"there is no bundle {folder}", fix=f"make one with `{EXPORT}`")
        folder = folder.absolute()  # graphs are loaded later, perhaps from another working folder
        manifest = read_manifest(folder / MANIFEST, BundleManifest, f"{EXPORT} MODEL -o {folder}")
        _check_parts(folder, manifest)
        check_files(folder, manifest.files, EXPORT, hash_file=hash_file)
        if not unproved:
            check_receipts(manifest, manifest.graphs, folder, EXPORT)
        return cls(folder, manifest, unproved)

    def verify(self, hash_file: Callable[[Path], str] = sha256_of) -> tuple[str, ...]:
        """Hash every file again, all targets included; raises `BundleError` at the first mismatch.

        Returns the targets with a graph that has no receipt: engines that have not been run yet.
        """
        check_files(self.folder, self.manifest.files, EXPORT, rehash=True, hash_file=hash_file)
        built = {
            name: self.target(name, unproved=True, rehash=True, hash_file=hash_file)
            for name in self.targets
        }
        return tuple(
            name
            for name, manifest in built.items()
            if any(manifest.receipt(graph) is None for graph in manifest.graphs)
        )

    @property
    def config(self) -> ModelConfig:
        return self.manifest.config

    @property
    def limits(self) -> Limits:
        return self.manifest.limits

    @cached_property
    def graphs(self) -> dict[str, Graph]:
        """The contract of every graph at this bundle's configuration and limits."""
        return graphs(self.config, self.limits)

    @property
    def tokenizer(self) -> Path:
        return self.folder / self.manifest.tokenizer

    @property
    def schedules(self) -> tuple[str, ...]:
        """Keys of the bundle's schedules (`ddim:20`); the first is the default."""
        return tuple(self.manifest.schedules)

    def schedule(self, key: str | None = None) -> Schedule:
        """Read one schedule, by default the first. Raises `ConfigError` for a key that cannot be
        parsed or whose sampler this model cannot be drawn with, and `BundleError`, listing those
        available, for one that is not in the bundle."""
        key = key or self.schedules[0]
        if key not in self.manifest.schedules:
            decoder = self.config.image_decoder
            name = parse_schedule_name(key, decoder.diffusion.steps)
            check_schedule(name, decoder.diffusion, decoder.distillation)
            key = name.key
        if key not in self.manifest.schedules:
            raise BundleError(
                f"{self.folder} has no schedule {key!r}",
                expected=" or ".join(self.schedules),
                fix=f"choose one of them, or add it with `{EXPORT} --schedule {key}`",
            )
        return read_schedule(self.folder / self.manifest.schedules[key])

    def graph_file(self, graph: str) -> Path:
        """Path of the portable file of `graph`."""
        return self.folder / self.manifest.graphs[graph]

    @property
    def remarks(self) -> list[str]:
        """Warnings for the user: placeholder weights, graphs proved on a smaller model only, and
        graphs that our kernels do not support."""
        found = []
        if self.manifest.weights != "given":
            found.append(
                f"{self.folder} holds {self.manifest.weights} weights: it shows the model's time "
                "and memory, and its output means nothing"
            )
        sliced = [
            graph
            for graph in self.manifest.graphs
            if (receipt := self.manifest.receipt(graph)) and receipt.scope == "slice"
        ]
        if sliced:
            found.append(
                f"proved by a slice, the same code on a smaller model: {', '.join(sliced)}"
            )
        found += [
            f"{graph}: MMFS has {reason}: on the CPU the operator's ONNX function runs instead of "
            "the kernel, which is slower"
            for graph, reason in self.beyond_kernels.items()
        ]
        return found

    @cached_property
    def beyond_kernels(self) -> dict[str, str]:
        """Graphs whose MMFS is outside the kernels' limits -> the reason. Their operator always
        runs as its ONNX function."""
        return beyond_kernels(self.config)

    def cache_hashes(self) -> None:
        """Cache the hashes of all files as they are now, unchecked, so that the next `open` skips
        them: call it where only hard links to the files were removed since they were hashed, which
        changes their times."""
        cache_hashes(self.folder, self.manifest.files)

    def check_runnable(self) -> None:
        """Raise `BundleError` for placeholder weights, unless `unproved`."""
        if self.manifest.weights != "given" and not self.unproved:
            raise BundleError(
                f"{self.folder} holds {self.manifest.weights} weights, which mean nothing",
                fix="export the model itself, or run the bundle anyway with --unproved",
            )

    @property
    def identity(self) -> str:
        """SHA-256 of bundle.json, which holds the hashes of all exported files."""
        return sha256_of(self.folder / MANIFEST)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets that were built, sorted."""
        return tuple(
            sorted(path.parent.name for path in self.folder.glob(f"engines/*/{TARGET_MANIFEST}"))
        )

    def target_folder(self, target: str) -> Path:
        return self.folder / "engines" / target

    def build_command(self, target: str) -> str:
        """Command line that builds `target`."""
        return f"{BUILD} {self.folder} {build_options(target)}"

    def verify_command(self, target: str) -> str:
        """Command line that writes the receipts of `target`."""
        return f"{VERIFY} {self.folder} --target {target}"

    def target(
        self,
        target: str,
        *,
        unproved: bool = False,
        rehash: bool = False,
        hash_file: Callable[[Path], str] = sha256_of,
    ) -> TargetManifest:
        """Read and check the manifest of `target`; raises `BundleError` if the target is missing,
        changed, stale, or (unless `unproved`) without receipts. `rehash`, `hash_file`: see
        `check_files`."""
        folder, fix = self.target_folder(target), self.build_command(target)
        manifest = read_manifest(folder / TARGET_MANIFEST, TargetManifest, fix)
        if manifest.target != target:
            raise BundleError(
                f"{folder} is a copy of another target",
                expected=f"a manifest of {target}",
                got=f"{manifest.target:.100}",
                fix=f"remove it, and build this one with `{fix}`",
            )
        if manifest.made_for != self.identity:
            raise BundleError(
                f"the engines in {folder} were built from another export of this bundle",
                fix=f"build them again with `{fix}`",
            )
        check_files(folder, manifest.files, fix, rehash=rehash, hash_file=hash_file)
        if not (unproved or self.unproved):
            check_receipts(manifest, manifest.graphs, folder, self.verify_command(target))
        return manifest


def _check_parts(folder: Path, manifest: BundleManifest) -> None:
    """Raise `BundleError` unless every graph, schedule and tokenizer of the manifest has a hash."""
    missing = [make.__name__ for make in GRAPHS if make.__name__ not in manifest.graphs]
    if missing or not manifest.schedules:
        raise BundleError(
            f"{folder} is not complete: it has no {', '.join(missing) or 'schedule'}",
            fix=f"write it again with `{EXPORT}`",
        )
    named = (*manifest.graphs.values(), *manifest.schedules.values(), manifest.tokenizer)
    for name in named:
        if name not in manifest.files:
            raise BundleError(
                f"{folder / MANIFEST} has no hash of {name}", fix=f"write it again with `{EXPORT}`"
            )


@dataclass
class _FolderWriter:
    """Collects the entries of a manifest while the caller writes files under `folder`."""

    folder: Path
    target: str
    hashes: Hashes = field(default_factory=Hashes)
    _graphs: dict[str, str] = field(default_factory=dict)
    _shared: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _receipts: list[Receipt] = field(default_factory=list)

    def share(self, graph: str, names: Iterable[str]) -> None:
        """Record the weight files that `graph` shares with other graphs, as paths in the folder."""
        self._shared[graph] = tuple(sorted(names))

    def add_receipt(
        self,
        graph: str,
        compared_with: str,
        cases: Iterable[Case],
        scope: Literal["full", "slice"] = "full",
    ) -> Receipt:
        """Add a receipt for the file of `graph` and its weights (files with its stem, and shared
        ones) as they are now. They must not change afterwards, or the receipt becomes invalid."""
        files = file_entries(
            self.folder, self._graphs[graph], self._shared.get(graph, ()), self.hashes
        )
        receipt = Receipt(
            graph=graph,
            target=self.target,
            sha256=hash_of_files(files),
            compared_with=compared_with,
            cases=tuple(cases),
            scope=scope,
        )
        self._receipts.append(receipt)
        return receipt


class BundleWriter(_FolderWriter):
    """Writer of a new bundle. Use `write_bundle`, which puts it in place once it is complete."""

    def __init__(self, folder: Path, config: ModelConfig, limits: Limits) -> None:
        super().__init__(folder, PORTABLE)
        self.config = config
        self.limits = limits
        self.weights: Literal["given", "empty", "random"] = "given"
        self.tokenizer = folder / "tokenizer.json"
        self.preview: PreviewMap | None = None
        self._schedules: dict[str, str] = {}
        (folder / "graphs").mkdir()
        (folder / "schedules").mkdir()

    def graph_file(self, graph: str) -> Path:
        """Path to write the portable file of `graph` to; its weights go into the same folder."""
        self._graphs[graph] = f"graphs/{graph}.onnx"
        return self.folder / self._graphs[graph]

    def add_schedule(self, schedule: Schedule) -> None:
        """Add a schedule with its time table; the first one added is the default."""
        if schedule.time_table is None:
            raise BundleError(f"schedule {schedule.key} has no time table")
        name = f"schedules/{schedule.name}-{schedule.steps}.safetensors"
        schedule.save(self.folder / name)
        self._schedules[schedule.key] = name

    def bundle(self) -> Bundle:
        """The bundle as written so far, to run its graphs before it is finished."""
        return Bundle(self.folder, self._manifest(), unproved=True)

    def finish(self) -> None:
        """Hash all files and write bundle.json."""
        manifest = self._manifest()
        _check_parts(self.folder, manifest)
        write_manifest(self.folder / MANIFEST, manifest)
        cache_hashes(self.folder, manifest.files)

    def _manifest(self) -> BundleManifest:
        return BundleManifest(
            format=FORMAT,
            graphs=self._graphs,
            shared=self._shared,
            files=file_entries(self.folder, hash_file=self.hashes),
            weights=self.weights,
            receipts=tuple(self._receipts),
            versions=tool_versions(),
            config=self.config,
            limits=self.limits,
            tokenizer=self.tokenizer.relative_to(self.folder).as_posix(),
            schedules=self._schedules,
            preview=self.preview,
        )


class TargetWriter(_FolderWriter):
    """Writer of the folder of one target. Use `write_target`."""

    def engine_file(self, graph: str, suffix: str) -> Path:
        """Path to write the engine of `graph` to; its other files go into the same folder."""
        self._graphs[graph] = f"{graph}{suffix}"
        return self.folder / self._graphs[graph]

    def finish(self, made_for: str, recipe: Mapping[str, str], activations: str) -> None:
        """Hash all files and write target.json."""
        manifest = TargetManifest(
            format=FORMAT,
            graphs=self._graphs,
            shared=self._shared,
            files=file_entries(self.folder, hash_file=self.hashes),
            receipts=tuple(self._receipts),
            versions=tool_versions(),
            target=self.target,
            made_for=made_for,
            recipe=dict(recipe),
            activations=activations,
        )
        write_manifest(self.folder / TARGET_MANIFEST, manifest)


@contextmanager
def write_bundle(
    folder: Path,
    config: ModelConfig,
    limits: Limits,
    *,
    force: bool = False,
    inputs: Sequence[Path] = (),
) -> Iterator[BundleWriter]:
    """Write a bundle into a temporary folder that replaces `folder` at the end.

    An error, or Ctrl-C, leaves `folder` as it was. `inputs`: paths that are read meanwhile and must
    not be replaced.
    """
    hashes = Hashes()
    with new_folder(folder, force, kind="bundle", inputs=inputs, hashed=hashes) as work:
        writer = BundleWriter(work, config, limits)
        writer.hashes = hashes
        yield writer
        writer.finish()


def check_target(bundle: Bundle, target: str) -> None:
    """Raise `MmiError` where `write_target` would refuse the folder: called before long work."""
    check_replaceable(bundle.target_folder(target), None, kind=_TARGET)


@contextmanager
def write_target(
    bundle: Bundle, target: str, recipe: Mapping[str, str], activations: str = "float32"
) -> Iterator[TargetWriter]:
    """Write `engines/<target>` of a bundle atomically: complete, or not at all."""
    folder, hashes = bundle.target_folder(target), Hashes()
    with new_folder(folder, None, kind=_TARGET, hashed=hashes) as work:
        writer = TargetWriter(work, target, hashes)
        yield writer
        writer.finish(bundle.identity, recipe, activations)


def tool_versions() -> dict[str, str]:
    """Versions of the installed packages that a bundle's content depends on."""
    found = {}
    for tool in _TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found
