"""Library files that tell whether they are whole.

To open a shared library of which a part is missing can end the process. So what we compile and keep
is sealed: after the library, where no loader looks, follows a hash of all before it. It is one file
still, and appears whole or not at all. CMake seals what it links with `python -I seal.py LIBRARY`.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from pathlib import Path

_MARK = b"mmi seal"
_LENGTH = len(_MARK) + hashlib.sha256().digest_size


def seal(path: Path) -> None:
    """Add the seal to a library that has none."""
    with path.open("rb+") as file:
        digest = hashlib.sha256(file.read())
        file.write(_MARK + digest.digest())


def damage(path: Path) -> str | None:
    """What is wrong with a library file, sealed or not, or None where nothing is seen."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if content[-_LENGTH:].startswith(_MARK):
        digest = hashlib.sha256(content[:-_LENGTH]).digest()
        return None if content.endswith(digest) else "its content is not what was compiled"
    if not content:
        return "it is empty"
    if content[:6] == b"\x7fELF\x02\x01" and len(content) >= 64:
        # The table of sections, which linkers put last: e_shoff, e_shentsize and e_shnum.
        (start,) = struct.unpack_from("<Q", content, 40)
        size, count = struct.unpack_from("<HH", content, 58)
        missing = start + size * count - len(content)
        if missing > 0:
            return f"{missing} bytes are missing at its end"
    return None


def is_sealed(path: Path) -> bool:
    """Whether a file is there, sealed, and whole."""
    if not path.is_file() or path.stat().st_size < _LENGTH:
        return False
    with path.open("rb") as file:
        file.seek(-_LENGTH, 2)
        if file.read(len(_MARK)) != _MARK:
            return False
    return damage(path) is None


if __name__ == "__main__":
    seal(Path(sys.argv[1]))
