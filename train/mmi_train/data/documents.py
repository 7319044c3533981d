"""Training documents by their numbers, as stages of training read them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from mmi_train.data.document import Part


@runtime_checkable  # settings that hold documents are checked when they are made
class Documents(Protocol):
    """Documents of a file or of a data set. `sha256`: checksum of what they are read from."""

    sha256: str

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Place of a document, for messages."""
        ...

    def parts(self, index: int, epoch: int = 0) -> tuple[Part, ...]:
        """Parts of a document as `epoch` draws them, its pictures decoded; raises
        `DocumentError`."""
        ...
