"""Modules that are traced to ONNX: one wrapper per graph of the contract."""
