"""Runs of the shim under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mmi_emulator import shim

# Argument of a script that stays inside its arrays; others go beyond.
INSIDE = "inside"


def check_sanitized(text: str, what: str, folder: Path) -> None:
    """Run a script with the argument `what`; it must be clean if that is `INSIDE`, and else be
    stopped by a sanitizer, which shows that they see it."""
    script = folder / "sanitized.py"
    script.write_text(text)
    environment = {
        **os.environ,
        "LD_PRELOAD": shim.sanitizer_library(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(script), what]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if what == INSIDE:
        assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-3000:]
    else:
        assert done.returncode != 0 and "AddressSanitizer" in done.stderr, done.stderr[-3000:]
