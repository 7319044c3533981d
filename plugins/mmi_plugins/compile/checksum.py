"""Append and verify a SHA-256 checksum at the end of compiled libraries.

Opening a truncated shared library can crash the process. So every library that is compiled here
ends with a mark and the checksum of all bytes before it, behind the last section, where no loader
reads: the library stays one file. CMake runs `python -I checksum.py LIBRARY` on what it links.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from pathlib import Path

# Part of the file format: libraries of earlier versions end with the same mark.
_MARK = b"mmi seal"
_LENGTH = len(_MARK) + hashlib.sha256().digest_size


def append_checksum(path: Path) -> None:
    """Append mark and checksum to a library that has none."""
    with path.open("rb+") as file:
        digest = hashlib.sha256(file.read())
        file.write(_MARK + digest.digest())


def checksum_error(path: Path) -> str | None:
    """Reason why a library file is damaged, or None. Without a checksum, only an empty file and
    an ELF file that is cut short are recognised."""
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
        # Linkers put the section table last, so it must fit: e_shoff, e_shentsize and e_shnum.
        (start,) = struct.unpack_from("<Q", content, 40)
        size, count = struct.unpack_from("<HH", content, 58)
        missing = start + size * count - len(content)
        if missing > 0:
            return f"{missing} bytes are missing at its end"
    return None


def has_valid_checksum(path: Path) -> bool:
    """Test that the file exists, ends with a checksum, and matches it."""
    if not path.is_file() or path.stat().st_size < _LENGTH:
        return False
    with path.open("rb") as file:
        file.seek(-_LENGTH, 2)
        if file.read(len(_MARK)) != _MARK:
            return False
    return checksum_error(path) is None


if __name__ == "__main__":
    append_checksum(Path(sys.argv[1]))
