"""Training on a data set by its name, as on a file of documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmi_deploy.errors import ConfigError, DocumentError
from mmi_train.data.document import Part
from mmi_train.data.document_file import DocumentFile
from mmi_train.data.documents import Documents
from mmi_train.data.readers.data_set import DataSet, Settings, document_of
from mmi_train.data.readers.registry import open_set


class SetDocuments:
    """Training documents of a data set by their numbers. `sha256`: of its annotation files."""

    def __init__(self, data: DataSet[Any]) -> None:
        if not len(data):
            raise DocumentError(f"{data.folder.path} holds no sample of {data.folder.name}")
        self.data = data
        self.sha256 = data.fingerprint()

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        """Place of a document, for messages."""
        data = self.data
        return f"sample {index} of {data.folder.name}, split {data.split}, in {data.folder.path}"

    def parts(self, index: int, epoch: int = 0) -> tuple[Part, ...]:
        """Parts of a document as `epoch` draws them, its pictures decoded. Raises `DocumentError`,
        and `Skipped` for a sample that the set's rules leave out."""
        return document_of(self.data.sample(index, epoch))


def documents_at(data: Path, images: Path | None = None) -> Documents:
    """Documents of a file, or of the data set that `NAME:DIR` names, with the paper's
    augmentation; raises `MmiError`."""
    name, colon, folder = str(data).partition(":")
    if not colon or data.exists():
        return DocumentFile(data, images)
    if images is not None:
        raise ConfigError(
            "a data set knows where its pictures are",
            fix="leave --images out, or give a file of documents",
        )
    return SetDocuments(open_set(name, Path(folder), Settings(mirror=True)))
