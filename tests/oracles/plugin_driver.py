"""A compiled program that calls the plugin library as TensorRT would."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from mmi_plugins.compile.compilers import find_nvcc
from mmi_plugins.tensorrt.build_plugin import find_tensorrt_headers

# What it returns, and what it reports, for its arguments.
Drive = Callable[..., tuple[str, str]]


def compiled_driver(source: str, library: Path, folder: Path) -> Drive:
    """Compile `source` of this folder and return a function that runs it on the library."""
    include, _ = find_tensorrt_headers()
    driver = folder / "driver"
    flags = ["-std=c++17", "-w", f"-I{include}", "-ldl"]
    file = Path(__file__).with_name(source)
    subprocess.run([find_nvcc(), file, "-o", driver, *flags], check=True)

    def call(*arguments: object) -> tuple[str, str]:
        done = subprocess.run(
            [driver, library, *map(str, arguments)], capture_output=True, text=True, check=True
        )
        return done.stdout.strip(), done.stderr.strip()

    return call
