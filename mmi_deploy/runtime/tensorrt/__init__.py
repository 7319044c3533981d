"""TensorRT and TensorRT-RTX backend: engines on an NVIDIA GPU."""
