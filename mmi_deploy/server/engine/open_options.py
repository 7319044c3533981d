"""Options with which an engine process opens its engine, and the digest of what it opens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from mmi_deploy.spec.backends import AUTO, CPU


@dataclass(frozen=True)
class OpenOptions:
    """Parameters of `BatchEngine.open`, and `digest`: the bundle must have it; empty for any."""

    bundle: str
    target: str = CPU
    kernels: str = AUTO
    threads: int = 0
    device: int = 0
    slots: int | None = None
    image_memory: int | None = None
    resident: tuple[str, ...] | None = None
    unproved: bool = False
    policy: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""


def bundle_digest(folder: Path, target: str) -> str:
    """SHA-256 of the manifests of a bundle and of its target, which list the hash of every file.

    Raises `OSError` if the bundle is gone.
    """
    digest = sha256((folder / "bundle.json").read_bytes())
    manifest = folder / "engines" / target / "target.json"
    if manifest.is_file():
        digest.update(manifest.read_bytes())
    return digest.hexdigest()
