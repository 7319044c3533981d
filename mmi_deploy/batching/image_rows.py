"""Pool of what the service keeps of encoded images: one row each, found again by a checksum.

Letters: n encoded images.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from hashlib import sha256

from mmi_deploy.documents.images import Rgb
from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.buffers import Buffer, Memory
from mmi_deploy.spec.graphs import Tensor

Key = bytes


def image_key(rgb: Rgb, salt: str) -> Key:
    """SHA-256 of a picture's pixels at the model's size, of its shape, and of `salt`, which keeps
    the images of one tenant from those of another."""
    digest = sha256(f"{rgb.shape}{salt!r}".encode())
    digest.update(rgb.tobytes())
    return digest.digest()


class ImageRows:
    """Rows of some tensors, one an image, shared by all documents.

    A row that is in use is never evicted; the others make room in the order of their last use. Row
    0 stays zero: documents without images look at it, hidden.
    """

    def __init__(self, tensors: Iterable[Tensor], memory: Memory, rows: int) -> None:
        """rows: images to keep, at least one."""
        self.rows = rows
        self.buffers: dict[str, Buffer] = {
            tensor.name: memory.allocate(tensor.resolve(n=rows + 1), tensor.dtype)
            for tensor in tensors
        }
        self.hits = 0
        self.evictions = 0
        self._row: dict[Key, int] = {}
        self._users: dict[Key, int] = {}  # of the rows in use
        self._new: set[Key] = set()  # images that nobody has found yet
        self._unused: OrderedDict[Key, None] = OrderedDict()  # least recently used first
        self._free = list(range(rows, 0, -1))

    @property
    def in_use(self) -> int:
        """Number of rows that documents hold."""
        return len(self._users)

    @property
    def kept(self) -> int:
        """Number of images in the pool."""
        return len(self._row)

    def __contains__(self, key: Key) -> bool:
        return key in self._row

    def find(self, key: Key) -> int | None:
        """Hold the row of an image that is in the pool; None if it is not. Call `release` for every
        row held."""
        if key not in self._row:
            return None
        self.hits += key not in self._new  # the document that had it encoded comes first
        self._new.discard(key)
        self._hold(key)
        return self._row[key]

    def add(self, key: Key) -> int:
        """Hold a row for an image that is not in the pool, to write to. Raises `EngineError` if all
        rows are in use."""
        if key in self._row:
            raise ValueError("the image is in the pool")
        if not self._free:
            if not self._unused:
                raise EngineError(
                    "all rows for images are in use",
                    expected=f"at most {self.rows} images at once",
                    fix="serve fewer documents at once, or give the pool more rows",
                )
            oldest, _ = self._unused.popitem(last=False)
            self._drop(oldest)
            self.evictions += 1
        self._row[key] = self._free.pop()
        self._new.add(key)
        self._hold(key)
        return self._row[key]

    def release(self, key: Key) -> None:
        """Let go of the row of an image once."""
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self._unused[key] = None

    def forget(self, keys: Iterable[Key]) -> None:
        """Drop those of `keys` that are in the pool and not in use."""
        for key in keys:
            if self._unused.pop(key, False) is None:
                self._drop(key)

    def _drop(self, key: Key) -> None:
        self._free.append(self._row.pop(key))
        self._new.discard(key)

    def _hold(self, key: Key) -> None:
        self._users[key] = self._users.get(key, 0) + 1
        self._unused.pop(key, None)


class HeldRows:
    """Rows of one pool that one document holds."""

    def __init__(self, pool: ImageRows) -> None:
        self._pool = pool
        self._rows: dict[Key, int] = {}

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Those of `keys` that are not in the pool, each once. The others become held."""
        missing: dict[Key, None] = {}
        for key in keys:
            if key in self._rows:
                continue
            row = self._pool.find(key)
            if row is None:
                missing[key] = None
            else:
                self._rows[key] = row
        return list(missing)

    def row(self, key: Key) -> int:
        """Row of an image that is held."""
        return self._rows[key]

    def release(self) -> None:
        """Let go of all rows."""
        for key in self._rows:
            self._pool.release(key)
        self._rows = {}
