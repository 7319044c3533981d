"""Affinity: documents with the same beginning go to the engine that has it in its caches."""

from __future__ import annotations

from hashlib import sha256

from mmi_deploy.documents.document import Document, Draw, Text


def hash_of_beginning(document: Document, tenant: str) -> int:
    """Hash of the first part, by which turns of a conversation find the same engine."""
    first = document.parts[0]
    if isinstance(first, Text):
        content = first.text[:256].encode()
    else:
        content = b"" if isinstance(first, Draw) else first.rgb.tobytes()
    return int.from_bytes(sha256(tenant.encode() + b"\0" + content).digest()[:8])


def weight(affinity: object, engine: str) -> bytes:
    """Place of an engine for documents of an affinity; the one with the smallest has them
    (rendezvous hashing: when an engine comes or goes, no others move)."""
    return sha256(f"{affinity} {engine}".encode()).digest()
