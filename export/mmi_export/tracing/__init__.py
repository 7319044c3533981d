"""Tracing of PyTorch modules to ONNX files, with weights that need not be in memory."""
