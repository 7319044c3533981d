"""ONNX Runtime as a backend: engines on the CPU."""
