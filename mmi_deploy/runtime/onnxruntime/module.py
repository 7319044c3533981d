"""ONNX Runtime, imported by this module alone, with its telemetry off.

From release 1.32 on, importing `onnxruntime` writes a device identifier and a queue of events below
the user's cache folder and looks up a server, unless this variable is set before.
"""

from __future__ import annotations

import os

TELEMETRY_OFF = "ORT_DISABLE_TELEMETRY"

# Who wants telemetry has set it to 0.
os.environ[TELEMETRY_OFF] = os.environ.get(TELEMETRY_OFF) or "1"

import onnxruntime as ort  # noqa: E402

__all__ = ["TELEMETRY_OFF", "ort"]
