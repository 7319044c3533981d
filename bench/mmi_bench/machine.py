"""Provenance of a measurement: machine and software versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Packages that matter for speed.
_PACKAGES = (
    "mmi_deploy",
    "numpy",
    "onnxruntime",
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
)


def describe() -> dict[str, Any]:
    """Describe processor, cores, memory, load, system and software versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def processor() -> str:
    """Name of the processor from /proc/cpuinfo, or else from Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Versions of the installed packages that matter for speed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
