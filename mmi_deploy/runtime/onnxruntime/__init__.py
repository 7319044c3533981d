"""ONNX Runtime backend: engines on the CPU."""
