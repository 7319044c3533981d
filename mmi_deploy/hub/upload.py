"""Files of a folder that are uploaded: those that its manifest or marker lists, unchanged.

Whatever else lies in the folder stays there, except a README.md, which is the model card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mmi_deploy.bundle.bundle import EXPORT, MANIFEST, TARGET_MANIFEST, Bundle
from mmi_deploy.bundle.manifest import FileEntry, Hashes
from mmi_deploy.errors import BundleError, MmiError, WeightsError
from mmi_deploy.hub.card import CARD, bundle_card, model_card
from mmi_deploy.hub.kinds import BUNDLE, MODEL, Kind
from mmi_deploy.hub.reference import Reference
from mmi_deploy.spec.config import read_config
from mmi_deploy.system.output_folder import CHECKED, MARKER, UNFINISHED, written_files
from mmi_deploy.system.progress import Progress, silent
from mmi_deploy.system.safetensors_reader import read_header

# Kind of a model folder in its marker, and its files.
_MODEL = "model"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"

_MADE_BY = "`mmi train`, `mmi convert` or `mmi init`"


@dataclass(frozen=True)
class Upload:
    """The files of a folder that are uploaded, and the card.

    files: path -> size and SHA-256, the card aside. card: contents of README.md. own_card: the card
    is the folder's README.md; else it was written from the manifest. left: files of the folder that
    are not uploaded.
    """

    folder: Path
    kind: Kind
    name: str
    files: Mapping[str, FileEntry]
    card: bytes
    own_card: bool
    left: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all files, with the card."""
        return sum(entry.size for entry in self.files.values()) + len(self.card)


def upload_of(
    folder: Path, reference: Reference, *, license: str | None = None, progress: Progress = silent
) -> Upload:
    """Check every file of a bundle or model folder by its hash, and write its card.

    license: identifier for a card that is written. Raises `MmiError`: a folder that mmi did not
    write, of another kind, incomplete or changed.
    """
    if not folder.is_dir():
        raise MmiError(f"there is no folder {folder}", expected="a bundle or a model folder")
    if (folder / MANIFEST).is_file():
        bundle = _bundle(folder, Hashes(progress))
        kind, name, files = BUNDLE, bundle.config.name, _files_of(bundle)
        card = bundle_card(bundle, files, reference, license)
    else:
        files = _model(folder, Hashes(progress))
        config = read_config(folder / _CONFIG)
        kind, name = MODEL, config.name
        card = model_card(config, read_header(folder / _WEIGHTS), files, reference, license)
    own = folder / CARD
    files = {path: entry for path, entry in files.items() if path != CARD}
    return Upload(
        folder,
        kind,
        name,
        files,
        _own_card(own) if own.is_file() else card.encode(),
        own.is_file(),
        tuple(_left(folder, files)),
    )


def _bundle(folder: Path, hashes: Hashes) -> Bundle:
    """Open a bundle as `mmi verify` does: every file hashed, every graph with a receipt."""
    bundle = Bundle.open(folder, hash_file=hashes)
    bundle.verify(hashes)
    if bundle.manifest.weights != "given":
        raise BundleError(
            f"{folder} holds {bundle.manifest.weights} weights, which mean nothing",
            fix=f"push what `{EXPORT}` made of a model",
        )
    return bundle


def _files_of(bundle: Bundle) -> dict[str, FileEntry]:
    """Files of a bundle and of its targets, with their manifests."""
    hashes = Hashes()

    def entry(name: str) -> FileEntry:
        path = bundle.folder / name
        return FileEntry(sha256=hashes(path), size=path.stat().st_size)

    files = {MANIFEST: entry(MANIFEST), **bundle.manifest.files}
    for target in bundle.targets:
        prefix = bundle.target_folder(target).relative_to(bundle.folder).as_posix()
        files[f"{prefix}/{TARGET_MANIFEST}"] = entry(f"{prefix}/{TARGET_MANIFEST}")
        listed = bundle.target(target, unproved=True).files
        files |= {f"{prefix}/{name}": one for name, one in listed.items()}
    return files


def _model(folder: Path, hashes: Hashes) -> dict[str, FileEntry]:
    """Files of a model folder, each as its marker has it."""
    found = written_files(folder)
    if found is None:
        raise MmiError(
            f"{folder} is neither a bundle nor a model folder of mmi: it holds no {MANIFEST}, and "
            f"no {MARKER} that lists its files",
            expected=f"what `{EXPORT}`, {_MADE_BY} wrote",
        )
    kind, listed = found
    if kind != _MODEL:
        raise MmiError(f"{folder} holds a {kind}", expected="a bundle or a model folder")
    for name in (_CONFIG, _WEIGHTS):
        if name not in listed:
            raise WeightsError(f"{folder} is not complete: mmi wrote no {name} into it")
    for name, (size, sha256) in listed.items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise WeightsError(f"{folder / MARKER} lists {name}, which leaves the folder")
        if not path.is_file():
            raise WeightsError(
                f"{folder} is not complete: {name} is missing",
                fix=f"write it again with {_MADE_BY}",
            )
        if path.stat().st_size != size or hashes(path) != sha256:
            raise WeightsError(
                f"{path} has changed since mmi wrote it", fix=f"write it again with {_MADE_BY}"
            )
    return {name: FileEntry(sha256=sha256, size=size) for name, (size, sha256) in listed.items()}


def _own_card(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        data.decode()
    except UnicodeDecodeError:
        raise MmiError(f"{path} is not text in UTF-8", fix="save it as UTF-8") from None
    return data


def _left(folder: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """Files of the folder that are not uploaded, those that mmi keeps for itself aside."""
    own = {CARD, *files}
    paths = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return sorted(
        name
        for path in paths
        if path.name not in (MARKER, CHECKED, UNFINISHED)
        and (name := path.relative_to(folder).as_posix()) not in own
    )
