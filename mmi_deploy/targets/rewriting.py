"""Change of the manifest of a target that is built: one process at a time, atomically."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable

from mmi_deploy.bundle.bundle import TARGET_MANIFEST, Bundle
from mmi_deploy.bundle.manifest import TargetManifest, manifest_text
from mmi_deploy.system.output_folder import rewrite_file


def rewrite_target(
    bundle: Bundle, target: str, change: Callable[[TargetManifest], TargetManifest]
) -> TargetManifest:
    """Replace the manifest of `target` by what `change` makes of the present one, and return it.

    Other processes that call this wait, so that none loses what another one wrote. Raises what
    `Bundle.target` does, and what `change` raises, before anything is written.
    """
    folder = bundle.target_folder(target)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        changed = change(bundle.target(target, unproved=True))
        rewrite_file(folder, TARGET_MANIFEST, manifest_text(changed))
    finally:
        os.close(descriptor)  # unlocks
    return changed
