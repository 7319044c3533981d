"""Tracing of PyTorch modules to ONNX files, without their weights in memory."""
