"""Timing cache: kernel times that TensorRT measured in earlier builds, so that a build of a similar
graph does not measure them again.

One file per GPU name, runtime and version of TensorRT, in `timing` beside the engine cache. It is
an aid: a file that is missing, damaged or of another GPU changes nothing but the time of a build.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmi_deploy.system.files import cache_folder, write_file


def timing_file(runtime: str, version: str, gpu: str) -> Path:
    """File of the measured times on a GPU called `gpu`."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{runtime}-{version}-{gpu}").strip("-")
    return cache_folder() / "timing" / f"{name}.cache"


def load_timings(config: Any, file: Path) -> None:
    """Give the builder configuration `config` the times in `file`, or an empty cache."""
    known = b""
    with suppress(OSError):
        known = file.read_bytes()
    # TensorRT checks version and GPU itself; a file that it refuses is replaced by `save_timings`.
    for data in (known, b"") if known else (b"",):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def save_timings(config: Any, file: Path) -> None:
    """Write the times that a build used or measured, together with those that another process has
    written to `file` meanwhile."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            other = config.create_timing_cache(file.read_bytes())
            if other is not None:
                cache.combine(other, False)
        write_file(file, bytes(cache.serialize()))
