"""TensorRT and TensorRT-RTX as backends: engines on an NVIDIA GPU."""
