"""Import of ONNX Runtime with its telemetry disabled; no other module imports it.

From release 1.32 on, importing `onnxruntime` writes a device identifier and an event queue below
the user's cache folder and looks up a server, unless an environment variable is set before.
"""

from __future__ import annotations

import os

TELEMETRY_OFF = "ORT_DISABLE_TELEMETRY"

# Before the import below. A user who wants telemetry sets the variable to 0.
os.environ[TELEMETRY_OFF] = os.environ.get(TELEMETRY_OFF) or "1"

import onnxruntime as ort  # noqa: E402

__all__ = ["TELEMETRY_OFF", "ort"]
